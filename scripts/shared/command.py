"""How every command starts and answers: arguments, one-line errors, JSON.

The environment variable JAXKV_DEBUG=1 shows a traceback in place of the one-line error.
"""

import contextlib
import contextvars
import inspect
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import tyro

from models.errors import one_line

# Where JSON goes while everything else that is printed goes to stderr.
_ANSWERS: contextvars.ContextVar[TextIO | None] = contextvars.ContextVar("answers", default=None)


def run_command(main: Callable, args_type: type) -> None:
    """Parses the arguments, runs `main(args)` and exits with what it returns.

    With an option `json` that is set, what `main` prints goes to stderr, and `print_json` alone
    writes to stdout. A ValueError, NotImplementedError or OSError is bad input: one line on stderr,
    exit code 2.
    """
    try:
        args = parse(args_type)
        with _json_alone() if getattr(args, "json", False) else contextlib.nullcontext():
            code = main(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ValueError, NotImplementedError, OSError) as error:
        if os.environ.get("JAXKV_DEBUG"):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def print_json(value: Any) -> None:
    """Prints the command's answer for programs: one line; numbers that are not finite are null."""
    print(json.dumps(_finite(value), allow_nan=False), file=_ANSWERS.get() or sys.stdout)


@contextlib.contextmanager
def _json_alone():
    token = _ANSWERS.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _ANSWERS.reset(token)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse(args_type: type, args: Sequence[str] | None = None):
    """The arguments (None: the command line's) as an `args_type`, a dataclass.

    Fields are the options, the text below each is its help, and the class's docstring with its
    examples heads --help. tyro's box of several lines about bad arguments becomes one line.
    """
    said = io.StringIO()
    prog = invocation(args_type)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                args_type,
                prog=prog,
                args=args,
                description=describe(args_type, prog),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (None, 0):  # --help
            raise
    boxed = [line.strip("│ ") for line in said.getvalue().splitlines() if line.startswith("│")]
    advice = next((n for n, line in enumerate(boxed) if line.startswith("For full help")), None)
    words = " ".join(line for line in boxed[:advice] if line.strip("─"))
    print(
        f"error: {one_line(words or said.getvalue())} (--help lists the options)", file=sys.stderr
    )
    sys.exit(2)


def source_file(args_type: type) -> Path:
    """The file of the command that has these arguments."""
    return Path(str(sys.modules[args_type.__module__].__file__)).resolve()


def invocation(args_type: type) -> str:
    """How to run the command, as one types it: `jaxkv plan`, or `python scripts/plan.py`."""
    if sys.argv[0].startswith("jaxkv "):  # set by jaxkv_commands
        return sys.argv[0]
    file = source_file(args_type)
    return f"python {file.relative_to(file.parents[1 + ('bench' in file.parts[-2:])])}"


def describe(args_type: type, prog: str) -> str:
    """The docstring; its examples, which begin with the file's name, as one can type them."""
    name = re.escape(source_file(args_type).name)
    return re.sub(rf"(?m)^(\s+){name}(?= |$)", rf"\1{prog}", inspect.getdoc(args_type) or "")
