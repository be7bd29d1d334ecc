"""SentencePiece's BPE with the `tokenizers` library, as GGUF files of `model` "llama" have it.

SentencePiece joins, again and again, the two neighbours whose joined text is the token with the
best score. The library joins by a list of pairs; the pairs of each token, in the order of the
tokens' scores, give the same result.
"""

from collections.abc import Sequence
from typing import Any

from models.errors import import_extra
from models.text.gguf_vocabulary import Vocabulary

MARK = "▁"  # stands for a space


def sentencepiece_bpe(
    vocabulary: Vocabulary, scores: Sequence[float], *, unknown: str, space_prefix: bool
) -> Any:
    """A `tokenizers.Tokenizer` without special tokens.

    Args:
      vocabulary: tokens; `<0x0A>` and its like are the bytes of characters that have no token.
      scores: one a token; higher ones are joined first.
      unknown: the token for a character without token and bytes.
      space_prefix: a space is put before each text, and taken away from decoded ones.
    """
    tokenizers = import_extra("tokenizers")
    ids = vocabulary.ids
    bpe = tokenizers.models.BPE(
        vocab=ids,
        merges=merge_list(vocabulary.tokens, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(bpe)
    change, decoders = tokenizers.normalizers, tokenizers.decoders
    steps = [change.Prepend(MARK)] if space_prefix else []
    backend.normalizer = change.Sequence([*steps, change.Replace(" ", MARK)])
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps
    )
    return backend


def merge_list(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to a token, best score first."""
    known = set(tokens)
    order = sorted(range(len(tokens)), key=lambda i: -scores[i])  # stable: then by id
    return [
        (token[:cut], token[cut:])
        for token in map(tokens.__getitem__, order)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
