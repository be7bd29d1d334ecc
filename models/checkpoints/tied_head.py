"""Whether a checkpoint's output matrix is its embedding, by what the file holds."""

import dataclasses

import numpy as np

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.tensor_names import Naming
from models.config import DecoderConfig

ROWS = 4096  # compared at a time


def as_stored(config: DecoderConfig, checkpoint: Checkpoint, naming: Naming) -> DecoderConfig:
    """The config, not tied if the file has an output matrix that is not its embedding.

    `tie_word_embeddings` is a promise about the file, and fine-tuned models break it: the matrix
    that they store is the one they were trained with. transformers 5 decides likewise.
    """
    if not config.tie_embeddings or naming.embedding == naming.head:
        return config
    both = naming.embedding, naming.head
    if not all(name in checkpoint.tensors for name in both) or _equal(checkpoint, *both):
        return config
    return dataclasses.replace(config, tie_embeddings=False)


def _equal(checkpoint: Checkpoint, *names: str) -> bool:
    """Whether two matrices have the same shape and values."""
    if checkpoint.shape(names[0]) != checkpoint.shape(names[1]):
        return False
    a, b = (checkpoint.read(name) for name in names)
    part = lambda x, row: x[row : row + ROWS].astype(np.float32)
    same = all(np.array_equal(part(a, row), part(b, row)) for row in range(0, len(a), ROWS))
    for name in names:
        checkpoint.tensors[name].release()
    return same
