"""Compiled programs are kept where the caller says, and only then."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

import jaxkv
from jaxkv.user_folder import user_folder

ENABLED = "jax_enable_compilation_cache"
FOLDER, LEAST = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """JAX without a folder, as users start; afterwards as the tests had it."""
    before = {name: jax.config.values[name] for name in (FOLDER, LEAST, ENABLED)}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setenv("JAXKV_CACHE", str(tmp_path / "own"))
    jax.config.update(FOLDER, None)
    jax.config.update(LEAST, 1.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_something(size: int) -> None:
    jax.jit(lambda x: x * 2 + size).lower(jnp.zeros(size)).compile()


def test_programs_are_kept_even_if_others_were_compiled_before(tmp_path, monkeypatch):
    compile_something(3)
    monkeypatch.setattr(jaxkv.compiled_programs, "LEAST_SECONDS", 0.0)
    folder = jaxkv.keep_compiled_programs(tmp_path / "new" / "folder")
    assert folder == str(tmp_path / "new" / "folder")
    compile_something(5)
    assert [path for path in os.listdir(folder) if path.startswith("jit_")]


def test_the_folder_that_jax_has_stays_unless_another_is_named(tmp_path):
    jax.config.update(FOLDER, str(tmp_path / "set"))
    assert jaxkv.keep_compiled_programs() == str(tmp_path / "set")
    assert not (tmp_path / "set").exists() and not (tmp_path / "own").exists()
    assert jaxkv.keep_compiled_programs(tmp_path / "named") == str(tmp_path / "named")
    assert jax.config.values[FOLDER] == str(tmp_path / "named")


def test_without_any_folder_programs_go_below_the_users_own():
    folder = jaxkv.keep_compiled_programs()
    assert folder.startswith(str(user_folder() / "xla")) and os.path.isdir(folder)
    assert jaxkv.keep_compiled_programs() == folder


def test_a_named_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder to write to.*file/below") as error:
        jaxkv.keep_compiled_programs(tmp_path / "file" / "below")
    assert "\n" not in str(error.value)
    assert not jax.config.values[FOLDER]


def test_a_default_folder_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXKV_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="compiled programs are not kept .*file"):
        assert jaxkv.keep_compiled_programs() is None
    assert not jax.config.values[FOLDER]


def test_a_cache_that_is_switched_off_stays_off(tmp_path):
    jax.config.update(ENABLED, False)
    assert jaxkv.keep_compiled_programs(tmp_path) is None
    assert not jax.config.values[FOLDER]


def test_users_own_threshold_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    jax.config.update(LEAST, 7.0)
    jaxkv.keep_compiled_programs(tmp_path)
    assert jax.config.values[LEAST] == 7.0


def test_an_address_is_left_to_jax():
    assert jaxkv.keep_compiled_programs("gs://bucket/xla") == "gs://bucket/xla"
    assert not os.path.exists("gs:")


def test_import_sets_nothing():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    code = f"import jaxkv, models, jax; print(jax.config.values[{FOLDER!r}])"
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "None"


def test_user_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAXKV_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_folder() == tmp_path / ".cache" / "jaxkv"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(user_folder()) == "/x/jaxkv"
    monkeypatch.setenv("JAXKV_CACHE", "~/models")
    assert user_folder() == tmp_path / "models"
