"""Settings of every test run: platform, JAX's strictness, the XLA cache, skips without a device.

Builders and tolerances live in `tests/helpers.py`, not here.
"""

import contextlib
import gc
import hashlib
import os
import platform
import time
from importlib import metadata
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def _cache_folder() -> Path:
    """Where compiled programs are kept, outside the work tree: fresh clones find them, too.

    By the CPU's instruction set, which JAX's cache key leaves out (another machine might not run
    the code), and by version, so that old versions' folders may be deleted.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    features = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    text = "\n".join([platform.machine(), *sorted(features)])
    cpu = hashlib.sha256(text.encode()).hexdigest()[:12]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "jaxkv" / "tests-xla" / f"{cpu}-jaxlib{metadata.version('jaxlib')}"


def _delete_old_programs(folder: Path, days: int = 30):
    """Bounds the cache: JAX deletes nothing. What is still in use is compiled once more."""
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):  # another run deleted it
            if time.time() - path.stat().st_mtime > days * 86_400:
                path.unlink()


# In the environment, before JAX is imported, so that scripts which tests start inherit it too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_cache_folder())
    _delete_old_programs(_cache_folder())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Most of a run's time is LLVM optimizing programs that run once. This leaves it out on CPUs and
# nothing else: XLA's own passes are the same, so that programs, their memory and their copies are
# (compiled.as_text() is equal). JAX_DISABLE_MOST_OPTIMIZATIONS=0 optimizes all tests.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if metadata.version("jaxlib").startswith("0.10."):
        # Its older emitter compiles twice as fast. XLA ends a process whose flags it does not know,
        # and later versions have one emitter only.
        flags = ["--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", "")]
        os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# Models follow their checkpoints' mixed dtypes and scripts run them; all else promotes by hand.
LOOSE_PROMOTION = {"models", "scripts"}

# A first example compiles, which no deadline survives. CI draws the same examples every time: a
# submission must not fail for a seed.
hypothesis.settings.register_profile(
    "jaxkv",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxkv")


MOST_MAPS = 30_000  # XLA aborts where a process exceeds its 65,530 memory maps


def _free_compiled_programs(most_maps: int):
    """Drops compiled programs, which hold several memory maps each, once there are many."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            count = sum(1 for _ in maps)
    except OSError:  # not Linux, no such limit
        return
    if count > most_maps:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def free_compiled_programs():
    """Another module hardly ever calls the same programs."""
    yield
    _free_compiled_programs(most_maps=5_000)


@contextlib.contextmanager
def _llvm_optimizations():
    """Optimizes programs as users' are, in this process and in those that a test starts."""
    before = jax.config.values["jax_disable_most_optimizations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Makes dtype promotion strict in a test and its fixtures, outside LOOSE_PROMOTION; optimizes
    what is marked so.

    A hook, not an autouse fixture: hypothesis refuses function-scoped fixtures under `@given`.
    """
    folder = item.path.relative_to(TESTS).parts[0]
    strict = contextlib.nullcontext()
    if folder not in LOOSE_PROMOTION:
        strict = jax.numpy_dtype_promotion("strict")
    optimized = contextlib.nullcontext()
    if item.get_closest_marker("optimized"):
        optimized = _llvm_optimizations()
    with strict, optimized:
        result = yield
    _free_compiled_programs(MOST_MAPS)
    return result


def pytest_collection_modifyitems(items):
    for marker in ("gpu", "tpu"):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not _has_device(marker):
            platforms = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}"
            reason = f"JAX sees no {marker.upper()} ({platforms}; JAX_PLATFORMS= looks for all)"
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_device(kind: str) -> bool:
    try:
        return bool(jax.devices(kind))
    except RuntimeError:
        return False
