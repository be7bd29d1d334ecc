"""Models of random weights in published shapes, for measuring speed without a checkpoint."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models.abstract_decoder import abstract_decoder
from models.config import DecoderConfig
from models.decoder import Decoder
from models.families.architectures import architecture_config
from models.platform_defaults import dtype_or_default, scan_or_default
from models.rope import make_rope


def _llama(layers, hidden, inner, q_heads, kv_heads, head_dim, vocab) -> DecoderConfig:
    return DecoderConfig(
        architecture="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=(None,) * layers,
        rope=make_rope(head_dim, {"rope_type": "default", "rope_theta": 500_000.0}),
        norm_eps=1e-5,
    )


def _of_defaults(model_type, **keys) -> DecoderConfig:
    """The shape of a config.json that gives `keys` alone."""
    return architecture_config({"model_type": model_type, **keys})


SHAPES = {
    "llama3-8b": _llama(32, 4096, 14336, 32, 8, 128, 128_256),
    "llama3-1b": _llama(16, 2048, 8192, 32, 8, 64, 128_256),
    "tiny": _llama(3, 96, 128, 6, 2, 64, 300),
    "qwen2.5-7b": _of_defaults(
        "qwen2",
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_theta=1e6,
    ),
    "qwen3-30b-a3b": _of_defaults(
        "qwen3_moe", num_hidden_layers=48, head_dim=128, norm_topk_prob=True, rope_theta=1e6
    ),
    "mixtral-8x7b": _of_defaults("mixtral", max_position_embeddings=32_768),
    "smollm3-3b": _of_defaults("smollm3", max_position_embeddings=65_536, rope_theta=5e6),
    "olmo2-7b": _of_defaults(
        "olmo2", vocab_size=100_352, max_position_embeddings=4096, rope_theta=5e5
    ),
}


def random_model(shape: str, *, dtype: str | None = None, scan: bool | None = None) -> Decoder:
    """Makes a model of random weights, for measuring speed without a checkpoint.

    Args:
      shape: a key of `SHAPES`: "llama3-8b", "llama3-1b", "tiny", "qwen2.5-7b", "qwen3-30b-a3b",
        "mixtral-8x7b", "smollm3-3b" or "olmo2-7b".
      dtype: as in `models.load`.
      scan: as in `models.load`.

    Raises:
      ValueError: there is no such shape.
    """
    return draw_decoder(
        named_shape(shape), dtype=dtype_or_default(dtype), scan=scan_or_default(scan)
    )


def named_shape(name: str) -> DecoderConfig:
    """The config that `SHAPES` has under a name.

    Raises:
      ValueError: there is no such name; the message lists the known ones.
    """
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} must be one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def draw_decoder(config: DecoderConfig, *, dtype: str, scan: bool) -> Decoder:
    """Builds the model and draws on the device every array of two axes or more; others are ones.

    Each shape of array gets a small program of its own: one program for the whole model would
    take minutes to compile.
    """
    graph, state = nnx.split(abstract_decoder(config, scan=scan, dtype=dtype))

    @functools.partial(jax.jit, static_argnames=("shape", "dtype"))
    def draw(seed, shape, dtype):
        return jax.random.normal(jax.random.key(seed), shape, dtype) * shape[-1] ** -0.5

    filled = []
    for seed, (path, parameter) in enumerate(nnx.to_flat_state(state)):
        one = parameter.get_value()
        value = draw(seed, one.shape, one.dtype) if one.ndim > 1 else jnp.ones(one.shape, one.dtype)
        filled.append((path, parameter.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))
