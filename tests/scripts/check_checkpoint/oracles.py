"""Where the oracles are, and how far their logits are from a model's."""

from pathlib import Path

import numpy as np

import models
from scripts import check_checkpoint

ROOT = Path(__file__).parents[3]
ORACLES = ROOT / "tests" / "oracles"
# Float32 rounding of logits whose deviation is near 1; what is wrong is off by more than 1e-3.
ROUNDING = 1e-4
CHUNK = 13  # tokens, on no page's border


def largest_difference(folder, *, page_size=8, scan=False):
    """As the command's, in chunks of two shapes, as each is compiled; the last third one by one."""
    model = models.load(folder, dtype="float32", scan=scan)
    stored = np.load(folder / "io.npz")
    tokens, logits = stored["input_ids"], stored["logits"]
    whole = tokens.shape[1] * 2 // 3 // CHUNK
    chunks = [CHUNK] * whole + [1] * (tokens.shape[1] - CHUNK * whole)
    assert whole
    args = check_checkpoint.Args(dir=folder, page_size=page_size)
    return check_checkpoint.largest_difference(model, tokens, logits, chunks, args)


def prefill(folder, *, page_size=8):
    """The same difference after one prefill of all tokens; layers are unrolled."""
    model = models.load(folder, dtype="float32", scan=False)
    stored = np.load(folder / "io.npz")
    tokens, logits = stored["input_ids"], stored["logits"]
    args = check_checkpoint.Args(dir=folder, page_size=page_size)
    return check_checkpoint.largest_difference(model, tokens, logits, [tokens.shape[1]], args)
