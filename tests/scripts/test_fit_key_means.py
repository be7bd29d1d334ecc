"""scripts/fit_key_means.py: the means of every layer, in a file."""

from pathlib import Path

import numpy as np
import pytest

from scripts import fit_key_means


def test_every_layers_means_are_saved(folder, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "means.npz"
    text.write_text("Some text. " * 10)
    args = fit_key_means.Args(out=out, model=str(folder), text=text, tokens=50)
    assert fit_key_means.main(args) == 0
    with np.load(out) as means:
        assert sorted(means) == ["layer_0", "layer_1", "layer_2"]
        assert all(mean.shape == (2, 16) and np.isfinite(mean).all() for mean in means.values())
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(out=Path("means.txt")), "--out means.txt: must be an .npz file in a folder"),
        (dict(tokens=1), "--tokens 1 must be at least 2"),
    ],
)
def test_bad_arguments_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        fit_key_means.main(fit_key_means.Args(**dict(out=tmp_path / "means.npz") | change))
