"""Reads the keys of a Hugging Face `config.json` that several architectures share.

Here and in the architectures' files `hf` is the content of a config.json.
"""

from collections.abc import Callable, Sequence

from models.config import Activation, DecoderConfig
from models.errors import CheckpointError
from models.numbers import MOST, MOST_LAYERS, positive_number, switch, token_id, whole_number
from models.rope import make_rope

DEFAULT_THETA = 10000.0  # transformers' default, for old files that do not give `rope_theta`
SLIDING, FULL = "sliding_attention", "full_attention"
# Only in configs that come from GGUF files, which may have biases on q, k and v alone.
OUTPUT_BIAS = "attention_output_bias"
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
SAME_ACTIVATION = {"swish": "silu"}  # other names of the same function
# Keys of rotations that are not supported, with the values that change nothing.
ROPE_NEUTRAL = {
    "partial_rotary_factor": (None, 1),
    "attn_factor": (None, 1),
    "extrapolation_factor": (None, 1),
    "llama_4_scaling_beta": (None, 0),
}
TRAINED = "original_max_position_embeddings"
MOST_OF = {"num_hidden_layers": MOST_LAYERS}  # limits of keys that lengthen a table


def build_config(
    hf: dict,
    *,
    windows: tuple[int | None, ...],
    activation: str = "silu",
    rope: dict | None = None,
    local_rope: dict | None = None,
    quantization: str | None = None,
    **own,
) -> DecoderConfig:
    """Builds the config from the keys that every architecture has, and from `own` fields.

    Args:
      hf: content of the config.json.
      windows: the window of each layer, None for layers without one.
      activation: Hugging Face's name of the activation; the file must give this one or none.
      rope: parameters of the rotation; None reads the usual keys.
      local_rope: parameters for the layers with a window; None if they are rotated like the others.
      quantization: the `quant_method` that is supported; None if the architecture has none.
      own: further fields of `DecoderConfig`.

    Raises:
      CheckpointError: a key is missing, or a value is invalid.
    """
    q_heads = whole(hf, "num_attention_heads")
    kv_heads = whole(hf, "num_key_value_heads", q_heads)
    hidden_size = whole(hf, "hidden_size")
    head_dim = whole(hf, "head_dim", hidden_size // q_heads)
    if head_dim % 2:
        raise CheckpointError(f"{head_dim=} must be even: channels are rotated in pairs.")
    rope = rope_parameters(hf) if rope is None else rope
    try:
        turn = make_rope(head_dim, rope)
        local_turn = None if local_rope is None else make_rope(head_dim, local_rope)
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
        rope=turn,
        local_rope=local_turn,
        norm_eps=number(hf, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(hf, "tie_word_embeddings", False),
        eos_ids=as_ids(hf.get("eos_token_id")),
        max_position=stretched_context(whole(hf, "max_position_embeddings", None), rope),
        activation=ACTIVATIONS[activation],
        **own,
    )
    if q_heads % kv_heads:
        raise CheckpointError(f"num_attention_heads={q_heads} must be a multiple of {kv_heads}.")
    for key in ("hidden_act", "hidden_activation"):  # Gemma's files have the second
        act = hf.get(key) or activation
        if isinstance(act, list | dict) or SAME_ACTIVATION.get(act, act) != activation:
            raise CheckpointError(f"{key}={act!r} must be {activation!r}.")
    if (packed := hf.get("quantization_config") or None) is not None:
        kind = packed.get("quant_method") if isinstance(packed, dict) else packed
        if kind != quantization:
            raise CheckpointError(f"config.json: quant_method={kind!r} must be {quantization!r}.")
    return config


def whole(hf: dict, key: str, *default):
    """A whole number, at least 1. If it is missing or null: `default`, or an error without one."""
    value = hf.get(key)
    if value is None:
        if default:
            return default[0]
        raise CheckpointError(f"config.json has no {key!r}.")
    return whole_number(f"config.json: {key}", value, most=MOST_OF.get(key, MOST))


def number(hf: dict, key: str, *default):
    """A number above 0. If it is missing or null: `default`, or an error without one."""
    value = hf.get(key)
    if value is None:
        if default:
            return default[0]
        raise CheckpointError(f"config.json has no {key!r}.")
    return positive_number(f"config.json: {key}", value)


def flag(hf: dict, key: str, default: bool) -> bool:
    """True or false; `default` if it is missing or null."""
    value = hf.get(key)
    return default if value is None else switch(f"config.json: {key}", value)


def expert_counts(hf: dict, *default: int) -> tuple[int, int]:
    """Number of experts, and how many of them a token is sent to.

    Files call the first `num_local_experts` or `num_experts`; `default` if they have neither.
    """
    names = ("num_local_experts", "num_experts")
    given = {name: hf[name] for name in names if hf.get(name) is not None}
    if len(set(map(str, given.values()))) > 1:
        raise CheckpointError(f"config.json: {names[0]} and {names[1]} must agree, not {given}.")
    count = whole(hf, next(iter(given), names[0]), *default)
    top_k = whole(hf, "num_experts_per_tok")
    if top_k > count:
        raise CheckpointError(f"num_experts_per_tok={top_k} must be at most {count}.")
    return count, top_k


def rope_parameters(hf: dict, *, theta: float = DEFAULT_THETA) -> dict:
    """Parameters for `make_rope`, from the key `rope_parameters` or, in old files, `rope_scaling`.

    `theta` is used if the file gives no `rope_theta`.
    """
    found = {}
    # Files that people have extended carry both keys; as in transformers, the older one wins.
    for key in ("rope_parameters", "rope_scaling"):
        given = hf.get(key) or {}
        if not isinstance(given, dict):
            raise CheckpointError(f"config.json: {key} must be an object, not {given!r}.")
        if "type" in given:  # the older name of rope_type
            given = {"rope_type": given["type"], **given}
        found |= given
    if nested := [key for key, value in found.items() if isinstance(value, dict)]:
        raise CheckpointError(
            f"config.json: rope parameters are one set here, not one for each of {nested}."
        )
    for where in (hf, found):
        for key, neutral in ROPE_NEUTRAL.items():
            if (part := where.get(key)) not in neutral:
                raise CheckpointError(f"config.json: {key}={part!r} must be {neutral[1]}.")
    if found.get("rope_theta") is None:
        found["rope_theta"] = number(hf, "rope_theta", theta)
    # transformers reads the trained context beside the parameters first: Phi's files have it there.
    if (context := whole(hf, TRAINED, None)) is not None:
        found[TRAINED] = context
    kind = found.get("rope_type") or "default"
    if kind == "yarn" and found.get("factor", 0) is None:
        trained = whole(found, TRAINED)
        found["factor"] = whole(hf, "max_position_embeddings") / trained
    return found | {"rope_type": kind}


def stretched_context(max_position: int | None, rope: dict) -> int | None:
    """The context in tokens, which YaRN may make longer than the file's number.

    Files whose scaling was added by hand, as Qwen's model cards say, keep the original number.
    """
    factor, trained = rope.get("factor"), rope.get(TRAINED)
    if max_position is None or rope.get("rope_type") != "yarn" or not (factor and trained):
        return max_position
    return max(max_position, int(min(factor * trained, MOST)))


def layer_types(hf: dict, default: Sequence[str]) -> tuple[str, ...]:
    """Each layer's kind of attention, `SLIDING` or `FULL`; `default` if the file does not say."""
    layers = whole(hf, "num_hidden_layers")
    types = hf.get("layer_types")
    types = default if types is None else types
    if not isinstance(types, list | tuple):
        raise CheckpointError(f"layer_types must be a list, not {types!r}.")
    for kind in types:
        if kind not in (SLIDING, FULL):
            raise CheckpointError(f"layer_types has {kind!r}; known: {SLIDING}, {FULL}.")
    if len(types) != layers:
        raise CheckpointError(f"layer_types has {len(types)} entries for {layers} layers.")
    return tuple(types)


def every_nth_full(hf: dict, n: int) -> list[str]:
    """The kind of each layer of a model in which every n-th layer is full, the others sliding."""
    layers = range(1, whole(hf, "num_hidden_layers") + 1)
    return [SLIDING if layer % n else FULL for layer in layers]


def layer_windows(hf: dict, types: Sequence[str]) -> tuple[int | None, ...]:
    """Each layer's window: None in full layers; `sliding_window`, also None if null, in sliding."""
    window = whole(hf, "sliding_window", None)
    return tuple(window if kind == SLIDING else None for kind in types)


def switched_windows(hf: dict, default: Callable[[dict], Sequence[str]]) -> tuple[int | None, ...]:
    """Each layer's window in families whose files have the switch `use_sliding_window`.

    `default(hf)` are the layers' kinds in files without `layer_types`. With the switch off, or with
    `sliding_window` null, no layer has a window, and `layer_types` must agree with that.
    """
    window = whole(hf, "sliding_window", None)
    if flag(hf, "use_sliding_window", False) and window is not None:
        return layer_windows(hf, layer_types(hf, default(hf)))
    if SLIDING in layer_types(hf, [FULL] * whole(hf, "num_hidden_layers")):
        used = hf.get("use_sliding_window", False)
        raise CheckpointError(
            f"config.json: layer_types has {SLIDING!r}, which needs use_sliding_window=True and a "
            f"sliding_window; they are {used} and {window}."
        )
    return (None,) * whole(hf, "num_hidden_layers")


def uniform_windows(hf: dict, window: int | None) -> tuple[int | None, ...]:
    """The window of families in which all layers have the same, or none.

    transformers does not read `layer_types` in them, so a file that has it must agree.
    """
    layers, kind = whole(hf, "num_hidden_layers"), FULL if window is None else SLIDING
    if set(layer_types(hf, [kind] * layers)) != {kind}:
        raise CheckpointError(
            f"config.json: layer_types must be {kind!r} in every layer of {hf['model_type']!r} "
            f"with sliding_window={window}."
        )
    return (window,) * layers


def last_layers_sliding(hf: dict) -> list[str]:
    """The kind of each layer of a model whose first `max_window_layers` layers are full."""
    layers = whole(hf, "num_hidden_layers")
    full = whole_number("config.json: max_window_layers", hf.get("max_window_layers"), least=0)
    return [SLIDING if layer >= full else FULL for layer in range(layers)]


def as_ids(ids: int | list[int] | None) -> tuple[int, ...]:
    """Token ids as a tuple; configs give one id, a list, or null."""
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list | tuple) else [ids]
    return tuple(token_id("config.json: eos_token_id", token) for token in ids)
