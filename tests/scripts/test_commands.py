"""Every command: its --help teaches, it stands alone, and the README lists it."""

import ast
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxkv_commands
from scripts.shared.command import parse, print_json, run_command

pytestmark = pytest.mark.both_pythons

ROOT = Path(__file__).parents[2]
WORDS = jaxkv_commands.find_commands(ROOT)
COMMANDS = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in WORDS.values()}


def file_of(name: str) -> str:
    """The command's file from the root, as in `python scripts/plan.py`."""
    return str(COMMANDS[name].relative_to(ROOT))


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
    examples = args.__doc__.partition("Examples:\n")[2].split("\n")
    assert len(examples) > 1
    for example in filter(None, map(str.strip, examples)):
        typed = example.replace(COMMANDS[name].name, f"python {file_of(name)}", 1)
        assert "Examples:" in told and f"\n  {typed}\n" in told
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
    listed = re.findall(r"^- `jaxkv ([a-z -]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(WORDS)


def calls(tree: ast.AST) -> list[str]:
    """What a file calls, as written: `print`, `json.dumps`, ..."""
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", COMMANDS)
def test_json_goes_through_the_one_function_that_reaches_stdout(name):
    tree = ast.parse(COMMANDS[name].read_text())
    fields = {field.name for field in dataclasses.fields(importlib.import_module(name).Args)}
    assert calls(tree).count("print_json") == ("json" in fields)
    assert "json.dumps" not in calls(tree) and "sys.stdout.write" not in calls(tree)


@dataclasses.dataclass
class Args:
    """Options of a command made up for the tests."""

    json: bool = False
    """Print JSON."""


def run(monkeypatch, main, *argv) -> int:
    """Runs a made-up command; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["jaxkv made-up", *argv])
    with pytest.raises(SystemExit) as stop:
        run_command(main, Args)
    return stop.value.code


def say_both(args: Args) -> int:
    """Prints a table, then JSON if asked."""
    print("a table")
    if args.json:
        print_json({"value": float("nan"), "all": (1.5, float("inf"))})
    return 3


def test_with_json_stdout_is_json_alone(monkeypatch, capsys):
    assert run(monkeypatch, say_both, "--json") == 3
    said = capsys.readouterr()
    assert json.loads(said.out) == {"value": None, "all": [1.5, None]}
    assert said.err == "a table\n"


def test_without_json_tables_go_to_stdout(monkeypatch, capsys):
    assert run(monkeypatch, say_both) == 3
    assert capsys.readouterr().out == "a table\n"


def test_an_error_with_json_leaves_stdout_empty(monkeypatch, capsys):
    def fail(args):
        print("a table")
        raise ValueError("no.")

    assert run(monkeypatch, fail, "--json") == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == "a table\nerror: no\n"


CONFIG = str(ROOT / "tests" / "oracles" / "llama" / "config.json")


def console(*argv) -> subprocess.CompletedProcess:
    """Runs `jaxkv` in a process of its own."""
    code = "import jaxkv_commands; jaxkv_commands.main()"
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)


def test_console_plans():
    done = console("plan", "--model", CONFIG, "--tokens", "300", "--codec", "tq4", "--json")
    assert json.loads(done.stdout)["results"][0]["codec"] == "tq4"
    assert "tq4" in done.stderr and done.returncode == 0


def console_here(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `jaxkv` where it does not come to run a command."""
    with pytest.raises(SystemExit) as stop:
        jaxkv_commands.main(argv)
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_console_lists_all_commands(capsys, argv):
    code, out, _ = console_here(capsys, *argv)
    assert code == 0 and all(f"\n  {words} " in out for words in WORDS)


@pytest.mark.parametrize("argv", [("bench",), ("bench", "--help")])
def test_console_lists_a_group(capsys, argv):
    code, out, _ = console_here(capsys, *argv)
    assert code == 0 and "\n  bench step " in out and "generate.py" not in out
    assert "\n  plan " not in out


@pytest.mark.parametrize("argv", [("nope",), ("bench", "nope"), ("bench", "--json"), ("shared",)])
def test_console_refuses_in_one_line(capsys, argv):
    code, out, err = console_here(capsys, *argv)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_console_tells_the_version(capsys):
    import jaxkv

    assert console_here(capsys, "--version")[1] == f"{jaxkv.__version__}\n"


def test_console_names_the_extra_that_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scripts.plan", None)  # as if an import in it had failed
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(jaxkv_commands, "OURS", ())
    code, _, err = console_here(capsys, "plan")
    assert code == 2 and "pip install 'jaxkv[models]'" in err


PEER = "scripts.bench.peers.transformers_llama"


@pytest.mark.parametrize(
    "argv, code, word", [(["--help"], 0, "JSON"), (["{}"], 2, "error"), ([], 2, "error")]
)
def test_a_peer_explains_itself(argv, code, word):
    done = subprocess.run([sys.executable, "-m", PEER, *argv], capture_output=True, text=True)
    assert done.returncode == code
    assert word in done.stdout + done.stderr and "Traceback" not in done.stderr
