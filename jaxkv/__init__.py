"""jaxkv: paged, windowed and quantized KV caches for LLM inference in JAX."""

from jaxkv.cache import KVCache as KVCache
from jaxkv.check import check as check
from jaxkv.compiled_programs import keep_compiled_programs as keep_compiled_programs
from jaxkv.config import CacheConfig as CacheConfig
from jaxkv.explain import explain as explain
from jaxkv.filled_cache import FilledCache as FilledCache
from jaxkv.generate import generate as generate
from jaxkv.generate import stream as stream
from jaxkv.generation import Generation as Generation
from jaxkv.keep import Keep as Keep
from jaxkv.key_means import fit_key_means as fit_key_means
from jaxkv.model import Model as Model
from jaxkv.plan import plan as plan
from jaxkv.sampling import Sampling as Sampling
from jaxkv.save import load_cache as load_cache
from jaxkv.save import save_cache as save_cache
from jaxkv.sizes import Sizes as Sizes
from jaxkv.spec import LayerSpec as LayerSpec
from jaxkv.stop_text import StopText as StopText
from jaxkv.stream import Stream as Stream

__version__ = "0.1.0"  # the only place: pyproject.toml and `jaxkv --version` read it
