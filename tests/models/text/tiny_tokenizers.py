"""Builders of tiny tokenizers in the shapes of published ones."""

import json

import tokenizers

from models.text.gguf_tokenizer import read_gguf_tokenizer


def byte_fields(pre="gpt-2", merges=("a b", "ab c"), **more):
    """GGUF metadata of a vocabulary of all bytes, some merges and three special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(m.replace(" ", "") for m in merges)]
    types = [1] * len(tokens) + [3, 3, 4]
    tokens += ["<s>", "<|im_end|>", "<think>"]
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types}
    keys |= {"merges": list(merges), "bos_token_id": len(tokens) - 3}
    keys |= {"eos_token_id": len(tokens) - 2, "eot_token_id": len(tokens) - 2} | more
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not None}


def byte_tokenizer(pre="gpt-2", merges=("a b", "ab c"), **more):
    """The tokenizer of `byte_fields`."""
    return read_gguf_tokenizer(byte_fields(pre, merges, **more))


def pieces(tokenizer, text):
    """The text of each token of `text`."""
    return [tokenizer.decode([i], skip_special=False) for i in tokenizer.encode(text)]


def llama2_like_backend():
    """SentencePiece's shape: metaspace, byte fallback, a leading space that decoding strips."""
    words = ["<unk>", "<s>", "▁", "▁a", "▁b", "c", "é"]
    vocab = {w: i for i, w in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    bpe = tokenizers.models.BPE(
        vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, ignore_merges=True
    )
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>"])
    return backend


WORDS = "Über den blauen Bergen, 12345 weiße Wale! naïve café 東京は夜 🙂🐳 I'm here\n\n  x  "


def gemma_like_backend():
    """Gemma's shape: spaces are the text's own, byte fallback, line breaks added, a BOS first."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    words = ["a", "b", "é", "▁", "東", "▁▁", "ab", "▁ab"]
    tokens = [*specials, "\n\n", *(f"<0x{b:02X}>" for b in range(256)), *words]
    bpe = tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("▁", "▁"), ("a", "b"), ("▁", "ab")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(specials)
    backend.add_tokens([tokenizers.AddedToken("\n\n", normalized=False)])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return backend


def gpt_oss_like_backend():
    """gpt-oss's shape: byte level after a split by case, digits in threes, harmony's tokens."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    contraction = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    words = [f"{upper}*{lower}+{contraction}", f"{upper}+{lower}*{contraction}"]
    cuts = [rf"[^\r\n\p{{L}}\p{{N}}]?{word}" for word in words]
    cuts += [r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]
    cut = tokenizers.pre_tokenizers
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = cut.Sequence(
        [
            cut.Split(tokenizers.Regex("|".join(cuts)), "isolated"),
            cut.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=sorted(cut.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([WORDS, "assistant analysis final commentary"] * 3, trainer)
    marks = ("startoftext", "endoftext", "return", "constrain", "channel", "start", "end")
    backend.add_special_tokens([f"<|{mark}|>" for mark in (*marks, "message", "call")])
    return backend


def metaspace_backend():
    """A space is put before the text and taken away again: decoding strips the first one."""
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "▁", "▁a", "a", "b", "é", "\ufffd"])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("▁", "a")], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    return backend


def hf_folder(path, backend, **files):
    """Writes a Hugging Face folder: tokenizer.json, and `{name}.json` for each of `files`."""
    backend.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path
