"""The paged KV cache: a pytree threaded through jitted steps, with no host-side mirror.

A step is `prepare` (reserve pages), `attend` for every layer (write, read), `commit` (keep some
or all of the new tokens). `free` and `fork` belong between steps. Each returns a new cache; donate
the old one and the pages are updated in place.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxkv.allocator import NULL_PAGE, PagePool, allocate, create_pool, release, retain
from jaxkv.config import CacheConfig, LayerGroup
from jaxkv.page_tables import (
    PageTables,
    create_tables,
    enter,
    entries,
    first_ring_page,
    look_up,
    pages_of,
)
from jaxkv.read import attend_segments
from pallas_kernels.backends import Backend
from pallas_kernels.shapes import bind_dims
from pallas_kernels.write_pages import write_pages

Layer = int | tuple[int, int | jax.Array]  # number, or (group, index in the group)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupState:
    """Pages, tables and allocator of the layers that share a `LayerSpec`."""

    k_pages: jax.Array  # [layers, pages, kv_heads, page_size, head_dim]
    v_pages: jax.Array  # like k_pages
    pool: PagePool
    tables: PageTables


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
    def create(cls, config: CacheConfig) -> "KVCache":
        """Allocates an empty cache; `jaxkv.plan(config)` tells its bytes beforehand.

        Raises:
          ValueError: the configuration can't be; names the value.
          NotImplementedError: a codec that is not available.
        """
        config = config.checked()
        # Each array its own: a buffer that stands twice in a donated state is refused.
        return cls(
            groups=tuple(_create_group(config, group) for group in config.groups),
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
        size = self.config.page_size
        too_long = new_tokens > self.config.max_new_tokens
        if self.config.max_tokens is not None:
            too_long |= self.lengths + new_tokens > self.config.max_tokens
        new_tokens = jnp.where(too_long, 0, jnp.maximum(new_tokens, 0))
        held = pages_of(self.lengths, size)
        needed = pages_of(self.lengths + new_tokens, size) - held
        starved = jnp.zeros_like(too_long)
        for group in self.groups:
            starved |= jnp.cumsum(needed, dtype=jnp.int32) > group.pool.free_pages
        starved &= needed > 0
        pending = jnp.where(starved, 0, new_tokens)
        logical = held[:, None] + jnp.arange(self.config.step_pages, dtype=jnp.int32)[None]
        wanted = logical < pages_of(self.lengths + pending, size)[:, None]
        groups = []
        for group in self.groups:
            pool, page = allocate(group.pool, wanted)
            tables = enter(group.tables, logical, page, wanted)
            groups.append(dataclasses.replace(group, pool=pool, tables=tables))
        return dataclasses.replace(
            self, groups=tuple(groups), pending=pending, starved=starved, too_long=too_long
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
            k_pages=(state.k_pages, "layers pages kv_heads page_size head_dim"),
            sink_logits=(sink_logits, "q_heads"),
            q_sink=(q_sink, "batch tokens q_heads head_dim"),
        )
        if sizes["tokens"] > self.config.max_new_tokens:
            raise ValueError(
                f"tokens={sizes['tokens']} must be at most {self.config.max_new_tokens=}."
            )
        if (q_sink is None) != (spec.q_sink_limit is None):
            wanted = "not taken" if spec.q_sink_limit is None else "needed"
            raise ValueError(f"q_sink is {wanted} with sink_positions={spec.sink_positions!r}.")
        state = _write(state, index, k, v, self.positions(sizes["tokens"]), self.pending)
        out = attend_segments(
            q,
            state.k_pages,
            state.v_pages,
            state.tables,
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
        groups = self.groups[:number] + (state,) + self.groups[number + 1 :]
        return dataclasses.replace(self, groups=groups), out.astype(q.dtype)

    def commit(self, accepted: jax.Array) -> "KVCache":
        """Keeps the first `accepted` of the prepared tokens and drops the rest (roll-back).

        Frees pages that held only dropped tokens, and pages that fell out of a window.

        Args:
          accepted: `i32[batch]`; more than was prepared counts as all of it.
        """
        bind_dims(lengths=(self.lengths, "batch"), accepted=(accepted, "batch"))
        size = self.config.page_size
        lengths = self.lengths + jnp.clip(accepted, 0, self.pending)
        kept = pages_of(lengths, size)
        prepared = pages_of(self.lengths + self.pending, size)
        groups = []
        for spec, state in zip(self.config.groups, self.groups, strict=True):
            logical, gone = _span(kept, prepared, self.config.step_pages)
            if spec.spec.window is not None:
                behind = _span(
                    first_ring_page(spec, self.lengths, size),
                    first_ring_page(spec, lengths, size),
                    self.config.step_pages,
                )
                logical = jnp.concatenate([logical, behind[0]], axis=1)
                gone = jnp.concatenate([gone, behind[1]], axis=1)
            page = jnp.where(gone, look_up(state.tables, logical), NULL_PAGE)
            groups.append(
                dataclasses.replace(
                    state,
                    pool=release(state.pool, page),
                    tables=enter(state.tables, logical, jnp.zeros_like(page), gone),
                )
            )
        return dataclasses.replace(
            self, groups=tuple(groups), lengths=lengths, pending=jnp.zeros_like(self.pending)
        )

    def free(self, mask: jax.Array) -> "KVCache":
        """Ends the sequences of `mask`, `bool[batch]`: their references go, their length is 0."""
        bind_dims(lengths=(self.lengths, "batch"), mask=(mask, "batch"))
        groups = tuple(_drop_sequences(state, mask) for state in self.groups)
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

        sources = [jax.tree.map(lambda table: table[src], state.tables) for state in self.groups]
        states, unfinished = [], []
        for state, source in zip(self.groups, sources, strict=True):
            page = jnp.where(copies[:, None], look_up(source, last), NULL_PAGE)
            held = entries(source)
            shared = jnp.where((held == page) | ~acts[:, None], NULL_PAGE, held)
            state = dataclasses.replace(state, pool=retain(state.pool, shared))
            ended = jnp.zeros(self.config.batch, bool).at[target].set(True, mode="drop")
            states.append(_drop_sequences(state, ended))
            unfinished.append(page)
        starved = jnp.zeros_like(copies)
        for state in states:
            starved |= jnp.cumsum(copies, dtype=jnp.int32) > state.pool.free_pages
        starved &= copies
        lives = jnp.where(starved, self.config.batch, target)
        groups = [
            _fork_group(state, source, page, copies & ~starved, starved, last, lives)
            for state, source, page in zip(states, sources, unfinished, strict=True)
        ]
        return dataclasses.replace(
            self,
            groups=tuple(groups),
            lengths=self.lengths.at[target].set(jnp.where(starved, 0, length), mode="drop"),
            pending=self.pending.at[target].set(0, mode="drop"),
            starved=self.starved.at[target].set(starved, mode="drop"),
            too_long=self.too_long.at[target].set(False, mode="drop"),
        )

    @property
    def pages_in_use(self) -> jax.Array:
        """Pages that hold something, `i32[groups]`; a shared page counts once."""
        used = [g.pool.references.size - 1 - g.pool.free_pages for g in self.groups]
        return jnp.stack(used)

    @property
    def page_bytes(self) -> list[int]:
        """Bytes of one page of each group, over all its layers, keys and values."""
        return [2 * g.k_pages.nbytes // g.k_pages.shape[1] for g in self.groups]

    @property
    def bytes_reserved(self) -> int:
        """Bytes of every array of the cache."""
        return sum(x.nbytes for x in jax.tree.leaves(self))


def _create_group(config: CacheConfig, group: LayerGroup) -> GroupState:
    spec = group.spec
    shape = (len(group.layers), group.pages, spec.kv_heads, config.page_size, spec.head_dim)
    return GroupState(
        k_pages=jnp.zeros(shape, spec.dtype),
        v_pages=jnp.zeros(shape, spec.dtype),
        pool=create_pool(group.pages),
        tables=create_tables(group, config.batch),
    )


def _write(
    state: GroupState,
    layer: int | jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    pending: jax.Array,
) -> GroupState:
    size = state.k_pages.shape[3]
    row = jnp.arange(position.shape[1], dtype=jnp.int32)[None]
    write = functools.partial(
        write_pages,
        layer=layer,
        page=look_up(state.tables, position // size),
        slot=position % size,
        writes=row < pending[:, None],
    )
    return dataclasses.replace(
        state, k_pages=write(state.k_pages, k), v_pages=write(state.v_pages, v)
    )


def _span(start: jax.Array, stop: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Logical pages `start .. stop` of each sequence, `i32[batch, most]`, and which of them are."""
    logical = start[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
    return logical, logical < stop[:, None]


def _drop_sequences(state: GroupState, mask: jax.Array) -> GroupState:
    """Releases everything that the sequences of `mask`, `bool[batch]`, reference."""
    page = jnp.where(mask[:, None], entries(state.tables), NULL_PAGE)
    tables = jax.tree.map(lambda t: jnp.where(mask[:, None], NULL_PAGE, t), state.tables)
    return dataclasses.replace(state, pool=release(state.pool, page), tables=tables)


def _fork_group(
    state: GroupState,
    source: PageTables,
    unfinished: jax.Array,
    copies: jax.Array,
    starved: jax.Array,
    last: jax.Array,
    target: jax.Array,
) -> GroupState:
    """Gives each target the source's tables, with a fresh copy of the unfinished page."""
    pool, page = allocate(state.pool, copies)
    tables = enter(source, last, page[:, None], copies[:, None])
    # A starved fork gives back the references that were taken for it.
    kept = jnp.where(starved[:, None] & (entries(source) != unfinished), entries(source), NULL_PAGE)
    pool = release(pool, kept)
    written = jnp.where(copies, page, pool.references.size)

    def copy(pages):
        return pages.at[:, written].set(pages[:, unfinished[:, 0]], mode="drop")

    merged = jax.tree.map(
        lambda old, new: old.at[target].set(new, mode="drop"), state.tables, tables
    )
    return GroupState(
        k_pages=copy(state.k_pages), v_pages=copy(state.v_pages), pool=pool, tables=merged
    )
