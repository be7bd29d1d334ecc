"""Next-token predictions of documents through caches: KL divergence, perplexity, agreement.

Teacher-forced, chunk by chunk, through the same caches that generation uses. Every codec's cache
takes a chunk right after the exact one did, so that only one chunk's distributions are alive.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from scripts.shared.documents import Document

Array = jax.Array | np.ndarray

EXACT = "exact"  # the cache that all others are compared with
ANY = -1  # in place of a choice: none
MOST_CHOICES = 32


class Scores(NamedTuple):
    """A cache's predictions beside the exact one's, each `f32[predictions]`."""

    kl: Array  # KL(exact || codec) of the next token's distribution, nats
    exact_log_prob: Array  # of the target
    log_prob: Array
    agrees: Array  # 1 where both pick the same token, else 0
    exact_right: Array  # 1 where the exact cache picks the target, else 0
    right: Array  # 1 where this cache does


class Reading(NamedTuple):
    """What one cache made of one document."""

    scores: Scores  # of the predictions that count
    held_bits: float  # see `held_bits`, at the end of the document
    stored_bits: float  # see `stored_bits`


@functools.partial(jax.jit, donate_argnames="cache")
def predict(model, tokens, count, cache):
    """Runs `tokens`, `i32[1, chunk]`, of which `count` are real.

    Returns:
      Log-probabilities of the next token, `f32[chunk, vocab]`, and the cache.
    """
    count = jnp.asarray(count, jnp.int32)[None]
    hidden, cache = model(tokens, cache.prepare(count))
    logits = model.unembed(hidden)[0].astype(jnp.float32)
    return jax.nn.log_softmax(logits, axis=-1), cache.commit(count)


@functools.partial(jax.jit, donate_argnames="cache")
def score(model, tokens, targets, choices, count, exact, cache):
    """Runs a codec's cache over the tokens for which the exact one predicted `exact`.

    Args:
      model: a `Decoder`.
      tokens: `i32[1, chunk]`.
      targets: `i32[chunk]`, the tokens that follow.
      choices: `i32[chunk, n]`, tokens from which each row picks; a row that begins with `ANY`
        picks from the whole vocabulary.
      count: number of rows that are real.
      exact: `f32[chunk, vocab]`, as `predict` returns it.
      cache: donated.

    Returns:
      `Scores` of the chunk's rows, and the cache.
    """
    coded, cache = predict(model, tokens, count, cache)
    exact_pick, coded_pick = choose(exact, choices), choose(coded, choices)
    as_float = lambda x: x.astype(jnp.float32)
    scores = Scores(
        kl=kl_divergence(exact, coded),
        exact_log_prob=pick(exact, targets),
        log_prob=pick(coded, targets),
        agrees=as_float(exact_pick == coded_pick),
        exact_right=as_float(exact_pick == targets),
        right=as_float(coded_pick == targets),
    )
    return scores, cache


@jax.jit
def score_exact(exact, targets, choices) -> Scores:
    """`Scores` of the exact cache beside itself."""
    right = (choose(exact, choices) == targets).astype(jnp.float32)
    log_prob, zero = pick(exact, targets), jnp.zeros_like(right)
    return Scores(zero, log_prob, log_prob, zero + 1, right, right)


def choose(log_probs: jax.Array, choices: jax.Array) -> jax.Array:
    """Each row's likeliest token, `i32[rows]`, of its choices or (`ANY`) of all tokens."""
    among = jnp.take_along_axis(log_probs, jnp.maximum(choices, 0), axis=1)
    best = jnp.argmax(jnp.where(choices == ANY, -jnp.inf, among), axis=1)
    chosen = jnp.take_along_axis(choices, best[:, None], axis=1)[:, 0]
    return jnp.where(choices[:, 0] == ANY, jnp.argmax(log_probs, axis=-1), chosen)


def pick(log_probs: jax.Array, targets: jax.Array) -> jax.Array:
    """Each row's entry of its target, `[tokens]` from `[tokens, vocab]`."""
    return jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]


def kl_divergence(p_log: jax.Array, q_log: jax.Array) -> jax.Array:
    """`sum(p * log(p / q))` over the last axis, nats, from log-probabilities.

    Summed as `p * (d + exp(-d) - 1)` with `d = log(p / q)`, which is the same as both sum to 1:
    no term is negative, so rounding can't drown a small divergence.
    """
    d = p_log - q_log
    near = jnp.abs(d) < 1  # elsewhere nothing cancels, and exp(-d) might overflow
    small = jnp.where(near, d, 0)
    p, q = jnp.exp(p_log), jnp.exp(q_log)
    return jnp.sum(jnp.where(near, p * (small + jnp.expm1(-small)), p * d - p + q), axis=-1)


def perplexity(
    model,
    tokens: np.ndarray,
    config: jaxkv.CacheConfig,
    *,
    done: Callable[[], None] = lambda: None,
) -> float:
    """Perplexity of `tokens`, `i32[n]`, through a fresh cache, `config.max_new_tokens` at a time.

    `done` is called after each step.
    """
    cache, total = jaxkv.KVCache.create(config), 0.0
    for inputs, targets, count in chunks(tokens, config.max_new_tokens):
        log_probs, cache = predict(model, inputs, count, cache)
        total += float(jnp.sum(pick(log_probs, targets)[:count]))
        done()
    return float(np.exp(-total / (len(tokens) - 1)))


