"""Draw docs/images/data.svg and block.svg, the diagrams of architecture.md: `python docs/pictures.py [FOLDER]`."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

matplotlib.rcParams |= {"svg.hashsalt": "diffussm", "font.family": "DejaVu Sans"}  # the same bytes each time
STORED, WORK, SHORT, FULL, GREY = "#d7e8f7", "#ffffff", "#e4e9d5", "#fbe3c8", "#555555"


class Canvas:
    """Boxes and arrows on a page of width × height units, ten to an inch."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure((width / 10, height / 10), facecolor="white")
        self._axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self._axes.set_axis_off()

    def box(self, x: float, y: float, text: str, colour: str = WORK, width: float = 20, height: float = 6) -> None:
        """Centred at (x, y)."""
        corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.8"
        self._axes.add_patch(
            FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor=GREY, linewidth=0.8)
        )
        self.text(x, y, text)

    def text(self, x: float, y: float, text: str, colour: str = "black", **options: object) -> None:
        options = {"ha": "center", "va": "center", "fontsize": 8.5, "linespacing": 1.35} | options
        self._axes.text(x, y, text, color=colour, **options)

    def arrow(self, *points: tuple[float, float]) -> None:
        """Along straight lines."""
        for start, end in pairwise(points):
            last = end == points[-1]
            style = {"arrowstyle": "-|>" if last else "-", "color": GREY, "shrinkA": 0, "shrinkB": 0}
            self._axes.annotate("", end, start, arrowprops=style)


def data() -> Figure:
    """From images to scores."""
    page = Canvas(104, 60)
    for y, title in ((56.5, "encode once"), (36.5, "train"), (14.5, "use")):
        page.text(3.5, y, title, GREY, ha="left", weight="bold")
    columns = (14, 39, 64, 89)

    def row(y: float, boxes: list[tuple[str, str]], height: float = 8) -> None:
        for x, (text, colour) in zip(columns, boxes, strict=True):
            page.box(x, y, text, colour, 21, height)
        for left, right in pairwise(columns):
            page.arrow((left + 10.5, y), (right - 10.5, y))

    row(50, [
        ("images\nfolder, LSUN, tars", STORED), ("autoencoder\nKL of diffusers, or pixels", WORK),
        ("moments\nmean and log-variance", WORK), ("tar shards, samples.npy,\nindex.json: disk or s3://", STORED),
    ])  # fmt: skip
    page.arrow((89, 46), (89, 42), (14, 42), (14, 34))
    row(30, [
        ("order of samples\nf(seed, epoch, step)", WORK), ("stream: ranges or cache,\ncrc32 of each sample", WORK),
        ("draws of f(seed, image):\nposterior, noise, t, label", WORK),
        ("DiffuSSM, hybrid loss,\nDeepSpeed ZeRO", WORK),
    ])  # fmt: skip
    page.arrow((89, 26), (89, 20), (14, 20), (14, 12))
    page.text(51.5, 21.5, "each rank's pieces of weights, Adam's moments and averages; the manifest last", GREY)
    row(8, [
        ("checkpoint\ncomplete, or invisible", STORED), ("sampler, guidance,\nautoencoder's decoder", WORK),
        ("samples.npz, grid.png", STORED), ("FID, sFID, IS, P, R\nscores.json", STORED),
    ])  # fmt: skip
    return page.figure


def block() -> Figure:
    """The network to the left, one block to the right."""
    page = Canvas(104, 96)
    left, right, side = 18, 66, 92
    page.text(left, 93, "the network", weight="bold")
    page.text((right + side) / 2 - 3, 93, "a block", weight="bold")

    network = [
        ("noisy latent  C×H×W", STORED), ("embed C→D, + position   L×D", FULL), ("fold M·D→D   J×D", SHORT),
        ("blocks   J×D\n29 of them at XL, each given\nc = embedding of t + of the class", SHORT),
        ("unfold D→M·D   L×D", FULL), ("adaLN(c), decode D→2C   L×2C", FULL), ("ε and v  2C×H×W", STORED),
    ]  # fmt: skip
    heights = [87, 76.5, 66, 50, 34, 23.5, 13]
    for y, (text, colour) in zip(heights, network, strict=True):
        page.box(left, y, text, colour, 27, 13 if text.startswith("blocks") else 6)
    for above, below in pairwise(heights):
        page.arrow((left, above - (6.5 if above == 50 else 3)), (left, below + (6.5 if below == 50 else 3)))

    steps = [
        ("residual stream", "J×D", SHORT), ("norm · (1 + scale(c)) + shift(c)", "I  J×D", SHORT),
        ("W0, GELU", "J×D", SHORT),
        ("W_up[k], GELU, interleave", "U  L×D", FULL), ("BiSSM: (K→ + K←) ∗ u + skip ∘ u, mix", "Y  L×D", FULL),
        ("W_down[k], GELU, concat over k", "I'  J×2D", SHORT), ("W2, GELU", "J×2D", SHORT), ("×", "J×2D", SHORT),
        ("W3, · gate(c)", "O  J×D", SHORT), ("+", "J×D", SHORT),
    ]  # fmt: skip
    ys = [87 - 8.6 * i for i in range(len(steps))]
    for y, (text, shape, colour) in zip(ys, steps, strict=True):
        narrow = text in "×+"
        page.box(right, y, text, colour, 6 if narrow else 32, 5)
        page.text(right - (4 if narrow else 17), y, shape, GREY, ha="right", fontsize=7.5)
    for above, below in pairwise(ys):
        page.arrow((right, above - 2.5), (right, below + 2.5))
    page.box(side, ys[6], "W1, GELU", SHORT, 14, 5)
    page.arrow((right + 16, ys[1]), (side, ys[1]), (side, ys[6] + 2.5))
    page.arrow((side, ys[6] - 2.5), (side, ys[7]), (right + 3, ys[7]))
    page.arrow((right + 16, ys[0]), (102, ys[0]), (102, ys[9]), (right + 3, ys[9]))
    page.box(10, 3.5, "length J = L/M", SHORT, 14, 3.6)
    page.box(26, 3.5, "full length L", FULL, 14, 3.6)
    return page.figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("images")
    for draw in (data, block):
        draw().savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})
