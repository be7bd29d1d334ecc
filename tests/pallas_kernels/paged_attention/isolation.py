"""Checks that a token which is not finite changes nothing in rows that do not see it."""

import dataclasses
import functools

import jax
import numpy as np

from pallas_kernels.rule import CAUSAL, Rule
from tests.pallas_kernels.paged_attention.paged_cases import LAYER, Case

POISONS = (np.nan, np.inf, -np.inf)
CHANNEL = 1  # of a value, the only one that is spoiled; a key is spoiled as a whole


def poison(case: Case, side: str, positions, bad: float) -> Case:
    """Puts `bad` into the key or value at one position of each sequence; exact pages only."""
    page_size, width = case.pages.dims["page_size"], case.segment.table.shape[1]
    positions = np.asarray(positions)
    page = np.asarray(case.segment.table)[np.arange(len(positions)), positions // page_size % width]
    channel = CHANNEL if side == "v" else slice(None)
    pool = case.pages.arrays[side]
    pool = pool.at[LAYER, page, :, positions % page_size, channel].set(bad)
    pages = dataclasses.replace(case.pages, arrays=case.pages.arrays | {side: pool})
    return dataclasses.replace(case, pages=pages)


def sees(case: Case, positions, *, window=None, sink_tokens=0, lag=None) -> np.ndarray:
    """Which queries see the position of their sequence, `bool[batch, q_tokens]`."""
    i, j = np.asarray(case.queries.positions), np.asarray(positions)[:, None]
    seen = (i >= 0) & (j <= i)
    if window is not None:
        seen &= (i - j < window) | (j < sink_tokens)
    if lag is not None:
        distance = i // lag.page_size - j // lag.page_size
        seen &= (distance >= lag.least) & (lag.most is None or distance < lag.most)
    return seen


def check_isolation(case: Case, attend, positions, rule: Rule = CAUSAL, *, tolerance=0.0):
    """Poisons each sequence at its position, key then value, and compares with the clean case.

    Rows that do not see the position must be unchanged: to the bit, or within the `tolerance` of a
    kernel that attends twice and may round otherwise the second time. Rows that do must tell: a
    key makes them NaN as a whole, a value one channel of them.
    """
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance)
    fields = {name: getattr(rule, name) for name in ("window", "sink_tokens", "lag")}
    seen = sees(case, positions, **fields)
    assert seen.any() and not seen.all()
    clean = jax.tree.map(np.asarray, attend(case))
    assert np.isfinite(clean.out).all()
    for side in "kv":
        for bad in POISONS if side == "v" else (np.nan,):
            out, lse = map(np.asarray, attend(poison(case, side, positions, bad)))
            same(out[~seen], clean.out[~seen])
            same(lse[~seen], clean.lse[~seen])
            if side == "k":
                assert np.isnan(out[seen]).all() and np.isnan(lse[seen]).all()
                continue
            spoiled, others = out[seen][..., CHANNEL], np.delete(out[seen], CHANNEL, axis=-1)
            assert not np.isfinite(spoiled).any()
            same(others, np.delete(clean.out[seen], CHANNEL, axis=-1))
            same(lse[seen], clean.lse[seen])


def attend_by(**options):
    """`Case.attend` with options."""
    return functools.partial(Case.attend, **options)
