"""Reads hostile files in this process within limits: `python -m ... FAMILY FIRST_SEED COUNT`.

Prints one line for each file that did not end well, and the seed before a file is read, so that
the caller knows which file ended the process.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

from tests.models.hostile.files import outcome

SECONDS, BYTES = 15, 2 << 30  # that one file may take


def main(family: str, first: int, count: int) -> None:
    for seed in range(first, first + count):
        print("seed", seed, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            start, before = time.process_time(), _peak()
            found = outcome(family, Path(folder), seed)
            seconds, grown = time.process_time() - start, _peak() - before
        if seconds > SECONDS or grown > BYTES:
            found += f" took {seconds:.1f} s, {grown >> 20} MiB"
        if found:
            print("bad", seed, found, flush=True)
    print("end", flush=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
