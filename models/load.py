"""Loads a model: opens its checkpoint and fills a `Decoder` with the weights."""

from pathlib import Path

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.load_decoder import Progress, load_decoder
from models.checkpoints.open import open_checkpoint
from models.decoder import Decoder
from models.platform_defaults import dtype_or_default, scan_or_default


def load(
    source: str | Path | Checkpoint,
    *,
    dtype: str | None = None,
    scan: bool | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Loads a model.

    Args:
      source: a path or name, as `open_checkpoint` takes it, or a checkpoint that is already open.
      dtype: of weights and activations; None for float32 on a CPU, bfloat16 elsewhere.
      scan: True scans over stacked layers, so that compile time does not grow with depth; False
        unrolls them; None unrolls except on a TPU. On CPUs and GPUs a scan copies each layer's
        weights before it reads them, which is more than half of a decode step on an H100.
      progress: called with the bytes of weights read so far and the bytes there are in all.

    Raises:
      CheckpointError: the message is one line that names the file or tensor and says what is wrong.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    return load_decoder(
        checkpoint,
        dtype=dtype_or_default(dtype),
        scan=scan_or_default(scan),
        progress=progress,
    )
