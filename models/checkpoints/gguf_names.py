"""How the converter of llama.cpp writes each supported architecture: names, rows, norms."""

import dataclasses
import re

_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Writing:
    """One architecture's way of writing."""

    reorders_qk: bool = False  # the rows of q and k stand in the order of RoPE pairs
    norm_offset: float = 0.0  # added to the weights of norms
    gemma: bool = False  # norms stand before and after attention and MLP, under Gemma's names

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a tensor; an unknown name is returned as it is.

        "blk.0.attn_q.weight" gives "model.layers.0.self_attn.q_proj.weight".
        """
        names = _GEMMA_NAMES if self.gemma else _LAYER_NAMES
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, part, kind = match.groups()
            if part in names:
                return f"model.layers.{layer}.{names[part]}.{kind}"
        part, _, kind = name.partition(".")
        return f"{_GLOBAL_NAMES[part]}.{kind}" if part in _GLOBAL_NAMES else name


WRITINGS = {  # by `general.architecture`; Mistral's files say "llama"
    "llama": Writing(reorders_qk=True),
    "qwen2": Writing(),
    "qwen3": Writing(),
    "gemma2": Writing(norm_offset=1.0, gemma=True),
    "gemma3": Writing(norm_offset=1.0, gemma=True),
}
