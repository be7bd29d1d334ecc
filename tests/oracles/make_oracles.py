"""Makes the folders of `CHECKPOINTS`: tiny random checkpoints with transformers' logits on them.

Needs torch and transformers, which the tests do not: run it by hand after a change of the table.

    python tests/oracles/make_oracles.py [NAME ...]

`io.npz` holds the logits of the config as it stands; `switches.npz` those of the same weights under
other keys of the config, which `switches.json` lists by name.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
BATCH, TOKENS = 2, 61
SIZES = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# For each folder its config.json, and its switches: keys that are put into it, None to leave one
# out, and under DROP the pattern of names of tensors that the model then does not have. Windows are
# shorter than the sequences; where a file may say a thing in two ways, both occur.
DROP = "drop"
CHECKPOINTS = {
    "qwen2": (
        SIZES
        | {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 13,
            "max_window_layers": 2,
            "rope_theta": 1000.0,
            "rope_scaling": YARN,
        },
        {
            "no_window": {"use_sliding_window": False},
            "all_windows": {"max_window_layers": 0},
            "layer_types": {"layer_types": ["sliding_attention", "full_attention"] * 2},
            "no_yarn": {"rope_scaling": None},
            "rope_parameters": {
                "rope_theta": None,
                "rope_scaling": None,
                "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
            },
            "tied": {"tie_word_embeddings": True, DROP: "lm_head"},
        },
    ),
    "qwen3_moe": (
        SIZES
        | {
            "model_type": "qwen3_moe",
            "head_dim": 12,
            "num_hidden_layers": 2,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 13,
            "max_window_layers": 2,
            "rope_theta": 1000.0,
        },
        {
            "shares_of_all": {"norm_topk_prob": False},
            "one_expert": {"norm_topk_prob": None, "num_experts_per_tok": 1},
            "no_window": {"use_sliding_window": False},
            "no_bias": {"attention_bias": False, DROP: "bias"},
        },
    ),
    "qwen3_moe_mixed": (
        SIZES
        | {
            "model_type": "qwen3_moe",
            "head_dim": 8,
            "num_hidden_layers": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
            "tie_word_embeddings": True,
        },
        {},
    ),
    "mixtral": (
        SIZES
        | {
            "model_type": "mixtral",
            "num_hidden_layers": 2,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 13,
            "rope_theta": 1000.0,
        },
        {
            "no_window": {"sliding_window": None},
            "three_experts": {"num_experts_per_tok": 3, "rope_theta": None},
        },
    ),
    "smollm3": (
        SIZES
        | {
            "model_type": "smollm3",
            "no_rope_layer_interval": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_theta": 1000.0,
            "rope_scaling": YARN,
        },
        {
            "every_third": {"no_rope_layer_interval": 3},
            "every_fourth": {"no_rope_layer_interval": None},
            "list": {"no_rope_layers": [0, 1, 1, 0]},
            "window": {"use_sliding_window": True, "sliding_window": 13},
            "layer_types": {
                "use_sliding_window": True,
                "sliding_window": 13,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "no_bias": {"attention_bias": False, "mlp_bias": False, DROP: "bias"},
            "theta_of_the_family": {"rope_theta": None, "rope_scaling": None},
        },
    ),
    "olmo2": (
        SIZES
        | {
            "model_type": "olmo2",
            "num_hidden_layers": 2,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "rope_theta": 1000.0,
        },
        {
            "no_bias": {"attention_bias": False, DROP: "bias"},
            "yarn": {"rope_scaling": YARN},
        },
    ),
}


def draw(name: str, shape: tuple[int, ...], noise: np.random.Generator) -> torch.Tensor:
    """A tensor of visible effect, with the values that bfloat16 has."""
    normal = noise.standard_normal(shape)
    if "norm" in name:
        value = 1 + 0.3 * normal
    elif name.endswith("bias"):
        value = 0.4 * normal
    elif "embed" in name or "lm_head" in name:
        value = normal * shape[-1] ** -0.5
    else:
        value = 1.4 * normal * shape[-1] ** -0.5
    return torch.tensor(value, dtype=torch.bfloat16)


def logits_of(folder: Path, config: dict, weights: dict, tokens: np.ndarray) -> np.ndarray:
    """transformers' logits on these tensors, written to `folder` with this config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(report.values()):
        raise SystemExit(f"{config}: {report}")
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens), use_cache=False).logits.numpy()


def make(name: str) -> None:
    """Writes one folder."""
    config, switches = CHECKPOINTS[name]
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(list(CHECKPOINTS).index(name))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        shapes = {k: v.shape for k, v in load_file(Path(scratch) / "model.safetensors").items()}
        weights = {key: draw(key, tuple(shape), noise) for key, shape in sorted(shapes.items())}
        tokens = noise.integers(0, config["vocab_size"], (BATCH, TOKENS)).astype(np.int32)
        logits = {"": logits_of(Path(scratch), config, weights, tokens)}
        for switch, keys in switches.items():
            other = {k: v for k, v in (config | keys).items() if k != DROP and v is not None}
            kept = {k: v for k, v in weights.items() if not re.search(keys.get(DROP, "$^"), k)}
            logits[switch] = logits_of(Path(scratch), other, kept, tokens)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(folder / "io.npz", input_ids=tokens, logits=logits.pop(""))
    (folder / "switches.json").write_text(json.dumps(switches, indent=1) + "\n")
    np.savez_compressed(folder / "switches.npz", **{k: v[:1] for k, v in logits.items()})
    for switch, value in logits.items():
        print(name, switch, value.std(), np.abs(value - np.load(folder / "io.npz")["logits"]).max())


if __name__ == "__main__":
    for name in sys.argv[1:] or CHECKPOINTS:
        make(name)
