"""Retrieval tasks in the manner of RULER (arXiv:2404.06654), made here: nothing is downloaded.

Facts lie at random places in plain sentences, and a question at the end asks for some of them.
They are asked as text to continue, with worked examples, so that small base models solve them.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from scripts.shared.documents import Document, Source, start_tokens
from scripts.shared.task_words import CITIES, NAMES, OBJECTS, SECRETS, filler_sentence


class Question(NamedTuple):
    """A task's instance, before it is surrounded by other sentences."""

    facts: list[str]  # sentences, each to be put somewhere
    tail: str  # the end of the document up to the first answer
    # Each answer, the words it is picked from (none: it must be said token by token), and the text
    # up to the next answer.
    answers: list[tuple[str, list[str], str]]


def needle(rng: random.Random, words: Callable[[Sequence[str]], list[str]]) -> Question:
    """One number of five digits, to be said in full."""
    city, number = rng.choice(CITIES), str(rng.randrange(10_000, 100_000))
    fact = f"The secret number of {city} is {number}."
    return Question([fact], f"\n\nThe secret number of {city} is", [(number, [], "")])


PAIRS, PAIRS_SHOWN = 8, 3


def pairs(rng: random.Random, words: Callable[[Sequence[str]], list[str]]) -> Question:
    """Key-value retrieval: the value of one of 8 keys, picked from all 8 values."""
    keys, values = rng.sample(OBJECTS, PAIRS), rng.sample(words(SECRETS), PAIRS)
    say = "The secret word of the {} is {}."
    facts = [say.format(*pair) for pair in zip(keys, values, strict=True)]
    shown = " ".join(facts[1 : 1 + PAIRS_SHOWN])
    tail = f"\n\n{shown} The secret word of the {keys[0]} is"
    answers = [(values[0], list(values), "")]
    return Question(rng.sample(facts, PAIRS), tail, answers)


CHAINS, CHAINS_SHOWN = 4, 3
LINKS = (
    "The secret owner of the {} is {}.",
    "The secret city of {} is {}.",
    "The secret word of {} is {}.",
)
SAID = 3  # how often each link is said: small models find one of several


def hops(rng: random.Random, words: Callable[[Sequence[str]], list[str]]) -> Question:
    """Multi-hop tracking: each link of one of 4 chains is picked, given the links before it."""
    pools = (OBJECTS, *map(words, (NAMES, CITIES, SECRETS)))[: len(LINKS) + 1]
    columns = [rng.sample(pool, CHAINS) for pool in pools]
    ends = list(zip(columns, columns[1:], strict=False))  # of each link, in every chain
    said = [
        [link.format(a[n], b[n]) for link, (a, b) in zip(LINKS, ends, strict=True)]
        for n in range(CHAINS)
    ]
    shown = "".join("\n" + " ".join(facts) for facts in said[1 : 1 + CHAINS_SHOWN])
    asked = [fact.rsplit(" ", 1)[0] for fact in said[0]]
    between = [f". {text}" for text in asked[1:]] + [""]
    answers = [
        (column[0], column, after) for column, after in zip(columns[1:], between, strict=True)
    ]
    facts = [fact for facts in said for fact in facts] * SAID
    return Question(rng.sample(facts, len(facts)), f"\n{shown}\n{asked[0]}", answers)


class Task(NamedTuple):
    """How instances are made, and how often guessing among the choices is right."""

    make: Callable[[random.Random, Callable[[Sequence[str]], list[str]]], Question]
    chance: float


TASKS = {
    "needle": Task(needle, 0.0),
    "pairs": Task(pairs, 1 / PAIRS),
    "hops": Task(hops, CHAINS ** -len(LINKS)),
}


