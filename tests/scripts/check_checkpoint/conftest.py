"""The command run in this process, and copies of oracles to damage."""

import json
import shutil
import sys

import jax
import pytest

from scripts import check_checkpoint
from scripts.shared.command import run_command
from tests.scripts.check_checkpoint.oracles import ORACLES


@pytest.fixture(autouse=True)
def settings():
    """Restores the matmul precision that the script sets."""
    before = jax.config.values["jax_default_matmul_precision"]
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture
def check(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code and what it wrote."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_checkpoint.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_command(check_checkpoint.main, check_checkpoint.Args)
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return run


@pytest.fixture
def differences(check):
    """Runs the command; returns its exit code and its two figures."""

    def run(*arguments):
        code, out, err = check(*arguments)
        assert err == ""
        found = json.loads(out.splitlines()[-1])
        assert set(found) == {"prefill_max_abs_diff", "decode_max_abs_diff"}
        return code, found

    return run


@pytest.fixture
def copy(tmp_path):
    """Copies an oracle, with keys of its config changed (None removes one)."""

    def make(oracle, **keys):
        folder = tmp_path / oracle
        shutil.copytree(ORACLES / oracle, folder)
        config = json.loads((folder / "config.json").read_text()) | keys
        config = {k: v for k, v in config.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def error_line(check):
    """Runs a command that must fail with one line on stderr and code 2; returns the line."""

    def run(*arguments):
        code, out, err = check(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        return err

    return run
