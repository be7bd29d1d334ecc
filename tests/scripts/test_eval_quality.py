"""scripts/eval_quality.py: its numbers against independent ones, its JSON, its one-line errors."""

import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
import models
from jaxkv.codecs import codec_names, get_codec
from scripts import eval_quality
from scripts.plan import choose_codecs
from scripts.shared import texts

ROOT = Path(__file__).parents[2]
LOSSY = tuple(name for name in codec_names() if name != "exact")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny Llama of the oracles with a byte-level tokenizer of its 256 tokens."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as tokenizer_models

    path = tmp_path_factory.mktemp("tiny")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "tests" / "oracles" / "llama" / name, path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(tokenizer_models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def model(folder):
    """Sharpened: the oracle's predictions are so near uniform that there is no KL to speak of."""
    tiny = models.load(folder, dtype="float32", scan=True)
    tiny.norm.weight[...] = 8 * tiny.norm.weight[...]
    return tiny


TOKENS = np.random.default_rng(0).integers(0, 256, 61).astype(np.int32)


def compare(model, codecs, tokens=TOKENS, **options):
    """`compare_caches` with pages of 8 tokens."""
    args = eval_quality.Args(tokens=len(tokens), page_size=8, **options)
    make = lambda codec: eval_quality.cache_config(model.config, codec, "float32", args)
    chosen = choose_codecs(codecs, recent_pages=args.recent_pages, sink_tokens=args.sink_tokens)
    configs = {name: make(codec) for name, codec in chosen.items()}
    return eval_quality.compare_caches(model, tokens, make("exact"), configs)


def test_kl_of_two_coins():
    p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    found = eval_quality.kl_divergence(p, q)
    assert found.shape == (1,)
    np.testing.assert_allclose(found, 0.5 * math.log(4 / 3), rtol=1e-6)


def test_kl_of_a_token_that_the_codec_all_but_excludes():
    p = jnp.log(jnp.array([0.5, 0.5]))
    q = jnp.array([-300.0, 0.0])  # exp(300) is no float32
    want = 0.5 * (math.log(0.5) + 300) + 0.5 * math.log(0.5)
    np.testing.assert_allclose(eval_quality.kl_divergence(p, q), want, rtol=1e-6)
    assert np.isfinite(eval_quality.kl_divergence(q, p))


def test_small_kl_does_not_drown_in_rounding():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (4, 5000))
    other = logits + rng.normal(0, 1e-4, logits.shape)
    log = lambda x: x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))
    p, q = log(logits), log(other)
    want = np.sum(np.exp(p) * (p - q), axis=-1)
    found = eval_quality.kl_divergence(jnp.asarray(p, "float32"), jnp.asarray(q, "float32"))
    assert np.all(want < 1e-8) and np.all(np.asarray(found) >= 0)
    np.testing.assert_allclose(found, want, rtol=0.02)


def test_summary_of_two_predictions():
    scores = eval_quality.Scores(
        kl=np.float32([0.1, 0.3]),
        exact_log_prob=np.log(np.float32([0.5, 0.5])),
        log_prob=np.log(np.float32([0.5, 0.125])),
        agrees=np.float32([1, 0]),
    )
    found = eval_quality.summarize("name", scores, 4.5)
    assert found["codec"] == "name" and found["bits_per_value"] == 4.5
    assert found["kl"] == pytest.approx(0.2) and found["kl_p99"] == pytest.approx(0.298)
    assert found["ppl_ratio"] == pytest.approx(2) and found["top1"] == 0.5


def test_exact_agrees_with_exact(model):
    scores, caches = compare(model, ("exact",), chunk=16)
    found = eval_quality.summarize(
        "exact", scores["exact"], eval_quality.stored_bits(caches["exact"])
    )
    assert found["kl"] == found["kl_p99"] == 0 and found["top1"] == found["ppl_ratio"] == 1
    assert found["bits_per_value"] == 32


