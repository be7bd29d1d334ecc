"""Where the library keeps files between runs: compiled programs and fetched models."""

import os
from pathlib import Path


def user_folder() -> Path:
    """`JAXKV_CACHE`, else "jaxkv" under the user's cache folder. It may not exist yet."""
    if chosen := os.environ.get("JAXKV_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxkv"
