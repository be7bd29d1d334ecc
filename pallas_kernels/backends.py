"""Which implementation of an op serves a call: named or chosen, never swapped silently.

A backend of an op is a module with a function named like the op and a function `refusal(**call)`,
which returns in words why the backend does not serve a call, or None if it does.
"""

import contextlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Literal, get_args

from pallas_kernels.device import current_platform

Backend = Literal["xla", "reference", "gpu", "tpu"]
NEEDS = {"gpu": "an NVIDIA GPU", "tpu": "a TPU"}  # other backends run anywhere

_interpreted = False


def interpreted() -> bool:
    """Whether kernels run in Pallas's interpreter."""
    return _interpreted


@contextlib.contextmanager
def interpret_kernels() -> Iterator[None]:
    """Lets backend="gpu" run anywhere, interpreted and very slowly: for tests without a GPU.

    Functions that were jitted outside keep their compiled programs: trace them anew inside.
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
    modules: Mapping[Backend, ModuleType],
    platform: str | None = None,
    **call,
) -> Backend:
    """Returns the backend that serves `op`: the named one, or the platform's best.

    Args:
      op: its name, for the message.
      backend: None chooses the platform's own backend if it serves the call, else "xla".
      modules: the op's backends.
      platform: "cpu", "gpu" or "tpu"; None asks JAX.
      call: facts about the call, passed to each module's `refusal`.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the named backend does not serve this op, or not this call.
    """
    platform = current_platform(platform)

    def refusal(name: Backend) -> str | None:
        if name in NEEDS and platform != name and not interpreted():
            return f"backend={name!r} needs {NEEDS[name]}, and JAX runs on {platform!r}"
        return modules[name].refusal(**call)

    if backend is None:
        for name in modules:
            if str(name) == platform and refusal(name) is None:
                return name
        return "xla"
    if backend not in get_args(Backend):
        raise ValueError(f"{backend=} must be one of {', '.join(get_args(Backend))}.")
    if backend not in modules:
        served = ", ".join(modules)
        raise NotImplementedError(f"{op} has no {backend!r} backend; it runs on: {served}.")
    if (reason := refusal(backend)) is not None:
        raise NotImplementedError(f"{op}: {reason}.")
    return backend
