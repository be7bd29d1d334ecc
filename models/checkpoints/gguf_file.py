"""Reads a GGUF file as if it were a Hugging Face checkpoint: names, row order, config.

Dequantization is the `gguf` package's. GGUF files of the Llama family keep the rows of q and k in
the order of interleaved RoPE pairs (llama.cpp's converter permutes them); this is undone.
"""

import functools
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from models.checkpoints.checkpoint import Checkpoint, LazyTensor, map_file, release_pages
from models.checkpoints.errors import CheckpointError, import_extra
from models.checkpoints.gguf_header import TensorEntry, read_gguf_header

ROPE_FACTORS = "rope_freqs.weight"

_PERMUTED_QK = {"llama": True, "qwen3": False}  # supported architectures
_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file of the Llama or Qwen3 architecture.

    Raises:
      CheckpointError: truncated or damaged, another architecture, an unsupported feature.
    """
    data = map_file(path)
    fields, entries = read_gguf_header(path, data)
    config = _Metadata(path, fields).config({entry.name: entry for entry in entries}, data)
    arch = fields["general.architecture"]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, LazyTensor] = {}
    for entry in entries:
        part = entry.name.split(".")[-2] if entry.name.count(".") else ""
        permuted = heads.get(part) if _PERMUTED_QK[arch] else None
        tensor = _lazy_tensor(path, data, entry, permuted)
        if entry.name != ROPE_FACTORS:
            tensors[hf_name(entry.name)] = tensor

    def load_tokenizer():
        from models.tokenizer import Tokenizer

        return Tokenizer.from_gguf_fields(fields, source=str(path))

    return Checkpoint(path, config, tensors, load_tokenizer)


def hf_name(name: str) -> str:
    """ "blk.0.attn_q.weight" gives "model.layers.0.self_attn.q_proj.weight"; unknown names stay."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    part, _, kind = name.partition(".")
    return f"{_GLOBAL_NAMES[part]}.{kind}" if part in _GLOBAL_NAMES else name


def unpermute_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Interleaved RoPE pairs back to halves, per head: rows (0, 1), (2, 3).. to (0, d/2), .."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _lazy_tensor(path: Path, data: np.ndarray, entry: TensorEntry, heads: int | None) -> LazyTensor:
    """Checks that a tensor lies inside the file; its values come dequantized, rows in HF order."""
    gguf = import_extra("gguf")
    try:
        kind = gguf.GGMLQuantizationType(entry.ggml_type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: {entry.name}: unknown ggml type {entry.ggml_type}; a newer gguf may know it."
        ) from error
    if not math.prod(entry.shape):
        raise CheckpointError(f"{path}: {entry.name}: shape {entry.shape} must not be empty.")
    row = entry.shape[-1] if entry.shape else 1
    if row % block:
        raise CheckpointError(f"{path}: {entry.name}: {row=} must be a multiple of {block=}.")
    end = entry.offset + math.prod(entry.shape) // block * block_bytes
    if end > len(data):
        raise CheckpointError(
            f"{path}: truncated: {entry.name} ends at byte {end}, the file has {len(data)}."
        )
    if heads is not None and (not entry.shape or entry.shape[0] % (2 * heads)):
        raise CheckpointError(
            f"{path}: {entry.name}: shape {entry.shape} must be {heads} heads of even size."
        )

    def read() -> np.ndarray:
        raw = data[entry.offset : end]
        direct = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
        if kind.name in direct:
            values = raw.view(direct[kind.name]).reshape(entry.shape)
        else:
            blocks = raw.reshape(*entry.shape[:-1], row // block * block_bytes)
            try:
                with np.errstate(all="ignore"):  # a damaged scale gives NaN, as it does elsewhere
                    values = gguf.quants.dequantize(blocks, kind)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{path}: {entry.name}: the gguf package can't dequantize {kind.name}."
                ) from error
        return values if heads is None else unpermute_rows(values, heads)

    release = functools.partial(release_pages, data, entry.offset, end)
    return LazyTensor(entry.shape, kind.name, read, end - entry.offset, release)


