"""The float type and the form of the layers that a model gets if its user names none."""

from pallas_kernels.device import current_platform


def dtype_or_default(dtype: str | None) -> str:
    """`dtype`; for None float32 on a CPU, bfloat16 elsewhere."""
    return dtype or ("float32" if current_platform() == "cpu" else "bfloat16")


def scan_or_default(scan: bool | None) -> bool:
    """`scan`; for None True on a TPU alone, as a scan copies weights on CPUs and GPUs."""
    return current_platform() == "tpu" if scan is None else scan
