"""`attend` inside `shard_map` with kv heads split over devices equals the unsharded result."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
# XLA of jax 0.11 crashes while Shardy partitions pages of codes; 0.10 and 0.12 compile them, and
# 0.11 does with the older partitioner.
IS_0_11 = (0, 11) <= jax.__version_info__ < (0, 12)
PARTITIONER = {"JAX_USE_SHARDY_PARTITIONER": "0"} if IS_0_11 else {}


@pytest.mark.both_pythons
@pytest.mark.parametrize("codec", ["exact", "fp8_e4m3", "tq4"])
def test_heads_may_be_split_over_devices(codec):
    """In a process of its own: the number of CPU devices is fixed when JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    result = subprocess.run(
        [sys.executable, "-m", "tests.jaxkv.sharded_attend", codec],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | PARTITIONER,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "equal on 2 devices\n"
