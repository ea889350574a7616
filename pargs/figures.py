"""What figures share: colours, axes, and how they are saved."""

from pathlib import Path
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pargs.files import write_whole

PALETTE = [
    *("#9a6fb0", "#3f8fd2", "#1f5fa8", "#d98b2b", "#b0a03a", "#3a9d78", "#c8553d"),
    *("#6b5bd0", "#2aa0a4", "#b8487c", "#7a5c3e", "#5f8f2f"),
]
GREY = "#777777"
EDGE = {"markeredgecolor": "white", "markeredgewidth": 1.2}  # a dot stands out from what is behind it


def style_axes(
    axes: Axes, title: str, label: str = "", grid: Literal["x", "y"] = "y", pad: float = 6
) -> None:
    axes.set_title(title, loc="left", fontweight="bold", pad=pad)
    axes.set_xlabel(label)
    axes.grid(axis=grid, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a .png and a .pdf."""
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # text stays text
        png, pdf = path.with_suffix(".png"), path.with_suffix(".pdf")
        write_whole(png, lambda beside: figure.savefig(beside, format="png", dpi=200))
        # No date inside: the same numbers make the same file.
        undated = {"format": "pdf", "metadata": {"CreationDate": None}}
        write_whole(pdf, lambda beside: figure.savefig(beside, **undated))
