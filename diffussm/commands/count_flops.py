"""Count parameters, MACs and FLOPs by formula: `tools/count_flops.py`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from diffussm.commands import costs
from diffussm.commands.common import Parser, emit_json, latent_shape
from diffussm.config import config_names, parse
from diffussm.errors import UserError
from diffussm.models.diffussm import PRESETS, ModelConfig


def main() -> None:
    arguments = parse_arguments()
    name, config = f"DiffuSSM-{arguments.preset}", ModelConfig(arguments.preset)
    if arguments.config:
        name, config = arguments.config, parse(["--config", arguments.config]).config.model
    side = (arguments.px or 256) // 8
    _, height, width = latent = arguments.latent or (costs.CHANNELS, side, side)
    if height * width % config.hourglass:
        raise UserError(f"{height}×{width} positions are not a multiple of model.hourglass {config.hourglass}")
    report = {
        "counted": "one forward pass of one image; flops = 2 × macs",
        "sizes": costs.sizes(),
        "against_dit": costs.against_dit(),
        "published": costs.published(),
        "by_part": costs.by_part(name, config, latent, arguments.classes, arguments.batch),
    }
    if arguments.plot:
        from diffussm.commands.cost_plot import save_plot  # loads matplotlib, which is optional

        save_plot(arguments.plot, report)
    if arguments.json != "-":
        print_sizes(report["sizes"], report["against_dit"])
        print_published(report["published"])
        print_parts(report["by_part"])
    emit_json(arguments.json, report)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "Parameters, MACs and FLOPs by formula: of every preset and of DiT-XL at 256, 512 and 1024 px; the published "
        "figures beside ours; then one model by part.",
        "python tools/count_flops.py --config fashion32 --latent 4x16x16 --classes 10 --plot cost.png",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", default="XL", choices=PRESETS, help="the model counted by part (default: XL)")
    model.add_argument("--config", metavar="FILE", help=f"or that of a YAML file, or of {', '.join(config_names())}")
    latent = parser.add_mutually_exclusive_group()
    latent.add_argument("--px", type=pixels, metavar="N", help="its images: latents 4×N/8×N/8 (a preset: 256)")
    latent.add_argument("--latent", type=latent_shape, metavar="CxHxW", help="or the shape of its latents")
    parser.add_argument("--classes", type=int, default=1000, metavar="N", help="0: unconditional (default: 1000)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images a forward pass (default: 32)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the figures")
    parser.add_json_option()
    arguments = parser.parse_args()
    if arguments.config and not (arguments.px or arguments.latent):
        parser.error("--config does not say the latent's shape: add --px or --latent")
    if arguments.classes < 0 or arguments.batch < 1:
        parser.error("--classes must be at least 0, and --batch at least 1")
    if arguments.plot and arguments.plot.suffix != ".png":
        parser.error(f"--plot {arguments.plot} must end in .png")
    return arguments


def pixels(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text) or int(text) % 8:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 8 such as 512")
    return int(text)


def print_sizes(rows: list[dict[str, Any]], against: dict[str, Any]) -> None:
    print("MACs of one forward pass of one image; FLOPs = 2 × MACs. The papers' Gflops are GMACs.")
    print("Latents are 4 × px/8 × px/8, classes 1000. DiT-XL/1 has as many tokens as DiffuSSM, DiT-XL/2 a quarter.")
    print(f"\n{'':25}", *(f"{f'{px} px':>19}" for px in costs.PIXELS))
    print(f"{'model':12}{'parameters':>13}", *[f"{'GMACs':>9} {'GFLOPs':>9}"] * len(costs.PIXELS))
    for model in costs.MODELS:
        mine = [row for row in rows if row["model"] == model]
        cells = [f"{row['macs'] / 1e9:9,.1f} {row['flops'] / 1e9:9,.1f}" for row in mine]
        print(f"{model:12}{mine[0]['parameters'] / 1e6:11,.1f} M", *cells)
    for model, ratios in against["macs_over_diffussm_xl"].items():
        print(f"{model + ' ÷ DiffuSSM-XL':25}", *(f"{ratio:18.2f}×" for ratio in ratios.values()))
    print("DiffuSSM-XL does fewer MACs than attention on the same tokens, DiT-XL/1. DiT-XL/2 does fewer than both:")
    px = against["dit_xl_2_does_more_from_px"]
    print(f"it runs on a quarter of the tokens. From {px:,} px it does more than DiffuSSM-XL.")


def print_published(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'published figures beside ours':55} {'published':>9} {'ours':>9}  difference")
    for row in rows:
        name = f"{row['model']} {row['px']} px" if row["px"] else row["model"]
        unit, scale = ("GMACs", 1e9) if row["px"] else ("M parameters", 1e6)
        figures = f"{row['published'] / scale:9,.1f} {row['ours'] / scale:9,.1f}"
        print(f"{name:20}{row['source']:23}{unit:12} {figures} {row['difference_percent']:+9.1f} %")
    print("Total ÷ images: the paper's Gflops of a whole training by the images it saw. Formula: 7.5 L D² a block,")
    print("its Ws and SSM mix, for which ours has the same; ours adds the FFT, adaLN, conditioning and ends.")


def print_parts(model: dict[str, Any]) -> None:
    total = model["total"]
    unit, prefix = (1e9, "G") if total["macs"] >= 1e10 else (1e6, "M")
    sizes = ", ".join(f"{key} {value}" for key, value in model["config"].items() if key != "preset")
    latent = "×".join(map(str, model["latent"]))
    print(f"\n{model['model']} by part: {sizes}; latent {latent}, classes {model['classes']}")
    print(f"{'part':12}{'parameters':>13}{prefix + 'MACs':>10}{prefix + 'FLOPs':>10}   of MACs")
    for row in [*model["parts"], {"part": "total", **total}]:
        figures = f"{row['macs'] / unit:10,.2f}{row['flops'] / unit:10,.2f}{row['macs'] / total['macs']:10.1%}"
        print(f"{row['part']:12}{row['parameters']:13,}{'     below' if row['part'] == 'SSM kernel' else figures}")
    shared = [(row, "once a batch") for row in model["once_a_batch"]]
    for row, per in [*shared, ({"part": "as run, an image", **model["run_an_image"]}, f"at batch {model['batch']}")]:
        print(f"{row['part']:25}{row['macs'] / unit:10,.2f}{row['flops'] / unit:10,.2f}   {per}")
    print("Evaluation keeps the kernels: none after its first batch. A batch of more than 2 × width positions")
    print("multiplies the SSM mix into W_down, and not each position with it.")
