"""Tries what caches and kernels ask of a codec, for codecs of one's own: rules, not accuracy."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.codecs.codec import Exact, KVCodec, Quantized, TensorCodec
from pallas_kernels.layouts.choose import default_layout

TOKENS = 16


def check_codec(codec: KVCodec, *, head_dim: int = 64) -> None:
    """Quantizes a few vectors and raises ValueError for the first rule that the codec breaks.

    Every vector is quantized by itself, to codes and factors of the types that the codec names;
    it reads as `scale * code_values(codes) + zero`, code by code; what is not finite stays in its
    own token; a rotation keeps dot products and can be undone; pages of CPUs and GPUs hold the
    codes without loss.

    Args:
      codec: the codec; its own checks, made when it was built, are not repeated.
      head_dim: channels of the vectors that are tried.

    Raises:
      ValueError: a broken rule, in one line that names it.
    """
    records = {}
    for name, tensor in (("key", codec.key), ("value", codec.value)):
        if isinstance(tensor, Exact):
            records[name] = tensor.quantize(_vectors(head_dim))
            continue
        if (broken := next(_broken_rules(tensor, head_dim), None)) is not None:
            raise ValueError(f"{codec.name}, {name} {type(tensor).__name__}: {broken}.")
        records[name] = tensor.quantize(_vectors(head_dim))
    if not codec.lossy:
        return
    pages = {name: jax.tree.map(lambda x: x[None], record) for name, record in records.items()}
    for platform in ("cpu", "gpu"):
        layout = default_layout(
            codec, platform=platform, kv_heads=1, head_dim=head_dim, page_size=TOKENS
        )
        back = layout.unpack(layout.pack(pages["key"], pages["value"]))
        for name, record in zip(pages, back, strict=True):
            if not _same(record, pages[name]):
                raise ValueError(
                    f"{codec.name}, {name}: codes must come back unchanged from {platform} pages."
                )


def _vectors(head_dim: int) -> jax.Array:
    """Vectors of several sizes, one of them zero."""
    x = np.random.default_rng(0).normal(size=(TOKENS, head_dim))
    x *= np.geomspace(1e-3, 1e3, TOKENS)[:, None]
    x[3] = 0
    return jnp.asarray(x, jnp.float32)


def _same(a: Quantized, b: Quantized) -> bool:
    bits = lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}")
    return all(
        np.array_equal(bits(x), bits(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def _broken_rules(tensor: TensorCodec, head_dim: int) -> Iterator[str]:
    """The rules that a codec breaks, in words."""
    x = _vectors(head_dim)
    mean = jnp.ones(head_dim, jnp.float32) if tensor.uses_mean else None
    quantize = jax.jit(lambda x: tensor.quantize(x, mean))
    record = quantize(x)
    yield from _wrong_record(tensor, record, x)
    values, (scale, zero) = tensor.code_values(record.codes), tensor.factor_values(record.factors)
    if values.shape != x.shape or values.dtype != jnp.float32:
        yield f"code_values must give f32 of the codes' shape, not {values.dtype} {values.shape}"
    if not np.array_equal(np.asarray(tensor.code_values(record.codes.T)).T, np.asarray(values)):
        yield "code_values must work code by code, whatever the order of the axes"
    read = values if scale is None else values * scale[..., None]
    read = read if zero is None else read + zero[..., None]
    if not np.allclose(tensor.dequantize(record), read, rtol=1e-5, atol=1e-6):
        yield "dequantize must give scale * code_values(codes) + zero, which attention reads"
    if not all(_same(quantize(x[n : n + 1]), _token(record, n)) for n in range(0, TOKENS, 5)):
        yield "a token's codes and factors must not depend on other tokens"
    yield from _spoiled(tensor, quantize, record, x)
    yield from _wrong_rotation(tensor, x)


def _token(record: Quantized, n: int) -> Quantized:
    return jax.tree.map(lambda x: x[n : n + 1], record)


def _wrong_record(tensor: TensorCodec, record: Quantized, x: jax.Array) -> Iterator[str]:
    codes, factors = record.codes, record.factors
    if codes.shape != x.shape or codes.dtype != tensor.codes_dtype:
        yield (f"codes must be {tensor.codes_dtype} {x.shape}, not {codes.dtype} {codes.shape}")
    found = [(factor.dtype, factor.shape) for factor in factors]
    if found != [(jnp.dtype(dtype), x.shape[:-1]) for dtype in tensor.factor_dtypes]:
        yield f"factors must be {len(tensor.factor_dtypes)} of factor_dtypes, one per token"
    if tensor.bits < 8 and int(jnp.max(codes)) >= 2**tensor.bits:
        yield f"codes must be below {2**tensor.bits}, and one is {int(jnp.max(codes))}"


def _spoiled(tensor: TensorCodec, quantize, record: Quantized, x: jax.Array) -> Iterator[str]:
    """What is not finite must stay in its own token, and never reach a factor."""
    dirty = x.at[0].set(jnp.nan).at[5, 1].set(jnp.inf).at[7, 0].set(-jnp.inf).at[9].set(3e38)
    found = quantize(dirty)
    for factor in found.factors:
        if not np.isfinite(np.asarray(factor, np.float32)).all():
            yield "factors must be finite, for NaN and infinity too (finite_input, store_factor)"
    if tensor.always_finite and not np.isfinite(tensor.code_values(found.codes)).all():
        yield "always_finite=True, and a token that is not finite gives levels that are not"
    clean = [n for n in range(TOKENS) if n not in (0, 5, 7, 9)]
    if not _same(
        jax.tree.map(lambda x: x[jnp.asarray(clean)], found),
        jax.tree.map(lambda x: x[jnp.asarray(clean)], record),
    ):
        yield "a token that is not finite must change no other token"


def _wrong_rotation(tensor: TensorCodec, x: jax.Array) -> Iterator[str]:
    rotated = np.asarray(tensor.rotate(x))
    close = lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
    if not tensor.rotated and not np.array_equal(rotated, np.asarray(x)):
        yield "rotated=False, and rotate changes vectors"
    if not close(tensor.unrotate(jnp.asarray(rotated)), x):
        yield "unrotate must undo rotate"
    if not close(rotated @ rotated.T, x @ x.T):
        yield "rotate must keep dot products"
