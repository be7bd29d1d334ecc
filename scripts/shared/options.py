"""Option types and checks that several commands use."""

from typing import Annotated, Any

import tyro

GIB = 2**30  # bytes; options that limit memory are in GiB

Names = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")]
Numbers = Annotated[tyro.conf.UseAppendAction[tuple[int, ...]], tyro.conf.arg(metavar="N")]


def flag(name: str) -> str:
    """`page_size` as a user types it: `--page-size`."""
    return "--" + name.replace("_", "-")


def check_least(args: Any, *names: str, least: int = 1) -> None:
    """Checks options whose values must be numbers of at least `least`.

    Args:
      args: the dataclass of options; a value is a number, a tuple of numbers, or None.
      names: its fields to check.
      least: the smallest number that passes.

    Raises:
      ValueError: names the option and its value.
    """
    rule = "must not be negative" if least == 0 else f"must be at least {least}"
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < least:
                raise ValueError(f"{flag(name)} {number} {rule}.")


def check_choice(name: str, value: str, known) -> None:
    """Raises ValueError, which lists the known values, if `value` is none of them."""
    if value not in known:
        raise ValueError(f"{flag(name)} {value!r} must be one of {', '.join(known)}.")
