"""What the GPU kernels of a call share: static facts, where pages stand, how tiles are turned."""

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from pallas_kernels.paged_attention.gpu_dequant import Reader
from pallas_kernels.paged_attention.gpu_split import SpanPages, span_pages
from pallas_kernels.rule import Rule

if TYPE_CHECKING:  # codecs lie above the kernels
    from jaxkv.codecs.token_major import FactorPlace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is static in a call, beside the config."""

    k: Reader
    v: Reader
    k_factors: "tuple[FactorPlace, ...]"
    v_factors: "tuple[FactorPlace, ...]"
    has_mean: bool
    page_size: int
    group: int
    q_tokens: int
    score_scale: float  # what is not in q already, log2(e) included
    rule: Rule
    sink_pages: int  # slots of the table before the ring's
    soft_cap: float | None
    direct: bool  # a program a sequence, no parts to merge
    asm: bool

    @property
    def rows(self) -> int:
        return self.group * self.q_tokens

    @property
    def masks_rows(self) -> bool:
        """Whether rows see different keys of a span."""
        return self.rule.needs_mask(self.q_tokens)


def find_span(x, case: Case) -> SpanPages:
    """Pages that some query of a sequence sees: `x` has its numbers by name."""
    return span_pages(
        x["q_start"],
        x["kv_start"],
        x["kv_stop"],
        page_size=case.page_size,
        rule=case.rule,
        sink_span=(x["sink_start"], x["sink_stop"]) if case.sink_pages else None,
    )


def read_span(refs, b, case: Case) -> SpanPages:
    """`find_span` of sequence `b`, from refs."""
    names = ("q_start", "kv_start", "kv_stop", "sink_start", "sink_stop")
    return find_span({name: refs[name][b] for name in names if name in refs}, case)


def table_slot(logical, refs, case: Case):
    """Where the table has a logical page: sink pages stand before the ring."""
    width = refs["table"].shape[1]
    if not case.sink_pages:
        return logical % width
    ring = case.sink_pages + logical % (width - case.sink_pages)
    return jnp.where(logical < case.sink_pages, logical, ring)


@dataclasses.dataclass(frozen=True)
class Axes:
    """Orientation of scores and outputs: tokens (or dims) by rows, or rows by them."""

    transposed: bool

    @property
    def tokens(self) -> int:
        return 0 if self.transposed else 1

    def by_row(self, x):
        return x[None, :] if self.transposed else x[:, None]

    def by_token(self, x):
        return x[:, None] if self.transposed else x[None, :]

    def scores(self, k, q):
        """Of keys `[tokens, columns]` and queries `[rows, columns]`."""
        return dot(k, q.T) if self.transposed else dot(q, k.T)

    def outputs(self, p, v):
        """Of probabilities and values in this orientation."""
        return dot(v, p) if self.transposed else dot(p, v)

    def shape(self, rows, n):
        return (n, rows) if self.transposed else (rows, n)

    # A sum over tokens. Where warps share a row's tokens, adding them up is a trip through shared
    # memory: each place of a block then keeps its own sum, and one trip at the end is enough.

    def no_sum(self, rows, block):
        return jnp.zeros((rows,) if self.transposed else (rows, block), jnp.float32)

    def add(self, total, shrink, x):
        if self.transposed:
            return total * shrink + jnp.sum(x, axis=0)
        return total * shrink[:, None] + x

    def total(self, total):
        return total if self.transposed else jnp.sum(total, axis=1)


def dot(a, b):
    """Product with float32 sums; of float32 operands in full precision."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def row_index(rows: int, case: Case):
    """Query token and head of a kv head's rows; padding rows repeat the last one."""
    row = jnp.minimum(jnp.arange(rows, dtype=jnp.int32), case.rows - 1)
    if case.q_tokens == 1:
        return jnp.zeros_like(row), row
    return row // case.group, row % case.group
