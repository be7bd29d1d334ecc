"""Keeps results as they are measured, so that a run that is cut short loses none."""

import json
from pathlib import Path
from typing import Annotated

import tyro

Out = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]


def make_folder(out: Path | None) -> None:
    """Makes the folder of --out; ValueError if that can't be."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}.") from None


def keep_results(out: Path | None, name: str, results: dict | list) -> None:
    """Writes `results` as `name`.json into the folder, over an older file; None: nowhere."""
    if out is not None:
        (out / f"{name}.json").write_text(json.dumps(results))
