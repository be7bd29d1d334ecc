"""Rotated rows against the codecs' own float32 rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codecs.turboquant import TurboQuant
from pallas_kernels.triton.rotation import FEW_ROWS, rotate_rows, sign_matrix

pytestmark = pytest.mark.both_pythons

SIGNED = TurboQuant(sign_seed=3)


@pytest.fixture(params=["interpret", pytest.param("compiled", marks=pytest.mark.gpu)])
def interpret(request):
    return request.param == "interpret"


def assert_rotated(x, transform, interpret, tolerance=1e-6, **options):
    want = np.asarray(transform(x)) * options.get("scale", 1.0)
    if "limit" in options:
        want = np.clip(want, -options["limit"], options["limit"])
    got = np.asarray(rotate_rows(x, transform, interpret=interpret, **options), np.float32)
    assert got.shape == x.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["rotate", "unrotate"])
def test_rows_are_rotated_to_float32_precision(name, head_dim, dtype, interpret):
    x = (3 * jax.random.normal(jax.random.key(0), (3, 7, head_dim))).astype(dtype)
    assert_rotated(x, getattr(SIGNED, name), interpret, scale=0.3)


def test_many_rows_that_fill_no_whole_program(interpret):
    x = jax.random.normal(jax.random.key(1), (FEW_ROWS + 1, 64))
    assert_rotated(x, SIGNED.rotate, interpret)


def test_results_are_clipped_and_rounded(interpret):
    x = 1e3 * jax.random.normal(jax.random.key(2), (5, 64))
    assert_rotated(x, SIGNED.rotate, interpret, tolerance=1e-3, limit=900.0, out_dtype=jnp.float16)


def test_what_is_not_finite_saturates_or_stays_nan(interpret):
    x = jnp.zeros((2, 64)).at[0, 3].set(jnp.inf).at[1, 5].set(jnp.nan)
    y = np.asarray(rotate_rows(x, SIGNED.rotate, limit=65504.0, interpret=interpret))
    assert (np.abs(y[0]) == 65504).all() and np.isnan(y[1]).all()


@pytest.mark.parametrize("head_dim", [80, 96, 192])
def test_other_matrices_are_left_to_the_codec(head_dim, interpret):
    assert sign_matrix(SIGNED.rotate, head_dim) is None
    x = jax.random.normal(jax.random.key(3), (5, head_dim))
    assert_rotated(x, SIGNED.rotate, interpret, scale=2.0)


def test_no_rotation_is_none(interpret):
    x = jax.random.normal(jax.random.key(4), (5, 64))
    assert_rotated(x, lambda x: x, interpret)
