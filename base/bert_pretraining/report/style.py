"""Colours and line styles of pictures, light and dark, that colour-blind readers can tell apart."""

from __future__ import annotations

from dataclasses import dataclass

FIGURE_INCHES = (11.6, 4.2)
DOTS_PER_INCH = 140
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINE_STYLES = ("-", (0, (6, 2)), (0, (1, 1.2)))  # the next style when the colours are used up


@dataclass(frozen=True)
class Theme:
    """Colours of a picture.

    `series` starts from Okabe and Ito's set; a test holds every pair apart for readers who do
    not see red or green, and every colour to enough contrast.
    """

    name: str
    background: str
    text: str
    muted: str
    grid: str
    target: str
    reference: str
    series: tuple[str, ...]


LIGHT = Theme(
    name="light",
    background="#ffffff",
    text="#1c2128",
    muted="#59636e",
    grid="#e2e6ea",
    target="#1c2128",
    reference="#8a8f98",
    series=("#0072b2", "#d55e00", "#009e73", "#d4679f", "#3b1e78", "#5c4400"),
)
DARK = Theme(
    name="dark",
    background="#151a21",
    text="#e6eaef",
    muted="#9aa5b1",
    grid="#2b333d",
    target="#e6eaef",
    reference="#8f98a3",
    series=("#56b4e9", "#ff8c4d", "#2fc79b", "#d96bb0", "#f5e663", "#f5f7fa"),
)


def settings(theme: Theme) -> dict[str, object]:
    """matplotlib's settings for a theme."""
    return {
        "font.size": 11,
        "font.family": "DejaVu Sans",
        "axes.titlesize": 12.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": 11,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.text,
        "axes.edgecolor": theme.reference,
        "axes.facecolor": theme.background,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.xmargin": 0.02,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "grid.color": theme.grid,
        "grid.linewidth": 0.9,
        "text.color": theme.text,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 10.5,
        "ytick.labelsize": 10.5,
        "legend.frameon": False,
        "legend.fontsize": 10.5,
        "lines.solid_capstyle": "round",
        "text.parse_math": False,  # names of runs may have dollar signs
    }
