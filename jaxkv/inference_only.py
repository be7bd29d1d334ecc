"""Refuses gradients through the cache while they are traced."""

import jax


@jax.custom_jvp
def inference_only(arrays):
    """Returns a pytree of arrays as it is; raises NotImplementedError where it is differentiated.

    Through pages of codes, which are integers, a gradient would be 0 in silence.
    """
    return arrays


@inference_only.defjvp
def _refuse_gradient(primals, tangents):
    raise NotImplementedError("KVCache.attend is for inference only: it has no gradient.")
