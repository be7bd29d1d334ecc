"""Plots of results, where matplotlib is installed."""

from pathlib import Path

from models.errors import one_line


def has_matplotlib() -> bool:
    """Whether matplotlib can be imported."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: F401
    except ImportError:
        return False
    return True


def check_plot(plot: str) -> Path:
    """The file to plot to.

    Raises:
      ValueError: matplotlib is missing or can't write such a file, or there is no such folder.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ValueError(f"--plot {plot}: needs matplotlib ({one_line(error)}).") from None
    path = Path(plot).expanduser()
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--plot {plot}: must end in one of {', '.join(sorted(known))}.")
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--plot {plot}: must be a file in a folder that exists.")
    return path


def plot_quality(path: Path, rows: list[dict], title: str) -> None:
    """Plots each codec's KL divergence (log scale) and accuracy against its bits per value.

    Colors are codecs, marks are sources and lengths, bars are standard errors. A codec without loss
    has no place on a log scale and is left out there; without tasks there is no accuracy.

    Args:
      path: the file to write.
      rows: as `summaries.summarize` makes them.
      title: of the plot.
    """
    from matplotlib.figure import Figure

    measures = [
        ("kl", "mean KL(exact || codec) of the next token, nats", [r for r in rows if r["kl"] > 0]),
        ("accuracy", "accuracy of tasks", [r for r in rows if r["kind"] == "task"]),
    ]
    panels = [panel for panel in measures if panel[2]] or measures[:1]
    codecs = list(dict.fromkeys(row["codec"] for row in rows))
    series = list(dict.fromkeys(map(_series, rows)))
    figure = Figure(figsize=(2 + 6 * len(panels), 5.5), dpi=150, layout="constrained")
    for number, (key, label, shown) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for row in shown:
            axes.errorbar(
                row["bits_per_value"],
                row[key],
                yerr=row[f"{key}_se"],
                color=_COLORS[codecs.index(row["codec"]) % len(_COLORS)],
                marker=_MARKS[series.index(_series(row)) % len(_MARKS)],
                capsize=2,
                linewidth=1,
                zorder=3,
            )
        if key == "kl" and shown:
            axes.set_yscale("log")
        axes.set_xlabel("bits per value in the cache at this length (exact pages counted)")
        axes.set_ylabel(label)
        axes.grid(True, which="both", alpha=0.25)
    figure.suptitle(title, fontsize=10)
    figure.legend(handles=_legend(codecs, series), loc="outside right upper", fontsize=8)
    figure.savefig(path)


_COLORS = (
    "#000000 #1f5fa8 #b3541e #2e8b57 #8e44ad #c0392b "
    "#16a0a0 #b8860b #7f7f7f #e377c2 #5d6d1e #17365d"
).split()
_MARKS = "osD^vP*X<>h"


def _series(row: dict) -> str:
    """What a mark stands for."""
    return f"{row['model']}, {row['source']}, {row['length']}"


def _legend(codecs: list[str], series: list[str]) -> list:
    """One line per codec's color and per series' mark."""
    from matplotlib.lines import Line2D

    colors = [
        Line2D([], [], color=_COLORS[n % len(_COLORS)], linewidth=3, label=codec)
        for n, codec in enumerate(codecs)
    ]
    marks = [
        Line2D([], [], color="gray", marker=_MARKS[n % len(_MARKS)], linestyle="", label=name)
        for n, name in enumerate(series)
    ]
    return colors + marks


def plot_fractions(path: Path, rows: list[dict], title: str) -> None:
    """Plots one bar per row: its fraction of the read ceiling; rows without one are left out."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["fraction"] is not None]
    figure = Figure(figsize=(9, 1.5 + 0.28 * len(shown)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    names = [row["codec"] if row["by"] == "jaxkv" else row["by"] for row in shown]
    colors = [
        "#9a9a9a" if row["by"] != "jaxkv" else "#1f5fa8" if row["codec"] == "exact" else "#b3541e"
        for row in shown
    ]
    places = range(len(shown))
    bars = axes.barh(places, [row["fraction"] for row in shown], color=colors)
    axes.bar_label(bars, [f"{row['fraction']:.2f}" for row in shown], padding=3, fontsize=8)
    labels = [f"{row['group']}  {name}" for row, name in zip(shown, names, strict=True)]
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("bytes of keys and values per second, as a fraction of the read ceiling")
    axes.set_title(title, fontsize=9)
    figure.savefig(path)
