"""transformers' Llama of random weights beside ours, for the benchmarks of steps and prompts.

Each case runs this file in a process of its own, without JAX: it finds the whole device free and
leaves it so, a compiler that hangs can be killed, and no case's programs are shaped by another's.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.shared.tables import words_of

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("torch", "transformers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What one process measures: a Llama's sizes, and its prompts or decode steps."""

    layers: int
    hidden_size: int
    intermediate_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: str
    batch: int
    context: int  # tokens of each prompt
    steps: int  # timed together
    repeats: int  # times that `steps` steps are timed, after the first `steps`, which warm up
    compiled: bool  # torch.compile(mode="reduce-overhead"), as `generate` does by itself on CUDA
    prompts: bool = False  # measure reading the prompts, eagerly, in place of decode steps

    @property
    def name(self) -> str:
        """Of its row in the table."""
        return f"transformers {'compiled' if self.compiled else 'eager'}"

    @property
    def new_tokens(self) -> int:
        """Of each sequence; the prompt gives the first."""
        return self.steps * (self.repeats + 1) + 1

    @property
    def bytes(self) -> int:
        """Least memory: weights, the cache, and the MLP's activations for the whole prompt."""
        attention = self.hidden_size * self.head_dim * 2 * (self.q_heads + self.kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        weights = self.layers * layer + 2 * self.vocab_size * self.hidden_size
        token = 2 * self.layers * self.kv_heads * self.head_dim
        cache = self.batch * (self.context + self.new_tokens) * token
        prefill = self.batch * self.context * (2 * self.hidden_size + 3 * self.intermediate_size)
        return (weights + cache + prefill) * (4 if self.dtype == "float32" else 2)


def check_packages() -> None:
    """ValueError names the first package that is missing."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--peers needs the package {name}, which is not installed.")


def llama_case(config, **options) -> Case:
    """A case of a `models.DecoderConfig`'s sizes; `options` are the other fields."""
    names = ("layers", "hidden_size", "intermediate_size", "q_heads", "kv_heads", "head_dim")
    sizes = {name: getattr(config, name) for name in (*names, "vocab_size")}
    return Case(**sizes, **options)


def measure_cases(
    cases: list[Case], *, memory: float, limit: float, log: Callable[[str], None]
) -> Iterator[dict]:
    """Measures every case that fits and ends well; `log` hears of the others.

    Args:
      cases: in the order in which they run.
      memory: GiB of the device; a case that needs more than 2 GiB less is left out.
      limit: seconds after which a case is given up.
      log: is told of each row, and why there is none.

    Returns:
      Rows as `run_case` returns them.
    """
    for case in cases:
        name = f"batch {case.batch}, {case.name}"
        if case.bytes > (memory - 2) * 2**30:
            need = f"{case.bytes / 2**30:.1f} GiB of weights, cache and prompt"
            log(f"{name}: {need} do not fit")
            continue
        try:
            log(f"{name}: at most {limit:g} s")
            row = run_case(case, limit=limit)
        except RuntimeError as error:
            log(f"{name}: {error}")
            continue
        log(words_of(row))
        yield row


def run_case(case: Case, *, limit: float) -> dict:
    """Measures a case in a process of its own.

    Returns:
      What `measure_prompts` or `measure_steps` returns.

    Raises:
      RuntimeError: it failed, or took longer than `limit` seconds; its errors went to stderr.
    """
    asked = json.dumps(dataclasses.asdict(case))
    command = [sys.executable, "-m", "scripts.bench.peers.transformers_llama", asked]
    # A file, not a pipe: a compiler's workers hold a pipe open after their parent has ended.
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(command, cwd=ROOT, stdout=out, start_new_session=True)
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not ready after {limit:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        out.seek(0)
        lines = out.read().splitlines()
    if code or not lines:
        raise RuntimeError(f"exit code {code}")
    return json.loads(lines[-1])


def read_case(text: str) -> Case:
    """A case from its JSON; the error that argparse turns into one line if it is none."""
    try:
        return Case(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"must be a case as JSON: {error}") from None


def build(case: Case) -> tuple:
    """The model, its random prompts, and what every row says of the case."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = transformers.LlamaConfig(
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_hidden_layers=case.layers,
        num_attention_heads=case.q_heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_position_embeddings=case.context + case.new_tokens,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=None,
        eos_token_id=None,  # nothing ends a sequence, and no step looks for an end
    )
    torch.manual_seed(0)
    with device:  # weights are drawn where they stay
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, case.dtype), attn_implementation="sdpa"
        ).eval()
        prompts = torch.randint(case.vocab_size, (case.batch, case.context))
    about = {
        "batch": case.batch,
        "codec": case.name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return model, prompts, about


def measure_prompts(case: Case) -> dict:
    """Reads the prompts `repeats` times, each time whole and into a new cache, after a warm-up."""
    import torch  # pyright: ignore[reportMissingImports]

    model, prompts, about = build(case)

    def read() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model(prompts, use_cache=True, logits_to_keep=1).logits[0, 0, 0].item()
        return time.perf_counter() - began

    _, *seconds = [read() for _ in range(case.repeats + 1)]
    median = statistics.median(seconds)
    return about | {
        "prefill_tokens_per_second": case.batch * case.context / median,
        "seconds": median,
        "spread": (max(seconds) - min(seconds)) / median,
    }


def measure_steps(case: Case) -> dict:
    """Runs `generate` once, with a static cache; a clock in its loop times `steps` steps together.

    The prompt and the first `steps`, in which programs compile and CUDA graphs are recorded, do not
    count. As in scripts/bench/step.py the first counted step sees `context + steps` tokens.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    began = time.perf_counter()
    model, prompts, about = build(case)
    times = []

    def clock(tokens, scores):
        if (tokens.shape[1] - case.context) % case.steps == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        return scores

    options: dict = {"disable_compile": True}
    if case.compiled:
        compiling = transformers.CompileConfig()  # reduce-overhead: CUDA graphs
        compiling._compile_all_devices = True  # or a CPU would not compile
        options = {"compile_config": compiling}
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=case.new_tokens,
        do_sample=False,
        cache_implementation="static",
        logits_processor=transformers.LogitsProcessorList([clock]),
        **options,
    )
    seconds = [(b - a) / case.steps for a, b in zip(times, times[1:], strict=False)]
    step = statistics.median(seconds[1:])
    return about | {
        "tokens_per_second": case.batch / step,
        "step_ms": 1e3 * step,
        "spread": (max(seconds[1:]) - min(seconds[1:])) / step,
        "warm_up_seconds": times[1] - began,
    }


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("case", type=read_case, help="the fields of `Case` as a JSON object")
    case = options.parse_args().case
    print(json.dumps(measure_prompts(case) if case.prompts else measure_steps(case)))
