"""Models by their name on the Hugging Face hub, with a stand-in for its package: no network."""

import json
import sys
import types

import pytest

from models.checkpoints.hub import is_hub_name
from models.checkpoints.open import open_checkpoint
from models.errors import CheckpointError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for `huggingface_hub`; `hub.asked` are the calls."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    module = types.SimpleNamespace(asked=asked, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_a_name_of_the_hub_is_fetched_and_opened(hub, tmp_path):
    said = []
    checkpoint = open_checkpoint("org/some-model.v2", say=said.append)
    assert checkpoint.path == tmp_path and checkpoint.config["model_type"] == "llama"
    assert said == ["Fetching org/some-model.v2 from the Hugging Face hub."]
    ((name, patterns),) = hub.asked
    assert name == "org/some-model.v2" and {"*.json", "*.safetensors"} <= set(patterns)
    assert not any("bin" in pattern or "*" == pattern for pattern in patterns)  # no pickles


def test_a_path_that_exists_is_never_fetched(hub, tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="config.json"):
        open_checkpoint("org/model")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["model", "a/b/c", "/org/model", "org/", "../x", "org/m.gguf", ""])
def test_other_paths_are_no_names(hub, name):
    assert not is_hub_name(name)
    with pytest.raises(CheckpointError):
        open_checkpoint(name)
    assert hub.asked == []


def test_without_the_package_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # makes the import fail
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("org/model")
    assert str(caught.value) == (
        "org/model: no such file or folder; to fetch it from the Hugging Face hub, "
        "pip install huggingface_hub."
    )


def test_a_failed_download_is_one_line(hub):
    def fail(name, **_):
        raise RuntimeError("404\nRepository not found")

    hub.snapshot_download = fail
    with pytest.raises(CheckpointError, match="^org/model: Hugging Face hub: .*404 Repository"):
        open_checkpoint("org/model")
