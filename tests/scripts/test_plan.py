"""scripts/plan.py: bytes equal to live caches, the largest that fits, one-line errors."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxkv
from jaxkv.codecs import codec_names
from scripts import plan
from scripts.shared.keep import CodecsOptions

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "oracles" / "llama" / "config.json"


def make_args(**options) -> plan.Args:
    """The arguments; options of what the cache keeps are found among them."""
    names = {field.name for field in dataclasses.fields(CodecsOptions)}
    keep = {name: options.pop(name) for name in names & options.keys()}
    return plan.Args(keep=CodecsOptions(**keep), **options)


def rows_of(capsys, **options) -> dict[str, dict]:
    """Runs the script's main; its results by codec."""
    options = dict(model=str(CONFIG), tokens=300, page_size=16, memory=0.01, json=True) | options
    assert plan.main(make_args(**options)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {row["codec"]: row for row in result["results"]}


def config_of(codec: str, **options) -> jaxkv.CacheConfig:
    """The same cache, built by hand; the tiny Llama has 3 layers of 2 heads of 16."""
    layer = lambda codec: jaxkv.LayerSpec(kv_heads=2, head_dim=16, codec=codec)
    layers = options.pop("layers", (layer(codec),) * 3)
    return jaxkv.CacheConfig(layers=layers, page_size=16, **options)


def test_every_codecs_bytes_are_those_of_the_live_arrays(capsys):
    rows = rows_of(capsys, batch=3, max_new_tokens=20)
    assert tuple(rows) == codec_names()
    for codec, row in rows.items():
        config = config_of(codec, batch=3, max_tokens=300, max_new_tokens=20)
        cache = jaxkv.KVCache.create(config)
        size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
        assert row["cache_bytes"] == size(cache)
        assert [group["bytes"] for group in row["groups"]] == [
            size([cache.stores[n] for n in group.stores]) for group in cache.config.groups
        ]
        assert row["compression"] == rows["exact"]["cache_bytes"] / row["cache_bytes"]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_largest_that_fits_fits_and_one_more_does_not(capsys, batch):
    memory = int(0.01 * 2**30)
    for codec, row in rows_of(capsys, batch=batch).items():
        total = lambda batch, tokens, codec=codec: (
            jaxkv.plan(config_of(codec, batch=batch, max_tokens=tokens)).total
        )
        assert total(batch, row["max_tokens"]) <= memory < total(batch, row["max_tokens"] + 1)
        assert total(row["max_sequences"], 300) <= memory < total(row["max_sequences"] + 1, 300)


def test_a_token_costs_its_codes_and_little_more(capsys):
    for row in rows_of(capsys).values():
        codes = row["bits_per_value"] / 8 * 2 * 3 * 2 * 16  # k and v, layers, heads, channels
        assert codes < row["bytes_per_token"] <= codes + 12 / 16  # tables and allocator, a page


def test_nothing_fits(capsys):
    row = rows_of(capsys, memory=1e-6)["4bit_nc"]
    assert row["max_tokens"] == row["max_sequences"] == 0


def test_a_window_has_no_longest_sequence_if_it_fits(capsys):
    row = rows_of(capsys, window=40, codec=("tq3",))["tq3"]
    assert row["max_tokens"] is None and row["bytes_per_token"] == 0
    row = rows_of(capsys, window=100_000, codec=("tq3",))["tq3"]
    assert 0 < row["max_tokens"] < 100_000


def test_groups_by_what_layers_keep(capsys):
    row = rows_of(capsys, codec=("tq3",), keep_first=1, recent_pages=1, sink_tokens=0)["tq3"]
    first, rest = row["groups"]
    assert first["layers"] == [0] and first["codec"] == "exact" and first["coded_pages"] == 0
    assert rest["layers"] == [1, 2] and rest["codec"] == "tq3" and rest["coded_pages"] > 0
    assert rest["exact_pages"] == 2  # the newest one, and the null page
    bits = [group["bits_per_value"] for group in row["groups"]]
    assert row["bits_per_value"] == pytest.approx((bits[0] + 2 * bits[1]) / 3)


@pytest.mark.parametrize("limit", [0, 1, 7, 1000, plan.MOST])
@pytest.mark.parametrize("guess", [-5, 0, 1, 900, 10**12])
def test_largest_finds_the_limit_from_any_guess(limit, guess):
    calls = []
    assert plan.largest(lambda n: calls.append(n) or n <= limit, guess, 16) == limit
    assert len(calls) < 80 and all(1 <= n <= plan.MOST for n in calls)


def test_layer_numbers_run_together():
    assert plan.layer_range((0, 1, 2, 4, 6, 7)) == "0-2, 4, 6-7"


def test_a_folder_without_weights_is_enough(capsys, tmp_path):
    shutil.copy(CONFIG, tmp_path)
    assert rows_of(capsys, model=str(tmp_path)) == rows_of(capsys)


def test_no_answer_needs_more_pages_than_int32_can_number(capsys):
    row = rows_of(capsys, codec=("3bit_nc",), memory=1e9, page_size=1)["3bit_nc"]
    assert row["max_tokens"] == plan.MOST - 1  # the null page is the other one
    assert row["max_sequences"] == (plan.MOST - 1) // 300


def test_the_table_cuts_no_number_short(capsys):
    plan.main(plan.Args(model=str(CONFIG), memory=10_000, batch=1000, groups=True))
    out = capsys.readouterr().out
    assert "…" not in out and all(name in out for name in codec_names())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(codec=("5bit",)), "'5bit' is unknown; there are exact"),
        (dict(recent_pages=0), "--recent-pages 0 must be at least 1 for codec 'tq4'"),
        (dict(memory=0), "--memory 0 must be positive"),
        (dict(batch=0), "--batch 0 must be at least 1"),
        (dict(tokens=0), "--tokens 0 must be at least 1"),
        (dict(tokens=plan.MOST, batch=99), "in one pool: give pages, or fewer tokens"),
        (dict(page_size=0), "page_size=0 must be at least 1"),
        (dict(keep_first=4), "keep_first=4, keep_last=0 must name some of 3 layers"),
        (dict(model="/no/such/model"), "/no/such/model: no such file or folder"),
        (dict(model="/no/such/config.json"), "/no/such/config.json: cannot be read"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        plan.main(make_args(**dict(model=str(CONFIG)) | change))


def test_an_error_is_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "plan.py"), "--codec", "5bit"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "'5bit' is unknown" in done.stderr


