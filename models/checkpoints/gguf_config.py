"""Translates a GGUF file's metadata into the keys that a Hugging Face config.json has."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoints.gguf_header import TensorEntry
from models.errors import CheckpointError
from models.text.gguf_vocabulary import gguf_eos_ids

ROPE_FACTORS = "rope_freqs.weight"  # a tensor that belongs to the config


def read_gguf_config(
    path: Path,
    fields: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    read_values: Callable[[TensorEntry], np.ndarray],
) -> dict[str, Any]:
    """Builds the config of a Llama or Qwen3 model.

    Args:
      path: names the file in errors.
      fields: metadata as Python values, by full key.
      entries: the tensor table, by GGUF name; some settings show only in which tensors exist.
      read_values: reads one tensor; called for `ROPE_FACTORS` alone.

    Raises:
      CheckpointError: a key is missing or damaged, or asks for something that is not supported.
    """
    metadata = _Metadata(path, fields)
    if fields.get("split.count", 1) > 1:
        metadata.refuse("split files (merge them with llama-gguf-split --merge) are")
    if metadata.has("expert_count"):
        metadata.refuse("mixtures of experts are")
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
    arch = metadata.arch
    return {
        "model_type": "mistral" if arch == "llama" and window else arch,
        "hidden_size": hidden,
        "intermediate_size": metadata.number("feed_forward_length", int),
        "num_hidden_layers": metadata.number("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.number("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "vocab_size": entries["token_embd.weight"].shape[0],
        "max_position_embeddings": metadata.number("context_length", int),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope(metadata, entries.get(ROPE_FACTORS), read_values, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in entries,
        "attention_output_bias": "blk.0.attn_output.bias" in entries,
        "mlp_bias": "blk.0.ffn_up.bias" in entries,
        "sliding_window": window,
        "tie_word_embeddings": "output.weight" not in entries,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf_eos_ids(fields),
    }


class _Metadata:
    """Reads typed values of the metadata, with errors that name the file and the key."""

    def __init__(self, path: Path, fields: Mapping[str, Any]):
        self.path, self.fields = path, fields
        self.arch = fields["general.architecture"]

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        """A positive number; if the file gives one per layer, all layers must have the same."""
        full = f"{self.arch}.{key}"
        value = self.fields.get(full, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"{self.path}: {full} must be a positive number, not {value!r}.")
        # Metadata floats are float32: 9.999999747378752e-06 stands for 1e-05.
        return int(value) if kind is int else float(str(np.float32(value)))

    def has(self, key: str) -> bool:
        return bool(self.fields.get(f"{self.arch}.{key}"))

    def refuse(self, what: str) -> None:
        raise CheckpointError(f"{self.path}: {what} not supported in GGUF files.")


def _rope(
    metadata: _Metadata,
    factors: TensorEntry | None,
    read_values: Callable[[TensorEntry], np.ndarray],
    head_dim: int,
) -> dict[str, Any]:
    """Rotary settings. Llama 3's scaling comes as a tensor of divisors, one per frequency."""
    theta = metadata.number("rope.freq_base", float, 10000.0)
    # A file that names no type means a linear scale, if it gives a factor (as llama.cpp reads it).
    kind = metadata.fields.get(f"{metadata.arch}.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        metadata.refuse(f"rope scaling {kind!r} is")
    older = metadata.number("rope.scale_linear", float, 1.0)
    linear = metadata.number("rope.scaling.factor", float, older) if kind == "linear" else 1.0
    if factors is None:
        if linear == 1.0:
            return {"rope_type": "default", "rope_theta": theta}
        return {"rope_type": "linear", "rope_theta": theta, "factor": linear}
    if factors.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{metadata.path}: {factors.name}: shape {factors.shape} must be ({head_dim // 2},)."
        )
    values = read_values(factors).astype(np.float64) * linear
    return {"rope_type": "factors", "rope_theta": theta, "factors": values.tolist()}
