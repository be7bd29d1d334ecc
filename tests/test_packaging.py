"""The package: one version, what the core needs, and what a wheel holds."""

import email
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import jaxkv

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("jaxkv", "jaxkv_commands", "models", "pallas_kernels")


def test_the_version_is_said_in_one_place():
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {jaxkv.__version__}\n" in citation


def test_the_core_needs_jax_and_numpy_alone():
    names = [re.match(r"[\w-]+", line).group() for line in PROJECT["dependencies"]]
    assert sorted(names) == ["jax", "jaxlib", "numpy"]


def test_jaxkv_imports_without_the_packages_of_the_extras():
    extras = "flax gguf jinja2 matplotlib optax rich safetensors tokenizers tyro".split()
    code = f"import sys; sys.modules |= dict.fromkeys({extras}); import jaxkv, pallas_kernels"
    code += "; import jaxkv.codecs, jaxkv_commands; assert 'models' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_says_that_it_is_typed(package):
    assert (ROOT / package / "py.typed").read_bytes() == b""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [file] = folder.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.mark.slow
def test_a_wheel_holds_all_of_the_packages_and_of_the_commands(wheel):
    listed = subprocess.run(
        ["git", "ls-files", *PACKAGES, "scripts"], cwd=ROOT, capture_output=True, text=True
    )
    files = listed.stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    want = {f"jaxkv_commands/{name}" if name.startswith("scripts/") else name for name in files}
    has = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert has == want
    assert {name.split("/")[0] for name in has} == set(PACKAGES)


@pytest.mark.slow
def test_a_wheel_says_what_it_is(wheel):
    read = lambda end: wheel.read(next(n for n in wheel.namelist() if n.endswith(end))).decode()
    about = email.message_from_string(read("/METADATA"))
    assert about["Version"] == jaxkv.__version__
    assert {"models", "cuda", "tpu"} <= set(about.get_all("Provides-Extra", []))
    assert "jaxkv = jaxkv_commands:main" in read("/entry_points.txt")
