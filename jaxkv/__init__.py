"""jaxkv: paged, windowed and quantized KV caches for LLM inference in JAX."""

from jaxkv.cache import KVCache as KVCache
from jaxkv.config import CacheConfig as CacheConfig
from jaxkv.config import LayerSpec as LayerSpec
from jaxkv.explain import explain as explain
from jaxkv.generate import Generation as Generation
from jaxkv.generate import generate as generate
from jaxkv.plan import plan as plan
from jaxkv.sampling import Sampling as Sampling
