"""What each prompt asks for, checked on the host before anything is compiled."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from jaxkv.draw import rules_of
from jaxkv.keep import Keep
from jaxkv.model import Model
from jaxkv.sampling import Sampling
from jaxkv.steps import NO_TOKEN, Requests
from jaxkv.stop_text import StopText
from pallas_kernels.checks import MOST_INT, whole_number

SEEDS = 2**32  # seeds are u32
STOP_STEP = 8  # lists of stop tokens are padded to multiples of this, so that few lengths compile

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and everything that decides its continuation."""

    prompt: list[int]  # token ids, at least one
    max_tokens: int  # most tokens to generate
    sampling: Sampling  # after `checked()`
    seed: int  # of the draws, a u32
    stop_ids: tuple[int, ...]  # tokens that end the answer and are its last
    stop_text: StopText | None  # strings that end the answer


def read_requests(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    keep: Keep,
    max_tokens: int | Sequence[int],
    sampling: Sampling | Sequence[Sampling] | None,
    seed: int | Sequence[int],
    stop_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    stop_text: StopText | None,
) -> list[Request]:
    """One request per prompt; `generate` describes the arguments.

    Raises:
      ValueError: a value is of a wrong type or out of range, or a prompt and its answer are longer
        than the model's trained context.
    """
    read = _read_prompts(prompts, model.vocab_size)
    count = len(read)
    requests = [
        Request(
            prompt=prompt,
            max_tokens=whole_number("max_tokens", most, least=1),
            sampling=_checked_sampling(rules, model.vocab_size),
            seed=own_seed,
            stop_ids=_checked_stop_ids(stops),
            stop_text=stop_text,
        )
        for prompt, most, rules, own_seed, stops in zip(
            read,
            per_prompt("max_tokens", max_tokens, count, numbers.Integral),
            per_prompt("sampling", Sampling() if sampling is None else sampling, count, Sampling),
            prompt_seeds(seed, count),
            _stop_lists(tuple(model.eos_ids) if stop_ids is None else stop_ids, count),
            strict=True,
        )
    ]
    context = model.max_position if keep.window is None else None
    for number, request in enumerate(requests):
        length, most = len(request.prompt), request.max_tokens
        if request.sampling.min_tokens > most:
            raise ValueError(
                f"min_tokens={request.sampling.min_tokens} must be at most max_tokens={most}."
            )
        if length + most > MOST_INT:
            raise ValueError(f"prompt {number}: {length} tokens and max_tokens={most} pass 2**31.")
        if context is not None and length + most > context:
            raise ValueError(
                f"prompt {number} has {length} tokens, with max_tokens={most} more than the "
                f"{context} the model was trained on: shorten it, lower max_tokens, or stream "
                "with a window and sink_tokens."
            )
    return requests


