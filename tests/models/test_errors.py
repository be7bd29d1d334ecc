"""Error lines are printable and short whatever a file holds; failures of readers become them."""

import pytest
import tokenizers

from models.errors import LONGEST_LINE, CheckpointError, clear_errors, library_errors, one_line


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\nb\r\x1b[31m\x00", r"a\nb\r\x1b[31m\x00"),
        ("\u202etxt.exe\ud800", r"\u202etxt.exe\ud800"),
        ("é東🙂", "é東🙂"),
    ],
)
def test_what_does_not_print_is_escaped(text, shown):
    assert str(CheckpointError(text)) == shown


@pytest.mark.parametrize("filling", ["x" * 10**7, "\x1b" * 5000, "é" * 301])
def test_a_long_line_keeps_its_file_and_its_rule(filling):
    line = str(CheckpointError(f"config.json: {filling} must be a number."))
    assert line.startswith("config.json: ") and line.endswith(" must be a number.")
    assert line.isprintable() and len(line) <= LONGEST_LINE and "..." in line


def test_one_line_folds_lines_and_names_silent_errors():
    assert one_line("a\n  b.\n") == "a b"
    assert one_line(MemoryError()) == "MemoryError"
    assert len(one_line("x" * 1000, 60)) == 60


@pytest.mark.parametrize(
    "error, line",
    [
        (MemoryError(), "f: needs more memory than there is."),
        (FileNotFoundError(2, "No such file"), "f: cannot be read: No such file."),
        (KeyError("x"), "f: damaged or unsupported: KeyError: 'x'."),
        (RecursionError("deep"), "f: damaged or unsupported: RecursionError: deep."),
        (CheckpointError("g: as it is"), "g: as it is"),
    ],
)
def test_failures_of_a_reader_become_one_line(error, line):
    with pytest.raises(CheckpointError) as caught, clear_errors("f"):
        raise error
    assert str(caught.value) == line


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("guard", [clear_errors, library_errors])
def test_what_ends_the_process_passes(error, guard):
    with pytest.raises(error), guard("f"):
        raise error


def panic():
    """Makes the tokenizers library panic: pieces of no characters."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.FixedLength(0)
    backend.encode("abc")


def test_a_panic_of_rust_becomes_one_line_and_other_errors_pass(capfd):
    with pytest.raises(BaseException) as bare:
        panic()
    assert not isinstance(bare.value, Exception)  # what an `except Exception` would miss
    with (
        pytest.raises(CheckpointError, match="^f: a library gave up: chunk size"),
        library_errors("f"),
    ):
        panic()
    with pytest.raises(KeyError), library_errors("f"):
        raise KeyError("x")
