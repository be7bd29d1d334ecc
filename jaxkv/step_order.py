"""Which layers a step has attended, as far as tracing shows, where a check costs nothing.

This is no part of the pytree, whose structure must not change in a scan over layers. So it is lost,
and None, where a cache crosses the border of a jitted function, a scan or the like; there checked
mode counts.
"""

from collections.abc import Sequence
from typing import Any

import jax.core
import numpy as np

Seen = frozenset[int] | None  # numbers of the layers attended since prepare; None if unknown
MOST_NAMED = 5


def attend_layer(seen: Seen, layer: int | None) -> Seen:
    """Adds a layer, None for a traced one; raises ValueError if the step has attended it before."""
    if seen is None or layer is None:
        return None
    if layer in seen:
        raise ValueError(f"layer {layer} is attended twice in one step.")
    return seen | {layer}


def check_complete(seen: Seen, layers: int, accepted: Any) -> None:
    """Raises ValueError if tokens are kept that some layer did not attend.

    A step that has attended no layer at all is a dry run of the allocator, and one that keeps no
    token is dropped: both pass.

    Args:
      seen: the layers that were attended.
      layers: number of layers.
      accepted: `[batch]`, tokens to keep, as the caller gave them.
    """
    if not seen:
        return
    missing = sorted(set(range(layers)) - seen)
    if missing and not _is_zero(accepted):
        raise ValueError(
            f"commit keeps tokens that {_name(missing)} did not attend: call attend once for every "
            "layer between prepare and commit."
        )


def _is_zero(accepted: Any) -> bool:
    """Whether no token is kept, as far as values are known."""
    parts = accepted if isinstance(accepted, list | tuple) else [accepted]
    if any(isinstance(part, jax.core.Tracer) for part in parts):
        return False
    return not np.any(np.asarray(accepted) > 0)


def _name(layers: Sequence[int]) -> str:
    more = ", ..." if len(layers) > MOST_NAMED else ""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers[:MOST_NAMED]))}{more}"
