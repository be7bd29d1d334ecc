"""Facts about the device that a program is compiled for, asked of JAX in one place."""

import jax

PLATFORMS = ("cpu", "gpu", "tpu")
H100_SMS = 132  # assumed where JAX sees no GPU


def current_platform(named: str | None = None) -> str:
    """The named platform, or JAX's default: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: another name.
    """
    if named is not None and named not in PLATFORMS:
        raise ValueError(f"platform={named!r} must be one of {', '.join(PLATFORMS)}.")
    return named or jax.default_backend()


def count_sms() -> int:
    """Number of streaming multiprocessors of the GPU; an H100's number where there is no GPU."""
    return getattr(jax.devices()[0], "core_count", H100_SMS)


def converts_float8() -> bool:
    """Whether the GPU has an instruction that converts e4m3 to float16 (Ada, Hopper and later)."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return "." in capability and tuple(map(int, capability.split("."))) >= (8, 9)