def on_device(requests: Sequence[Request], *, releases: bool) -> Requests:
    """The requests as arrays with a row each, for the jitted steps.

    Raises:
      ValueError: requests have different hooks.
    """
    most_stops = max(len(request.stop_ids) for request in requests)
    width = max(1, -(-most_stops // STOP_STEP)) * STOP_STEP
    stops = np.full((len(requests), width), NO_TOKEN, np.int32)
    for row, request in zip(stops, requests, strict=True):
        row[: len(request.stop_ids)] = request.stop_ids
    samplings = [request.sampling for request in requests]
    asked = [one.logprobs for one in samplings if one.logprobs is not None]
    return Requests(
        prompt_lens=jnp.asarray([len(request.prompt) for request in requests], jnp.int32),
        seeds=jnp.asarray([request.seed for request in requests], jnp.uint32),
        limits=jnp.asarray([request.max_tokens for request in requests], jnp.int32),
        stop_ids=jnp.asarray(stops),
        rules=rules_of(samplings),
        logprobs=max(asked, default=None),
        releases=releases,
    )


def per_prompt(name: str, value: T | Sequence[T], count: int, single: Any) -> Sequence[T]:
    """`count` values from one of type `single` for all prompts, or from a sequence of as many."""
    if isinstance(value, single) or not _is_list(value):
        return [value] * count  # type: ignore[list-item]  # a wrong type is named when it is checked
    values = list(value)  # type: ignore[arg-type]
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries and must have one per prompt, {count}.")
    return values


def prompt_seeds(seed: int | Sequence[int], prompts: int) -> list[int]:
    """One seed per prompt: the given ones, or counted up from an int (modulo 2**32).

    Raises:
      ValueError: a seed is out of range, or there are not as many as prompts.
    """
    single = not _is_list(seed)
    seeds = per_prompt("seed", seed, prompts, numbers.Integral)
    for value in seeds:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not whole or not 0 <= value < SEEDS:
            raise ValueError(f"seed={value!r} must be a whole number, at least 0, below 2**32.")
    return [(int(value) + single * number) % SEEDS for number, value in enumerate(seeds)]


def _is_list(value: object) -> bool:
    """Whether the value is a list, a tuple, an array with an axis, or the like, but no text."""
    if isinstance(value, str | bytes | dict | set | frozenset):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0


def _read_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """The prompts as lists of ints; ValueError for anything that is not a list of token lists."""
    if not _is_list(prompts):
        raise ValueError(
            f"prompts must be a list of lists of token ids, not {type(prompts).__name__}: "
            "encode text with the model's tokenizer."
        )
    if len(prompts) == 0:
        raise ValueError("prompts is empty: give at least one.")
    read = []
    for number, prompt in enumerate(prompts):
        if not _is_list(prompt):
            raise ValueError(
                f"prompt {number} must be a list of token ids, not {_short(prompt)}: "
                "one prompt alone is [[...]]."
            )
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty: it needs at least one token.")
        read.append(_token_ids(f"prompt {number}", prompt, vocab_size))
    return read


def _token_ids(name: str, values: Any, vocab_size: int | None) -> list[int]:
    """The values as ints; ValueError for one that is no token id."""
    if isinstance(values, Sequence):
        array = values
    else:  # numpy's and JAX's arrays become Python numbers at once, one by one would be slow
        array = np.asarray(values).tolist()
    for token in array:
        if isinstance(token, bool | np.bool) or not isinstance(token, int | np.integer):
            raise ValueError(f"{name} has {_short(token)}, and a token id is a whole number.")
        if vocab_size is not None and not 0 <= token < vocab_size:
            raise ValueError(f"{name} has token {token}, and {vocab_size=}.")
    return [int(token) for token in array]


def _checked_sampling(sampling: object, vocab_size: int) -> Sampling:
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a jaxkv.Sampling, not {_short(sampling)}.")
    sampling = sampling.checked()
    if sampling.logprobs is not None and sampling.logprobs > vocab_size:
        raise ValueError(f"logprobs={sampling.logprobs} must be at most {vocab_size=}.")
    return sampling


def _stop_lists(stop_ids: object, count: int) -> Sequence[Any]:
    """One list of stop tokens per prompt, from one list for all, or a list of lists."""
    if not _is_list(stop_ids):
        raise ValueError(f"stop_ids must be a list of token ids, not {_short(stop_ids)}.")
    if len(stop_ids) > 0 and all(_is_list(one) for one in stop_ids):  # type: ignore
        return per_prompt("stop_ids", stop_ids, count, str)  # type: ignore[arg-type]
    return [stop_ids] * count


def _checked_stop_ids(stops: Any) -> tuple[int, ...]:
    ids = _token_ids("stop_ids", stops, None)
    for token in ids:
        if not 0 <= token <= MOST_INT:
            raise ValueError(f"stop_ids has {token}: it must be at least 0 and below 2**31.")
    return tuple(dict.fromkeys(ids))


def _short(value: object) -> str:
    """The value's text for an error line, cut."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
