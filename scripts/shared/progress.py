"""Progress of long work: what is being done, and of a run through several caches how far it is."""

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

REPORT_SECONDS = 10.0  # between lines of progress where there is no terminal


@contextlib.contextmanager
def working(log: Console, doing: str) -> Iterator[None]:
    """Tells what is being done as long as it takes.

    On a terminal that is a moving line; elsewhere a line with the seconds so far, every
    REPORT_SECONDS, so that a log shows what a run is at and short work leaves no trace.
    """
    if log.is_terminal:
        with log.status(doing):
            yield
        return
    ended, began = threading.Event(), time.monotonic()

    def tell():
        while not ended.wait(REPORT_SECONDS):
            said = f"{doing}: {time.monotonic() - began:.0f} s so far"
            log.print(said, style="dim", soft_wrap=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


class Reporter:
    """Shows progress through all caches: a bar on a terminal, else a line now and then."""

    def __init__(self, log: Console, caches: int, tokens: int):
        self.log, self.caches, self.tokens = log, caches, tokens
        self.seen: set[str] = set()
        self.done = self.running = 0  # tokens times caches
        self.start: tuple[float, int] | None = None  # time and `done` when all was compiled
        self.said = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(),
            console=log,
            transient=True,
            disable=not log.is_terminal,
        )
        self.task = self.bar.add_task("loading weights", total=caches * tokens)

    def __enter__(self) -> "Reporter":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def begin(self, name: str, tokens: int) -> None:
        """A cache begins a step of `tokens`; the step before it has ended."""
        now = time.monotonic()
        self.done, self.running = self.done + self.running, tokens
        if name not in self.seen:
            self.seen.add(name)
            doing, left = f"compiling {name}, cache {len(self.seen)} of {self.caches}", ""
        else:
            self.start = self.start or (now, self.done)
            speed = (self.done - self.start[1]) / max(now - self.start[0], 1e-9)
            doing = f"scoring {name}, {speed:.0f} tokens/s" if speed else f"scoring {name}"
            rest = self.caches * self.tokens - self.done
            left = f", {rest / speed:.0f} s left" if speed else ""
        self.bar.update(self.task, completed=self.done, description=doing)
        if not self.log.is_terminal and now - self.said >= REPORT_SECONDS:
            self.said = now
            at = f"token {self.done // self.caches} of {self.tokens}"
            self.log.print(f"{at}: {doing}{left}", style="dim", soft_wrap=True)
