"""Families of hostile files: each writes a damaged file by a seed, and reads it as users would."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from models.checkpoints.open import open_checkpoint
from models.checkpoints.tensor_names import check_names, find_naming, recipe_table
from models.errors import LONGEST_LINE, CheckpointError
from models.families.architectures import architecture_config
from models.json_files import parse_json_object
from models.text.chat_template import render_chat
from models.text.hf_tokenizer import read_hf_tokenizer
from tests.models.hostile import mutations
from tests.models.text import tiny_tokenizers

DATA, ORACLES = (
    Path(__file__).parents[2] / "data" / "configs",
    Path(__file__).parents[2] / "oracles",
)
CONFIGS = [
    json.loads(p.read_text())
    for p in sorted((*DATA.glob("*.json"), *ORACLES.glob("*/config.json")))
]
TEXT = "ab c é 12345  \n\n x <s>aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 5


def config(folder: Path, rng: random.Random) -> None:
    """A damaged config.json of any architecture."""
    data = mutations.damaged_json(rng.choice(CONFIGS), rng)
    architecture_config(parse_json_object(data, "config.json"))


def gguf(folder: Path, rng: random.Random) -> None:
    """A damaged GGUF file: config, table of tensors, values, tokenizer."""
    path = folder / "m.gguf"
    fields, tensors = gguf_parts(
        rng.choice(("llama", "llama", "qwen2", "qwen3", "gemma2", "gemma3"))
    )
    if rng.random() < 0.3:  # a SentencePiece tokenizer
        fields["tokenizer.ggml.model"] = (8, "llama")
        fields["tokenizer.ggml.unknown_token_id"] = (4, 0)
        scores = [-float(i) for i in range(len(fields["tokenizer.ggml.tokens"][1][1]))]
        fields["tokenizer.ggml.scores"] = (9, (6, scores))
    path.write_bytes(mutations.damaged_gguf(fields, tensors, rng))
    checkpoint = open_checkpoint(path)
    found = architecture_config(checkpoint.config)
    naming = find_naming(checkpoint, found)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    check_names(checkpoint, recipe_table(found, naming), found.layers)
    checkpoint.load_tokenizer().encode(TEXT)


def gguf_parts(arch: str = "llama") -> tuple[dict, dict]:
    """Metadata and tensors of a small model, as `mutations.gguf_bytes` takes them."""
    numbers = {
        "context_length": 128,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 32,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "rope.dimension_count": 8,
    }
    fields = {"general.architecture": (8, arch), "general.alignment": (4, 32)}
    fields |= {f"{arch}.{key}": (4, number) for key, number in numbers.items()}
    fields |= {f"{arch}.attention.layer_norm_rms_epsilon": (6, 1e-5)}
    fields |= {f"{arch}.rope.freq_base": (6, 1e4), f"{arch}.rope.scaling.factor": (6, 2.0)}
    kinds = {"model": 8, "pre": 8, "tokens": (9, 8), "merges": (9, 8), "token_type": (9, 5)}
    for key, value in tiny_tokenizers.byte_fields().items():
        kind = kinds.get(key.rpartition(".")[2], 4)
        fields[key] = (9, (kind[1], value)) if isinstance(kind, tuple) else (kind, value)
    fields["tokenizer.chat_template"] = (8, "{{ messages[0].content }}")
    vocab = len(fields["tokenizer.ggml.tokens"][1][1])
    shapes = {"token_embd.weight": (32, vocab), "output_norm.weight": (32,)}
    matrices = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}
    matrices |= {"ffn_gate": 32, "ffn_up": 32, "ffn_down": 32}
    shapes |= {f"blk.0.{name}.weight": (32, rows) for name, rows in matrices.items()}
    shapes |= {"blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,)}
    tensors, offset = {}, 0
    for name, dims in shapes.items():
        data = bytes(int(np.prod(dims)) // 32 * 34 if len(dims) > 1 else 4 * dims[0])  # Q8_0, F32
        tensors[name] = (dims, 8 if len(dims) > 1 else 0, offset, data)
        offset += len(data) + -len(data) % 32
    return fields, tensors


def tokenizer(folder: Path, rng: random.Random) -> None:
    """A damaged tokenizer.json or one of the files beside it."""
    backend = rng.choice(
        (
            tiny_tokenizers.llama2_like_backend,
            tiny_tokenizers.gemma_like_backend,
            tiny_tokenizers.metaspace_backend,
            lambda: tiny_tokenizers.byte_tokenizer("llama-bpe").backend,
            _unigram_backend,
            _wordpiece_backend,
        )
    )()
    files = {
        "tokenizer.json": json.loads(backend.to_str()),
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
            "add_bos_token": True,
            "chat_template": [{"name": "default", "template": "{{ messages }}"}],
            "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
            "additional_special_tokens": ["<x>"],
        },
        "generation_config.json": {"eos_token_id": [1, 2], "bos_token_id": 0},
    }
    chosen = rng.choice(("tokenizer.json", "tokenizer.json", *files))
    for name, content in files.items():
        data = json.dumps(content).encode()
        (folder / name).write_bytes(
            mutations.damaged_json(content, rng) if name == chosen else data
        )
    read = read_hf_tokenizer(folder)
    ids = read.encode(TEXT)
    read.decode(ids[:2000])


def _unigram_backend():
    vocab = [("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0), ("é", -3.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, 0, byte_fallback=False))
    steps = tokenizers.normalizers
    backend.normalizer = steps.Sequence([steps.NFKC(), steps.Strip(), steps.Replace(" ", "▁")])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.enable_padding(length=20)
    backend.enable_truncation(16, stride=3)
    return backend


def _wordpiece_backend():
    words = ["[UNK]", "a", "##b", "c", "[CLS]", "[SEP]"]
    model = tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    backend, cut = tokenizers.Tokenizer(model), tokenizers.pre_tokenizers
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = cut.Sequence(
        [cut.BertPreTokenizer(), cut.Digits(), cut.UnicodeScripts(), cut.FixedLength(3)]
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
    )
    backend.decoder = tokenizers.decoders.WordPiece()
    return backend


def safetensors(folder: Path, rng: random.Random) -> None:
    """A damaged safetensors file: its header by parts, or its bytes."""
    (folder / "config.json").write_text('{"model_type": "llama"}')
    rows = {"a": ("F32", [4, 3]), "b": ("BF16", [5]), "c": ("I64", []), "d": ("U8", [0, 2])}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (kind, shape) in rows.items():
        size = int(np.prod(shape)) * {"F32": 4, "BF16": 2, "I64": 8, "U8": 1}[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = mutations.damaged_json(header, rng) if rng.random() < 0.7 else json.dumps(header).encode()
    data = struct.pack("<Q", len(raw)) + raw + bytes(end)
    if rng.random() < 0.4:
        data = mutations.damaged_bytes(data, rng)
    (folder / "model.safetensors").write_bytes(data)
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors:
        checkpoint.read(name)


def template(folder: Path, rng: random.Random) -> None:
    """A made-up chat template, at times with damaged bytes."""
    text = mutations.made_up_template(rng)
    if rng.random() < 0.2:
        text = mutations.damaged_bytes(text.encode(), rng).decode(errors="replace")
    render_chat(text, [{"role": "user", "content": "Hi"}], special_tokens={}, source="m.gguf")


def shard_index(folder: Path, rng: random.Random) -> None:
    """A damaged index of shards."""
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name in "ab":
        save_file({name: np.zeros(3, np.float32)}, folder / f"{name}.safetensors")
    index = {"metadata": {"total_size": 24}, "weight_map": {n: f"{n}.safetensors" for n in "ab"}}
    (folder / "model.safetensors.index.json").write_bytes(mutations.damaged_json(index, rng))
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors:
        checkpoint.read(name)


FAMILIES: dict[str, Callable[[Path, random.Random], None]] = {
    read.__name__: read for read in (config, gguf, tokenizer, safetensors, template, shard_index)
}


def outcome(family: str, folder: Path, seed: int) -> str:
    """ "" if the file was read or refused in one clean line, else what happened."""
    try:
        FAMILIES[family](folder, random.Random(f"{family} {seed}"))
    except CheckpointError as error:
        line = str(error)
        clean = line.isprintable() and 0 < len(line) <= LONGEST_LINE
        return "" if clean else f"an unclean line: {line!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""
