"""Which keys a query sees, said once: as a mask, as bounds of a read, as pages to keep.

Every backend takes its masks and the bounds of its reads from `Rule`; the cache sizes its page
tables and frees pages by it. Methods do arithmetic only, so their arguments may be ints, arrays, or
values inside a kernel.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_types, whole_number
from pallas_kernels.shapes import cdiv, larger


class PageLag(NamedTuple):
    """Limits how many pages a key's page lies behind the query's: `least <= distance < most`.

    With a lossy codec recent pages are read exactly and older ones as codes. Which of the two
    applies depends on positions alone, never on how many tokens each step added.
    """

    page_size: int
    least: int = 0
    most: int | None = None

    def serves(self, q_position: jax.Array, k_position: jax.Array) -> jax.Array:
        """Whether the distance in pages from key to query is within the limits, broadcast."""
        distance = q_position // self.page_size - k_position // self.page_size
        near = True if self.most is None else distance < self.most
        return (distance >= self.least) & near

    def first_page(self, q_position):
        """Oldest page that a query at `q_position` reads; may be negative. `most` must be set."""
        assert self.most is not None
        return q_position // self.page_size - self.most + 1

    def stop_page(self, q_position):
        """One past the newest page that a query at `q_position` reads; may be negative."""
        return q_position // self.page_size - self.least + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A query at position `i` sees a key at position `j` iff all of these hold:

    - `j <= i` (causal);
    - `i - j < window`, or `j < sink_tokens`, or there is no window;
    - `lag`, if given, serves the pair.

    The window includes the query itself (Mistral). Sink tokens are the first tokens of a sequence;
    they stay visible behind the window (StreamingLLM, arXiv:2309.17453).

    With `stride`, a key is an entry that stands for `stride` tokens: entry `g` is complete with
    token `(g + 1) * stride - 1` and has that token's position (DeepSeek V4's compressed entries).
    The bounds that methods return count entries; with `stride` 1 an entry is a token and `g == j`.

    Attributes:
      window: tokens that a query sees, itself included; None for all.
      sink_tokens: number of first tokens that stay visible behind the window.
      lag: how many pages behind the query's own page a key must lie; None for any number.
      stride: tokens per entry; must be 1 with a lag.
    """

    window: int | None = None
    sink_tokens: int = 0
    lag: PageLag | None = None
    stride: int = 1

    def checked(self) -> "Rule":
        """Returns itself; raises ValueError naming a value that makes no sense."""
        if self.window is not None:
            whole_number("window", self.window, least=1, hint=", or None for all tokens")
        whole_number("sink_tokens", self.sink_tokens, least=0)
        whole_number("stride", self.stride, least=1)
        if self.lag is not None:
            check_types(lag=(self.lag, PageLag))
            whole_number("lag.page_size", self.lag.page_size, least=1)
            whole_number("lag.least", self.lag.least, least=0)
            if self.lag.most is not None:
                whole_number("lag.most", self.lag.most, least=0)
        if self.stride > 1 and self.lag is not None:
            raise ValueError(f"stride={self.stride} must be 1 with a lag: a lag counts tokens.")
        return self

    def position(self, entry):
        """Position of an entry: that of its last token."""
        return entry if self.stride == 1 else (entry + 1) * self.stride - 1

    def seen(self, q_position, entry, *, pinned: int = 0) -> jax.Array:
        """Whether a query sees an entry, broadcast.

        Args:
          q_position: `i32`, position of the query.
          entry: `i32`, number of the entry (its position, with `stride` 1).
          pinned: entries below this number are in pinned sink pages, where the lag does not apply.
        """
        j = self.position(entry)
        sees = j <= q_position
        if self.window is not None:
            near = q_position - j < self.window
            if self.sink_tokens:
                near = near | (j < self.sink_tokens)
            sees = sees & near
        if self.lag is not None:
            served = self.lag.serves(q_position, j)
            if pinned:
                served = served | (entry < pinned)
            sees = sees & served
        return sees

    def needs_mask(self, q_tokens: int) -> bool:
        """Whether a query may fail to see an entry within the bounds of `seen_by_some`.

        A single query sees all of them, unless sinks leave a gap before its window.
        """
        return q_tokens > 1 or (self.window is not None and self.sink_tokens > 0)

    def window_start(self, q_position):
        """First entry in the window of a query at `q_position`; may be negative."""
        assert self.window is not None
        oldest = q_position - self.window + 1
        return oldest if self.stride == 1 else cdiv(oldest + 1, self.stride) - 1

    def causal_stop(self, q_position):
        """One past the newest entry that a query at `q_position` sees."""
        return (q_position + 1) // self.stride if self.stride > 1 else q_position + 1

    def seen_by_some(self, q_start, q_lens, start, stop) -> tuple[jax.Array, jax.Array]:
        """Narrows `start <= g < stop` to bounds of the entries that some query sees.

        Args:
          q_start: `i32[batch]`, position of the first query.
          q_lens: `i32[batch]`, number of queries; if 0, the result is empty.
          start: `i32[batch]`.
          stop: `i32[batch]`.
        """
        last = q_start + q_lens - 1
        stop = jnp.minimum(stop, self.causal_stop(last))
        if self.window is not None and not self.sink_tokens:
            start = jnp.maximum(start, self.window_start(q_start))
        if self.lag is not None:
            size = self.lag.page_size
            if self.lag.most is not None:
                start = jnp.maximum(start, self.lag.first_page(q_start) * size)
                if self.lag.most <= self.lag.least:  # a store of nothing but sink pages
                    stop = start
            if self.lag.least:
                stop = jnp.minimum(stop, self.lag.stop_page(last) * size)
        return start, jnp.where(q_lens > 0, jnp.maximum(stop, start), start)

    def seen_by_all(self, q_start, q_lens, start, stop):
        """Narrows entries `start <= g < stop` to those that every query sees.

        The result may be empty with `stop < start`. Sinks behind a window are left out.
        """
        last = q_start + q_lens - 1
        stop = jnp.minimum(stop, self.causal_stop(q_start))
        if self.window is not None:
            start = jnp.maximum(start, self.window_start(last))
        if self.lag is not None:
            size = self.lag.page_size
            if self.lag.most is not None:
                start = jnp.maximum(start, self.lag.first_page(last) * size)
            stop = jnp.minimum(stop, self.lag.stop_page(q_start) * size)
        return start, stop

    def first_page(self, q_position, page_size: int):
        """Oldest page that queries at `q_position` or later read, apart from sinks.

        None where they read from the sequence's beginning.
        """
        first = None
        if self.window is not None:  # no later query sees an entry that has left the window
            first = larger(self.window_start(q_position), 0) // page_size
        if self.lag is not None and self.lag.most is not None:
            near = self.lag.first_page(q_position)
            first = near if first is None else larger(first, near)
        return first

    def most_pages(self, q_tokens: int, page_size: int) -> int | None:
        """Most pages that `q_tokens` consecutive queries read, wherever in a page they begin.

        Sink pages are not counted. None where the number grows with the sequence.
        """
        bounds = []
        least = 0 if self.lag is None else self.lag.least
        if self.window is not None:
            entries = cdiv(self.window + q_tokens - 1, self.stride)
            bounds.append(cdiv(entries - 1, page_size) + 1 - least)
        if self.lag is not None and self.lag.most is not None:
            if self.lag.most <= least:  # a store of nothing but sink pages
                return 0
            bounds.append(self.lag.most - least + cdiv(q_tokens - 1, page_size))
        return max(min(bounds), 0) if bounds else None


CAUSAL = Rule()  # every key up to the query's own
