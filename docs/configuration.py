"""Write docs/configuration.md, every key of a run, from the dataclasses: `python docs/configuration.py [FILE]`."""

from __future__ import annotations

import sys
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml

from diffussm.config import CONFIGS, Config, config_names
from diffussm.models.diffussm import PRESETS

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Configuration: every key

A run is configured by a YAML file, `--config FILE`, or by the name of one that comes with the package (below). Any
key can also be given on the command line, by its dotted name: `--train.lr 2e-4`. A key that is unknown, or a value
that cannot be, is refused before anything is allocated, in one line that names the key and what would do. What was
used is kept in the run's folder, in `config.yaml` and `ds_config.json`.

DeepSpeed's own file, `--deepspeed ds_configs/zero2.json`, holds DeepSpeed's own keys only. Batch sizes, clipping and
precision are `auto` there: they come from here, and a file that contradicts is refused.

(This page is made from the code: `python docs/configuration.py`.)
"""


def page() -> str:
    sections = [HEAD]
    for field in fields(Config):
        cls = get_type_hints(Config)[field.name]
        if is_dataclass(cls):
            sections.append(f"## `{field.name}`\n\n{summary(cls)}\n\n" + keys_table(cls, f"{field.name}."))
        else:
            sections.append("## The run\n\n" + keys_table(Config, "", only=field.name))
    return "\n".join([*sections, presets(), shipped()])


def keys_table(cls: type, prefix: str, only: str | None = None) -> str:
    hints, meanings = (
        get_type_hints(cls),
        {p.arg_name: p.description for p in docstring_parser.parse(cls.__doc__).params},
    )
    rows = [
        (
            f"`{prefix}{f.name}`",
            kind(hints[f.name]),
            value(f.default),
            " ".join(meanings[f.name].split()).replace("``", "`"),
        )
        for f in fields(cls)
        if only in (None, f.name)
    ]
    return table(("key", "type", "default", "meaning"), rows)


def summary(cls: type) -> str:
    """What the class says of itself before its attributes."""
    text = docstring_parser.parse(cls.__doc__)
    return " ".join(" ".join(filter(None, (text.short_description, text.long_description))).split())


def kind(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(kind(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) in (list, tuple):
        inner = [kind(part) for part in get_args(hint)]
        return f"list of {inner[0]}s" if get_origin(hint) is list else f"[{', '.join(inner)}]"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true, false"}[hint.__name__]


def value(setting: Any) -> str:
    """As YAML has it."""
    if isinstance(setting, int) and not isinstance(setting, bool):
        return f"`{setting:_}`" if setting >= 10_000 else f"`{setting}`"
    plain = list(setting) if isinstance(setting, tuple) else setting
    return f"`{yaml.safe_dump(plain, default_flow_style=True).splitlines()[0]}`"


def presets() -> str:
    rows = [(f"`{name}`", f"{width:,}", str(depth)) for name, (width, depth) in PRESETS.items()]
    return "## Sizes\n\n" + table(("`model.preset`", "width", "depth"), rows)


def shipped() -> str:
    """What the package's own configurations set."""
    settings = {name: flat(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())) for name in config_names()}
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    rows = [
        (f"`{key}`", *(value(values[key]) if key in values else "" for values in settings.values())) for key in keys
    ]
    text = "## The configurations that come with the package\n\nAn empty cell is the default.\n\n"
    return text + table(("key", *(f"`{name}`" for name in settings)), rows)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs = {}
    for key, item in values.items():
        pairs |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return pairs


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page())
