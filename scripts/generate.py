"""Streams text from a model through the paged cache; `--help` teaches the options."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jaxkv
import models
from jaxkv.codecs import KVCodec, codec_names, get_codec
from models.text.harmony import HarmonyStream, answer_stream
from scripts.shared.command import print_json, run_command
from scripts.shared.keep import KeepOptions
from scripts.shared.options import check_least
from scripts.shared.screen import IdStream, Screen
from scripts.shared.tables import make_table

Texts = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")]
Pairs = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")]
RANDOM = "random:"  # prefix of a model that is a shape without a checkpoint


@dataclasses.dataclass
class Args:
    """Streams a continuation of one or more prompts.

    Examples:
      generate.py --model smollm2 --prompt "The capital of France is"
      generate.py --chat --prompt "Why is the sky blue?" --prompt "Name three whales."
      generate.py --model gpt-oss-20b --chat --template-args reasoning_effort=low --prompt "Hi"
      generate.py --window 256 --sink-tokens 4 --prompt-file book.txt --max-tokens 2000
      generate.py --kv tq4 --prompt-file book.txt
      generate.py --prompt "One, two," --stop . --temperature 0.8 --top-p 0.9 --min-tokens 8
      generate.py --kv help
      generate.py --model random:llama3-8b --prompt-tokens 8000 --batch 8 --kv tq4
    """

    model: str = "smollm2"
    """'smollm2' (93 MB, fetched once), a GGUF file, or a Hugging Face folder.
    To measure without weights: 'random:llama3-8b', 'random:llama3-1b' or 'random:tiny'."""
    prompt: Texts = ()
    """Prompt text; repeat for a batch. Without it and --prompt-file: standard input."""
    prompt_file: Path | None = None
    """File with one more prompt."""
    prompt_tokens: int | None = None
    """With random weights, which have no tokenizer: length of a random prompt; 128 if not given.
    Token ids are printed."""
    batch: int | None = None
    """With random weights: number of prompts side by side; 1 if not given."""
    chat: bool = False
    """Wrap each prompt in the model's chat template as a user's message."""
    template_args: Pairs = ()
    """A variable of the chat template, JSON or plain text; repeat for more."""
    max_tokens: int = 128
    """Most new tokens after each prompt."""
    stop: Texts = ()
    """Text that ends the answer and is not shown; repeat for more."""
    min_tokens: int = 0
    """Nothing ends the answer before it has this many tokens."""
    temperature: float | None = None
    """0 is greedy; higher is more random; default: 1 with --top-k, --top-p or --min-p, else 0."""
    top_k: int | None = None
    """Draw among the K most likely tokens."""
    top_p: float | None = None
    """Draw among the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Drop tokens less likely than this times the best one."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of the prompt and the answer become less likely."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has already."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens once for each time that the answer has them."""
    seed: int = 0
    """Of the random draws; of several prompts, number i draws with this plus i."""
    kv: str = "exact"
    """How the cache stores keys and values, a codec's name; 'help' lists them."""
    keep: KeepOptions = KeepOptions()
    page_size: int = 64
    """Tokens per cache page."""
    chunk: int | None = None
    """Prompt tokens of one step; default: 256, on a GPU or TPU up to 1024 if prompts are few."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and cache; default: float32 on a CPU, bfloat16 elsewhere."""
    backend: Literal["xla", "gpu", "tpu", "reference"] | None = None
    """Attention backend; default: the platform's."""
    json: bool = False
    """Print one JSON object with everything on standard output, all else on standard error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What to run: a model, prompts, and the stream that turns each one's answer into text."""

    model: models.Decoder
    texts: list[str]
    prompts: list[list[int]]
    streams: list[Any]
    stop_ids: Sequence[int]
    stop_text: jaxkv.StopText | None


def check_prompt_options(args: Args) -> None:
    """ValueError where prompts are described in a way that the kind of model can't take."""
    drawn = args.model.startswith(RANDOM)
    for name, value in (("--prompt-tokens", args.prompt_tokens), ("--batch", args.batch)):
        if value is not None and not drawn:
            raise ValueError(f"{name} {value} needs random weights: --model {RANDOM}SHAPE.")
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be at least 1.")
    worded = {
        "--prompt": args.prompt,
        "--prompt-file": args.prompt_file,
        "--chat": args.chat,
        "--stop": args.stop,
    }
    for name, value in worded.items():
        if value and drawn:
            raise ValueError(f"{name} needs a tokenizer; {args.model} takes --prompt-tokens N.")


