import pytest

from jaxkv.codecs import Float8, MinMax, TurboQuant, codec_names, get_codec, recipe

# Bits per value at head_dim 64 and page_size 64, factors and page means included.
BITS = {
    "exact": 16,
    "int8": 8.375,
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    "k8v4": 6.25,
    "4bit_nc": 4.375,
    "k3v4_nc": 3.875,
    "3bit_nc": 3.375,
    "tq4": 4.375,
    "tq3": 3.375,
    "tq2": 2.75,
}


def test_every_codec_has_its_bits_per_value():
    assert {name: get_codec(name).bits_per_value(64, 64) for name in codec_names()} == BITS


def test_published_presets_are_as_published():
    for name, bits, value_bits in (("4bit_nc", 4, 4), ("k3v4_nc", 3, 4), ("3bit_nc", 3, 3)):
        codec = get_codec(name)
        assert codec.key == TurboQuant(bits=bits, codebook="lloyd_max", factor="norm")
        assert codec.key.sign_seed is None and not codec.key.search
        assert codec.value == MinMax(value_bits)
        assert (codec.recent_pages, codec.sink_tokens, codec.key_mean) == (0, 0, None)
    assert get_codec("k8v4").key == Float8("e4m3")


@pytest.mark.parametrize("name", ["tq4", "tq3", "tq2"])
def test_recipes_keep_a_sink_page_and_two_recent_ones(name):
    codec = get_codec(name)
    assert (codec.recent_pages, codec.sink_tokens, codec.key_mean) == (2, 4, "page")
    assert codec.lossy and codec.key.uses_mean and not codec.value.uses_mean


def test_recipe_without_a_mean_needs_no_recent_pages():
    codec = recipe("mine", key_bits=4, value_bits=3, key_mean=None, recent_pages=0)
    assert codec.bits_per_value(64, 64) == 3.75


def test_static_mean_costs_no_bits():
    assert (
        recipe("mine", key_bits=3, value_bits=3, key_mean="static").bits_per_value(64, 64) == 3.25
    )


def test_codecs_are_static_arguments():
    assert len({get_codec(name) for name in codec_names()}) == len(codec_names())
    assert not get_codec("exact").lossy


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'5bit' is unknown; there are exact, int8.*tq2") as error:
        get_codec("5bit")
    assert "\n" not in str(error.value)
