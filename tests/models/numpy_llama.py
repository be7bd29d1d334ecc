"""The Llama family once more, in plain numpy and float64, from the papers' formulas.

It shares nothing with the packages: no cache, no pages, no merged matrices, rotation by complex
numbers. Tests hold the real decoder against it on checkpoints that they make up.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def make_config(model_type: str = "llama", **keys) -> dict:
    """A small `config.json` with `keys` put in; a key that is None is left out."""
    config = {
        "model_type": model_type,
        "vocab_size": 61,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    }
    return {k: v for k, v in {**config, **keys}.items() if v is not None}


def make_weights(config: dict, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors by their published names; logits have a deviation near 1."""
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, dim = _heads(config)
    qwen3 = config["model_type"] == "qwen3"
    attention_bias = config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    weights = {}

    def matrix(name: str, rows: int, columns: int, bias: bool = False) -> None:
        weights[f"{name}.weight"] = rng.standard_normal((rows, columns)) / np.sqrt(columns)
        if bias:
            weights[f"{name}.bias"] = 0.5 * rng.standard_normal(rows)

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.3 * rng.standard_normal(size)

    matrix("model.embed_tokens", config["vocab_size"], hidden)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        norm(name + "input_layernorm", hidden)
        norm(name + "post_attention_layernorm", hidden)
        matrix(name + "self_attn.q_proj", heads * dim, hidden, attention_bias)
        matrix(name + "self_attn.k_proj", kv_heads * dim, hidden, attention_bias)
        matrix(name + "self_attn.v_proj", kv_heads * dim, hidden, attention_bias)
        matrix(name + "self_attn.o_proj", hidden, heads * dim, attention_bias)
        if qwen3:
            norm(name + "self_attn.q_norm", dim)
            norm(name + "self_attn.k_norm", dim)
        matrix(name + "mlp.gate_proj", inner, hidden, mlp_bias)
        matrix(name + "mlp.up_proj", inner, hidden, mlp_bias)
        matrix(name + "mlp.down_proj", hidden, inner, mlp_bias)
    return {k: v.astype(np.float32) for k, v in weights.items()}


def write_folder(
    folder: Path,
    config: dict,
    *,
    tokens: int = 37,
    batch: int = 2,
    seed: int = 0,
    dtype=np.float32,
    shards: int = 1,
) -> dict[str, np.ndarray]:
    """Writes config.json, safetensors (with an index if there are shards) and io.npz.

    Returns:
      The weights as they were stored.
    """
    weights = {k: v.astype(dtype) for k, v in make_weights(config, seed=seed).items()}
    (folder / "config.json").write_text(json.dumps(config))
    names = list(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        files = {
            n: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, n in enumerate(names)
        }
        for file in set(files.values()):
            save_file({n: weights[n] for n in names if files[n] == file}, folder / file)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    rng = np.random.default_rng(seed + 1)
    ids = rng.integers(0, config["vocab_size"], (batch, tokens)).astype(np.int32)
    logits = np.stack([forward(config, weights, row) for row in ids]).astype(np.float32)
    np.savez(folder / "io.npz", input_ids=ids, logits=logits)
    return weights


def forward(config: dict, weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits, `f64[tokens, vocab]`, of one sequence `i32[tokens]`."""
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    heads, kv_heads, dim = _heads(config)
    eps = config["rms_norm_eps"]
    turn = np.exp(1j * np.outer(np.arange(len(ids)), frequencies(config)))  # [tokens, dim / 2]

    def linear(name, x):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(name, x):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def rotated(x):  # channels c and c + dim / 2 are one complex number
        z = (x[:, : dim // 2] + 1j * x[:, dim // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        y = norm(name + "input_layernorm", x)
        q, k, v = (linear(f"{name}self_attn.{p}_proj", y) for p in "qkv")
        outs = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            q_h, k_h = q[:, head * dim :][:, :dim], k[:, kv * dim :][:, :dim]
            if f"{name}self_attn.q_norm.weight" in w:
                q_h = norm(name + "self_attn.q_norm", q_h)
                k_h = norm(name + "self_attn.k_norm", k_h)
            scores = rotated(q_h) @ rotated(k_h).T / np.sqrt(dim)
            scores[~visible(len(ids), _window(config, layer))] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            outs.append(p / p.sum(axis=1, keepdims=True) @ v[:, kv * dim :][:, :dim])
        x = x + linear(name + "self_attn.o_proj", np.concatenate(outs, axis=1))
        y = norm(name + "post_attention_layernorm", x)
        gate = linear(name + "mlp.gate_proj", y)
        up = linear(name + "mlp.up_proj", y)
        x = x + linear(name + "mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return norm("model.norm", x) @ w[f"{head}.weight"].T


def frequencies(config: dict) -> np.ndarray:
    """Radians a token turns each channel pair, `f64[head_dim / 2]`."""
    dim = _heads(config)[2]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    frequency = np.array([theta ** (-2 * c / dim) for c in range(dim // 2)])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        return np.array([llama3(f, rope) for f in frequency])
    return frequency / (rope["factor"] if kind == "linear" else 1)


def llama3(frequency: float, rope: dict) -> float:
    """Llama 3.1's rule by wavelength, case by case, as Meta published it."""
    old = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * np.pi / frequency
    if wavelength < old / high:
        return frequency
    if wavelength > old / low:
        return frequency / rope["factor"]
    smooth = (old / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / rope["factor"] + smooth * frequency


def visible(tokens: int, window: int | None) -> np.ndarray:
    """Which key (column) each query (row) sees, `bool[tokens, tokens]`."""
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    return (distance >= 0) & (distance < (tokens if window is None else window))


def _heads(config: dict) -> tuple[int, int, int]:
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    return heads, config.get("num_key_value_heads") or heads, dim


def _window(config: dict, layer: int) -> int | None:
    """Mistral: every layer; Qwen3: if `use_sliding_window`, by `layer_types`; Llama: none."""
    window = config.get("sliding_window")
    if config["model_type"] == "mistral":
        return window
    if config["model_type"] != "qwen3" or not config.get("use_sliding_window", False):
        return None
    if "layer_types" in config:
        return window if config["layer_types"][layer] == "sliding_attention" else None
    return window if layer >= config["max_window_layers"] else None