class _Metadata:
    """Reads typed values of a GGUF file's metadata, with errors that name file and key."""

    def __init__(self, path: Path, fields: dict[str, Any]):
        self.path, self.fields = path, fields
        self.arch = fields.get("general.architecture")
        if self.arch not in _PERMUTED_QK:
            known = " and ".join(_PERMUTED_QK)
            raise CheckpointError(
                f"{path}: architecture {self.arch!r} is not supported; GGUF files of {known} are."
            )

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        """A number; one that is given per layer must be the same in all layers."""
        full = f"{self.arch}.{key}"
        value = self.fields.get(full, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"{self.path}: {full} must be a positive number, not {value!r}.")
        # metadata floats are float32: 9.999999747378752e-06 is meant to be 1e-05
        return int(value) if kind is int else float(str(np.float32(value)))

    def has(self, key: str) -> bool:
        return bool(self.fields.get(f"{self.arch}.{key}"))

    def refuse(self, what: str) -> None:
        raise CheckpointError(f"{self.path}: {what} not supported in GGUF files.")

    def config(self, entries: dict[str, TensorEntry], data: np.ndarray) -> dict[str, Any]:
        """The metadata as config.json would have it."""
        if self.fields.get("split.count", 1) > 1:
            self.refuse("split files (merge them with llama-gguf-split --merge) are")
        if self.has("expert_count"):
            self.refuse("mixtures of experts are")
        if "token_embd.weight" not in entries:
            raise CheckpointError(f"{self.path}: has no tensor 'token_embd.weight'.")
        hidden = self.number("embedding_length", int)
        heads = self.number("attention.head_count", int)
        head_dim = self.number("attention.key_length", int, hidden // heads)
        if self.number("attention.value_length", int, head_dim) != head_dim:
            self.refuse("key_length other than value_length is")
        if self.number("rope.dimension_count", int, head_dim) != head_dim:
            self.refuse("rotating a part of head_dim is")
        has_window = self.has("attention.sliding_window")
        window = self.number("attention.sliding_window", int) if has_window else None
        return {
            "model_type": "mistral" if self.arch == "llama" and window else self.arch,
            "hidden_size": hidden,
            "intermediate_size": self.number("feed_forward_length", int),
            "num_hidden_layers": self.number("block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": self.number("attention.head_count_kv", int, heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "vocab_size": entries["token_embd.weight"].shape[0],
            "max_position_embeddings": self.number("context_length", int),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", float),
            "rope_parameters": self.rope(entries.get(ROPE_FACTORS), data, head_dim),
            "attention_bias": "blk.0.attn_q.bias" in entries,
            "mlp_bias": "blk.0.ffn_up.bias" in entries,
            "sliding_window": window,
            "tie_word_embeddings": "output.weight" not in entries,
            "bos_token_id": self.fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": gguf_eos_ids(self.fields),
        }

    def rope(self, factors: TensorEntry | None, data: np.ndarray, head_dim: int) -> dict[str, Any]:
        """Rotary settings; "factors" divide the frequencies one by one (Llama 3's scaling)."""
        theta = self.number("rope.freq_base", float, 10000.0)
        kind = self.fields.get(f"{self.arch}.rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            self.refuse(f"rope scaling {kind!r} is")
        linear = self.number("rope.scaling.factor", float, 1.0) if kind == "linear" else 1.0
        if factors is None:
            if linear == 1.0:
                return {"rope_type": "default", "rope_theta": theta}
            return {"rope_type": "linear", "rope_theta": theta, "factor": linear}
        if factors.shape != (head_dim // 2,):
            raise CheckpointError(
                f"{self.path}: {factors.name}: shape {factors.shape} must be ({head_dim // 2},)."
            )
        values = _lazy_tensor(self.path, data, factors, None).read().astype(np.float64) * linear
        return {"rope_type": "factors", "rope_theta": theta, "factors": values.tolist()}


def gguf_eos_ids(fields: dict[str, Any]) -> list[int]:
    """Token ids that end a generation: end of sequence, of turn, of message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (fields.get(f"tokenizer.ggml.{key}") for key in keys)
    return list(dict.fromkeys(token for token in ids if isinstance(token, int)))
