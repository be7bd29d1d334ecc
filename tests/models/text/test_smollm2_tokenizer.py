"""The tokenizer of the real SmolLM2 against ids and texts from transformers."""

import json
from pathlib import Path

import pytest

from models.checkpoints.fetch_smollm2 import fetch_smollm2
from models.checkpoints.open import open_checkpoint
from models.errors import CheckpointError

ORACLE = json.loads((Path(__file__).parents[2] / "oracles" / "smollm2.json").read_text("utf-8"))
CASES = {case["name"]: case for case in ORACLE["cases"]}


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = fetch_smollm2()
    except CheckpointError as error:
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
    return open_checkpoint(path).load_tokenizer()


@pytest.mark.parametrize("name", CASES)
def test_oracle_prompts_round_trip(smollm2, name):
    ids = CASES[name]["input_ids"]
    assert smollm2.encode(smollm2.decode(ids, skip_special=False)) == ids


@pytest.mark.parametrize("name", CASES)
def test_oracle_text_is_decoded_whole_and_streamed(smollm2, name):
    case = CASES[name]
    assert smollm2.decode(case["greedy"], skip_special=False) == case["text"]
    stream = smollm2.stream(skip_special=False)
    assert "".join(stream.push([i]) for i in case["greedy"]) + stream.flush() == case["text"]


def test_smollm2_has_its_published_settings(smollm2):
    assert smollm2.eos_ids == (ORACLE["eos"], 0)  # <|endoftext|> ends a text, too
    assert (smollm2.bos_id, smollm2.adds_bos, smollm2.vocab_size) == (1, False, 49152)


def test_smollm2_chat_is_the_oracle_prompt(smollm2):
    expected = CASES["chat_sky"]["input_ids"]
    question = smollm2.decode(expected, skip_special=False)
    question = question.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    prompt = smollm2.apply_chat([{"role": "user", "content": question}])
    assert smollm2.encode(prompt) == expected