CONFIGS = ROOT / "tests" / "data" / "configs"


@pytest.mark.parametrize(
    "model, windows, layers, exact_bytes",
    [
        # 2 x heads x channels x 2 bytes x tokens; a window touches a page more, and one is null
        ("gpt-oss-20b", [128, None], [12, 12], 2048 * (12 * 131_136 + 12 * 256)),
        ("gpt-oss-120b", [128, None], [18, 18], 2048 * (18 * 131_136 + 18 * 256)),
        ("gemma-3-12b-it", [1024, None], [40, 8], 8192 * (8 * 131_136 + 40 * 1152)),
    ],
)
def test_real_models_of_two_windows(capsys, model, windows, layers, exact_bytes):
    path = str(CONFIGS / f"{model}.json")
    options = dict(model=path, tokens=None, page_size=64, memory=8.0, codec=("exact", "tq4"))
    rows = rows_of(capsys, **options)
    for row in rows.values():
        assert [group["window"] for group in row["groups"]] == windows
        assert [len(group["layers"]) for group in row["groups"]] == layers
    pages = sum(group["bytes"] for group in rows["exact"]["groups"])
    assert pages == pytest.approx(exact_bytes, rel=2e-3)  # tables and free lists come on top
    sliding = rows["tq4"]["groups"][0]["codec"]
    assert sliding == ("exact" if windows[0] == 128 else "tq4")
