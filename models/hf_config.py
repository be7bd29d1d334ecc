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
    q_heads = whole(hf, "num_attention_heads")
    kv_heads = whole(hf, "num_key_value_heads", q_heads)
    hidden_size = whole(hf, "hidden_size")
    head_dim = whole(hf, "head_dim", hidden_size // q_heads)
    norm_eps = hf.get("rms_norm_eps", 1e-6)
    if not isinstance(norm_eps, int | float) or not norm_eps > 0:
        raise CheckpointError(f"config.json: rms_norm_eps={norm_eps!r} must be a number above 0.")
    try:
        rope = make_rope(head_dim, rope_parameters(hf))
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None
    config = DecoderConfig(
        architecture=hf["model_type"],
        vocab_size=whole(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=whole(hf, "intermediate_size"),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=windows,
        rope=rope,
        norm_eps=float(norm_eps),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        eos_ids=as_ids(hf.get("eos_token_id")),
        max_position=whole(hf, "max_position_embeddings", None),
        **own,
    )
    if q_heads % kv_heads:
        raise CheckpointError(f"num_attention_heads={q_heads} must be a multiple of {kv_heads}.")
    if head_dim % 2:
        raise CheckpointError(f"{head_dim=} must be even: channels are rotated in pairs.")
    act = hf.get("hidden_act", "silu")
    if act != "silu":
        raise CheckpointError(f"hidden_act={act!r} must be 'silu'.")
    return config


def whole(hf: dict, key: str, *default):
    """A size, at least 1; with a `default` it may be missing or null."""
    value = hf.get(key)
    if value is None:
        if default:
            return default[0]
        raise CheckpointError(f"config.json has no {key!r}.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key}={value!r} must be a whole number, at least 1.")
    return int(value)


def rope_parameters(hf: dict) -> dict:
    """One rope description, from the new (`rope_parameters`) or the old keys."""
    found = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ValueError(f"rope parameters must be an object, not {found!r}.")
    found = dict(found)
    found["rope_type"] = found.get("rope_type", found.get("type", "default"))
    found.setdefault("rope_theta", hf.get("rope_theta", DEFAULT_THETA))
    if hf.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={hf['partial_rotary_factor']} must be 1.")
    return found


def layer_windows(hf: dict, *, uses_window: bool, full_first: int = 0) -> tuple[int | None, ...]:
    """Each layer's window: by `layer_types`, in older files all but the first `full_first`."""
    layers = whole(hf, "num_hidden_layers")
    window = whole(hf, "sliding_window", None) if uses_window else None
    if window is None:
        return (None,) * layers
    types = hf.get("layer_types")
    if types is None:
        types = ["full_attention" if n < full_first else "sliding_attention" for n in range(layers)]
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
    ids = ids if isinstance(ids, list | tuple) else [ids]
    for number in ids:
        if isinstance(number, bool) or not isinstance(number, int):
            raise CheckpointError(f"config.json: eos_token_id has {number!r}, not a token id.")
    return tuple(map(int, ids))
