"""How one request's tokens are chosen and reported: what people write, checked on the host."""

import dataclasses
import math
import numbers
from collections.abc import Callable

import jax

from pallas_kernels.checks import whole_number

# (logits f32[batch, vocab], tokens so far i32[batch, tokens], -1 behind the last) -> logits
LogitsHook = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw one request's tokens; `Sampling()` is greedy.

    Logits pass the penalties, `min_tokens`, the hook, the temperature, then top-k, top-p and min-p,
    each applied to the tokens that the previous rule kept. What no request of a batch uses is left
    out of the compiled program; a number can change without compiling again.

    Attributes:
      temperature: logits are divided by it; 0 takes the largest logit. None is 1 where `top_k`,
        `top_p` or `min_p` is given, and 0 otherwise.
      top_k: keep the `top_k` most likely tokens.
      top_p: keep the most likely tokens whose probabilities first reach `top_p` (arXiv:1904.09751).
      min_p: drop tokens less likely than `min_p` times the best one (arXiv:2407.01082).
      repetition_penalty: logits of tokens of the prompt or the answer are divided by it where
        positive, multiplied where negative (CTRL, arXiv:1909.05858); 1 changes nothing.
      presence_penalty: subtracted from the logit of each token that the answer has (OpenAI's API).
      frequency_penalty: subtracted once per occurrence of the token in the answer (OpenAI's API).
      min_tokens: tokens that end a sequence can't be drawn before the answer has this many.
      logprobs: report each generated token's log-probability, and those of this many most likely
        tokens beside it; None reports nothing. They are natural logarithms of the softmax of the
        model's own logits, before any rule above.
      prompt_logprobs: report the log-probability of each prompt token after the first, too.
      hook: `(logits, tokens) -> logits`, traced into the compiled step: `f32[batch, vocab]` after
        the penalties, and `i32[batch, tokens]`, prompt and answer of each request so far with -1
        behind. All requests of a batch share one hook. Another function object compiles again.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    hook: LogitsHook | None = None

    def checked(self) -> "Sampling":
        """Returns itself with a temperature; raises ValueError naming a bad value."""
        if self.temperature is not None:
            _check_number("temperature", self.temperature, least=0)
        if self.top_k is not None:
            whole_number("top_k", self.top_k, least=1)
        if self.top_p is not None:
            _check_number("top_p", self.top_p, above=0, most=1)
        if self.min_p is not None:
            _check_number("min_p", self.min_p, least=0, most=1)
        _check_number("repetition_penalty", self.repetition_penalty, above=0)
        _check_number("presence_penalty", self.presence_penalty)
        _check_number("frequency_penalty", self.frequency_penalty)
        whole_number("min_tokens", self.min_tokens, least=0)
        if self.logprobs is not None:
            whole_number("logprobs", self.logprobs, least=0)
        if not isinstance(self.prompt_logprobs, bool):
            raise ValueError(f"prompt_logprobs={self.prompt_logprobs!r} must be True or False.")
        if self.hook is not None and not callable(self.hook):
            raise ValueError(f"hook={self.hook!r} must be a function of logits and tokens.")
        if self.temperature is not None:
            return self
        ruled = any(rule is not None for rule in (self.top_k, self.top_p, self.min_p))
        return dataclasses.replace(self, temperature=1.0 if ruled else 0.0)


def _check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
) -> None:
    """ValueError unless the value is a finite number within the bounds."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if number and math.isfinite(value) and above < value and least <= value <= most:  # type: ignore
        return
    bounds = [f"at least {least}"] if least > -math.inf else []
    bounds += [f"above {above}"] if above > -math.inf else []
    bounds += [f"at most {most}"] if most < math.inf else []
    raise ValueError(f"{name}={value!r} must be a finite number{', '.join(['', *bounds])}.")
