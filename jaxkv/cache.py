"""The paged KV cache: a pytree threaded through jitted steps, with no host-side mirror.

A step is `prepare` (reserve pages), `attend` for every layer (write, read), `commit` (keep some
or all of the new tokens). `free` and `fork` belong between steps. Each returns a new cache; donate
the old one and the pages are updated in place.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxkv.allocator import NULL_PAGE
from jaxkv.config import CacheConfig
from jaxkv.page_tables import entries, look_up
from jaxkv.read import attend_stores
from jaxkv.store import GroupState, Store, create_group
from pallas_kernels.backends import Backend
from pallas_kernels.shapes import bind_dims

Layer = int | tuple[int, int | jax.Array]  # number, or (group, index in the group)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of `config.batch` sequences in pages; see the module's docstring."""

    groups: tuple[GroupState, ...]
    lengths: jax.Array  # i32[batch], committed tokens
    pending: jax.Array  # i32[batch], tokens prepared and not committed
    starved: jax.Array  # bool[batch], the last prepare or fork found no page for this sequence
    too_long: jax.Array  # bool[batch], the last prepare asked for more than a table can hold
    config: CacheConfig = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def create(
        cls, config: CacheConfig, *, key_means: Sequence[jax.Array] | None = None
    ) -> "KVCache":
        """Allocates an empty cache; `jaxkv.plan(config)` tells its bytes beforehand.

        Args:
          config: what to keep.
          key_means: `[kv_heads, head_dim]` for each layer, means of its rotated (RoPE) keys, for
            codecs with `key_mean="static"`; `jaxkv.fit_key_means` makes them.

        Raises:
          ValueError: the configuration can't be; names the value.
        """
        config = config.checked()
        # Each array its own: a buffer that stands twice in a donated state is refused.
        return cls(
            groups=tuple(create_group(group, config.batch, key_means) for group in config.groups),
            lengths=jnp.zeros(config.batch, jnp.int32),
            pending=jnp.zeros(config.batch, jnp.int32),
            starved=jnp.zeros(config.batch, bool),
            too_long=jnp.zeros(config.batch, bool),
            config=config,
        )

    def positions(self, tokens: int) -> jax.Array:
        """Positions of the next `tokens` tokens, `i32[batch, tokens]`."""
        return self.lengths[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]

    def prepare(self, new_tokens: jax.Array) -> "KVCache":
        """Reserves pages for the next `new_tokens` of each sequence, in every group.

        Served in batch order: from the first sequence that does not fit in some group, later
        ones that need pages starve, those that need none pass. A starved sequence gets nothing
        in any group, writes nowhere and commits 0; likewise one that asks for more than
        `max_new_tokens`, or would outgrow `max_tokens` (`too_long`).

        Args:
          new_tokens: `i32[batch]`; 0 or less leaves a sequence out of the step. The step before
            must have been committed.
        """
        bind_dims(lengths=(self.lengths, "batch"), new_tokens=(new_tokens, "batch"))
        too_long = new_tokens > self.config.max_new_tokens
        if self.config.max_tokens is not None:
            too_long |= self.lengths + new_tokens > self.config.max_tokens
        new_tokens = jnp.where(too_long, 0, jnp.maximum(new_tokens, 0))
        starved, needs = jnp.zeros_like(too_long), jnp.zeros_like(too_long)
        for store in self._stores:
            needed = store.needed(self.lengths, new_tokens)
            needs |= needed > 0
            starved |= jnp.cumsum(needed, dtype=jnp.int32) > store.pool.free_pages
        starved &= needs
        pending = jnp.where(starved, 0, new_tokens)
        reserve = lambda store: store.reserve(self.lengths, pending, self.config.step_pages)
        return dataclasses.replace(
            self,
            groups=tuple(state.map(reserve) for state in self.groups),
            pending=pending,
            starved=starved,
            too_long=too_long,
        )

    def attend(
        self,
        layer: Layer,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        scale: float | None = None,
        soft_cap: float | None = None,
        sink_logits: jax.Array | None = None,
        q_sink: jax.Array | None = None,
        backend: Backend | None = None,
    ) -> tuple["KVCache", jax.Array]:
        """Writes the prepared tokens' keys and values, and attends their queries.

        Row `t` of a sequence is its token at position `lengths + t`; rows past `pending` are
        padding: nothing of them is kept, their output is 0.

        Args:
          layer: number, or `(group, index)` as `config.locate` gives it; the index may be traced.
          q: `[batch, tokens, q_heads, head_dim]`, rotated.
          k: `[batch, tokens, kv_heads, head_dim]`, rotated.
          v: like `k`.
          scale: of scores; None for `head_dim ** -0.5`.
          soft_cap: bound on scores (Gemma 2).
          sink_logits: `[q_heads]`, learned sink, joins the softmax denominator only (gpt-oss).
          q_sink: like `q`, rotated for `min(position, sink_tokens + window - 1)`: attends the
            first `sink_tokens` keys. Needed iff the layer has `sink_positions="cache"`.
          backend: of the attention; None picks by platform (`jaxkv.explain` tells).

        Returns:
          The new cache, and attention shaped and typed like `q`.

        Raises:
          ValueError: shapes disagree, more rows than `max_new_tokens`, or `q_sink` missing or
            not wanted.
          NotImplementedError: the named backend does not serve this.
        """
        number, index = layer if isinstance(layer, tuple) else self.config.locate(layer)
        group, state = self.config.groups[number], self.groups[number]
        spec = group.spec
        sizes = bind_dims(
            lengths=(self.lengths, "batch"),
            q=(q, "batch tokens q_heads head_dim"),
            k=(k, "batch tokens kv_heads head_dim"),
            v=(v, "batch tokens kv_heads head_dim"),
            sink_logits=(sink_logits, "q_heads"),
            q_sink=(q_sink, "batch tokens q_heads head_dim"),
        )
        for name in ("kv_heads", "head_dim"):
            if sizes[name] != getattr(spec, name):
                raise ValueError(f"k.shape={k.shape}: {name} must be {getattr(spec, name)}.")
        if sizes["tokens"] > self.config.max_new_tokens:
            raise ValueError(
                f"tokens={sizes['tokens']} must be at most {self.config.max_new_tokens=}."
            )
        if (q_sink is None) != (spec.q_sink_limit is None):
            wanted = "not taken" if spec.q_sink_limit is None else "needed"
            raise ValueError(f"q_sink is {wanted} with sink_positions={spec.sink_positions!r}.")
        position = self.positions(sizes["tokens"])
        row = jnp.arange(sizes["tokens"], dtype=jnp.int32)[None]
        writes = row < self.pending[:, None]
        write = lambda store: store.write(index, k, v, position, writes)
        state = state.map(lambda store: store if store.spec.lag.least else write(store))
        state = state.quantize_for_chunk(index, self.lengths, self.pending, sizes["tokens"])
        out = attend_stores(
            q,
            state,
            group=group,
            layer=index,
            lengths=self.lengths,
            pending=self.pending,
            scale=spec.head_dim**-0.5 if scale is None else scale,
            soft_cap=soft_cap,
            sink_logits=sink_logits,
            q_sink=q_sink,
            backend=backend,
        )
        state = state.after_reading(out)
        groups = self.groups[:number] + (state,) + self.groups[number + 1 :]
        return dataclasses.replace(self, groups=groups), out.astype(q.dtype)

    def commit(self, accepted: jax.Array) -> "KVCache":
        """Keeps the first `accepted` of the prepared tokens and drops the rest (roll-back).

        Frees pages that held only dropped tokens, and pages that fell out of a window. With a lossy
        codec, pages that leave the recent span are quantized, unless `attend` had to do it.

        Args:
          accepted: `i32[batch]`; more than was prepared counts as all of it.
        """
        bind_dims(lengths=(self.lengths, "batch"), accepted=(accepted, "batch"))
        lengths = self.lengths + jnp.clip(accepted, 0, self.pending)
        step = (self.lengths, self.pending, lengths)
        groups = (state.quantize_for_commit(*step) for state in self.groups)
        settle = lambda store: store.settle(*step, self.config.step_pages)
        return dataclasses.replace(
            self,
            groups=tuple(state.map(settle) for state in groups),
            lengths=lengths,
            pending=jnp.zeros_like(self.pending),
        )

    def free(self, mask: jax.Array) -> "KVCache":
        """Ends the sequences of `mask`, `bool[batch]`: their references go, their length is 0."""
        bind_dims(lengths=(self.lengths, "batch"), mask=(mask, "batch"))
        groups = tuple(state.map(lambda store: store.drop(mask)) for state in self.groups)
        return dataclasses.replace(
            self,
            groups=groups,
            lengths=jnp.where(mask, 0, self.lengths),
            pending=jnp.where(mask, 0, self.pending),
            starved=self.starved & ~mask,
            too_long=self.too_long & ~mask,
        )

    def fork(self, src: jax.Array | int, dst: jax.Array | int) -> "KVCache":
        """Makes sequence `dst` a copy of `src`: full pages are shared, the unfinished one copied.

        What `dst` held is released first. Where no page is left for the copy, `dst` ends up empty
        and `starved`. Only between steps. `src == dst` does nothing.

        Args:
          src: `i32[n]` or an int, sequences to copy, as they are before the call.
          dst: like `src`, all different; only those below `batch` are looked at.
        """
        src, dst = (jnp.atleast_1d(jnp.asarray(x, jnp.int32)) for x in (src, dst))
        bind_dims(src=(src, "forks"), dst=(dst, "forks"))
        size = self.config.page_size
        acts = (src != dst) & (dst >= 0)
        target = jnp.where(acts, dst, self.config.batch)  # out of range is dropped
        length = self.lengths[src]
        last = (length // size)[:, None]  # logical page that is unfinished, if any
        copies = acts & (length % size > 0)

        ended = jnp.zeros(self.config.batch, bool).at[target].set(True, mode="drop")
        stores, prepared, blocked = [], [], jnp.zeros_like(copies)
        for store in self._stores:
            source = jax.tree.map(lambda table: table[src], store.tables)
            here = copies & store.spec.is_written(last)[:, 0]  # pages of codes may be complete only
            page = jnp.where(here[:, None], look_up(source, last), NULL_PAGE)
            held = entries(source)
            shared = jnp.where((held == page) | ~acts[:, None], NULL_PAGE, held)
            store = store.retain(shared).drop(ended)
            blocked |= jnp.cumsum(here, dtype=jnp.int32) > store.pool.free_pages
            stores.append(store)
            prepared.append((source, page, here))
        starved = copies & blocked
        lives = jnp.where(starved, self.config.batch, target)
        forked = [
            store.fork(source, page, here & ~starved, starved, last, lives)
            for store, (source, page, here) in zip(stores, prepared, strict=True)
        ]
        remaining = iter(forked)
        return dataclasses.replace(
            self,
            groups=tuple(state.map(lambda _: next(remaining)) for state in self.groups),
            lengths=self.lengths.at[target].set(jnp.where(starved, 0, length), mode="drop"),
            pending=self.pending.at[target].set(0, mode="drop"),
            starved=self.starved.at[target].set(starved, mode="drop"),
            too_long=self.too_long.at[target].set(False, mode="drop"),
        )

    @property
    def _stores(self) -> list[Store]:
        """Every store of every group, in order."""
        return [store for state in self.groups for store in state.stores]

    @property
    def pages_in_use(self) -> jax.Array:
        """Pages that hold something in each store, `i32[stores]`; a shared page counts once."""
        return jnp.stack([store.pages_in_use for store in self._stores])

    @property
    def page_bytes(self) -> list[int]:
        """Bytes of one page of each store, over all the layers that share it."""
        return [store.page_bytes for store in self._stores]

    @property
    def bytes_reserved(self) -> int:
        """Bytes of every array of the cache."""
        return sum(x.nbytes for x in jax.tree.leaves(self))
