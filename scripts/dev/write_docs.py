"""Rewrite the documentation that is generated from the code: traces of schedules, tables of config keys, JSON Schema.

    python scripts/dev/write_docs.py

In README.md, docs/schedules.md and docs/zero.md it rewrites the blocks between <!-- name --> and <!-- end -->;
docs/config.md and configs/schema.json are written completely. Tests fail if one of them is not up to date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from redline import schedulers
from redline.config import build_schema
from redline.config.explain import STAGE_HEADS, Entry, catalog, top_keys
from redline.config.schema import section_of, whole_schema
from redline.config.section import HONOURED, NO_EFFECT, REFUSED
from redline.config.zero import LETTERS, STAGES

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("README.md", "docs/schedules.md", "docs/zero.md")
_BLOCK = re.compile(r"<!-- (?P<name>[a-z][a-z0-9_ ]*) -->\n.*?<!-- end -->", re.DOTALL)


def render(text: str) -> str:
    """A document with its blocks as the code is now."""
    return _BLOCK.sub(lambda block: f"<!-- {block['name']} -->\n\n{BLOCKS[block['name']]()}\n\n<!-- end -->", text)


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Markdown's table; a bar within a cell is escaped."""
    lines = [list(map(str, row)) for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# -- schedules -----------------------------------------------------------------------------------------


def trace(name: str, params: dict[str, Any], steps: int, *, momentum: bool = False) -> str:
    """What a schedule sets for Adam in the first steps: DeepSpeed's values, then the corrected ones."""
    rows = []
    for kind in ("DeepSpeed", "corrected"):
        groups = _groups(getattr(schedulers, name), {**params, "corrected": kind == "corrected"}, steps)
        rows.append([f"LR, {kind}", *(f"{group['lr']:.3g}" for group in groups)])
        if momentum:
            rows.append([f"betas, {kind}", *("{:.3g}, {:.3g}".format(*group["betas"]) for group in groups)])
    given = ", ".join(f"{key}={value!r}" for key, value in params.items())
    return f"`{name}(optimizer, {given})`\n\n" + table(["step", *range(steps)], rows)


def _groups(schedule: Any, params: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The optimizer's group as each step finds it."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.1, betas=(0.9, 0.95))
    moving = schedule(optimizer, **params)
    groups = []
    for _ in range(steps):
        groups.append(dict(optimizer.param_groups[0]))
        moving.step()
    return groups


def traces() -> dict[str, Callable[[], str]]:
    test = {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 5.0}
    cycle = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.05, "cycle_first_step_size": 4}
    decay = {"decay_lr_rate": 1.0, "decay_mom_rate": 0.02}
    short = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.05, "cycle_first_step_size": 2}
    warm = {"warmup_max_lr": 0.1, "warmup_num_steps": 4}
    linear = {"warmup_num_steps": 4, "warmup_type": "linear"}
    total = {"total_num_steps": 8}
    return {
        "range test": lambda: trace("LRRangeTest", test, 7),
        "range test in stairs": lambda: trace("LRRangeTest", {**test, "lr_range_test_staircase": True}, 7),
        "range test by powers": lambda: trace("LRRangeTest", {**test, "growth": "exponential"}, 7),
        "one cycle": lambda: trace("OneCycle", cycle, 11, momentum=True),
        "one cycle in stairs": lambda: trace("OneCycle", {**cycle, "cycle_first_stair_count": 2}, 11),
        "one cycle with a decay": lambda: trace("OneCycle", {**short, **decay, "decay_step_size": 1}, 9, momentum=True),
        "one cycle with a rate only": lambda: trace("OneCycle", {**short, "decay_lr_rate": 1.0}, 9),
        "warmup": lambda: trace("WarmupLR", {**warm, "warmup_type": "linear"}, 8),
        "warmup log": lambda: trace("WarmupLR", warm, 8),
        "warmup decay": lambda: trace("WarmupDecayLR", {**total, "warmup_max_lr": 0.1, **linear}, 10),
        "warmup stable decay": lambda: trace(
            "WarmupStableDecayLR", {**total, "decay_num_steps": 3, "warmup_max_lr": 0.1, **linear}, 10
        ),
        "warmup cosine": lambda: trace("WarmupCosineLR", {**total, **linear, "cos_min_ratio": 0.1}, 10),
    }


# -- config keys ---------------------------------------------------------------------------------------


