"""Numbers of files: finite, whole, within what tables can be made of, or one line that says so."""

import math

import pytest

from models import numbers
from models.errors import CheckpointError
from models.families.architectures import ARCHITECTURES, architecture_config
from models.json_files import MOST_BYTES, parse_json_object, read_json_object, read_text
from models.rope import make_rope
from tests.models.numpy_llama import make_config
from tests.models.numpy_mixed import gpt_oss_config

NOT_WHOLE = [None, True, "1", 1.0, math.nan, math.inf, [1], {}, 0, -1, 2**31, 10**400]
NOT_POSITIVE = [None, True, "1", math.nan, math.inf, -math.inf, [1.0], {}, 0, -1, 1e-45, 1e308]
NOT_POSITIVE += [10**400, -(10**400)]


@pytest.mark.parametrize("value", NOT_WHOLE, ids=lambda v: repr(v)[:20])
def test_whole_numbers(value):
    with pytest.raises(CheckpointError, match="^n="):
        numbers.whole_number("n", value)


@pytest.mark.parametrize("value", NOT_POSITIVE, ids=lambda v: repr(v)[:20])
def test_positive_numbers(value):
    with pytest.raises(CheckpointError, match="^n="):
        numbers.positive_number("n", value)


def test_numbers_at_their_limits_pass():
    assert numbers.whole_number("n", 2**31 - 1) == 2**31 - 1
    assert numbers.whole_number("n", 0, least=0) == 0 and numbers.token_id("n", 0) == 0
    assert numbers.positive_number("n", 10**20) == 1e20
    assert numbers.not_negative_number("n", 0) == 0 and numbers.switch("n", False) is False


@pytest.mark.parametrize("value", [None, 0, 1, "true", []])
def test_switches(value):
    with pytest.raises(CheckpointError, match="^n=.* must be true or false"):
        numbers.switch("n", value)


SIZES = ("num_hidden_layers", "hidden_size", "head_dim", "num_attention_heads", "sliding_window")
FACTORS = ("rms_norm_eps", "swiglu_alpha", "swiglu_limit")
ROPE_FACTORS = ("rope_theta", "factor", "beta_fast", "mscale", "original_max_position_embeddings")
WRONG = (10**400, math.nan, math.inf, -1, "7", [7], {"a": 1}, True)


@pytest.mark.parametrize("value", WRONG, ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("key", SIZES + FACTORS + ROPE_FACTORS)
def test_a_number_of_a_config_that_can_not_be_is_named(key, value):
    config = gpt_oss_config()
    rope = config["rope_scaling"] | ({key: value} if key in ROPE_FACTORS else {})
    config |= {"rope_scaling": rope} | ({} if key in ROPE_FACTORS else {key: value})
    with pytest.raises(
        CheckpointError, match=key if not isinstance(value, dict) else "config.json"
    ):
        architecture_config(config)


@pytest.mark.parametrize("key", SIZES)
def test_a_size_beyond_int32_is_named(key):
    with pytest.raises(CheckpointError, match=key):
        architecture_config(gpt_oss_config(**{key: 2**31}))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sizes_that_lengthen_tables_are_refused_before(kind):
    text = {"text_config": {"num_hidden_layers": 10**9}} if kind == "gemma3" else {}
    window = {} if kind in ("llama", "olmo2") else {"sliding_window": 8}
    config = make_config(kind, num_hidden_layers=10**9, **window) | text
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        architecture_config(config)


def test_rotary_tables_are_bounded():
    with pytest.raises(CheckpointError, match="head_dim=2147483646 must be at most 65536"):
        make_rope(2**31 - 2, {"rope_theta": 1e4})


LLAMA3 = {"rope_type": "llama3", "original_max_position_embeddings": 64, "factor": 2.0}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64, "factor": 2.0}


@pytest.mark.parametrize(
    "parameters, part",
    [
        (LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0}, "must be below"),
        (YARN | {"rope_theta": 1.0}, "must be above 1"),
        ({"rope_type": "linear", "factor": 1e-45}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        (YARN | {"mscale": math.nan}, "mscale"),
        ({"rope_type": "factors", "factors": [1.0]}, "factors must be a list of 4"),
        ({"rope_type": "factors", "factors": [1.0, 2.0, 0.0, 1.0]}, "a factor=0.0"),
    ],
)
def test_no_division_by_zero_in_rotations(parameters, part):
    with pytest.raises(ValueError, match=part):
        make_rope(8, {"rope_theta": 1e4} | parameters)


@pytest.mark.parametrize(
    "text, part",
    [
        ('{"a": ' + "9" * 5000 + "}", "a whole number of 5000 digits"),
        ("[" * 100_000 + "]" * 100_000, "recursion"),
        ("[1]", "must hold a JSON object, not list"),
        ('{"a": 1', "invalid JSON"),
    ],
)
def test_json_that_can_not_be_is_one_line(text, part):
    with pytest.raises(CheckpointError, match=f"^f: .*{part}"):
        parse_json_object(text, "f")


def test_small_files_must_be_small_files(tmp_path):
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(CheckpointError, match="must have at most"):
        read_text(large)
    with pytest.raises(CheckpointError, match="must be a file"):
        read_json_object(tmp_path)
    with pytest.raises(CheckpointError, match="File name too long"):
        read_json_object(tmp_path / ("x" * 1000))
