"""Which implementation of an op serves a call: named or chosen, never swapped silently."""

from typing import Literal, get_args

import jax

Backend = Literal["xla", "reference", "gpu", "tpu"]


def choose_backend(
    op: str, backend: Backend | None, implemented: tuple[Backend, ...], platform: str | None = None
) -> Backend:
    """Returns the backend that serves `op`: the named one, or the platform's best.

    Args:
      op: name, for the message.
      backend: None chooses by platform among `implemented`.
      implemented: backends that the op has for this case.
      platform: "cpu", "gpu" or "tpu"; None asks JAX.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the named backend does not serve this op.
    """
    if backend is None:
        platform = platform or jax.default_backend()
        return platform if platform in implemented else "xla"  # type: ignore[return-value]
    if backend not in get_args(Backend):
        raise ValueError(f"{backend=} must be one of {', '.join(get_args(Backend))}.")
    if backend not in implemented:
        served = ", ".join(implemented)
        raise NotImplementedError(f"{op} has no {backend!r} backend; it runs on: {served}.")
    return backend
