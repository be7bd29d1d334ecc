"""Finds the layers of a repeating pattern in the groups of a cache."""

import dataclasses

from jaxkv import CacheConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """A place of the pattern. Its layer in repeat `r` is number `first + r * stride` of `group`."""

    group: int
    first: int
    stride: int  # how many places of the pattern share the group


def pattern_places(cache: CacheConfig, period: int, repeats: int) -> list[Place]:
    """Finds the `period` places of a pattern that repeats `repeats` times.

    Raises:
      ValueError: the cache keeps layers in different ways that stand at one place of the pattern.
    """
    located = [cache.locate(layer) for layer in range(period * repeats)]
    groups = [group for group, _ in located[:period]]
    places = [Place(group, first, groups.count(group)) for group, first in located[:period]]
    for layer, found in enumerate(located):
        place = places[layer % period]
        if found != (place.group, place.first + layer // period * place.stride):
            raise ValueError(
                f"layer {layer} is kept unlike layer {layer % period} (an exact first or last "
                f"layer?), but a scan runs both as one: use scan=False."
            )
    return places
