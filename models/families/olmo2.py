"""OLMo 2 (arXiv:2501.00656): norms stand after attention and MLP, and on all queries and keys."""

from models.config import DecoderConfig
from models.errors import CheckpointError
from models.families import llama
from models.families.hf_config import build_config, flag, uniform_windows

# transformers' defaults, for keys that a file leaves out.
DEFAULTS = llama.DEFAULTS | {"vocab_size": 50_304, "rms_norm_eps": 1e-5, "eos_token_id": 50_279}


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "olmo2"; CheckpointError if it is invalid."""
    hf = DEFAULTS | hf
    bias = flag(hf, "attention_bias", False)
    if hf.get("clip_qkv") is not None:
        raise CheckpointError(f"config.json: clip_qkv={hf['clip_qkv']!r} is not supported.")
    return build_config(
        hf,
        windows=uniform_windows(hf, None),
        attention_bias=bias,
        output_bias=bias,
        qk_norm="channels",
        norm_places="after",
    )
