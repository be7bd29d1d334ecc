"""Generation by jaxkv, transformers and llama.cpp behind one signature, in the same process."""

import os
import time
from collections.abc import Callable

import numpy as np

import jaxkv

# Prompts and the number of new tokens to the tokens, seconds of prefill and seconds of decode.
Measure = Callable[[list[list[int]], int], tuple[list[list[int]], float, float]]


def ours(model) -> Measure:
    """jaxkv: compiled before the clock starts."""

    def measure(prompts, count):
        result = jaxkv.generate(model, prompts, max_tokens=count, stop_ids=())
        return result.tokens, result.prefill_seconds, result.decode_seconds

    return measure


def transformers_peer(checkpoint) -> Measure:
    """transformers' `generate` with its default cache, on the same float32 weights."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import (  # pyright: ignore[reportMissingImports]
        AutoConfig,
        AutoModelForCausalLM,
    )

    torch.set_num_threads(os.cpu_count() or 1)
    hf = dict(checkpoint.config)
    config = AutoConfig.for_model(hf.pop("model_type"), **hf)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {n: torch.from_numpy(np.array(checkpoint.read(n))) for n in checkpoint.tensors}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    model.eval()

    def run(tokens, count):
        with torch.no_grad():
            return model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )

    def measure(prompts, count):
        tokens = torch.tensor(prompts)
        begin = time.perf_counter()
        run(tokens, 1)
        prefill = time.perf_counter() - begin
        out = run(tokens, count)
        decode = time.perf_counter() - begin - 2 * prefill
        return out[:, tokens.shape[1] :].tolist(), prefill, decode

    return measure


def llama_cpp_peer(checkpoint) -> Measure:
    """llama.cpp through its Python binding, the GGUF's own quantization, one sequence."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    model = Llama(
        str(checkpoint.path), n_ctx=4096, n_threads=os.cpu_count(), logits_all=False, verbose=False
    )

    def measure(prompts, count):
        if len(prompts) > 1:
            raise NotImplementedError("the binding's high-level API runs one sequence")
        model.reset()
        begin = time.perf_counter()
        model.eval(prompts[0])
        token = model.sample(temp=0.0)
        prefill = time.perf_counter() - begin
        tokens = [token]
        for _ in range(count - 1):
            model.eval([token])
            token = model.sample(temp=0.0)
            tokens.append(token)
        return [tokens], prefill, time.perf_counter() - begin - prefill

    return measure
