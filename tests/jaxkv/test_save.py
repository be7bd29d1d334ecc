"""A saved cache comes back to the bit; any other file is refused in one line."""

import dataclasses
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from jaxkv import CacheConfig, KVCache, LayerSpec, load_cache, save_cache
from jaxkv.codecs import KVCodec, MinMax, recipe

SMALL = LayerSpec(kv_heads=1, head_dim=64)
LAYERS = (
    dataclasses.replace(SMALL, dtype="bfloat16"),
    dataclasses.replace(SMALL, dtype="float32", window=7, sink_tokens=3, sink_positions="cache"),
    dataclasses.replace(SMALL, codec="tq3"),
    dataclasses.replace(SMALL, codec="fp8_e4m3"),
    dataclasses.replace(SMALL, codec=KVCodec(name="own", key=MinMax(4), value=MinMax(8))),
    dataclasses.replace(SMALL, codec=recipe("s", key_bits=4, value_bits=2, key_mean="static")),
)


def scrambled(x, rng):
    return jnp.asarray(rng.integers(0, 200, x.nbytes, np.uint8).view(x.dtype).reshape(x.shape))


def make_cache(layers=LAYERS, **options):
    config = CacheConfig(layers=layers, batch=2, max_tokens=30, page_size=4, **options)
    means = [np.ones((1, 64), np.float32)] * len(layers)
    cache = KVCache.create(config, key_means=means).prepare([1, 0])
    rng = np.random.default_rng(0)
    stores = tuple(
        dataclasses.replace(s, pages=jax.tree.map(lambda x: scrambled(x, rng), s.pages))
        for s in cache.stores
    )
    return dataclasses.replace(cache, stores=stores)


def assert_same(a, b):
    assert a.config == b.config and jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("options", [{}, dict(platform="gpu", pages=9)])
def test_a_cache_comes_back_to_the_bit(tmp_path, options):
    cache = make_cache(**options)
    save_cache(cache, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]
    loaded = load_cache(str(tmp_path / "a.safetensors"))
    assert_same(cache, loaded)
    jax.jit(KVCache.commit, donate_argnums=0)(loaded, jnp.int32([1, 0]))


def test_orbax_saves_a_cache(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    cache = make_cache(LAYERS[:2])
    assert all(x.size for x in jax.tree.leaves(cache)), "an array without elements"
    with orbax.StandardCheckpointer() as saver:
        saver.save(tmp_path / "orbax", cache)
        saver.wait_until_finished()
        assert_same(cache, saver.restore(tmp_path / "orbax", cache))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    save_cache(make_cache(LAYERS[:3]), path)
    return path


def refuses(path, message):
    with pytest.raises(ValueError, match=f"is no cache file for here: .*{message}.*\\.$") as caught:
        load_cache(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
def test_cut_files_are_refused(saved, tmp_path, kept):
    data = saved.read_bytes()
    stop = int(len(data) * kept) if isinstance(kept, float) else kept
    (tmp_path / "cut").write_bytes(data[:stop])
    refuses(tmp_path / "cut", "cut short or not written by save_cache")


def rewrite(saved, path, *, metadata=None, arrays=None):
    """The saved file with other metadata or arrays."""
    with safetensors.safe_open(saved, framework="numpy") as file:
        about = file.metadata() | (metadata or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()} | (arrays or {})
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata=about)
    return path


@pytest.mark.parametrize(
    "metadata, message",
    [
        (
            dict(format="jaxkv cache 2"),
            "its format is 'jaxkv cache 2', and 'jaxkv cache 1' is read",
        ),
        (dict(platform="gpu"), "its platform is 'gpu', and here it is 'cpu'"),
        (dict(prepared="1"), "prepared is '1'"),
        (dict(layouts="TokenMajor"), "its layouts is 'TokenMajor', and here it is 'Plain, "),
        (dict(config="{"), "its configuration can't be read"),
        (dict(config="[" * 100_000), "its configuration can't be read"),
        (dict(config="3"), "its configuration can't be read: it is no CacheConfig"),
        (dict(config='{"class": "Path", "fields": {}}'), "is no part of a configuration"),
        (dict(config='{"class": "LayerSpec", "fields": {}}'), "LayerSpec has other fields here"),
    ],
)
def test_other_files_are_refused(saved, tmp_path, metadata, message):
    refuses(rewrite(saved, tmp_path / "other", metadata=metadata), message)


def test_broken_arrays_are_refused(saved, tmp_path):
    wrong = lambda **arrays: rewrite(saved, tmp_path / "wrong", arrays=arrays)
    refuses(wrong(lengths=None), "array 'lengths' is missing or too much")
    refuses(wrong(more=np.zeros(1)), "array 'more' is missing or too much")
    refuses(wrong(lengths=np.zeros(2, np.int64)), "lengths is int64.2,., and must be int32.2,.")
    refuses(wrong(lengths=np.int32([7, 0])), "cache is broken: ")


def test_a_name_that_means_another_codec_is_refused(saved, tmp_path):
    with safetensors.safe_open(saved, framework="numpy") as file:
        config = json.loads(file.metadata()["config"])
    config["fields"]["layers"][2]["fields"]["codec"]["means"]["fields"]["recent_pages"] = 1
    path = rewrite(saved, tmp_path / "codec", metadata=dict(config=json.dumps(config)))
    refuses(path, "codec 'tq3' has other fields here")


def test_what_can_not_be_saved_leaves_the_old_file(saved, tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"
    path.write_bytes(saved.read_bytes())
    cache = make_cache(LAYERS[:1])

    class Own(MinMax):
        """A codec of one's own."""

    codec = KVCodec(name="own", key=Own(4), value=MinMax(4))
    with pytest.raises(ValueError, match="^a cache with a codec of class Own can't be saved: "):
        save_cache(make_cache((dataclasses.replace(SMALL, codec=codec),)), path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="^disk full$"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        save_cache(cache, path)
    assert path.read_bytes() == saved.read_bytes() and os.listdir(tmp_path) == [path.name]
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        load_cache(tmp_path / "none")
    jax.jit(KVCache.free, donate_argnums=0)(cache, jnp.zeros(2, bool))
    with pytest.raises(ValueError, match="^cache was donated to a step"):
        save_cache(cache, path)


def test_without_safetensors_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (
        lambda: load_cache(tmp_path),
        lambda: save_cache(make_cache(LAYERS[:1]), tmp_path),
    ):
        with pytest.raises(ImportError, match="need the package safetensors: pip install safeten"):
            call()
