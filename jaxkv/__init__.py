"""jaxkv: paged, windowed and quantized KV caches for LLM inference in JAX."""

from jaxkv.cache import KVCache as KVCache
from jaxkv.config import CacheConfig as CacheConfig
from jaxkv.config import LayerSpec as LayerSpec
from jaxkv.generation import Generation as Generation
from jaxkv.generation import generate as generate
from jaxkv.keep import Keep as Keep
from jaxkv.key_means import fit_key_means as fit_key_means
from jaxkv.report import explain as explain
from jaxkv.sampling import Sampling as Sampling
from jaxkv.sizing import plan as plan