def support() -> str:
    """README's table: every key of DeepSpeed under its status."""
    keys = top_keys()
    refused = [key for key in keys if key.status == REFUSED]
    later = [key for key in refused if key.note.startswith("not built yet")]
    removed = [key for key in refused if key.note.startswith("DeepSpeed has removed it")]
    rest = [key for key in refused if key not in later and key not in removed]
    rows = [
        (HONOURED, [key for key in keys if key.status == HONOURED]),
        (f"{NO_EFFECT}: harmless here", [key for key in keys if key.status == NO_EFFECT]),
        (f"{REFUSED}: not built yet", later),
        (f"{REFUSED}: not planned", rest),
        (f"{REFUSED}: removed by DeepSpeed, too", removed),
    ]
    return table(("status", "keys"), ((status, _named(group)) for status, group in rows))


def _named(keys: Iterable[Entry]) -> str:
    return ", ".join(f"`{key.path}`" for key in keys)


def stages() -> str:
    """What each stage of ZeRO is here."""
    return f"{table(STAGE_HEADS, STAGES)}\n\n{LETTERS}"


# -- docs/config.md --------------------------------------------------------------------------------------

_INTRODUCTION = """\
# Keys of the config

<!-- Written by scripts/dev/write_docs.py from the models; do not edit. -->

To look up one key, run `redline explain KEY`; to check a config, `redline validate CONFIG`.

The config is DeepSpeed's JSON: the same keys, nesting, defaults and spelling. Each key of DeepSpeed 0.19.8 is
**honoured**, has **no effect** (harmless here; the reason is given), or is **refused** (it would change training and is
not implemented; an alternative is given). A refused section that is disabled is accepted. Any other key is an error,
unless it starts with `_` or `//`, which marks a comment. 1 and 0 are true and false, and a file that is
no JSON is read as Hjson, which needs `pip install 'redline[hjson]'`; its errors have no lines.

## "auto"

Hugging Face's integration lets a config say `"auto"` and fills it in from the script's arguments. Where it was not
filled in, it becomes the following; anywhere else it is an error. `redline validate --effective CONFIG` shows the
values in force, with `auto` as their origin.

| key | becomes |
|---|---|
"""


def reference() -> str:
    """docs/config.md: all keys."""
    lines = [f"| {_code(path)} | {auto} |" for path, auto in _autos()]
    sections = [_INTRODUCTION + "\n".join(lines)]
    sections.append("## Top level\n\n" + _markdown([(entry, entry.path) for entry in top_keys()]))
    for top in top_keys():
        inside = [entry for entry in catalog().values() if entry.key.startswith(f"{top.path}.")]
        if inside:
            note = f": {top.note}" if top.note else ""
            text = f"## {top.path}\n\n{top.meaning} {top.status.capitalize()}{note}.\n\n"
            sections.append(text + _markdown([(entry, entry.path.removeprefix(f"{top.path}.")) for entry in inside]))
    return "\n\n".join(sections) + "\n"


def _autos() -> Iterator[tuple[str, str]]:
    """Keys that may be "auto"; a whole section that may comes as one row."""
    schema = whole_schema()
    whole = {name for name, key in schema["properties"].items() if "*" in (section_of(key) or {}).get("auto", {})}
    whole |= {alias for alias, name in schema["aliases"].items() if name in whole}
    seen = set()
    for entry in catalog().values():
        top = entry.key.partition(".")[0]
        if entry.auto and top not in whole and not entry.meaning.startswith("Another spelling"):
            yield entry.path, entry.auto
        elif entry.auto and top in whole and top not in seen:
            seen.add(top)
            yield f"{top}.*", entry.auto


def _markdown(rows: list[tuple[Entry, str]]) -> str:
    lines = ["| key | values | default | status | meaning |", "|---|---|---|---|---|"]
    for entry, name in rows:
        meaning = entry.meaning + (f" {entry.note[0].upper()}{entry.note[1:]}." if entry.note else "")
        default = _code(entry.default) if entry.default else "required"
        lines.append(f"| {_code(name)} | {_cell(entry.values)} | {default} | {entry.status} | {_cell(meaning)} |")
    return "\n".join(lines)


def _code(text: str) -> str:
    path, _, types = text.partition(" (") if text[:1].isalpha() else (text, "", "")
    return f"`{path}`" + (f" ({types}" if types else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


BLOCKS: dict[str, Callable[[], str]] = {
    **traces(),
    "support": support,
    "stages": stages,
}


def main() -> None:
    for name in FILES:
        path = ROOT / name
        path.write_text(render(path.read_text()))
    (ROOT / "docs" / "config.md").write_text(reference())
    (ROOT / "configs" / "schema.json").write_text(json.dumps(build_schema(), indent=2) + "\n")


if __name__ == "__main__":
    main()
