"""SmolLM3: a Llama in which some layers do not rotate queries and keys (NoPE, arXiv:2501.18795)."""

from models.config import DecoderConfig
from models.errors import CheckpointError
from models.families.hf_config import (
    FULL,
    SLIDING,
    build_config,
    flag,
    rope_parameters,
    switched_windows,
    whole,
)

THETA = 2_000_000.0
# transformers' defaults, for keys that a file leaves out.
DEFAULTS = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 128_001,
    "tie_word_embeddings": True,
}


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "smollm3"; CheckpointError if it is invalid."""
    hf = DEFAULTS | hf
    bias, rotated = flag(hf, "attention_bias", False), _rotated_layers(hf)
    sliding = [FULL if turns else SLIDING for turns in rotated]
    return build_config(
        hf,
        windows=switched_windows(hf, lambda hf: sliding),
        rope=rope_parameters(hf, theta=THETA),
        rotated=rotated,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=flag(hf, "mlp_bias", False),
    )


def _rotated_layers(hf: dict) -> tuple[bool, ...]:
    """`no_rope_layers` says 1 for layers that are rotated; without it every n-th is not."""
    layers, interval = whole(hf, "num_hidden_layers"), whole(hf, "no_rope_layer_interval", 4)
    given = hf.get("no_rope_layers")
    if given is None:
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(given, list) or any(turns not in (0, 1) for turns in given):
        raise CheckpointError(f"config.json: no_rope_layers={given!r} must be a list of 0 and 1.")
    if len(given) < layers:
        raise CheckpointError(
            f"config.json: no_rope_layers has {len(given)} entries for {layers} layers."
        )
    return tuple(bool(turns) for turns in given[:layers])