def test_scores_equal_what_single_steps_predict(model):
    """Token by token with plain `prepare`, model, `commit`, and numpy's arithmetic in float64."""

    @jax.jit
    def step(model, token, cache):
        one = jnp.ones(1, jnp.int32)
        hidden, cache = model(token[None, None], cache.prepare(one))
        return model.unembed(hidden)[0, 0], cache.commit(one)

    def log_probs(codec):
        layers = model.layer_specs(jaxkv.Keep(dtype="float32", codec=codec))
        cache = jaxkv.KVCache.create(
            jaxkv.CacheConfig(layers=layers, batch=1, max_tokens=len(TOKENS), page_size=8)
        )
        rows = []
        for token in TOKENS[:-1]:
            row, cache = step(model, jnp.asarray(token), cache)
            rows.append(np.float64(row))
        rows = np.stack(rows)
        return rows - np.log(np.sum(np.exp(rows), axis=-1, keepdims=True))

    scores, _ = compare(model, ("3bit_nc",), chunk=16)
    found, p, q = scores["3bit_nc"], log_probs("exact"), log_probs("3bit_nc")
    want = np.sum(np.exp(p) * (p - q), axis=-1)
    row = np.arange(len(want))
    assert want.mean() > 1e-4
    # Rounding may flip a code at a threshold, and which do differs between compilers.
    np.testing.assert_allclose(found.kl, want, rtol=3e-2, atol=1e-5)
    np.testing.assert_allclose(found.exact_log_prob, p[row, TOKENS[1:]], atol=1e-4)
    np.testing.assert_allclose(found.log_prob, q[row, TOKENS[1:]], rtol=2e-3)
    np.testing.assert_array_equal(found.agrees, p.argmax(-1) == q.argmax(-1))


@pytest.mark.parametrize("codec, window", [("3bit_nc", None), ("tq3", 24)])
def test_chunks_do_not_change_the_scores(model, codec, window):
    """But for rounding: a value between two codes may fall to the other side."""
    one, other = (compare(model, (codec,), chunk=n, window=window)[0][codec] for n in (60, 7))
    assert one.kl.mean() > 1e-5
    np.testing.assert_allclose(other.kl, one.kl, rtol=5e-2, atol=1e-4)
    np.testing.assert_allclose(other.log_prob, one.log_prob, rtol=2e-3)


def test_sinks_beside_a_window_belong_to_the_exact_cache_too(folder):
    architecture = models.architecture_config(models.open_checkpoint(folder).config)
    for codec in ("exact", "3bit_nc"):
        for window, sinks in ((None, 0), (16, 4)):
            args = eval_quality.Args(window=window, sink_tokens=4)
            layers = eval_quality.cache_config(architecture, codec, "float32", args).layers
            assert [spec.sink_tokens for spec in layers] == [sinks] * 3


@pytest.mark.parametrize("codec", codec_names())
def test_stored_bits_are_the_codecs_own(codec):
    spec = jaxkv.LayerSpec(kv_heads=2, head_dim=64, codec=codec, dtype="float32")
    config = jaxkv.CacheConfig(layers=(spec, spec), batch=1, max_tokens=300)
    known = 32 if codec == "exact" else get_codec(codec).bits_per_value(64, 64)
    assert eval_quality.stored_bits(jaxkv.KVCache.create(config)) == known


def test_exact_layers_count_with_their_own_bits():
    exact = jaxkv.LayerSpec(kv_heads=2, head_dim=64, dtype="bfloat16")
    coded = jaxkv.LayerSpec(kv_heads=2, head_dim=64, codec="4bit_nc", dtype="bfloat16")
    config = jaxkv.CacheConfig(layers=(exact, coded, coded, coded), batch=1, max_tokens=100)
    cache = jaxkv.KVCache.create(config)
    assert eval_quality.stored_bits(cache) == (16 + 3 * 4.375) / 4


def test_published_codecs_run_as_published_and_recipes_keep_theirs():
    chosen = choose_codecs(LOSSY, recent_pages=None, sink_tokens=None)
    assert chosen == {name: get_codec(name) for name in LOSSY}
    assert (chosen["3bit_nc"].recent_pages, chosen["3bit_nc"].sink_tokens) == (0, 0)
    assert chosen["tq3"].recent_pages > 0 and chosen["tq3"].sink_tokens > 0
    changed = choose_codecs(("3bit_nc", "tq3", "exact"), recent_pages=1, sink_tokens=9)
    assert [(c.recent_pages, c.sink_tokens) for c in changed.values()] == [(1, 9), (1, 9), (0, 0)]


