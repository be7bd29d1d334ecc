"""Answers in channels are shown and kept the same, however the tokens are split up."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from models.text.harmony import HarmonyStream, Message, answer_stream
from models.text.tokenizer import TextStream, Tokenizer

MARKS = ("start", "end", "message", "channel", "constrain", "return", "call")
PROMPT = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
ANSWER = (
    "<|channel|>analysis<|message|>Hm, 🐳.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    "<|start|>assistant<|channel|>final<|message|>\nYes: é<|return|>"
)
SHOWN = "[analysis]\nHm, 🐳.\n\n[commentary to functions.f]\n{}\n\n[final]\n\nYes: é"


def make_tokenizer(marks=MARKS) -> Tokenizer:
    """All bytes and harmony's special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([f"<|{mark}|>" for mark in marks])
    return Tokenizer(backend, "tiny", (), None, False, None, {})


TOKENIZER = make_tokenizer()


def read(answer, prompt=PROMPT, step=1):
    """What is shown of an answer that comes `step` tokens at a time, and its messages."""
    ids = TOKENIZER.encode(answer)
    stream = HarmonyStream(TOKENIZER, TOKENIZER.encode(prompt))
    parts = [stream.push(ids[n : n + step]) for n in range(0, len(ids), step)]
    return "".join(parts) + stream.flush(), stream.messages


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_messages_are_shown_under_their_channels(step):
    shown, messages = read(ANSWER, step=step)
    assert shown == SHOWN
    assert messages == [
        Message(channel="analysis", text="Hm, 🐳."),
        Message(channel="commentary", recipient="functions.f", text="{}"),
        Message(channel="final", text="\nYes: é"),
    ]


def test_text_is_shown_as_it_comes_and_never_half_a_character():
    stream = HarmonyStream(TOKENIZER, TOKENIZER.encode(PROMPT))
    assert stream.push(TOKENIZER.encode("<|channel|>final")) == ""
    assert stream.push(TOKENIZER.encode("<|message|>")) == "[final]\n"
    assert [stream.push([i]) for i in TOKENIZER.encode("aé")] == ["a", "", "é"]


def test_a_recipient_may_stand_with_the_role():
    header = " to=functions.f<|channel|>commentary json<|message|>"
    assert read(header + "{}<|call|>") == (
        "[commentary to functions.f]\n{}",
        [Message(channel="commentary", recipient="functions.f", text="{}")],
    )


@pytest.mark.parametrize(
    ("prompt", "answer", "shown", "channel"),
    [
        ("plain", "text", "text", ""),
        (PROMPT + "<|channel|>final<|message|>It is", " so", " so", "final"),
        (PROMPT + "<|channel|>final", "<|message|>so", "[final]\nso", "final"),
        ("<|start|>user<|message|>Hi", " all", " all", ""),
    ],
)
def test_an_answer_goes_on_where_its_prompt_stopped(prompt, answer, shown, channel):
    text = answer.removeprefix("<|message|>")
    assert read(answer, prompt) == (shown, [Message(channel=channel, text=text)])


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("", ""),
        ("<|return|>", ""),
        ("no header", "no header"),
        ("<|channel|>anal", "<|channel|>anal"),
        ("x<|end|><|start|>assistant<|channel|>final<|message|>y", "x\n\n[final]\ny"),
        ("<|channel|>final<|message|>x<|channel|>final<|message|>y", "[final]\nx\n\n[final]\ny"),
        ("<|channel|>final<|message|>x<|end|><|start|>assistant", "[final]\nx"),
        ("<|message|>x", "x"),
    ],
)
def test_broken_or_cut_answers_lose_nothing(answer, shown):
    assert read(answer)[0] == shown


some_id = st.integers(0, TOKENIZER.vocab_size + 1) | st.integers(256, TOKENIZER.vocab_size)


@given(ids=st.lists(some_id), cuts=st.lists(st.integers(0, 20)))
def test_shown_and_kept_do_not_depend_on_chunks(ids, cuts):
    prompt = TOKENIZER.encode(PROMPT)
    whole, parts = HarmonyStream(TOKENIZER, prompt), HarmonyStream(TOKENIZER, prompt)
    shown, rest = "", list(ids)
    for cut in cuts:
        shown, rest = shown + parts.push(rest[:cut]), rest[cut:]
    shown += parts.push(rest) + parts.flush()
    assert shown == whole.push(ids) + whole.flush()
    assert parts.messages == whole.messages
    for message in whole.messages:
        assert message.text in shown


def test_only_harmony_vocabularies_are_read_by_messages():
    assert isinstance(answer_stream(TOKENIZER, [1]), HarmonyStream)
    assert isinstance(answer_stream(make_tokenizer(MARKS[:3]), [1]), TextStream)