def make_task(name: str, tokenizer, length: int, count: int) -> Source:
    """`count` instances of a task, each `length` tokens in the cache when its answer is known.

    The same arguments give the same instances.

    Raises:
      ValueError: the length is too short for the task's facts, or the tokenizer cuts words so that
        too few of them differ in their first token.
    """
    documents = []
    for number in range(count):
        rng = random.Random(f"{name} {length} {number}")  # by sha512, whatever PYTHONHASHSEED is
        question = TASKS[name].make(rng, lambda pool: distinct_words(tokenizer, tuple(pool)))
        documents.append(_lay_out(question, rng, name, tokenizer, length))
    return Source("task", name, length, documents, TASKS[name].chance)


def distinct_words(tokenizer, words: tuple[str, ...], least: int = PAIRS) -> list[str]:
    """Those words that can be told from each other by one token of theirs, in order.

    Raises:
      ValueError: fewer than `least`.
    """
    chosen: dict[int, str] = {}
    texts = [f"It is {word}" for word in words]
    _, tokens = _first_difference(tokenizer, texts)
    for word, token in zip(words, tokens, strict=True):
        chosen.setdefault(token, word)
    if len(chosen) < least:
        raise ValueError(
            f"{tokenizer.source}: the tokenizer tells only {len(chosen)} words of a task apart by "
            f"their first token, and {least} are needed: choose other --tasks."
        )
    return list(chosen.values())


def _first_difference(tokenizer, texts: list[str]) -> tuple[int, list[int]]:
    """The first place at which the texts' tokens differ, and each one's token there."""
    ids = [tokenizer.encode(text) for text in texts]
    shortest = min(map(len, ids))
    place = next(
        (n for n in range(shortest) if len({tokens[n] for tokens in ids}) > 1), shortest - 1
    )
    return place, [tokens[place] for tokens in ids]


def _lay_out(question: Question, rng: random.Random, name: str, tokenizer, length: int) -> Document:
    """Puts the facts at random places of plain sentences, and the question behind them."""
    start = start_tokens(tokenizer)
    encode = lambda text: tokenizer.encode(text)[len(start) :]
    tail, rows, choices = _answer(question, tokenizer, len(start))
    facts = [encode(" " + fact) for fact in question.facts]
    room = length + 1 - len(start) - len(tail) - sum(map(len, facts))
    if room < 0:
        raise ValueError(
            f"--lengths {length} is too short for task {name!r}, which takes "
            f"{length - room} tokens of this tokenizer."
        )
    sentences: list[list[int]] = []
    while (extra := sum(map(len, sentences)) - room) < 0:
        sentences.append(encode(" " + filler_sentence(rng)))
    if sentences:  # all documents of a length are equally long
        sentences[0] = sentences[0][extra:]
    for fact in facts:
        sentences.insert(rng.randint(0, len(sentences)), fact)
    tokens = [*start, *itertools.chain(*sentences), *tail]
    before = len(tokens) - len(tail)
    return Document(
        tokens=np.asarray(tokens, np.int32),
        rows=np.asarray(rows, np.int32) + before - 1,
        choices=np.asarray(choices, np.int32).reshape(len(rows), -1),
        whole=True,
    )


def _answer(
    question: Question, tokenizer, skip: int
) -> tuple[list[int], list[int], list[list[int]]]:
    """The question with its answers: tokens, the places of answer tokens, and their choices."""
    text, rows, choices = question.tail, [], []
    last: list[int] = []
    for answer, words, after in question.answers:
        last = tokenizer.encode(f"{text} {answer}")
        if words:
            place, tokens = _first_difference(tokenizer, [f"{text} {word}" for word in words])
            rows.append(place - skip)
            choices.append(tokens)
            last = last[: place + 1]  # one token tells the answer
        else:
            # Said in full: from where the tokens depend on the answer. No number begins with 0.
            first, _ = _first_difference(tokenizer, [f"{text} 0", f"{text} {answer}"])
            rows += [place - skip for place in range(first, len(last))]
            choices += [[] for _ in range(first, len(last))]
        text += f" {answer}{after}"
    return last[skip:], rows, choices
