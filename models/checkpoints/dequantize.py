"""Dequantizes the blocks of GGUF files; the `gguf` package knows the formats."""

from typing import Any

import numpy as np

from models.errors import import_extra

VALUES_AT_ONCE = 1 << 17  # they and the package's temporaries stay in a core's cache


def dequantize(raw: np.ndarray, kind: Any) -> np.ndarray:
    """The values, `f32[n]`, of whole quantized blocks, `u8[bytes]`.

    The `gguf` package works on 16 rows at a time, which are short in small models. Blocks do not
    depend on each other, so it gets a row of many blocks instead: the same values in half the time.

    Args:
      raw: the blocks' bytes.
      kind: their `gguf.GGMLQuantizationType`.

    Raises:
      NotImplementedError: the gguf package can't dequantize this kind.
    """
    gguf = import_extra("gguf")
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    values = np.empty(raw.size // block_bytes * block, np.float32)
    blocks = max(1, VALUES_AT_ONCE // block)
    rows = (raw[at : at + blocks * block_bytes] for at in range(0, raw.size, blocks * block_bytes))
    done = 0
    with np.errstate(all="ignore"):  # a damaged scale gives NaN
        for row in rows:
            part = gguf.quants.dequantize(row[None], kind)[0]
            values[done : done + part.size] = part
            done += part.size
    return values
