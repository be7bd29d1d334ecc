"""A cache as a file: every array and the configuration, exactly, in one safetensors file.

The file belongs to the platform and the page layouts that wrote it; another refuses it.
"""

import dataclasses
import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import codecs
from jaxkv.abstract_cache import abstract_cache
from jaxkv.cache import KVCache
from jaxkv.check import array_name, verify
from jaxkv.config import CacheConfig
from jaxkv.spec import LayerSpec
from pallas_kernels.checks import shown
from pallas_kernels.device import current_platform

FORMAT = "jaxkv cache 1"  # another number when the arrays or their meaning change
MOST_SAID = 300  # characters of a reason
# The classes that a file may name; no other is ever made from a file.
CLASSES = {
    cls.__name__: cls
    for cls in (
        CacheConfig,
        LayerSpec,
        codecs.KVCodec,
        codecs.Exact,
        codecs.Float8,
        codecs.Int8,
        codecs.MinMax,
        codecs.TurboQuant,
    )
}


def save_cache(cache: KVCache, path: str | os.PathLike[str]) -> None:
    """Writes a cache to a file, beside its place first: a file that is there is whole.

    Args:
      cache: between calls, not donated.
      path: of the file, usually `*.safetensors`; one that exists is replaced.

    Raises:
      ValueError: the cache is traced, donated or broken, or a codec is of a class of one's own.
      ImportError: the package safetensors is missing.
      OSError: the file can't be written.
    """
    to_bytes = _safetensors("save")
    verify(cache, finite=False)
    text = json.dumps(_to_json(cache.config))
    arrays = {
        array_name(path): _plain(np.asarray(x))
        for path, x in jax.tree_util.tree_leaves_with_path(cache)
    }
    about = {"format": FORMAT, "config": text, "prepared": json.dumps(cache.prepared)}
    about |= _about(cache.config)
    path = Path(path)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(to_bytes(arrays, metadata=about))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def load_cache(path: str | os.PathLike[str]) -> KVCache:
    """Reads a cache that `save_cache` wrote: the same arrays to the bit, the same configuration.

    Raises:
      ValueError: the file is no such cache, is cut short, is of another version, platform or page
        layout, or breaks an invariant (`jaxkv.check`).
      ImportError: the package safetensors is missing.
      OSError: the file can't be read.
    """
    safe_open = _safetensors("safe_open")
    with open(path, "rb"):  # so that a missing file is an OSError that names it
        pass
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            about = file.metadata() or {}
            abstract = _read_config(about, path)
            named = jax.tree_util.tree_map_with_path(lambda p, x: array_name(p), abstract)
            names = set(jax.tree.leaves(named))
            if names != set(file.keys()):
                some = sorted(names ^ set(file.keys()))[0]
                raise _refused(path, f"array {shown(some)} is missing or too much")
            read = lambda name, x: _read_array(path, name, file.get_tensor(name), x)
            cache = jax.tree.map(read, named, abstract)
    except _safetensors("SafetensorError") as error:
        raise _refused(path, f"cut short or not written by save_cache ({error})") from None
    try:
        verify(cache, finite=False)
    except ValueError as error:
        raise _refused(path, error) from None
    return cache


def _refused(path: Any, reason: object) -> ValueError:
    """The error for a file: one line of bounded length, whatever the file has made of it."""
    line = " ".join(str(reason).split()).rstrip(".")
    return ValueError(f"{os.fspath(path)!r} is no cache file for here: {line[:MOST_SAID]}.")


def _safetensors(name: str) -> Any:
    """A name of the package safetensors, which is optional."""
    try:
        module = importlib.import_module("safetensors.numpy" if name == "save" else "safetensors")
    except ImportError:
        raise ImportError(
            "save_cache and load_cache need the package safetensors: pip install safetensors."
        ) from None
    return getattr(module, name)


def _about(config: CacheConfig) -> dict[str, str]:
    """What must be the same where a file is read: the platform, and the layout of each store."""
    layouts = [type(store.layout).__name__ for store in config.stores]
    return {"platform": current_platform(config.platform), "layouts": ", ".join(layouts)}


def _read_config(about: dict[str, str], path: Any) -> KVCache:
    """The shapes and dtypes of the cache that a file's metadata describes."""
    if about.get("format") != FORMAT:
        found = shown(about.get("format"))
        raise _refused(path, f"its format is {found}, and {FORMAT!r} is read here")
    try:
        config = _from_json(json.loads(about.get("config", "")))
        if not isinstance(config, CacheConfig):
            raise ValueError("it is no CacheConfig")
        abstract = abstract_cache(config)
    except Exception as error:  # whatever a file's values make codecs and layouts raise
        raise _refused(path, f"its configuration can't be read: {error}") from None
    for name, here in _about(config).items():
        if about.get(name) != here:
            found = shown(about.get(name))
            raise _refused(path, f"its {name} is {found}, and here it is {here!r}")
    prepared = about.get("prepared")
    if prepared not in ("true", "false"):
        raise _refused(path, f"prepared is {shown(prepared)}")
    return dataclasses.replace(abstract, prepared=prepared == "true")


def _plain(x: np.ndarray) -> np.ndarray:
    """An array in a type of numpy's own: bfloat16 as the integers of its bits."""
    x = np.ascontiguousarray(x).reshape(x.shape)
    return x if x.dtype.kind in "biuf" else x.view(f"u{x.dtype.itemsize}")


def _read_array(path: Any, name: str, x: np.ndarray, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    stored = _plain(np.zeros(0, wanted.dtype)).dtype
    if x.dtype != stored or x.shape != wanted.shape:
        raise _refused(path, f"{name} is {x.dtype}{x.shape}, and must be {stored}{wanted.shape}")
    return jnp.asarray(x.view(wanted.dtype))


def _to_json(value: Any) -> Any:
    """A configuration as lists and dictionaries; a codec by the names and values of its fields."""
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value.item() if isinstance(value, np.generic) else value
    name = type(value).__name__
    if CLASSES.get(name) is not type(value):
        raise ValueError(
            f"a cache with a codec of class {name} can't be saved: only {', '.join(CLASSES)}."
        )
    fields = {
        field.name: _to_json(getattr(value, field.name)) for field in dataclasses.fields(value)
    }
    if isinstance(value, LayerSpec) and isinstance(value.codec, str):
        # A name may come to mean other fields, so they are kept beside it.
        fields["codec"] = {"name": value.codec, "means": _to_json(value.kv_codec)}
    return {"class": name, "fields": fields}


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    if not isinstance(value, dict):
        return value
    if value.keys() == {"name", "means"}:
        codec = codecs.get_codec(value["name"])
        if codec != _from_json(value["means"]):
            raise ValueError(f"codec {value['name']!r} has other fields here")
        return value["name"]
    if value.keys() != {"class", "fields"} or value["class"] not in CLASSES:
        raise ValueError(f"{shown(value)} is no part of a configuration")
    cls = CLASSES[value["class"]]
    fields = {name: _from_json(item) for name, item in value["fields"].items()}
    if fields.keys() != {field.name for field in dataclasses.fields(cls)}:
        raise ValueError(f"{value['class']} has other fields here")
    return cls(**fields)
