"""Reads a Hugging Face `config.json` into a `DecoderConfig`: what the Llama family shares."""

from models.checkpoints import CheckpointError
from models.config import DecoderConfig
from models.rope import make_rope

# Missing in old config files; transformers' defaults.
DEFAULT_THETA = 10000.0


def common(hf: dict, *, windows: tuple[int | None, ...], **own) -> DecoderConfig:
    """Builds the config from the keys that every architecture has, and `own` fields beside them.

    Raises:
      CheckpointError: a key is missing, or a value can't be.
    """
    try:
        q_heads = hf["num_attention_heads"]
        kv_heads = hf.get("num_key_value_heads") or q_heads
        head_dim = hf.get("head_dim") or hf["hidden_size"] // q_heads
        config = DecoderConfig(
            architecture=hf["model_type"],
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            windows=windows,
            rope=make_rope(head_dim, rope_parameters(hf)),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            eos_ids=as_ids(hf.get("eos_token_id")),
            max_position=hf.get("max_position_embeddings"),
            **own,
        )
    except KeyError as missing:
        raise CheckpointError(f"config.json has no {missing}.") from None
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None
    if q_heads % kv_heads:
        raise CheckpointError(f"num_attention_heads={q_heads} must be a multiple of {kv_heads}.")
    if head_dim % 2:
        raise CheckpointError(f"{head_dim=} must be even: channels are rotated in pairs.")
    act = hf.get("hidden_act", "silu")
    if act != "silu":
        raise CheckpointError(f"hidden_act={act!r} must be 'silu'.")
    return config


def rope_parameters(hf: dict) -> dict:
    """One rope description, from the new (`rope_parameters`) or the old keys."""
    new = hf.get("rope_parameters")
    old = hf.get("rope_scaling") or {}
    found = dict(new or old)
    found["rope_type"] = found.get("rope_type", found.get("type", "default"))
    found.setdefault("rope_theta", hf.get("rope_theta", DEFAULT_THETA))
    if hf.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={hf['partial_rotary_factor']} must be 1.")
    return found


def layer_windows(hf: dict, *, uses_window: bool) -> tuple[int | None, ...]:
    """Each layer's window: by `layer_types` where the config has them, else the same for all."""
    layers, window = hf.get("num_hidden_layers"), hf.get("sliding_window")
    if not isinstance(layers, int) or layers < 1:
        raise CheckpointError(f"num_hidden_layers={layers} must be at least 1.")
    if not uses_window or not window:
        return (None,) * layers
    types = hf.get("layer_types") or ["sliding_attention"] * layers
    known = {"sliding_attention": window, "full_attention": None}
    for kind in types:
        if kind not in known:
            raise CheckpointError(f"layer_types has {kind!r}; known: {', '.join(known)}.")
    if len(types) != layers:
        raise CheckpointError(f"layer_types has {len(types)} entries for {layers} layers.")
    return tuple(known[kind] for kind in types)


def as_ids(ids: int | list[int] | None) -> tuple[int, ...]:
    """Token ids from the three forms that configs use."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
