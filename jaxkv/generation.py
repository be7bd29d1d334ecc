"""The result of generation: tokens, why they ended, times, bytes, and the cache itself."""

import dataclasses

from jaxkv.config import CacheConfig
from jaxkv.filled_cache import FilledCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The result of `generate`; lists have one entry per prompt."""

    tokens: list[list[int]]  # generated tokens, a stop token included
    # "stop", "length", "no_pages" (none was left), or "closed" (the stream was closed before)
    stop_reasons: list[str]
    texts: list[str] | None  # with `stop_text`: the answers' text, up to the string that ended it
    # Where `Sampling.logprobs` asked for them (None elsewhere), one entry per generated token:
    logprobs: list[list[float] | None]  # natural log of the token's probability
    top_logprobs: list[list[dict[int, float]] | None]  # the likeliest tokens', by token
    # Where `Sampling.prompt_logprobs` asked, one entry per prompt token; None for a token that was
    # not fed (the first one, and those that the given cache held)
    prompt_logprobs: list[list[float | None] | None]
    cached_tokens: list[int]  # tokens of each prompt that the given cache held already
    compile_seconds: float
    prefill_seconds: float  # reading of the prompts, the first tokens included
    decode_seconds: float
    decode_steps: int  # after the first token's
    prompt_tokens: int  # tokens of all prompts
    bytes_peak: int  # bytes of the most pages in use at a time, each store's peak summed
    bytes_reserved: int  # bytes of the whole cache
    config: CacheConfig  # configuration of the cache
    cache: FilledCache  # what the cache holds; give it to the next call to continue

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second that were not cached, the first token's sampling included."""
        return (self.prompt_tokens - sum(self.cached_tokens)) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_speed(self) -> float:
        """Tokens of all sequences per second, without each one's first."""
        decoded = sum(len(t) for t in self.tokens) - len(self.tokens)
        return max(decoded, 0) / max(self.decode_seconds, 1e-9)
