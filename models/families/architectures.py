"""The architectures that can be loaded, by the `model_type` of their config.json."""

from collections.abc import Callable

from models.config import DecoderConfig
from models.errors import CheckpointError, clear_errors
from models.families import (
    gemma,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo2,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from models.families.foreign_keys import refuse_foreign_keys

ARCHITECTURES: dict[str, Callable[[dict], DecoderConfig]] = {
    "llama": llama.decoder_config,
    "mistral": mistral.decoder_config,
    "mixtral": mixtral.decoder_config,
    "qwen2": qwen2.decoder_config,
    "qwen3": qwen3.decoder_config,
    "qwen3_moe": qwen3_moe.decoder_config,
    "smollm3": smollm3.decoder_config,
    "olmo2": olmo2.decoder_config,
    "gemma2": gemma.gemma2_config,
    "gemma3_text": gemma.gemma3_config,
    "gemma3": gemma.gemma3_multimodal_config,
    "gpt_oss": gpt_oss.decoder_config,
}


def architecture_config(hf: dict) -> DecoderConfig:
    """Reads a Hugging Face config.

    Raises:
      CheckpointError: the architecture is unknown, a key is missing, a value is invalid, or a key
        asks for something that the architecture does not have.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise CheckpointError(f"model_type={kind!r} must be one of {', '.join(ARCHITECTURES)}.")
    with clear_errors("config.json"):
        refuse_foreign_keys(hf)
        return ARCHITECTURES[kind](hf)
