"""Translates a GGUF file's metadata into the keys that a Hugging Face config.json has."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoints.gguf_header import TensorEntry
from models.checkpoints.gguf_metadata import Metadata
from models.checkpoints.gguf_rope import read_gguf_rope
from models.errors import CheckpointError
from models.numbers import whole_number
from models.text.gguf_vocabulary import gguf_eos_ids

LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the models with 27 billion parameters
ROPE_FACTORS = "rope_freqs.weight"  # a tensor that belongs to the config


def read_gguf_config(
    path: Path,
    fields: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    read_values: Callable[[TensorEntry], np.ndarray],
) -> dict[str, Any]:
    """Builds the config of a model whose architecture is one of `WRITINGS`.

    Args:
      path: names the file in errors.
      fields: metadata as Python values, by full key.
      entries: the tensor table, by GGUF name; some settings show only in which tensors exist.
      read_values: reads one tensor; called for `ROPE_FACTORS` alone.

    Raises:
      CheckpointError: a key is missing or damaged, or asks for something that is not supported.
    """
    metadata = Metadata(path, fields)
    if whole_number(f"{path}: split.count", fields.get("split.count", 1), least=0) > 1:
        metadata.refuse("split files (merge them with llama-gguf-split --merge) are")
    metadata.refuse_foreign_keys()
    if "token_embd.weight" not in entries:
        raise CheckpointError(f"{path}: has no tensor 'token_embd.weight'.")
    hidden = metadata.number("embedding_length", int)
    heads = metadata.number("attention.head_count", int)
    head_dim = metadata.number("attention.key_length", int, hidden // heads)
    if metadata.number("attention.value_length", int, head_dim) != head_dim:
        metadata.refuse("key_length other than value_length is")
    if metadata.number("rope.dimension_count", int, head_dim) != head_dim:
        metadata.refuse("rotating a part of head_dim is")
    has_window = metadata.has("attention.sliding_window")
    window = metadata.number("attention.sliding_window", int) if has_window else None
    return {
        "hidden_size": hidden,
        "intermediate_size": metadata.number("feed_forward_length", int),
        "num_hidden_layers": metadata.number("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.number("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "vocab_size": entries["token_embd.weight"].shape[0],
        "max_position_embeddings": metadata.number("context_length", int),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": read_gguf_rope(
            metadata, entries.get(ROPE_FACTORS), read_values, head_dim
        ),
        "attention_bias": "blk.0.attn_q.bias" in entries,
        "attention_output_bias": "blk.0.attn_output.bias" in entries,
        "mlp_bias": "blk.0.ffn_up.bias" in entries,
        "tie_word_embeddings": "output.weight" not in entries,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf_eos_ids(fields),
    } | _by_architecture(metadata, window)


def _by_architecture(metadata: Metadata, window: int | None) -> dict[str, Any]:
    """Keys that one architecture has, and the name that Hugging Face gives it."""
    arch = metadata.arch
    if arch in ("gemma2", "gemma3"):
        return _gemma(metadata, window)
    kind = "mistral" if arch == "llama" and window else arch
    return {"model_type": kind, "hidden_act": "silu", "sliding_window": window}


def _gemma(metadata: Metadata, window: int | None) -> dict[str, Any]:
    """Gemma's keys. What a file leaves out, and the scale of scores, are constants of llama.cpp."""
    second = metadata.arch == "gemma2"
    hidden, layers = metadata.number("embedding_length", int), metadata.number("block_count", int)
    heads = metadata.number("attention.head_count", int)
    head_dim = metadata.number("attention.key_length", int, hidden // heads)
    cap = lambda key, default: (
        metadata.number(key, float, default) if metadata.has(key) else default
    )
    keys = {
        "model_type": "gemma2" if second else "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        # The files don't say it: the largest models scale by the mean width of a head.
        "query_pre_attn_scalar": hidden // heads if layers == LARGEST[metadata.arch] else head_dim,
        "final_logit_softcapping": cap("final_logit_softcapping", 30.0 if second else None),
    }
    if second:
        keys["attn_logit_softcapping"] = cap("attn_logit_softcapping", 50.0)
        return keys | {"sliding_window": window or 4096}
    keys["rope_local_base_freq"] = metadata.number("rope.freq_base_swa", float, 10000.0)
    if window is None:  # llama.cpp's reading of a file without the key
        return keys | {"layer_types": ["full_attention"] * layers}
    pattern = metadata.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        return keys | {"sliding_window": window, "layer_types": kinds}
    period = metadata.number("attention.sliding_window_pattern", int, 6)
    return keys | {"sliding_window": window, "sliding_window_pattern": period}
