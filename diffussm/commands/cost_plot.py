"""The picture of `tools/count_flops.py --plot`: MACs by resolution, and those of one model by part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffussm.commands import costs
from diffussm.errors import needs
from diffussm.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"DiffuSSM-XL": "#1f5fa8", "DiT-XL/1": "#c0392b", "DiT-XL/2": "#c77700"}
OTHER_PRESETS = "#9db4cf"
LIFTS = {"DiT-XL/2": 7, "DiffuSSM-L": -4}  # points, of names at lines' ends that would overlap
MARKERS = {"paper: total ÷ images": "o", "paper: formula": "D", "DiT's paper": "o"}
TICKS = (128, 256, 512, 1024, 2048)  # px
PARTS = {  # in the order of the forward pass: the hourglass blue, the state space layer green, the rest grey
    "ends": "#c4c4c4",
    "conditioning": "#aaaaaa",
    "adaLN": "#dcdcdc",
    "W0": "#4e9acb",
    "W_up": "#68aad6",
    "SSM kernel": "#3fa75c",
    "SSM FFT": "#6cc07a",
    "SSM mix": "#98d594",
    "W_down": "#84bbe0",
    "W1": "#9dcae7",
    "W2": "#b8d9ef",
    "W3": "#d2e7f5",
}


def save_plot(path: Path, report: dict[str, Any]) -> None:
    """Draw the report of `tools/count_flops.py` as a PNG, written atomically."""
    with needs("--plot", "plot"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 6.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.9, 1])
    draw_sizes(left, report)
    draw_parts(right, report["by_part"])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_sizes(axes: Axes, report: dict[str, Any]) -> None:
    """GMACs of an image by its resolution, log-log, with the published figures."""
    sides = range(TICKS[0], TICKS[-1] + 1, 16)
    for model in costs.MODELS:
        gmacs = [costs.image_macs(model, side) / 1e9 for side in sides]
        color, width = COLORS.get(model, OTHER_PRESETS), 2.6 if model in COLORS else 1.3
        axes.loglog(sides, gmacs, color=color, linewidth=width)
        note(axes, model, (sides[-1], gmacs[-1]), (6, LIFTS.get(model, 0)), color, va="center")
    for row in report["published"]:
        if row["px"]:
            label = f"{row['model']}, {row['source']}" if row["px"] == 256 else None
            style = {"facecolor": "white", "edgecolor": COLORS[row["model"]], "linewidth": 1.6, "zorder": 3}
            axes.scatter(row["px"], row["published"] / 1e9, 42, marker=MARKERS[row["source"]], label=label, **style)
    for dit, offset, side in (("DiT-XL/1", (-6, 6), "right"), ("DiT-XL/2", (7, -13), "left")):
        for px, ratio in report["against_dit"]["macs_over_diffussm_xl"][dit].items():
            point = int(px), costs.image_macs(dit, int(px)) / 1e9
            of = " DiffuSSM-XL" if int(px) == costs.PIXELS[0] else ""
            note(axes, f"{ratio:.2f}×{of}", point, offset, COLORS[dit], ha=side)
    crossing = report["against_dit"]["dit_xl_2_does_more_from_px"]
    point = crossing, costs.image_macs("DiT-XL/2", crossing) / 1e9
    note(axes, f"equal near\n{crossing:,} px", point, (-18, 14), "#444444", ha="center", arrowprops={"arrowstyle": "-"})

    axes.set_title("MACs of one forward pass of one image", loc="left", fontweight="bold")
    axes.set_xticks(TICKS, [f"{px}\n{(px // 8) ** 2:,}" for px in TICKS])
    axes.minorticks_off()
    axes.set_xlabel("side of the image in pixels; below, tokens (of DiT-XL/2: a quarter)")
    axes.set_ylabel("GMACs (GFLOPs are twice as many)")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="published", loc="upper left", frameon=False, alignment="left")


def draw_parts(axes: Axes, model: dict[str, Any]) -> None:
    """Two stacked bars, MACs and parameters, with the parts' names between them."""
    rows = {row["part"]: row for row in model["parts"]}
    heights = {part: 1 - (index + 0.5) / len(PARTS) for index, part in enumerate(PARTS)}
    for part, height in heights.items():
        axes.text(1.5, height, part, ha="center", va="center")
    for key, x, towards_names in (("macs", 0, 1), ("parameters", 3, -1)):
        bottom = 1.0
        for part, color in PARTS.items():
            share = rows[part][key] / model["total"][key]
            bottom -= share
            axes.bar(x, share, 1, bottom=bottom, color=color, edgecolor="white", linewidth=0.6)
            if share > 0:
                ends = [x + 0.5 * towards_names, x + 0.95 * towards_names]
                axes.plot(ends, [bottom + share / 2, heights[part]], color="#c4c4c4", linewidth=0.8)
            if share >= 0.03:
                axes.text(x, bottom + share / 2, f"{share:.0%}", ha="center", va="center")
    macs, parameters = model["total"]["macs"], model["total"]["parameters"]
    macs = f"{macs / 1e9:,.1f} G" if macs >= 1e10 else f"{macs / 1e6:,.1f} M"
    axes.set_xticks([0, 3], [f"{macs}\nMACs", f"{parameters / 1e6:,.1f} M\nparameters"])
    axes.set_xlabel("without what a batch shares")
    latent = "×".join(map(str, model["latent"]))
    axes.set_title(f"{model['model']} by part, latent {latent}", loc="left", fontweight="bold")
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def note(axes: Axes, text: str, point: tuple[float, float], offset: tuple[int, int], color: str, **style: Any) -> None:
    """Text beside a point, ``offset`` from it in points of type."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.annotate(text, point, offset, textcoords="offset points", color=color, bbox=box, **style)