def read_prompts(args: Args) -> list[str]:
    """The prompts' texts, from flags, file or standard input; ValueError if there are none."""
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        try:
            prompts.append(args.prompt_file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--prompt-file {args.prompt_file}: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise ValueError(f"--prompt-file {args.prompt_file}: must be UTF-8 text.") from None
    if not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("no prompt: give --prompt TEXT, --prompt-file FILE or standard input.")
        prompts.append(sys.stdin.read())
    for number, text in enumerate(prompts):
        if not text:
            raise ValueError(f"prompt {number} is empty: give some text.")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"prompt {number} must be UTF-8 text.")
    return prompts


def template_variables(pairs: Sequence[str]) -> dict[str, Any]:
    """The chat template's variables from NAME=VALUE texts; ValueError if one is no pair."""
    variables = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--template-args {pair!r} must be NAME=VALUE.")
        try:
            variables[name] = json.loads(value)
        except json.JSONDecodeError:
            variables[name] = value
    return variables


def codec_table(head_dim: int, page_size: int) -> Table:
    """Every codec with its bits per value, its compression and what it keeps exact."""
    codecs = {name: get_codec(name) for name in codec_names()}
    bits = [codec.bits_per_value(head_dim, page_size) for codec in codecs.values()]
    columns = {
        "name": list(codecs),
        "bits per\nvalue": [f"{number:.2f}" for number in bits],
        "smaller\nthan bf16": [f"{16 / number:.2f}x" for number in bits],
        "kept exactly": [kept_exactly(codec) for codec in codecs.values()],
    }
    table = make_table(f"--kv NAME, at head_dim {head_dim}, page size {page_size}", columns)
    table.columns[-1].justify = "left"
    return table


def kept_exactly(codec: KVCodec) -> str:
    """The tokens that a codec does not quantize, as text."""
    if not codec.lossy:
        return "everything, in --dtype"
    if codec.recent_pages or codec.sink_tokens:
        return f"newest {codec.recent_pages} pages, first {codec.sink_tokens} tokens"
    return "nothing"


def ask_checkpoint(args: Args, variables: dict[str, Any], log: Console) -> Asked:
    """Opens a checkpoint and encodes the prompts that were given as text."""
    texts = read_prompts(args)
    jaxkv.keep_compiled_programs()
    with Progress(console=log, transient=True, disable=not log.is_terminal) as progress:
        say = lambda line: log.print(line, style="dim")
        checkpoint = models.open_checkpoint(args.model, say=say)
        tokenizer = checkpoint.load_tokenizer()
        task = progress.add_task("loading weights", total=None)
        model = models.load(
            checkpoint,
            dtype=args.dtype,
            progress=lambda done, of: progress.update(task, completed=done, total=of),
        )
    if args.chat:
        asked = [[{"role": "user", "content": text}] for text in texts]
        chats = [tokenizer.apply_chat(messages, **variables) for messages in asked]
        prompts = [tokenizer.encode(text) for text in chats]
    else:
        prompts = [tokenizer.encode(text) for text in texts]
    return Asked(
        model=model,
        texts=texts,
        prompts=prompts,
        streams=[answer_stream(tokenizer, prompt) for prompt in prompts],
        stop_ids=tokenizer.eos_ids,
        stop_text=jaxkv.StopText(args.stop, tokenizer.decode).checked() if args.stop else None,
    )


def ask_random(args: Args, log: Console) -> Asked:
    """Draws a model's weights, and prompts of random tokens."""
    batch, length = args.batch or 1, args.prompt_tokens or 128
    jaxkv.keep_compiled_programs()
    with log.status("drawing weights"):
        model = models.random_model(args.model.removeprefix(RANDOM), dtype=args.dtype)
    rng = np.random.default_rng(args.seed)
    tokens = rng.integers(model.config.vocab_size, size=(batch, length))
    return Asked(
        model=model,
        texts=[f"{length} random tokens"] * batch,
        prompts=tokens.tolist(),
        streams=[IdStream() for _ in range(batch)],
        stop_ids=(),
        stop_text=None,
    )


