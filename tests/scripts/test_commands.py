"""Every command: its --help teaches, it stands alone, and the README lists it."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from scripts.shared.command import parse

pytestmark = pytest.mark.both_pythons

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "scripts" / "bench").glob("*.py")]
COMMANDS = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in sorted(FILES)
    if "run_command(main, Args)" in file.read_text()
}


def test_there_are_thirteen():
    assert len(COMMANDS) == 13


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name, capsys):
    args = importlib.import_module(name).Args
    with pytest.raises(SystemExit) as stop:
        parse(args, ["--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0
    assert " ".join(args.__doc__.split()[:6]) in " ".join(told.split())
    assert "Example" in told and f"{COMMANDS[name].name} " in told
    for field in dataclasses.fields(args):
        if not dataclasses.is_dataclass(field.type) and field.name != "dir":
            assert f"--{field.name.replace('_', '-')}" in told


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name):
    """An option's help is the text below its field."""
    tree = ast.parse(COMMANDS[name].read_text())
    [args] = [node for node in tree.body if getattr(node, "name", "") == "Args"]
    for field, after in zip(args.body, [*args.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and field.target.id != "keep":
            assert isinstance(after, ast.Expr) and len(after.value.value) > 5, field.target.id


def test_the_readme_lists_all():
    listed = re.findall(r"^- `(scripts/\S+\.py)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in COMMANDS.values())
