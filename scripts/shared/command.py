"""How every command starts: parsed arguments, one-line errors, kept compiled programs.

The environment variable JAXKV_DEBUG=1 shows a traceback in place of the one-line error.
"""

import contextlib
import inspect
import io
import os
import sys
from collections.abc import Callable, Sequence

import jax
import tyro

from models.checkpoints.fetch_smollm2 import cache_folder
from models.errors import one_line


def run_command(main: Callable, args_type: type) -> None:
    """Parses the arguments, runs `main(args)` and exits with what it returns.

    A ValueError, NotImplementedError or OSError is bad input: one line on stderr, exit code 2.
    """
    args = parse(args_type)
    try:
        code = main(args)
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


def parse(args_type: type, args: Sequence[str] | None = None):
    """The arguments (None: the command line's) as an `args_type`, a dataclass.

    Fields are the options, the text below each is its help, and the class's docstring with its
    examples heads --help. tyro's box of several lines about bad arguments becomes one line.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                args_type,
                args=args,
                description=inspect.getdoc(args_type),
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


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs in the user's cache, so that a second start skips compiling.

    If JAX already has a folder for them (JAX_COMPILATION_CACHE_DIR), it stays.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = cache_folder() / "xla"
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
