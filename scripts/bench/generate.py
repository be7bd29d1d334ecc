"""Measures generation on this machine beside transformers and llama.cpp, where they are installed.

Every contender runs the same float32 weights, prompt lengths and token counts, in this process, one
after the other and then again; correctness (equal greedy tokens) is checked first.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxkv
import models
from models.smollm2 import cache_folder
from scripts.shared.command import keep_compiled_programs, run_command

Measure = Callable[[list[list[int]], int], tuple[list[list[int]], float, float]]


@dataclasses.dataclass
class Args:
    """Prints tokens per second of prefill and decode, ours beside transformers and llama.cpp."""

    model: str = "smollm2"
    """'smollm2', a GGUF file, or a Hugging Face folder (no llama.cpp then)."""
    batch: tuple[int, ...] = (1, 8)
    """Batch sizes."""
    prompt_tokens: int = 128
    """Length of each prompt."""
    new_tokens: int = 128
    """Tokens generated for each."""
    repeats: int = 3
    """Measurements of each; the median counts, the spread is shown."""
    peers: bool = True
    """Measure transformers and llama.cpp where they are installed."""
    json: bool = False
    """Last line of standard output: one JSON object."""


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


def contenders(args: Args, checkpoint, log: Console) -> dict[str, Measure]:
    """What can be measured here, by name; says what can't."""
    found = {"jaxkv": ours(models.load(checkpoint, dtype="float32"))}
    if not args.peers:
        return found
    for package, name, make in (
        ("transformers", "transformers float32", transformers_peer),
        ("llama_cpp", f"llama.cpp {checkpoint.path.stem.rpartition('.')[2]}", llama_cpp_peer),
    ):
        if importlib.util.find_spec(package) is None:
            log.print(f"{package} is not installed: left out (pip install 'jaxkv[bench]')")
        elif package == "llama_cpp" and checkpoint.path.is_dir():
            log.print("llama.cpp reads GGUF files only: left out")
        else:
            log.print(f"loading {name}")
            found[name] = make(checkpoint)
    return found


def weight_read_seconds(model) -> float:
    """Least time to read all weights once: bytes over this machine's read bandwidth, measured."""
    import jax.numpy as jnp

    x = jnp.ones((64 << 20,), jnp.float32)  # 256 MiB, past every cache
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    best = min(_timed(lambda: total(x).block_until_ready()) for _ in range(5))
    weights = sum(w.nbytes for w in jax.tree.leaves(model))
    return weights / (x.nbytes / best)


def _timed(call: Callable) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main(args: Args) -> int:
    """Measures, prints a table; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    keep_compiled_programs(cache_folder() / "xla")
    checkpoint = models.open_checkpoint(args.model, say=log.print)
    found = contenders(args, checkpoint, log)
    vocab = checkpoint.config["vocab_size"]
    rng = np.random.default_rng(0)
    rows = []
    for batch in args.batch:
        prompts = rng.integers(3, vocab, (batch, args.prompt_tokens)).tolist()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
        first: dict[str, list[list[int]]] = {}
        for repeat in range(args.repeats + 1):  # the first warms up
            for name, measure in found.items():
                log.print(f"batch {batch}, {name}, {repeat}/{args.repeats}")
                with contextlib.suppress(NotImplementedError):
                    tokens, prefill, decode = measure(prompts, args.new_tokens)
                    first.setdefault(name, tokens)
                    if repeat:
                        times[name].append((prefill, decode))
        for name, runs in times.items():
            if runs:
                rows.append(_row(name, batch, runs, args, first[name], first["jaxkv"]))
    floor = weight_read_seconds(models.load(checkpoint, dtype="float32"))
    table = Table(title=f"{args.prompt_tokens} prompt + {args.new_tokens} new tokens")
    columns = ("contender", "batch", "prefill tok/s", "decode tok/s", "spread", "same tokens")
    for column in columns:
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows:
        table.add_row(
            row["contender"],
            str(row["batch"]),
            f"{row['prefill']:.0f}",
            f"{row['decode']:.1f}",
            f"{row['decode_spread']:.0%}",
            f"{row['same_tokens']:.0%}",
        )
    Console().print(table)
    print(
        f"floor of a decode step, reading float32 weights once: {floor * 1e3:.1f} ms = "
        f"{1 / floor:.1f} tokens/s at batch 1; {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )
    if args.json:
        print(json.dumps({"results": rows, "floor_ms": floor * 1e3}))
    return 0


def _row(name, batch, runs, args, tokens, reference) -> dict:
    prefill, decode = (statistics.median(x) for x in zip(*runs, strict=True))
    slowest, fastest = (pick(d for _, d in runs) for pick in (max, min))
    pairs = [(a, b) for x, y in zip(tokens, reference, strict=True) for a, b in zip(x, y)]  # noqa: B905
    return {
        "contender": name,
        "batch": batch,
        "prefill": batch * args.prompt_tokens / prefill,
        "decode": batch * (args.new_tokens - 1) / decode,
        "decode_spread": (slowest - fastest) / decode,
        "same_tokens": sum(a == b for a, b in pairs) / len(pairs),
    }


if __name__ == "__main__":
    run_command(main, Args)
