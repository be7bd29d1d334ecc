"""Random models have the shapes of the published ones, and finite logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.checkpoints.open import open_checkpoint
from models.decoder import Decoder
from models.families.architectures import architecture_config
from models.random_weights import SHAPES, draw_decoder
from tests.scripts.check_checkpoint.oracles import ORACLES

# As the model cards or the index files of the published weights say.
PARAMETERS = {
    "llama3-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "smollm3-3b": 3_075_098_624,
    "olmo2-7b": 7_298_617_344,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_published_number_of_parameters(name):
    build = lambda: Decoder(SHAPES[name], nnx.Rngs(0), dtype="bfloat16")
    arrays = jax.tree.leaves(nnx.state(nnx.eval_shape(build)))
    assert sum(x.size for x in arrays) == PARAMETERS[name]


def test_random_experts_route_tokens_apart():
    """A drawn router has no bias toward some experts, and differs from token to token."""
    config = architecture_config(open_checkpoint(ORACLES / "qwen3_moe_mixed").config)
    model = draw_decoder(config, dtype="float32", scan=False)
    experts = model.layers[1].experts
    assert experts is not None and model.layers[0].experts is None
    x = jax.random.normal(jax.random.key(0), (64, config.hidden_size))
    chosen, shares = experts._route(x, 0)
    assert len(np.unique(chosen)) == 4
    assert bool(jnp.all((shares > 0) & (shares < 1)))
