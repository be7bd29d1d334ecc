"""The README's examples run as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from models import CheckpointError
from models.checkpoints.fetch_smollm2 import fetch_smollm2

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number):
    if "smollm2" in EXAMPLES[number]:
        try:
            fetch_smollm2()
        except CheckpointError as error:
            pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[number]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    expected = ["Paris", "xla"] if "smollm2" in EXAMPLES[number] else ["(3, 1, 8, 64)"]
    assert all(text in done.stdout for text in expected)


def test_there_are_two_examples():
    assert len(EXAMPLES) == 2
