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
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jaxkv
import models
from jaxkv.codecs import codec_names, get_codec
from models.harmony import HarmonyStream, answer_stream
from models.smollm2 import cache_folder
from scripts.shared.command import keep_compiled_programs, run_command

Texts = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")]
Pairs = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")]
RANDOM = "random:"  # how the name of a model begins that is a shape without a checkpoint


@dataclasses.dataclass
class Args:
    """Streams a continuation of one or more prompts.

    Examples:
      generate.py --model smollm2 --prompt "The capital of France is"
      generate.py --chat --prompt "Why is the sky blue?" --prompt "Name three whales."
      generate.py --model gpt-oss-20b --chat --template-args reasoning_effort=low --prompt "Hi"
      generate.py --window 256 --sink-tokens 4 --prompt-file book.txt --max-tokens 2000
      generate.py --kv tq4 --prompt-file book.txt
      generate.py --kv help
      generate.py --model random:llama3-8b --prompt-tokens 8000 --batch 8 --kv tq4
    """

    model: str = "smollm2"
    """'smollm2' (98 MB, fetched once), a GGUF file, or a Hugging Face folder.
    To measure without weights: 'random:llama3-8b', 'random:llama3-1b' or 'random:tiny'."""
    prompt: Texts = ()
    """Prompt text; repeat for a batch. Without it and --prompt-file: standard input."""
    prompt_file: Path | None = None
    """File with one more prompt."""
    prompt_tokens: int | None = None
    """Of random weights, which have no tokenizer: length of a random prompt; 128 if not given.
    Token ids are printed."""
    batch: int | None = None
    """Of random weights: prompts side by side; 1 if not given."""
    chat: bool = False
    """Wrap each prompt in the model's chat template as a user's message."""
    template_args: Pairs = ()
    """A variable of the chat template, JSON or plain text; repeat for more."""
    max_tokens: int = 128
    """Most new tokens of each prompt."""
    temperature: float = 0.0
    """0 is greedy; higher is more random."""
    top_k: int | None = None
    """Draw among the K most likely tokens."""
    top_p: float | None = None
    """Draw among the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Drop tokens less likely than this times the best one."""
    seed: int = 0
    """Of the draws."""
    window: int | None = None
    """Attend to the newest so many tokens only: constant memory for any length."""
    sink_tokens: int = 0
    """First tokens kept beside the window for ever (StreamingLLM; 4 is usual)."""
    sink_positions: Literal["original", "cache"] = "original"
    """'cache' keeps sinks at a bounded distance, for streams past the trained context."""
    kv: str = "exact"
    """How the cache stores keys and values, a codec's name; 'help' lists them."""
    keep_first: int = 0
    """So many of the first layers stay exact."""
    keep_last: int = 0
    """So many of the last layers stay exact."""
    page_size: int = 64
    """Tokens a cache page."""
    chunk: int | None = None
    """Prompt tokens of one step; default: 256, on a GPU or TPU up to 1024 of few prompts."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and cache; default: float32 on a CPU, bfloat16 elsewhere."""
    backend: Literal["xla", "gpu", "tpu", "reference"] | None = None
    """Attention backend; default: the platform's."""
    json: bool = False
    """Last line of standard output: one JSON object with everything."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What to run: a model, prompts, and what turns each one's answer into text."""

    model: models.Decoder
    texts: list[str]
    prompts: list[list[int]]
    streams: list[Any]
    stop_ids: Sequence[int]


class IdStream:
    """Shows tokens by their ids: random weights have no tokenizer."""

    def push(self, tokens: Sequence[int]) -> str:
        """Takes the next ids; returns them as text."""
        return "".join(f"{token} " for token in tokens)

    def flush(self) -> str:
        """Nothing is held back."""
        return ""