def test_json_table_and_plot(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(eval_quality, "keep_compiled_programs", lambda folder: None)
    text = tmp_path / "text.txt"
    text.write_text("Some text that is long enough for this. " * 4)
    plot = tmp_path / "plot.svg"
    args = eval_quality.Args(
        model=str(folder), codec=("int8", "exact", "4bit_nc"), text=text, tokens=90, page_size=8,
        chunk=40, plot=str(plot), json=True,
    )  # fmt: skip
    assert eval_quality.main(args) == 0
    said = capsys.readouterr()
    *table, last = said.out.splitlines()
    result = json.loads(last)
    assert [row["codec"] for row in result["results"]] == ["int8", "exact", "4bit_nc"]
    for row in result["results"]:
        keys = {"codec", "bits_per_value", "kl", "kl_p99", "ppl_ratio", "top1"}
        assert set(row) == keys and all(math.isfinite(row[k]) for k in keys - {"codec"})
        assert any(line.split()[:1] == [row["codec"]] for line in table)
    assert result["results"][1]["kl"] == 0 and result["results"][1]["top1"] == 1
    assert result["tokens"] == 90 and result["page_size"] == 8
    assert result["model"] == str(folder) and result["text"] == str(text)
    assert result["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert plot.read_text().startswith("<?xml") and str(plot) in said.err.replace("\n", "")


def test_without_matplotlib_only_a_plot_that_was_asked_for_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert eval_quality.check_plot(eval_quality.PLOT) is None
    with pytest.raises(ValueError, match="needs matplotlib"):
        eval_quality.check_plot("other.png")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(codec=("5bit",)), "'5bit' is unknown; there are exact, int8"),
        (dict(codec=("tq3",), recent_pages=0), "--recent-pages 0 must be at least 1 for codec"),
        (dict(recent_pages=-1), "--recent-pages -1 must not be negative"),
        (dict(sink_tokens=-1), "--sink-tokens -1 must not be negative"),
        (dict(tokens=1), "--tokens 1 must be at least 2"),
        (dict(chunk=0), "--chunk 0 must be at least 1"),
        (dict(text=Path("/no/such/file")), "/no/such/file: No such file"),
        (dict(plot="/no/such/folder/plot.png"), "must be a file in a folder that exists"),
        (dict(plot="plot.doc"), "must end in one of"),
    ],
)  # fmt: skip
def test_bad_arguments_are_told_before_a_model_is_opened(monkeypatch, change, message):
    if "plot" in change:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(models, "open_checkpoint", None)
    with pytest.raises(ValueError, match=message):
        eval_quality.main(eval_quality.Args(**change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=200), "has 90 tokens, fewer than --tokens 200"),
        (dict(tokens=2050), "trained context, 2048"),
        (dict(keep_first=2, keep_last=2), "keep_first=2, keep_last=2 must name some of 3"),
        (dict(page_size=0), "page_size=0 must be at least 1"),
        (dict(window=0), "window=0 must be at least 1"),
    ],
)
def test_what_does_not_suit_the_model_is_told_before_weights_are_read(
    monkeypatch, folder, tmp_path, change, message
):
    text = tmp_path / "text.txt"
    text.write_text("x" * 90)
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(ValueError, match=message):
        eval_quality.main(eval_quality.Args(model=str(folder), text=text, plot="", **change))


def test_an_error_is_one_line_and_exit_code_2():
    script = ROOT / "scripts" / "eval_quality.py"
    done = subprocess.run(
        [sys.executable, str(script), "--codec", "5bit"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "'5bit' is unknown" in done.stderr


def test_the_packaged_text_is_pinned_and_long_enough():
    text = texts.read_text(None)
    assert "Objects, values and types" in text.text and len(text.text) > 40_000
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in text.source
