"""A `Decoder` without weights, for whoever fills it: the loader, or a drawer of random ones."""

from typing import cast

import jax
from flax import nnx

from models.config import DecoderConfig
from models.decoder import Decoder


class _OneKey:
    """Stands for `nnx.Rngs` where nothing is drawn.

    Those count their draws in a traced array, and flax asks it, at each draw, for an attribute that
    tracers lack. JAX's answer describes the whole trace so far, so that time grew with the square
    of the layers.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract_decoder(config: DecoderConfig, *, scan: bool, dtype: str) -> Decoder:
    """Builds a `Decoder` whose parameters are shapes and types; arguments are `Decoder`'s."""
    rngs = cast(nnx.Rngs, _OneKey())
    return nnx.eval_shape(lambda: Decoder(config, rngs, scan=scan, dtype=dtype))
