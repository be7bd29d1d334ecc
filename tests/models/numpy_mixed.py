"""Gemma 2, Gemma 3 and gpt-oss once more, in plain numpy and float64, from the papers' formulas.

Like `numpy_llama`, it shares nothing with the packages. One loop over heads and tokens' experts; a
mask, a rotation by complex numbers and a softmax that has the sink as one more column.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SLIDING, FULL = "sliding_attention", "full_attention"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 16.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
    "truncate": True,
}
SIZES = {
    "vocab_size": 53,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


def gemma_config(kind: str, **keys) -> dict:
    """A small `config.json` of "gemma2" or "gemma3_text" with `keys` put in."""
    config = SIZES | {
        "model_type": kind,
        "hidden_size": 28,
        "intermediate_size": 36,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 10,
        "num_hidden_layers": 5,
        "sliding_window": 21,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 2.0 if kind == "gemma2" else None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
    }
    if kind == "gemma3_text":
        config |= {
            "rope_theta": 5000.0,
            "rope_local_base_freq": 300.0,
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        }
    return config | keys


def gpt_oss_config(**keys) -> dict:
    """A small `config.json` of gpt-oss with `keys` put in."""
    return (
        SIZES
        | {
            "model_type": "gpt_oss",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 10,
            "num_hidden_layers": 3,
            "sliding_window": 11,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "rope_scaling": YARN,
            "attention_bias": True,
            "tie_word_embeddings": False,
        }
        | keys
    )


def make_weights(config: dict, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors by their published names; experts packed if the config says so."""
    rng = np.random.default_rng(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    oss = config["model_type"] == "gpt_oss"
    normal = lambda *shape, scale=1.0: (scale * rng.standard_normal(shape)).astype(np.float32)
    norm = lambda size: normal(size, scale=0.3) + np.float32(oss)  # Gemma's are around 0
    weights = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden, scale=hidden**-0.5),
        "model.norm.weight": norm(hidden),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(config["vocab_size"], hidden, scale=hidden**-0.5)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        norms = ["input_layernorm", "post_attention_layernorm"]
        if not oss:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        weights |= {f"{name}{x}.weight": norm(hidden) for x in norms}
        attention = name + "self_attn."
        for x, rows, columns in (
            ("q", heads * dim, hidden),
            ("k", kv_heads * dim, hidden),
            ("v", kv_heads * dim, hidden),
            ("o", hidden, heads * dim),
        ):
            weights[f"{attention}{x}_proj.weight"] = normal(rows, columns, scale=columns**-0.5)
            if config.get("attention_bias"):
                weights[f"{attention}{x}_proj.bias"] = normal(rows, scale=0.3)
        if config["model_type"] == "gemma3_text":
            weights |= {f"{attention}{x}_norm.weight": norm(dim) for x in "qk"}
        if not oss:
            for x in ("gate", "up"):
                weights[f"{name}mlp.{x}_proj.weight"] = normal(inner, hidden, scale=hidden**-0.5)
            weights[f"{name}mlp.down_proj.weight"] = normal(hidden, inner, scale=inner**-0.5)
            continue
        count = config["num_local_experts"]
        weights[attention + "sinks"] = normal(heads, scale=2.0)
        weights[name + "mlp.router.weight"] = normal(count, hidden, scale=hidden**-0.5)
        weights[name + "mlp.router.bias"] = normal(count, scale=0.3)
        for part, rows, columns in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
            proj = f"{name}mlp.experts.{part}_proj"
            weights[proj + "_bias"] = normal(count, rows, scale=0.3)
            if config.get("quantization_config"):
                shape = (count, rows, columns // 32)
                weights[proj + "_blocks"] = rng.integers(0, 256, (*shape, 16), np.uint8)
                weights[proj + "_scales"] = rng.integers(122, 125, shape, np.uint8)
            else:
                weights[proj] = normal(count, columns, rows, scale=columns**-0.5)
    return weights


def write_folder(folder: Path, config: dict, *, tokens: int = 47, batch: int = 2) -> None:
    """Writes config.json, model.safetensors and io.npz."""
    weights = make_weights(config)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], (batch, tokens))
    logits = np.stack([forward(config, weights, row) for row in ids]).astype(np.float32)
    np.savez(folder / "io.npz", input_ids=ids.astype(np.int32), logits=logits)


