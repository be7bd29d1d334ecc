"""The interface of a model that `generate` can run: `models.Decoder` has it, others may as well."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax

from jaxkv.cache import KVCache
from jaxkv.keep import Keep
from jaxkv.spec import LayerSpec
from pallas_kernels.backends import Backend


@runtime_checkable
class Model(Protocol):
    """A decoder that attends through a `KVCache`: a pytree of weights, passed to jitted steps.

    `generate` uses all members, `fit_key_means` only `layer_specs` and the call.
    """

    @property
    def vocab_size(self) -> int:
        """Number of different tokens: ids are below it."""
        ...

    @property
    def eos_ids(self) -> Sequence[int]:
        """Tokens that end a sequence unless a caller names others; () for none."""
        ...

    @property
    def max_position(self) -> int | None:
        """Trained context in tokens; None for no limit."""
        ...

    def layer_specs(self, keep: Keep) -> tuple[LayerSpec, ...]:
        """Describes each layer to the cache: returns `keep.apply(the model's own layers)`."""
        ...

    def __call__(
        self, tokens: jax.Array, cache: KVCache, *, backend: Backend | None
    ) -> tuple[jax.Array, KVCache]:
        """Runs the prepared tokens of each sequence; every layer calls `cache.attend` once.

        Args:
          tokens: `i32[batch, tokens]`; row `b` has `cache.pending[b]` tokens, then padding.
          cache: prepared; the caller commits it.
          backend: passed on to `cache.attend`.

        Returns:
          Hidden states, `[batch, tokens, hidden]`, and the cache.
        """
        ...

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits, `[..., vocab_size]`, of hidden states `[..., hidden]`."""
        ...
