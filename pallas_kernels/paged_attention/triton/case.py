"""Static facts of a call that all its kernels share; tile sizes are in `tile_sizes`."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.layouts.token_major import FactorPlace
from pallas_kernels.paged_attention.triton.readers import Reader
from pallas_kernels.paged_attention.triton.span import Bounds, SpanPages, span_pages
from pallas_kernels.rule import Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a call reads, how, and by which rule."""

    k: Reader
    v: Reader
    k_factors: tuple[FactorPlace, ...]  # scale, then zero if there is one; () for exact pages
    v_factors: tuple[FactorPlace, ...]  # like k_factors
    page_size: int
    group: int  # query heads per kv head
    q_tokens: int
    score_scale: float  # factor of scores, log2(e) included; 1 where q has been scaled by it
    rule: Rule
    sink_pages: int  # slots of the table that stand before the ring
    soft_cap: float | None
    asm: bool  # compiled for a GPU, with inline PTX; not interpreted

    @property
    def rows(self) -> int:
        """Query rows per kv head."""
        return self.group * self.q_tokens

    @property
    def masks_rows(self) -> bool:
        """Whether a row may fail to see a key that another row sees."""
        return self.q_tokens > 1

    def rows_see(self, q_position, positions):
        """Whether queries see tokens of the span, broadcast."""
        return self.rule.seen(q_position, positions, pinned=self.sink_pages * self.page_size)

    def find_span(self, bounds: Bounds) -> SpanPages:
        """Pages that some query of a sequence sees."""
        return span_pages(bounds, self.rule, self.page_size)

    def table_slot(self, logical, table_ref):
        """The table's slot for a logical page; slots of sink pages come before the ring."""
        width = table_ref.shape[1]
        if not self.sink_pages:
            return logical % width
        ring = self.sink_pages + logical % (width - self.sink_pages)
        return jnp.where(logical < self.sink_pages, logical, ring)
