"""The paged KV cache: a pytree threaded through jitted steps, with no host-side mirror.

A step is `prepare` (reserve pages), `attend` for every layer (write, read), `commit` (keep some
or all of the new tokens). `free` and `fork` belong between steps. Each returns a new cache; donate
the old one and the pages are updated in place.

Mistakes that show in shapes, types and the order of calls raise when a step is traced. Those that
depend on data are found by `jax.experimental.checkify.checkify(step)`, which costs nothing where
it is not used, and by `jaxkv.check(cache)` on the host.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from jaxkv.allocator import NULL_PAGE
from jaxkv.arguments import counts, sequence_numbers
from jaxkv.arguments import mask as read_mask
from jaxkv.attend import attend_stores
from jaxkv.config import CacheConfig, Layer, LayerGroup, check_config
from jaxkv.inference_only import inference_only
from jaxkv.page_tables import entries, look_up
from jaxkv.static_means import static_means
from jaxkv.step_order import Seen, attend_layer, check_complete
from jaxkv.store import Committed, Fork, NewTokens, Store, create_store
from pallas_kernels.backends import Backend
from pallas_kernels.checks import check_floats, positive_number
from pallas_kernels.segment import Queries
from pallas_kernels.shapes import bind_dims


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stores", "lengths", "pending", "starved", "too_long", "attended"],
    meta_fields=["config", "prepared"],
    drop_fields=["seen"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of `config.batch` sequences, in pages; the module's docstring has its use."""

    stores: tuple[Store, ...]  # as `config.stores` describes them
    lengths: jax.Array  # i32[batch], committed tokens
    pending: jax.Array  # i32[batch], tokens prepared and not yet committed
    starved: jax.Array  # bool[batch], whether the last prepare or fork lacked pages for it
    too_long: jax.Array  # bool[batch], whether the last prepare asked for too many tokens
    # i32[layers], times that each was attended since prepare, group after group; only the checked
    # mode reads it
    attended: jax.Array
    config: CacheConfig  # static
    # Whether a step is prepared and not yet committed. Static, so that a call in the wrong order
    # raises when it is traced.
    prepared: bool = False
    seen: Seen = None  # layers attended since prepare; no part of the pytree, see `Seen`

    @classmethod
    def create(
        cls, config: CacheConfig, *, key_means: Sequence[jax.Array] | None = None
    ) -> "KVCache":
        """Allocates an empty cache; `jaxkv.plan(config)` tells its bytes beforehand.

        Args:
          config: static description of the cache.
          key_means: `[kv_heads, head_dim]` for each layer, means of its keys after RoPE, for codecs
            with `key_mean="static"`; `jaxkv.fit_key_means` makes them.

        Raises:
          ValueError: the configuration is not valid, or key means are missing or misshapen.
        """
        check_config(config)
        return _create(tuple(static_means(config, key_means)), config=config)

    def positions(self, tokens: int) -> jax.Array:
        """Positions of the next `tokens` tokens, `i32[batch, tokens]`."""
        return self.lengths[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]

    def prepare(self, new_tokens: jax.Array) -> "KVCache":
        """Reserves pages for the next `new_tokens` of each sequence, in every group.

        Sequences are served in batch order. From the first one that does not fit in some group
        on, all that need pages starve (`starved`); those that need none go on. A starved sequence
        gets no page in any group, writes nothing and commits 0 tokens. The same holds for one that
        asks for more than `max_new_tokens` or would outgrow `max_tokens` (`too_long`).

        A step that was prepared before and not committed is dropped, so to prepare twice is to
        prepare the second time.

        Args:
          new_tokens: `i32[batch]`; 0 or less leaves a sequence out of the step.

        Raises:
          ValueError: `new_tokens` is not a whole number for each sequence.
        """
        new_tokens = counts("new_tokens", new_tokens, self.config.batch)
        if self.prepared:
            return self.commit(jnp.zeros_like(self.pending), _check=False).prepare(new_tokens)
        room = jnp.minimum(self.config.longest - self.lengths, self.config.max_new_tokens)
        too_long = new_tokens > jnp.maximum(room, 0)
        new_tokens = jnp.where(too_long, 0, jnp.maximum(new_tokens, 0))
        starved, needs = jnp.zeros_like(too_long), jnp.zeros_like(too_long)
        for store in self.stores:
            needed = store.needed(self.lengths, new_tokens)
            needs |= needed > 0
            starved |= jnp.cumsum(needed, dtype=jnp.int32) > store.pool.free_pages
        starved &= needs
        pending = jnp.where(starved, 0, new_tokens)
        most = self.config.step_pages
        return dataclasses.replace(
            self,
            stores=tuple(store.reserve(self.lengths, pending, most) for store in self.stores),
            pending=pending,
            starved=starved,
            too_long=too_long,
            attended=jnp.zeros_like(self.attended),
            prepared=True,
            seen=frozenset(),
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

        Row `t` of a sequence is its token at position `lengths + t`. Rows past `pending` are
        padding: they are not kept, and their output is 0.

        It is for inference only: there is no gradient.

        Args:
          layer: its number, or `(group, index)` from `config.locate`; the index may be traced, and
            the number, too, if all layers are in one group (`config.groups`).
          q: `[batch, tokens, q_heads, head_dim]`, rotated.
          k: `[batch, tokens, kv_heads, head_dim]`, rotated.
          v: like `k`.
          scale: factor of scores; None for `head_dim ** -0.5`.
          soft_cap: bound on scores, `soft_cap * tanh(s / soft_cap)` (Gemma 2); None for none.
          sink_logits: `[q_heads]`, learned sink, joins the softmax denominator only (gpt-oss).
          q_sink: like `q`, rotated for position `min(position, sink_tokens + window - 1)`; it
            attends the first `sink_tokens` keys. Needed iff the layer has `sink_positions="cache"`.
          backend: backend of the attention; None picks by platform (`jaxkv.explain` says which).

        Returns:
          The new cache, and attention shaped and typed like `q`.

        Raises:
          ValueError: the step is not prepared, there is no such layer, shapes or types disagree,
            there are more rows than `max_new_tokens`, `q_sink` is missing or not wanted, or
            tracing shows that the step has attended the layer before.
          NotImplementedError: the named backend does not serve this call, or it is differentiated.
        """
        number, index = self.config.place(layer)
        check_floats(q=q, k=k, v=v, sink_logits=sink_logits, q_sink=q_sink)
        if soft_cap is not None:
            soft_cap = positive_number("soft_cap", soft_cap)
        if scale is not None:
            scale = positive_number("scale", scale)
        group = self.config.groups[number]
        spec = group.spec
        self._check_rows(group, q, k, v, sink_logits=sink_logits, q_sink=q_sink)
        seen = attend_layer(self.seen, group.layers[index] if isinstance(index, int) else None)
        q, k, v, sink_logits, q_sink = inference_only((q, k, v, sink_logits, q_sink))
        stores = list(self.stores)
        new = NewTokens(k, v, self.lengths, self.pending)
        for own in group.stores:
            stores[own] = stores[own].spec.fill.attend(stores, own, index, new)
        out = attend_stores(
            Queries(q, self.lengths, self.pending),
            [stores[own] for own in group.stores],
            spec,
            layer=index,
            scale=spec.head_dim**-0.5 if scale is None else scale,
            soft_cap=soft_cap,
            sink_logits=sink_logits,
            q_sink=q_sink,
            backend=backend,
        )
        if not self.prepared:  # last, so that a call that is wrong in itself is told so
            raise ValueError("attend needs a prepared step: call prepare(new_tokens) before it.")
        out = inference_only(out)  # pools might be differentiated, too
        for own in group.stores:
            stores[own] = stores[own].after_reading(out)
        attended = self.attended + self.config.marks(number, index)
        cache = dataclasses.replace(self, stores=tuple(stores), attended=attended, seen=seen)
        return cache, out.astype(q.dtype)

    def _check_rows(self, group: LayerGroup, q, k, v, *, sink_logits, q_sink) -> None:
        """ValueError unless the operands of `attend` have the shapes that a group takes."""
        spec, dims = group.spec, self.stores[group.stores[0]].pages.dims
        sizes = bind_dims(
            lengths=(self.lengths, "batch"),
            q=(q, "batch tokens q_heads head_dim"),
            k=(k, "batch tokens kv_heads head_dim"),
            v=(v, "batch tokens kv_heads head_dim"),
            sink_logits=(sink_logits, "q_heads"),
            q_sink=(q_sink, "batch tokens q_heads head_dim"),
        )
        for name in ("kv_heads", "head_dim"):
            if sizes[name] != dims[name]:
                raise ValueError(f"k.shape={k.shape}: {name} must be {dims[name]}.")
        if sizes["tokens"] == 0 or sizes["q_heads"] == 0:
            raise ValueError(f"{q.shape=} has no token or no head: it must have at least 1.")
        checkify.debug_check(
            jnp.all(self.pending <= sizes["tokens"]),
            "attend: sequences have {pending} prepared tokens, and q has " + f"{sizes['tokens']}",
            pending=self.pending,
        )
        if sizes["tokens"] > self.config.max_new_tokens:
            raise ValueError(
                f"tokens={sizes['tokens']} must be at most {self.config.max_new_tokens=}."
            )
        if (q_sink is None) != (spec.q_sink_limit is None):
            wanted = "not taken" if spec.q_sink_limit is None else "needed"
            raise ValueError(f"q_sink is {wanted} with sink_positions={spec.sink_positions!r}.")

    def commit(self, accepted: jax.Array, *, _check: bool = True) -> "KVCache":
        """Keeps the first `accepted` of the prepared tokens and drops the rest (roll-back).

        Frees pages that held only dropped tokens, and pages that fell out of a window. With a lossy
        codec, pages that leave the recent span are quantized, unless `attend` has done so.

        Args:
          accepted: `i32[batch]`; more than was prepared counts as all prepared tokens, which is 0
            for a sequence that starved or asked for too many (an error in checked mode).

        Raises:
          ValueError: no step is prepared, `accepted` is not a whole number for each sequence, or
            tracing shows that some layers were attended and others were not.
        """
        if not self.prepared:
            raise ValueError("commit needs a prepared step: call prepare(new_tokens) before it.")
        given, accepted = accepted, counts("accepted", accepted, self.config.batch)
        if _check:
            check_complete(self.seen, len(self.config.layers), given)
            wrong = jnp.argmax(self.attended != 1)
            order = [layer for group in self.config.groups for layer in group.layers]
            checkify.debug_check(
                (self.attended[wrong] == 1) | ~jnp.any(self.pending > 0),
                "commit: layer {layer} was attended {times} times since prepare",
                layer=jnp.asarray(order, jnp.int32)[wrong],
                times=self.attended[wrong],
            )
            checkify.debug_check(
                jnp.all(accepted <= self.pending),
                "commit: accepted {accepted}, prepared {pending}: see starved and too_long",
                accepted=accepted,
                pending=self.pending,
            )
        lengths = self.lengths + jnp.clip(accepted, 0, self.pending)
        step = Committed(self.lengths, self.pending, lengths)
        stores = list(self.stores)
        for own, store in enumerate(stores):
            stores[own] = store.spec.fill.commit(stores, own, step)
        return dataclasses.replace(
            self,
            stores=tuple(store.settle(step, self.config.step_pages) for store in stores),
            lengths=lengths,
            pending=jnp.zeros_like(self.pending),
            attended=jnp.zeros_like(self.attended),
            prepared=False,
        )

    def free(self, mask: jax.Array) -> "KVCache":
        """Ends the sequences of `mask`, `bool[batch]`: releases their pages; their length is 0.

        Raises:
          ValueError: `mask` is not `bool[batch]`, for example numbers of sequences.
        """
        mask = read_mask("mask", mask, self.config.batch)
        return dataclasses.replace(
            self,
            stores=tuple(store.drop(mask) for store in self.stores),
            lengths=jnp.where(mask, 0, self.lengths),
            pending=jnp.where(mask, 0, self.pending),
            starved=self.starved & ~mask,
            too_long=self.too_long & ~mask,
        )

    def fork(self, src: jax.Array | int, dst: jax.Array | int) -> "KVCache":
        """Makes sequence `dst` a copy of `src`: full pages are shared, the unfinished one copied.

        The pages of `dst` are released first. If no page is left for the copy, `dst` ends up empty
        and `starved`. Call it only between steps. `src == dst` does nothing.

        Args:
          src: `i32[n]` or an int, sequences to copy, as they are before the call.
          dst: like `src`, all different (of equal ones the first counts: an error in checked mode);
            entries outside `0 <= dst < batch` are ignored, and so are those whose `src` is (an
            error in checked mode).

        Raises:
          ValueError: a step is prepared and not committed, or numbers are not whole.
        """
        if self.prepared:
            raise ValueError("fork belongs between steps: commit the prepared step before it.")
        src, dst = sequence_numbers("src", src), sequence_numbers("dst", dst)
        bind_dims(src=(src, "forks"), dst=(dst, "forks"))
        size, batch = self.config.page_size, self.config.batch
        known = (src >= 0) & (src < batch)
        acts = (src != dst) & (dst >= 0) & (dst < batch) & known
        checkify.debug_check(
            jnp.all(known | (dst < 0) | (dst >= batch)), "fork: src={src} is out of range", src=src
        )
        earlier = jnp.tri(dst.size, k=-1, dtype=bool) & acts[None]
        again = acts & jnp.any(earlier & (dst[:, None] == dst[None]), axis=1)
        checkify.debug_check(~jnp.any(again), "fork: dst={dst} names a sequence twice", dst=dst)
        acts &= ~again  # pages that two sources give to one sequence would be lost
        src = jnp.clip(src, 0, batch - 1)
        target = jnp.where(acts, dst, batch)  # out of range is dropped
        length = self.lengths[src]
        last = (length // size)[:, None]  # logical page that is unfinished, if any
        copies = acts & (length % size > 0)

        ended = jnp.zeros(self.config.batch, bool).at[target].set(True, mode="drop")
        stores, forks, blocked = [], [], jnp.zeros_like(copies)
        for store in self.stores:
            source = jax.tree.map(lambda table: table[src], store.tables)
            # A store of complete pages only has no unfinished one.
            here = copies & store.spec.span.takes_tokens(last)[:, 0]
            page = jnp.where(here[:, None], look_up(source, last), NULL_PAGE)
            held = entries(source)
            shared = jnp.where((held == page) | ~acts[:, None], NULL_PAGE, held)
            store = store.retain(shared).drop(ended)
            blocked |= jnp.cumsum(here, dtype=jnp.int32) > store.pool.free_pages
            stores.append(store)
            forks.append(Fork(source, page, last, here))
        starved = copies & blocked
        lives = jnp.where(starved, self.config.batch, target)
        return dataclasses.replace(
            self,
            stores=tuple(
                store.fork(fork, fork.copies & ~starved, starved, lives)
                for store, fork in zip(stores, forks, strict=True)
            ),
            lengths=self.lengths.at[target].set(jnp.where(starved, 0, length), mode="drop"),
            pending=self.pending.at[target].set(0, mode="drop"),
            starved=self.starved.at[target].set(starved, mode="drop"),
            too_long=self.too_long.at[target].set(False, mode="drop"),
        )

    @property
    def pages_in_use(self) -> jax.Array:
        """Pages that hold something in each store, `i32[stores]`; a shared page counts once."""
        return jnp.stack([store.pages_in_use for store in self.stores])

    @property
    def page_bytes(self) -> list[int]:
        """Bytes of one page of each store, summed over the layers that share it."""
        return [store.page_bytes for store in self.stores]

    @property
    def bytes_reserved(self) -> int:
        """Bytes of every array of the cache."""
        return sum(x.nbytes for x in jax.tree.leaves(self))


@functools.partial(jax.jit, static_argnames="config")
def _create(means: tuple[jax.Array | None, ...], *, config: CacheConfig) -> KVCache:
    """An empty cache, by one program: made one by one, each shape of array would compile its own.

    No array is used twice: JAX refuses to donate a state that holds the same buffer twice.
    """
    return KVCache(
        stores=tuple(
            create_store(store, config.batch, mean)
            for store, mean in zip(config.stores, means, strict=True)
        ),
        lengths=jnp.zeros(config.batch, jnp.int32),
        pending=jnp.zeros(config.batch, jnp.int32),
        starved=jnp.zeros(config.batch, bool),
        too_long=jnp.zeros(config.batch, bool),
        attended=jnp.zeros(len(config.layers), jnp.int32),
        config=config,
    )
