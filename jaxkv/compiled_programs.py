"""Keeps compiled programs between runs, in JAX's persistent compilation cache."""

import hashlib
import os
import platform
import tempfile
import warnings
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxkv.user_folder import user_folder

# Programs that compile faster are compiled anew; seconds. JAX's own default is 1.
LEAST_SECONDS = 0.1


def keep_compiled_programs(folder: str | os.PathLike[str] | None = None) -> str | None:
    """Keeps programs that this process compiles, so that its next start loads them instead.

    It sets JAX's persistent compilation cache, for programs of any library. Importing jaxkv does
    not: call it once, best before anything is compiled. Files of the folder may be deleted at any
    time; JAX deletes none itself.

    Args:
      folder: where to keep them; it is made if it is missing. None for the folder that JAX has
        already (`JAX_COMPILATION_CACHE_DIR`); if it has none, for one of this machine's kind of CPU
        in `JAXKV_CACHE`, else in the user's cache folder (`~/.cache/jaxkv`). An address ("gs://...")
        is passed on to JAX unchecked.

    Returns:
      The folder in use. None if programs are not kept: JAX's cache is switched off
      (`JAX_ENABLE_COMPILATION_CACHE=0`), or the default folder can't be written, which a warning
      says.

    Raises:
      ValueError: the folder that was named can't be written.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    own = jax.config.values["jax_compilation_cache_dir"]
    if folder is None and own:
        return own
    try:
        chosen = _made(user_folder() / "xla" / _cpu_kind() if folder is None else folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        reason = " ".join(str(error).split())
        if folder is not None:
            raise ValueError(f"{folder=} must be a folder to write to ({reason}).") from error
        warnings.warn(f"compiled programs are not kept ({reason}).", stacklevel=2)
        return None
    if chosen != own:
        jax.config.update("jax_compilation_cache_dir", chosen)
        compilation_cache.reset_cache()  # JAX reads the folder once, when it first compiles
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return chosen


def _made(folder: str | os.PathLike[str]) -> str:
    """The folder's full name, after making it; OSError if it can't be written."""
    name = os.fspath(folder)
    if "://" in name:
        return name
    path = Path(name).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        return str(path)


def _cpu_kind() -> str:
    """Names the CPU's set of instructions.

    JAX's key of a program leaves it out, and a home folder may be shared by machines of which some
    can't run what others compiled.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    text = "\n".join([platform.machine(), platform.processor(), *kinds])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
