"""Predicts a cache's bytes before anything is allocated."""

import dataclasses
import math

import jax

from jaxkv.abstract_cache import abstract_cache
from jaxkv.config import CacheConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of a cache."""

    groups: tuple[int, ...]  # bytes of each layer group's arrays
    total: int  # bytes of the whole cache, state that groups share included


def plan(config: CacheConfig) -> Plan:
    """Returns the bytes that `KVCache.create(config)` would allocate, exactly.

    Raises:
      ValueError: the configuration is not valid.
    """
    abstract = abstract_cache(config)
    of_group = lambda group: _bytes([abstract.stores[number] for number in group.stores])
    return Plan(groups=tuple(map(of_group, abstract.config.groups)), total=_bytes(abstract))


def _bytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