def sampling(args: Args) -> jaxkv.Sampling:
    """How tokens are drawn; ValueError for a number out of range."""
    names = [field.name for field in dataclasses.fields(jaxkv.Sampling)]
    return jaxkv.Sampling(
        **{name: getattr(args, name) for name in names if hasattr(args, name)}
    ).checked()


def ask(args: Args, log: Console) -> Asked:
    """Checks what can be checked before weights are read, then opens the model and the prompts."""
    get_codec(args.kv)
    sampling(args)
    check_least(args, "max_tokens")
    if args.min_tokens > args.max_tokens:
        raise ValueError(f"--min-tokens {args.min_tokens} must be at most --max-tokens.")
    if "" in args.stop:
        raise ValueError("--stop '' must not be empty.")
    variables = template_variables(args.template_args)
    if variables and not args.chat:
        raise ValueError("--template-args needs --chat.")
    check_prompt_options(args)
    if args.model.startswith(RANDOM):
        return ask_random(args, log)
    return ask_checkpoint(args, variables, log)


def run(args: Args, asked: Asked, log: Console) -> tuple[jaxkv.Generation, list[str]]:
    """Generates and streams; returns the generation and the answers as text."""
    with log.status("compiling (kept for the next start)") as status:
        screen = Screen(asked.streams, asked.stop_text, args.min_tokens, status)
        stream = jaxkv.stream(
            asked.model,
            asked.prompts,
            max_tokens=args.max_tokens,
            sampling=sampling(args),
            seed=args.seed,
            stop_ids=asked.stop_ids or None,
            stop_text=asked.stop_text,
            keep=args.keep.keep(args.kv),
            sizes=jaxkv.Sizes(page_size=args.page_size, chunk=args.chunk),
            backend=args.backend,
        )
        for new in stream:
            if any(new):
                screen.show(new)
            else:
                screen.prefilled(stream.prompt_done, stream.prompt_total)
    return stream.result, screen.finish(asked.texts)


def main(args: Args) -> int:
    """Loads, generates, streams, reports; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    if args.kv == "help":
        Console(highlight=False).print(codec_table(head_dim=128, page_size=args.page_size))
        return 0
    asked = ask(args, log)
    result, outputs = run(args, asked, log)
    report = jaxkv.explain(result.config, backend=args.backend)
    log.print(
        f"prefill {result.prompt_tokens} tokens, {result.prefill_speed:.0f} tokens/s; decode "
        f"{sum(map(len, result.tokens))} tokens, {result.decode_speed:.1f} tokens/s; "
        f"compiled in {result.compile_seconds:.1f} s; cache {result.bytes_peak / 2**20:.1f} MiB "
        f"used of {result.bytes_reserved / 2**20:.1f} MiB reserved; "
        f"ended by {', '.join(result.stop_reasons)}",
        style="dim",
        soft_wrap=True,
    )
    for group in report:
        log.print(f"{group} on {jax.default_backend()}", style="dim", soft_wrap=True)
    if args.json:
        said = [s.messages if isinstance(s, HarmonyStream) else None for s in asked.streams]
        print_json(as_json(asked.texts, outputs, said, result, report))
    return 0


def as_json(texts, outputs, said, result, report) -> dict:
    """Everything that was asked, made and measured, as plain values."""
    return {
        "prompts": texts,
        "tokens": result.tokens,
        "text": outputs,
        # gpt-oss's channels, apart; null for models without
        "messages": [m and [dataclasses.asdict(one) for one in m] for m in said],
        "stop_reason": result.stop_reasons,
        "prompt_tokens": result.prompt_tokens,
        "prefill_tokens_per_second": result.prefill_speed,
        "decode_tokens_per_second": result.decode_speed,
        "compile_seconds": result.compile_seconds,
        "cache_bytes_used": result.bytes_peak,
        "cache_bytes_reserved": result.bytes_reserved,
        "layers": [str(group) for group in report],
    }


if __name__ == "__main__":
    run_command(main, Args)
