"""How byte-level BPE tokenizers of GGUF files cut a text into words before the merges.

The metadata names the cut (`tokenizer.ggml.pre`). The names, and what they stand for, are
llama.cpp's; the regular expressions equal those in the models' own tokenizer.json.
"""

import dataclasses

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (  # words end where a capital letter follows a small one
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+ENDING|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*ENDING"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_ONE, _THREE = r"\p{N}", r"\p{N}{1,3}"


@dataclasses.dataclass(frozen=True)
class PreSplit:
    """One kind of cut: each expression cuts the pieces of the one before it further."""

    expressions: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is taken before any merge
    adds_bos: bool = False  # where the file does not say
    composed: bool = False  # texts are brought into Unicode's form NFC first


_LLAMA3 = PreSplit((_WORDS.replace("DIGITS", _THREE),), whole_words=True, adds_bos=True)
_QWEN2 = PreSplit((_WORDS.replace("DIGITS", _ONE),))
_GPT = PreSplit((_GPT2,))
_SINGLE_DIGITS = PreSplit((_ONE, _GPT2))
_TEKKEN = _CASED.replace("ENDING", "").replace("DIGITS", _ONE)
_GPT_4O = _CASED.replace("ENDING", _CONTRACTION).replace("DIGITS", _THREE)
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|BACKTICK]+"
_DIGIT_TRIPLES = "[0-9][0-9][0-9]"

PRE_SPLITS = {
    # What llama.cpp does for a file that does not name its cut.
    "default": PreSplit((_PUNCTUATION.replace("BACKTICK", ""), _GPT2, r"\p{N}+", _DIGIT_TRIPLES)),
    "falcon": PreSplit((_PUNCTUATION.replace("BACKTICK", "`"), _GPT2, _DIGIT_TRIPLES)),
    "tekken": PreSplit((_TEKKEN,), whole_words=True, adds_bos=True),
    "deepseek-coder": PreSplit(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
    ),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "megrez"), dataclasses.replace(_QWEN2, composed=True)
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA3,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreSplit(_LLAMA3.expressions)),
    **dict.fromkeys(("kormo", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"), _GPT),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _SINGLE_DIGITS,
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), PreSplit((_GPT_4O,))),
}
