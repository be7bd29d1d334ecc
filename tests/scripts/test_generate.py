"""scripts/generate.py as a user runs it: a folder, prompts, one JSON line, one-line errors."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.random_weights import SHAPES
from scripts import generate

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "generate.py"


def run(*args, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


def test_a_batch_ends_in_one_json_object(folder, tmp_path):
    more = tmp_path / "prompt.txt"
    more.write_text("from a file, longer than the others")
    done = run(
        "--model", folder, "--prompt", "one", "--prompt", "prompt two", "--prompt-file", more,
        "--max-tokens", 9, "--window", 16, "--sink-tokens", 4, "--page-size", 8, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["prompts"] == ["one", "prompt two", more.read_text()]
    assert all(0 < len(tokens) <= 9 for tokens in result["tokens"])
    assert len(result["text"]) == len(result["stop_reason"]) == 3
    assert result["messages"] == [None] * 3
    assert set(result["stop_reason"]) <= {"length", "stop"}
    assert 0 < result["cache_bytes_used"] <= result["cache_bytes_reserved"]
    assert result["prefill_tokens_per_second"] > 0 and result["decode_tokens_per_second"] > 0
    assert "window 16 + 4 sink tokens" in result["layers"][0] and "xla" in result["layers"][0]
    assert "tokens/s" in done.stderr and "MiB used" in done.stderr


def test_a_harmony_chat_is_read_by_messages(folder, tmp_path):
    from tokenizers import AddedToken, Tokenizer, models

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = ("start", "channel", "message", "end", "call", "return")
    marks = [f"<|{name}|>" for name in names]
    by_id = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    vocab = {token: n for n, token in enumerate([*by_id[: -len(marks)], *marks])}
    tokenizer.model = models.BPE(vocab, [])
    tokenizer.add_special_tokens([AddedToken(mark) for mark in marks])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(
        "<|start|>{{ messages[0].content ~ shouts }}<|start|>assistant<|channel|>final<|message|>"
    )
    done = run(
        "--model", tmp_path, "--prompt", "Hi", "--chat", "--template-args", "shouts=[1]",
        "--max-tokens", 6, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    first = result["messages"][0][0]
    assert (first["channel"], first["recipient"]) == ("final", None)
    assert result["text"][0].startswith(first["text"])
    assert result["prompt_tokens"] == len("Hi[1]" + "assistant" + "final") + 4


def test_template_arguments_are_json_or_text():
    pairs = ("effort=low", "thinking=false", 'tools=["a"]', 'year="2024"', "sum=1=1", "no=")
    assert generate.template_variables(pairs) == {
        "effort": "low", "thinking": False, "tools": ["a"], "year": "2024", "sum": "1=1", "no": "",
    }  # fmt: skip


def test_standard_input_streams_the_same_text(folder):
    done = run("--model", folder, "--max-tokens", 8, "--json", stdin="from stdin")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["prompts"] == ["from stdin"]
    assert result["text"][0] + "\n" in done.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model", "/no/such/model", "--prompt", "x"], "/no/such/model: no such file or folder"),
        (["--prompt-file", "/no/such/file"], "/no/such/file: No such file"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must be a finite"),
        (["--prompt", "x", "--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "x", "--max-tokens", "many"], "many"),
        (["--prompt", "x", "--no-such-flag"], "--no-such-flag"),
        (["--model", "TINY", "--prompt", "x" * 2050], "prompt 0 has 2050 tokens"),
        (["--model", "TINY", "--prompt", "x", "--window", "0"], "window=0 must be at least 1"),
        (["--model", "TINY", "--prompt", "x", "--backend", "tpu"], "no 'tpu' backend"),
        (["--model", "TINY", "--prompt", "x", "--chat"], "chat template"),
        (["--prompt", "x", "--template-args", "a=1"], "--template-args needs --chat"),
        (["--prompt", "x", "--chat", "--template-args", "low"], "'low' must be NAME=VALUE"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, args, message):
    done = run(*[folder if arg == "TINY" else arg for arg in args])
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert not done.stdout.strip()


@pytest.mark.parametrize("kv", ["exact", "fp8_e4m3", "tq4"])
def test_random_weights_continue_random_prompts(monkeypatch, capsys, kv):
    layer = dataclasses.replace(SHAPES["tiny"], windows=(None,))  # one: each is compiled
    monkeypatch.setitem(SHAPES, "tiny", layer)
    asked = dict(prompt_tokens=19, batch=3, max_tokens=5)
    assert generate.main(generate.Args(model="random:tiny", kv=kv, json=True, **asked)) == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result["prompts"] == ["19 random tokens"] * 3 and result["prompt_tokens"] == 3 * 19
    assert result["stop_reason"] == ["length"] * 3
    for tokens, text in zip(result["tokens"], result["text"], strict=True):
        assert len(tokens) == 5 and text.split() == [str(token) for token in tokens]
    assert kv in result["layers"][0]
    assert "prefill 57 tokens" in said.err and "decode 15 tokens" in said.err


@pytest.mark.parametrize(
    "args, message",
    [
        (dict(model="random:huge"), "'huge' must be one of llama3-8b, llama3-1b, tiny"),
        (dict(model="random:tiny", prompt=("x",)), "--prompt needs a tokenizer"),
        (dict(model="random:tiny", chat=True), "--chat needs a tokenizer"),
        (dict(model="random:tiny", prompt_tokens=0), "--prompt-tokens 0 must be at least 1"),
        (dict(model="random:tiny", batch=-1), "--batch -1 must be at least 1"),
        (dict(prompt=("x",), prompt_tokens=5), "--prompt-tokens 5 needs random weights"),
        (dict(prompt=("x",), batch=2), "--batch 2 needs random weights"),
    ],
)
def test_prompts_that_do_not_go_with_the_model(args, message):
    with pytest.raises(ValueError, match=message):
        generate.main(generate.Args(**args))


def test_help_teaches():
    done = run("--help")
    assert done.returncode == 0
    for word in (
        "--window",
        "--sink-tokens",
        "--chat",
        "StreamingLLM",
        "smollm2",
        "random:llama3-8b",
    ):
        assert word in done.stdout


@pytest.mark.parametrize(
    "stdin, message",
    [(None, "no prompt: give --prompt"), ("", "prompt 0 is empty"), ("a\udcff", "must be UTF-8")],
    ids=["closed", "empty", "not UTF-8"],
)
def test_standard_input_that_is_no_prompt(monkeypatch, stdin, message):
    monkeypatch.setattr(sys, "stdin", None if stdin is None else io.StringIO(stdin))
    with pytest.raises(ValueError, match=message):
        generate.read_prompts(generate.Args())


def test_text_that_stops_is_not_shown_whatever_tokens_it_spans(folder):
    free = json.loads(run("--model", folder, "--prompt", "one", "--json").stdout)
    text = free["text"][0]
    stop = text[5:9]
    done = run("--model", folder, "--prompt", "one", "--stop", "never", "--stop", stop, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["text"][0] == text[: text.index(stop)]
    assert f"{result['text'][0]}\nprefill " in done.stderr
    assert result["stop_reason"] == ["stop"]