def forward(config: dict, weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits, `f64[tokens, vocab]`, of one sequence `i32[tokens]`."""
    w = {k: v if v.dtype == np.uint8 else v.astype(np.float64) for k, v in weights.items()}
    oss = config["model_type"] == "gpt_oss"

    def linear(name, x):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def norm(name, x):
        y = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config["rms_norm_eps"])
        return y * (w[name + ".weight"] + (0 if oss else 1))

    cap = lambda x, bound: bound * np.tanh(x / bound) if bound else x
    x = w["model.embed_tokens.weight"][ids] * (1 if oss else np.sqrt(config["hidden_size"]))
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        y = attention(config, w, layer, norm(name + "input_layernorm", x), linear, norm, cap)
        if oss:
            x = x + y
            x = x + experts(config, w, name, norm(name + "post_attention_layernorm", x))
            continue
        x = x + norm(name + "post_attention_layernorm", y)
        y = norm(name + "pre_feedforward_layernorm", x)
        gate = linear(name + "mlp.gate_proj", y)
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        y = linear(name + "mlp.down_proj", gate * linear(name + "mlp.up_proj", y))
        x = x + norm(name + "post_feedforward_layernorm", y)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    logits = norm("model.norm", x) @ w[head + ".weight"].T
    return cap(logits, config.get("final_logit_softcapping"))


def attention(config, w, layer, x, linear, norm, cap) -> np.ndarray:
    """One layer's attention, head by head, `f64[tokens, hidden]`."""
    name = f"model.layers.{layer}.self_attn."
    heads, kv_heads, dim = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    tokens = np.arange(len(x))
    distance = tokens[:, None] - tokens
    sees = distance >= 0
    kind = layer_kind(config, layer)
    if kind == SLIDING:
        sees &= distance < config["sliding_window"]
    frequency, stretch = rotation(config, kind)
    turn = stretch * np.exp(1j * np.outer(tokens, frequency))

    def head(part, number):
        y = linear(f"{name}{part}_proj", x)[:, number * dim :][:, :dim]
        if part != "v" and f"{name}{part}_norm.weight" in w:
            y = norm(f"{name}{part}_norm", y)
        if part == "v":
            return y
        z = (y[:, : dim // 2] + 1j * y[:, dim // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    outs = []
    for number in range(heads):
        kv = number // (heads // kv_heads)
        scale = config.get("query_pre_attn_scalar", dim) ** -0.5
        scores = head("q", number) @ head("k", kv).T * scale
        if config["model_type"] == "gemma2":
            scores = cap(scores, config["attn_logit_softcapping"])
        scores = np.where(sees, scores, -np.inf)
        if name + "sinks" in w:  # one more column, dropped after the softmax
            column = np.full((len(x), 1), w[name + "sinks"][number])
            scores = np.concatenate([scores, column], axis=1)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p = p / p.sum(axis=1, keepdims=True)
        outs.append(p[:, : len(x)] @ head("v", kv))
    return linear(name + "o_proj", np.concatenate(outs, axis=1))


def experts(config, w, name, x) -> np.ndarray:
    """gpt-oss's mixture, token by token, `f64[tokens, hidden]`."""
    name += "mlp."
    alpha, limit = config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0)
    matrix = lambda part, e: expert_matrix(w, f"{name}experts.{part}_proj", e)
    bias = lambda part, e: w[f"{name}experts.{part}_proj_bias"][e]
    out = np.zeros_like(x)
    for row, token in enumerate(x):
        logits = w[name + "router.weight"] @ token + w[name + "router.bias"]
        chosen = np.argsort(-logits)[: config["num_experts_per_tok"]]
        share = np.exp(logits[chosen] - logits[chosen].max())
        for e, p in zip(chosen, share / share.sum(), strict=True):
            y = token @ matrix("gate_up", e) + bias("gate_up", e)
            gate, up = np.minimum(y[::2], limit), np.clip(y[1::2], -limit, limit)
            y = gate / (1 + np.exp(-alpha * gate)) * (up + 1)
            out[row] += p * (y @ matrix("down", e) + bias("down", e))
    return out


def expert_matrix(w, name: str, expert: int) -> np.ndarray:
    """`f64[in, out]` of one expert, unpacked by a table where it is packed."""
    if name in w:
        return w[name][expert]
    blocks, scales = w[name + "_blocks"][expert], w[name + "_scales"][expert]
    codes = np.stack([blocks % 16, blocks // 16], axis=-1).reshape(*scales.shape, 32)
    values = np.where(codes > 7, -1, 1) * E2M1[codes % 8] * 2.0 ** (scales[..., None] - 127.0)
    return values.reshape(len(blocks), -1).T


def layer_kind(config: dict, layer: int) -> str:
    """What `layer_types` says, or the published patterns: 5 to 1 in Gemma 3, else 1 to 1."""
    if config.get("layer_types"):
        return config["layer_types"][layer]
    period = 6 if config["model_type"] == "gemma3_text" else 2
    period = config.get("sliding_window_pattern", period)
    return FULL if layer % period == period - 1 else SLIDING


def rotation(config: dict, kind: str) -> tuple[np.ndarray, float]:
    """Radians a token turns each channel pair, and what rotated vectors are multiplied by."""
    dim = config["head_dim"]
    plain = lambda theta: np.array([theta ** (-2 * c / dim) for c in range(dim // 2)])
    if config["model_type"] == "gpt_oss":
        return yarn(config["rope_scaling"], plain, dim)
    if config["model_type"] == "gemma3_text":
        if kind == SLIDING:
            return plain(config["rope_local_base_freq"]), 1.0
        return plain(config["rope_theta"]) / config["rope_scaling"]["factor"], 1.0
    return plain(config.get("rope_theta", 10000.0)), 1.0


def yarn(rope: dict, plain, dim: int) -> tuple[np.ndarray, float]:
    """arXiv:2309.00071, pair by pair: the ramp runs over the pair's number."""
    base, length = rope["rope_theta"], rope["original_max_position_embeddings"]
    index = lambda turns: dim / 2 * np.log(length / (2 * np.pi * turns)) / np.log(base)
    first, last = index(rope["beta_fast"]), index(rope["beta_slow"])
    if rope["truncate"]:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    out = []
    for c, frequency in enumerate(plain(base)):
        ramp = min(max((c - first) / (last - first), 0), 1)
        out.append((1 - ramp) * frequency + ramp * frequency / rope["factor"])
    return np.array(out), rope.get("attention_factor", 0.1 * np.log(rope["factor"]) + 1)
