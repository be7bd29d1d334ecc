"""Results with error bars: each document counts once, and codecs are compared on the same ones."""

import math
from collections.abc import Sequence

import numpy as np

from scripts.shared.documents import Source
from scripts.shared.scoring import Reading


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error `std / sqrt(n)`; None for a single value.

    The deviation is that of a sample (`n - 1`), so the error is an estimate for other documents of
    the same kind.
    """
    x = np.asarray(values, np.float64)
    if x.size < 2:
        return float(x.mean()), None
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(x.size))


def summarize(
    model: str, source: Source, codec: str, readings: Sequence[Reading]
) -> dict[str, str | int | float | None]:
    """One row: what a codec costs on a source's documents, compared with exact pages.

    A key that ends in "_se" is the standard error of the one before it over documents.

    Args:
      model: its name.
      source: where the documents are from.
      codec: its name.
      readings: one per document, in order.

    Returns:
      `kl`, `kl_p99` (over predictions), `top1` (how often both caches pick the same token),
      `ppl_ratio`, `accuracy` (of a text the next token's, of a task whole answers), and
      `accuracy_change`, this cache's accuracy minus the exact one's, document by document.
    """
    scores = [reading.scores for reading in readings]
    mean = lambda x: float(np.mean(np.float64(x)))
    whole = [document.whole for document in source.documents]
    judge = lambda right, whole: float(np.min(right)) if whole else mean(right)
    right = [judge(s.right, all_of) for s, all_of in zip(scores, whole, strict=True)]
    exact = [judge(s.exact_right, all_of) for s, all_of in zip(scores, whole, strict=True)]
    loss, loss_se = mean_and_error(
        [mean(np.float64(s.exact_log_prob) - np.float64(s.log_prob)) for s in scores]
    )
    ratio = math.exp(loss)
    kl, kl_se = mean_and_error([mean(s.kl) for s in scores])
    top1, top1_se = mean_and_error([mean(s.agrees) for s in scores])
    accuracy, accuracy_se = mean_and_error(right)
    change, change_se = mean_and_error([a - b for a, b in zip(right, exact, strict=True)])
    return {
        "model": model,
        "kind": source.kind,
        "source": source.name,
        "length": source.length,
        "documents": len(readings),
        "codec": codec,
        "bits_per_value": mean([reading.held_bits for reading in readings]),
        "coded_bits_per_value": mean([reading.stored_bits for reading in readings]),
        "kl": kl,
        "kl_se": kl_se,
        "kl_p99": float(np.percentile(np.concatenate([s.kl for s in scores]), 99)),
        "ppl_ratio": ratio,
        "ppl_ratio_se": None if loss_se is None else ratio * loss_se,
        "top1": top1,
        "top1_se": top1_se,
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "accuracy_change": change,
        "accuracy_change_se": change_se,
        "chance": source.chance,
    }
