"""`CheckpointError`, and what turns any failure of a reader into one of its one-line messages."""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

LONGEST_LINE = 300  # characters


class CheckpointError(ValueError):
    """A checkpoint can't be used. The message is one line: the file, the rule, the value found.

    Names and values of a file may be long, or hold line breaks and escape sequences of terminals.
    So every message is made printable and at most `LONGEST_LINE` characters long, here.
    """

    def __init__(self, message: str):
        super().__init__(_printable(message, LONGEST_LINE))


@contextlib.contextmanager
def clear_errors(source: object) -> Iterator[None]:
    """Turns whatever fails inside into a CheckpointError that names `source`.

    A damaged file can make Python, numpy and the libraries that read it raise nearly anything.
    Readers check what they can name a rule for; this is for all else, so it stands around whole
    readers, and around nothing that a user's own code runs in.

    Raises:
      CheckpointError: in place of any error. What is meant to end the process passes.
    """
    try:
        with library_errors(source):
            yield
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"{source}: needs more memory than there is.") from error
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror or error}.") from error
    except Exception as error:
        kind = type(error).__name__
        raise CheckpointError(
            f"{source}: damaged or unsupported: {kind}: {one_line(error)}."
        ) from error


@contextlib.contextmanager
def library_errors(source: object) -> Iterator[None]:
    """Turns what a library written in Rust raises by itself into a CheckpointError.

    That is a panic, pyo3's `PanicException`, which is no `Exception` and has no module to be
    imported from; and `Exception` itself. Other errors pass: they are those of our callers.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{source}: a library gave up: {one_line(error)}.") from error


def import_extra(name: str) -> ModuleType:
    """Imports an optional package.

    Raises:
      CheckpointError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise CheckpointError(
            f"This needs the package {package!r}: pip install 'jaxkv[models]' ({one_line(error)})."
        ) from error


def one_line(error: object, limit: int = LONGEST_LINE) -> str:
    """An error's text on one line, at most `limit` characters long, without a final full stop."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return _printable(text, limit)


def _printable(text: str, limit: int) -> str:
    """`text` with its unprintable characters escaped; one that is too long loses its middle.

    A message begins with the file and ends with the rule, so both ends are worth more.
    """
    if len(text) > limit:  # the rest can't be seen, so it is not escaped either
        text = text[:limit] + "..." + text[-limit:]
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(text) <= limit:
        return text
    head = (limit - 3) * 3 // 5
    return text[:head] + "..." + text[head + 3 - limit :]
