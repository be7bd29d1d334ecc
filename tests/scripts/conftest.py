"""A tiny checkpoint with a tokenizer, for commands that read text."""

import shutil
from pathlib import Path

import pytest

ORACLE = Path(__file__).parents[1] / "oracles" / "llama"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The tiny Llama of the oracles with a byte-level tokenizer of its 256 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("tiny")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ORACLE / name, path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path
