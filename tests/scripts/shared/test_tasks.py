"""scripts/shared/tasks.py and documents.py: lengths, places and answers, for several tokenizers."""

import random

import numpy as np
import pytest
import tokenizers

from models.text.tokenizer import Tokenizer
from scripts.shared.documents import cut_text
from scripts.shared.task_words import CITIES, NAMES, OBJECTS, SECRETS, filler_sentence
from scripts.shared.tasks import TASKS, distinct_words, make_task
from scripts.shared.texts import Text


def byte_tokenizer(bos: bool) -> Tokenizer:
    """One token per byte, and perhaps a BOS, id 256."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: n for n, c in enumerate([*alphabet, "<s>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, "bytes", (), 256, bos, None, {})


def word_tokenizer() -> Tokenizer:
    """Words with their spaces, digits one by one, as SentencePiece models have: "▁" leads."""
    rng, words = random.Random(0), {"\n", ".", *"0123456789"}
    for pool in (OBJECTS, NAMES, CITIES, SECRETS):
        words |= {f"▁{word}" for word in pool}
    texts = [filler_sentence(rng) for _ in range(500)]
    texts += ["The secret number of word is The owner The city of belongs It is secret word of the"]
    for text in texts:
        words |= {f"▁{word.strip('.')}" for word in text.split()}
    vocab = {word: n for n, word in enumerate(["<unk>", "▁", *sorted(words)])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
    cut = tokenizers.pre_tokenizers
    backend.pre_tokenizer = cut.Sequence(
        [cut.Metaspace(), cut.Split(tokenizers.Regex(r"[0-9]|\.|\n"), "isolated")]
    )
    return Tokenizer(backend, "words", (), None, False, None, {})


TOKENIZERS = {
    "bytes": byte_tokenizer(False),
    "bytes with BOS": byte_tokenizer(True),
    "words": word_tokenizer(),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("name", TASKS)
def test_instances_have_their_length_and_end_with_the_answer(name, tokenizer):
    length = 2600 if tokenizer.source == "bytes" else 450
    source = make_task(name, tokenizer, length, 3)
    assert source.kind == "task" and source.length == length and len(source.documents) == 3
    assert len({document.tokens.tobytes() for document in source.documents}) == 3
    for document in source.documents:
        assert document.tokens.shape == (length + 1,) and document.whole
        assert tokenizer.encode("") == [] or document.tokens[0] == 256
        assert document.rows[-1] == length - 1 and (np.diff(document.rows) > 0).all()
        targets = document.tokens[document.rows + 1]
        if name == "needle":  # five digits, which stand in the text once before
            said = tokenizer.decode(targets).replace(" ", "")
            assert len(said) == len(targets) == 5 and said.isdigit()
            before = tokenizer.decode(document.tokens[: -len(targets)]).replace(" ", "")
            assert before.count(said) == 1
            continue
        assert source.chance == pytest.approx(np.prod([1 / len(row) for row in document.choices]))
        for target, row in zip(targets, document.choices, strict=True):
            assert target in row and len(set(row.tolist())) == len(row)


def test_the_same_instances_every_time():
    one, other = (make_task("pairs", TOKENIZERS["words"], 300, 2) for _ in range(2))
    for a, b in zip(one.documents, other.documents, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_answers_of_chains_follow_from_the_facts():
    """Read back from the text: each link that is asked for is said before the question."""
    tokenizer = TOKENIZERS["bytes"]
    for document in make_task("hops", tokenizer, 2600, 4).documents:
        facts, _, asked = tokenizer.decode(document.tokens).rpartition("\n")
        links = asked.split(". ")
        assert len(links) == len(document.rows)
        for link, after in zip(links, [*links[1:], ""], strict=True):
            assert link in facts
            assert after == "" or link.split()[-1][0] in after  # the next link asks about it


def test_facts_lie_anywhere_in_the_document():
    tokenizer, places = TOKENIZERS["bytes"], []
    for document in make_task("needle", tokenizer, 1000, 40).documents:
        places.append(tokenizer.decode(document.tokens).index("The secret number") / 1000)
    assert min(places) < 0.15 and max(places) > 0.8 and 0.3 < np.median(places) < 0.7


def test_words_that_one_token_does_not_tell_apart_are_left_out():
    tokenizer = TOKENIZERS["bytes"]
    words = distinct_words(tokenizer, tuple(CITIES))
    assert len({word[0] for word in words}) == len(words) >= 8
    with pytest.raises(ValueError, match="bytes: the tokenizer tells only 2 words"):
        distinct_words(tokenizer, ("apple", "able", "boat"))


def test_no_word_of_a_fact_stands_in_the_sentences_around_it():
    rng = random.Random(0)
    words = {word.strip(".") for _ in range(2000) for word in filler_sentence(rng).split()}
    assert not words & {*OBJECTS, *NAMES, *CITIES, *SECRETS}


def test_a_document_too_short_for_its_facts_is_refused():
    with pytest.raises(
        ValueError, match="--lengths 100 is too short for task 'pairs', which takes"
    ):
        make_task("pairs", TOKENIZERS["words"], 100, 1)


@pytest.mark.parametrize("bos", [False, True])
def test_documents_of_a_text_follow_each_other(bos):
    tokenizer = byte_tokenizer(bos)
    text = Text("abcdefghijklmnopqrstuvwxyz", "source", "name")
    source = cut_text(text, tokenizer, 7, 3)
    step = 7 - bos
    for number, document in enumerate(source.documents):
        assert (
            document.length == 7
            and tokenizer.decode(document.tokens)
            == text.text[number * step : (number + 1) * step + 1]
        )
        assert (document.tokens[0] == 256) == bos
        np.testing.assert_array_equal(document.rows, np.arange(7))
    with pytest.raises(ValueError, match="has 26 tokens, fewer than --documents 5 of --lengths 7"):
        cut_text(text, tokenizer, 7, 5)
