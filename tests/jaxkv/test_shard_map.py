"""`attend` inside `shard_map` with kv heads split over devices equals the unsharded result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("codec", ["exact", "fp8_e4m3", "tq4"])
def test_heads_may_be_split_over_devices(codec):
    """In a process of its own: the number of CPU devices is fixed when JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    result = subprocess.run(
        [sys.executable, "-m", "tests.jaxkv.sharded_attend", codec],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "equal on 2 devices\n"
