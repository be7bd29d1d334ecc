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


def plot_quality(path: Path, rows: list[dict], recipes: set[str], title: str) -> None:
    """Plots each codec's KL divergence (log scale) against its bits per value.

    A codec without loss has no place on a log scale and is left out.

    Args:
      path: the file to write.
      rows: `codec`, `kl` and `bits_per_value` of each.
      recipes: the codecs that are jaxkv's own; they get another color.
      title: of the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    shown = [row for row in rows if row["kl"] > 0]
    for is_own, label, color, marker in (
        (False, "published and 8-bit formats", "#b3541e", "o"),
        (True, "jaxkv recipes", "#1f5fa8", "s"),
    ):
        points = [row for row in shown if (row["codec"] in recipes) == is_own]
        x, y = [row["bits_per_value"] for row in points], [row["kl"] for row in points]
        if points:
            axes.scatter(x, y, color=color, marker=marker, label=label, zorder=3)
        for row in points:
            axes.annotate(
                row["codec"],
                (row["bits_per_value"], row["kl"]),
                xytext=(6, 4),
                textcoords="offset points",
                color=color,
                fontsize=9,
            )
    if shown:
        axes.set_yscale("log")
        axes.legend(loc="best")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("stored bits per value (exact tokens left out)")
    axes.set_ylabel("mean KL(exact || codec) of the next token, nats")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    figure.savefig(path)


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
