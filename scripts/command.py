"""What every command line shares: argument parsing, one-line errors, the compilation cache."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import tyro

from models.checkpoints.errors import one_line


def run_command(main: Callable, args_type: type) -> None:
    """Parses the arguments, runs `main(args)` and exits with what it returns.

    A ValueError, NotImplementedError or OSError is bad input: one line on stderr, exit code 2.
    """
    args = tyro.cli(args_type, config=(tyro.conf.OmitArgPrefixes,))
    try:
        code = main(args)
    except (ValueError, NotImplementedError, OSError) as error:
        if os.environ.get("JAXKV_DEBUG"):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def keep_compiled_programs(folder: Path) -> None:
    """Lets JAX keep compiled programs in `folder`, so that a second start skips compiling."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
