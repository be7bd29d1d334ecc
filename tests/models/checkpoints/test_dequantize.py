"""Blocks dequantized in runs of our own give the gguf package's values, to the bit."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as expected

from models.checkpoints import dequantize as module


@pytest.mark.parametrize("blocks", [1, 3, 4, 11])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q6_K", "Q4_K"])
def test_values_are_those_of_the_package(kind, blocks, monkeypatch):
    kind = GGMLQuantizationType[kind]
    values, size = GGML_QUANT_SIZES[kind]
    monkeypatch.setattr(module, "VALUES_AT_ONCE", 4 * values)  # runs of 4 blocks and a shorter one
    raw = np.random.default_rng(blocks).integers(0, 60, blocks * size).astype(np.uint8)
    found = module.dequantize(raw, kind)
    assert found.shape == (blocks * values,) and found.dtype == np.float32
    np.testing.assert_array_equal(found, expected(raw.reshape(blocks, size), kind).reshape(-1))


def test_damaged_scales_give_their_values_without_a_warning():
    raw = np.full(34, 0xFF, np.uint8)  # the scale, a float16, is NaN
    assert np.isnan(module.dequantize(raw, GGMLQuantizationType.Q8_0)).all()


def test_a_kind_that_the_package_lacks_is_said():
    with pytest.raises(NotImplementedError):
        module.dequantize(np.zeros(36, np.uint8), GGMLQuantizationType.Q8_1)
