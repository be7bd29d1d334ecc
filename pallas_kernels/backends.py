"""Which implementation of an op serves a call: named or chosen, never swapped silently."""

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import jax

Backend = Literal["xla", "reference", "gpu", "tpu"]

_interpreted = False


def interpreted() -> bool:
    """Whether kernels run in Pallas's interpreter."""
    return _interpreted


@contextlib.contextmanager
def interpret_kernels() -> Iterator[None]:
    """Lets backend="gpu" run anywhere, interpreted and very slowly: for tests without a GPU.

    Programs that were compiled outside stay as they are: trace anew inside.
    """
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before


def choose_backend(
    op: str,
    backend: Backend | None,
    implemented: tuple[Backend, ...],
    platform: str | None = None,
    gpu_refusal: str | None = None,
) -> Backend:
    """Returns the backend that serves `op`: the named one, or the platform's best.

    Args:
      op: name, for the message.
      backend: None chooses by platform among `implemented`.
      implemented: backends that the op has for this case.
      platform: "cpu", "gpu" or "tpu"; None asks JAX.
      gpu_refusal: why "gpu" does not serve this call, in words; None if it does.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the named backend does not serve this op, or not this call.
    """
    if gpu_refusal is not None:
        if backend == "gpu":
            raise NotImplementedError(f"{op}: {gpu_refusal}.")
        implemented = tuple(name for name in implemented if name != "gpu")
    if backend is None:
        platform = platform or jax.default_backend()
        return platform if platform in implemented else "xla"  # type: ignore[return-value]
    if backend not in get_args(Backend):
        raise ValueError(f"{backend=} must be one of {', '.join(get_args(Backend))}.")
    if backend not in implemented:
        served = ", ".join(implemented)
        raise NotImplementedError(f"{op} has no {backend!r} backend; it runs on: {served}.")
    return backend