def read_document(
    model,
    document: Document,
    exact: jaxkv.CacheConfig,
    coded: dict[str, jaxkv.CacheConfig],
    *,
    begin: Callable[[str, int], None] = lambda name, tokens: None,
) -> dict[str, Reading]:
    """Reads a document through the exact cache and each codec's, all empty at first.

    Args:
      model: a `Decoder`.
      document: what to read, and which predictions count.
      exact: the exact cache; a chunk has its `max_new_tokens` tokens.
      coded: each codec's cache.
      begin: called before each step with the name of the cache and the number of tokens.

    Returns:
      What each cache made of it, by codec; the exact cache's comes first, as "exact".

    Raises:
      ValueError: a prediction that is not finite.
    """
    caches = {name: jaxkv.KVCache.create(config) for name, config in coded.items()}
    reference = jaxkv.KVCache.create(exact)
    parts: dict[str, list[Scores]] = {name: [] for name in (EXACT, *coded)}
    for piece in pieces(document, exact.max_new_tokens):
        begin(EXACT, piece.count)
        expected, reference = predict(model, piece.tokens, piece.count, reference)
        found = score_exact(expected, piece.targets, piece.choices)
        parts[EXACT].append(Scores(*(np.asarray(x)[: piece.count] for x in found)))
        for name in coded:
            begin(name, piece.count)
            found, caches[name] = score(
                model,
                piece.tokens,
                piece.targets,
                piece.choices,
                piece.count,
                expected,
                caches[name],
            )
            parts[name].append(Scores(*(np.asarray(x)[: piece.count] for x in found)))
    readings = {}
    for name, cache in {EXACT: reference, **caches}.items():
        scores = Scores(*(np.concatenate(x)[document.rows] for x in zip(*parts[name], strict=True)))
        if not all(np.isfinite(x).all() for x in scores):
            raise ValueError(f"codec {name!r} or this model gives predictions that are not finite.")
        readings[name] = Reading(scores, held_bits(cache), stored_bits(cache))
    return readings


class Piece(NamedTuple):
    """A chunk of a document, padded."""

    tokens: jax.Array  # i32[1, chunk]
    targets: jax.Array  # i32[chunk]
    choices: jax.Array  # i32[chunk, MOST_CHOICES]
    count: int  # real tokens


def pieces(document: Document, size: int) -> Iterator[Piece]:
    """The document's chunks; choices are padded, so that all documents share programs."""
    choices = np.full((document.length, MOST_CHOICES), ANY, np.int32)
    choices[document.rows, : document.choices.shape[1]] = document.choices
    starts = range(0, document.length, size)
    for start, (tokens, targets, count) in zip(starts, chunks(document.tokens, size), strict=True):
        own = np.full((size, MOST_CHOICES), ANY, np.int32)
        own[:count] = choices[start : start + count]
        yield Piece(tokens, targets, jnp.asarray(own), count)


def chunks(tokens: np.ndarray, size: int) -> Iterator[tuple[jax.Array, jax.Array, int]]:
    """Pieces of the text: inputs `i32[1, size]`, targets `i32[size]`, how many of them are real."""
    for start in range(0, len(tokens) - 1, size):
        stop = min(start + size, len(tokens) - 1)
        pad = lambda x: jnp.asarray(np.pad(x, (0, size - len(x))), jnp.int32)
        yield pad(tokens[start:stop])[None], pad(tokens[start + 1 : stop + 1]), stop - start


def stored_bits(cache: jaxkv.KVCache) -> float:
    """Bits per cached number in the pages of codes, exact pages beside them left out.

    Keys and values, factors and page means, layout padding; layers averaged.
    """
    bits = 0.0
    for group in cache.config.groups:
        store = cache.stores[group.stores[-1]]
        spec = group.spec
        values = 2 * spec.kv_heads * spec.head_dim * cache.config.page_size  # per page and layer
        bits += 8 * store.page_bytes / values  # of all layers of the group
    return bits / len(cache.config.layers)


def held_bits(cache: jaxkv.KVCache) -> float:
    """Bits that the pages in use take per cached number: exact pages and codes, all layers.

    Cached numbers are the keys and values of the tokens that the next query can see, so that the
    unused end of a page, and tokens of a page that have left the window, count as cost.
    """
    pages = np.asarray(cache.pages_in_use).tolist()
    held = sum(n * size for n, size in zip(pages, cache.page_bytes, strict=True))
    numbers = 0
    for length in np.asarray(cache.lengths).tolist():
        for group in cache.config.groups:
            spec, seen = group.spec, length
            if spec.window is not None:
                seen = min(length, spec.window + min(spec.sink_tokens, length))
            numbers += len(group.layers) * 2 * spec.kv_heads * spec.head_dim * seen
    return 8 * held / numbers
