"""The console command `jaxkv`: `jaxkv generate`, `jaxkv plan`, `jaxkv bench step`, ...

Every file of the folder `scripts` that ends in `run_command(main, Args)` is a subcommand. A wheel
has that folder inside of this package, a checkout beside it. `scripts` is put on the path of this
process only, so that an installed jaxkv takes no top-level name as common as that.
"""

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

RUNS = "run_command(main, Args)"  # the last line of a command
OURS = ("jaxkv", "jaxkv_commands", "models", "pallas_kernels", "scripts")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the subcommand that `args` names (None: those of the command line), and exits."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        dispatch(args, scripts_root())
    except BrokenPipeError:  # the reader of our output has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def dispatch(args: list[str], root: Path) -> None:
    """Answers what `jaxkv` itself does, or runs a command of the folder `root / "scripts"`."""
    files = find_commands(root)
    if args[:1] == ["--version"]:
        print(importlib.import_module("jaxkv").__version__)
        sys.exit(0)
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview(files))
        sys.exit(0)
    group = {name: file for name, file in files.items() if name.startswith(f"{args[0]} ")}
    if group and args[1:] in ([], ["-h"], ["--help"]):
        print(overview(group))
        sys.exit(0)
    name = " ".join(args[:2]) if group else args[0]
    if name not in files:
        fail(f"{name!r} is no command of jaxkv (--help lists them).")
    sys.argv = [f"jaxkv {name}", *args[len(name.split()) :]]
    sys.path.insert(0, str(root))
    run(name, files[name].relative_to(root))


def run(name: str, file: Path) -> None:
    """Runs one command, whose options stand in `sys.argv`."""
    try:
        command = importlib.import_module(".".join(file.with_suffix("").parts))
        start = importlib.import_module("scripts.shared.command")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OURS:
            raise
        fail(f"jaxkv {name} needs the package {package!r}: pip install 'jaxkv[models]'.")
    start.run_command(command.main, command.Args)


def scripts_root() -> Path:
    """The folder in which `scripts` lies: this package in a wheel, the checkout's root else."""
    here = Path(__file__).resolve().parent
    return here if (here / "scripts").is_dir() else here.parent


def find_commands(root: Path) -> dict[str, Path]:
    """Files by the words that run them; `scripts/bench/fit_key.py` would be "bench fit-key"."""
    top = root / "scripts"
    files = [*sorted(top.glob("*.py")), *sorted(top.glob("bench/*.py"))]
    words = lambda file: " ".join(file.relative_to(top).with_suffix("").parts).replace("_", "-")
    return {words(file): file for file in files if RUNS in file.read_text(encoding="utf-8")}


def overview(files: dict[str, Path]) -> str:
    """A line for each command: its words, and the first line of its file."""
    width = max(map(len, files))
    lines = ["usage: jaxkv COMMAND [options]", "", "Commands (jaxkv COMMAND --help):"]
    for name, file in files.items():
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:{width}}  {about.partition(chr(10))[0]}")
    return "\n".join([*lines, "", "jaxkv --version prints the version."])


def fail(message: str) -> None:
    """One line on stderr, and the exit code of bad input."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