def check_prompt_options(args: Args) -> None:
    """ValueError where prompts are described in a way that the kind of model can't take."""
    drawn = args.model.startswith(RANDOM)
    for name, value in (("--prompt-tokens", args.prompt_tokens), ("--batch", args.batch)):
        if value is not None and not drawn:
            raise ValueError(f"{name} {value} needs random weights: --model {RANDOM}SHAPE.")
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be at least 1.")
    worded = {"--prompt": args.prompt, "--prompt-file": args.prompt_file, "--chat": args.chat}
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
    table = Table(title=f"--kv NAME, at head_dim {head_dim}, page size {page_size}", box=SIMPLE)
    for column in ("name", "bits per value", "smaller than bf16", "kept exactly"):
        table.add_column(column, justify="left" if column in ("name", "kept exactly") else "right")
    for name in codec_names():
        codec = get_codec(name)
        bits = codec.bits_per_value(head_dim, page_size)
        kept = "nothing" if codec.lossy else "everything, in --dtype"
        if codec.recent_pages or codec.sink_tokens:
            kept = f"newest {codec.recent_pages} pages, first {codec.sink_tokens} tokens"
        table.add_row(name, f"{bits:.2f}", f"{16 / bits:.2f}x", kept)
    return table


def ask_checkpoint(args: Args, variables: dict[str, Any], log: Console) -> Asked:
    """Opens a checkpoint and encodes the prompts that were given as text."""
    texts = read_prompts(args)
    keep_compiled_programs(cache_folder() / "xla")
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
    )


def ask_random(args: Args, log: Console) -> Asked:
    """Draws a model's weights, and prompts of random tokens."""
    batch, length = args.batch or 1, args.prompt_tokens or 128
    keep_compiled_programs(cache_folder() / "xla")
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
    )


def main(args: Args) -> int:
    """Loads, generates, streams, reports; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    if args.kv == "help":
        Console(highlight=False).print(codec_table(head_dim=128, page_size=args.page_size))
        return 0
    get_codec(args.kv)
    sampling = jaxkv.Sampling(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p
    ).checked()
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens {args.max_tokens} must be at least 1.")
    variables = template_variables(args.template_args)
    if variables and not args.chat:
        raise ValueError("--template-args needs --chat.")
    check_prompt_options(args)
    drawn = args.model.startswith(RANDOM)
    asked = ask_random(args, log) if drawn else ask_checkpoint(args, variables, log)
    streams, prompts = asked.streams, asked.prompts
    alone = len(prompts) == 1
    pieces: list[list[str]] = [[] for _ in prompts]

    def show(new: list[list[int]]) -> None:
        for number, tokens in enumerate(new):
            piece = streams[number].push(tokens)
            pieces[number].append(piece)
            if alone:
                print(piece, end="", flush=True)
        if not alone:
            count = sum(len(piece) for piece in pieces[0])
            status.update(f"prompt 0, {count} characters: …{''.join(pieces[0])[-60:]!r}")

    with log.status("compiling (kept for the next start)") as status:

        def prefilled(done: int, of: int) -> None:
            status.update(f"prefill {done}/{of} tokens")
            if done == of and alone:
                status.stop()

        result = jaxkv.generate(
            asked.model,
            prompts,
            max_tokens=args.max_tokens,
            sampling=sampling,
            seed=args.seed,
            stop_ids=asked.stop_ids or None,
            keep=jaxkv.Keep(
                codec=args.kv,
                window=args.window,
                sink_tokens=args.sink_tokens,
                sink_positions=args.sink_positions,
                keep_first=args.keep_first,
                keep_last=args.keep_last,
            ),
            page_size=args.page_size,
            chunk=args.chunk,
            backend=args.backend,
            on_tokens=show,
            on_prefill=prefilled,
        )
    for number, stream in enumerate(streams):
        pieces[number].append(stream.flush())
    outputs = ["".join(piece) for piece in pieces]
    if alone:
        print(pieces[0][-1])
    else:
        for number, (text, output) in enumerate(zip(asked.texts, outputs, strict=True)):
            print(f"--- {number}: {text[:60]!r} ---\n{output}")
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
        said = [s.messages if isinstance(s, HarmonyStream) else None for s in streams]
        print(json.dumps(as_json(asked.texts, outputs, said, result, report)))
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
