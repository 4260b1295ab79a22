"""Renew what is written from the code: traces of schedules, tables of config keys, the JSON Schema.

    python scripts/write_docs.py

In README.md, docs/schedules.md and docs/zero.md it rewrites the blocks between <!-- name --> and <!-- end -->;
docs/config.md and configs/schema.json it writes whole. Tests fail where one of them is not what the code says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import schedulers
from engine.config import build_schema
from engine.config.explain import STAGE_HEADS, reference
from engine.config.sections.zero import LETTERS, STAGES
from engine.config.support import HONOURED, KEYS, NO_EFFECT, REFUSED, Key

ROOT = Path(__file__).resolve().parent.parent
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
    """What a schedule writes into Adam for the first updates: DeepSpeed's values, then the corrected ones."""
    rows = []
    for kind in ("DeepSpeed", "corrected"):
        groups = _groups(getattr(schedulers, name), {**params, "corrected": kind == "corrected"}, steps)
        rows.append([f"LR, {kind}", *(f"{group['lr']:.3g}" for group in groups)])
        if momentum:
            rows.append([f"betas, {kind}", *("{:.3g}, {:.3g}".format(*group["betas"]) for group in groups)])
    given = ", ".join(f"{key}={value!r}" for key, value in params.items())
    return f"`{name}(optimizer, {given})`\n\n" + table(["update", *range(steps)], rows)


def _groups(schedule: Any, params: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The optimizer's group as each update finds it."""
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
        "warmup cosine": lambda: trace("WarmupCosineLR", {**total, **linear, "cos_min_ratio": 0.1}, 10),
    }


# -- config keys ---------------------------------------------------------------------------------------


def support() -> str:
    """README's table: every key of DeepSpeed under its status."""
    keys = list(KEYS.values())
    refused = [key for key in keys if key.status == REFUSED]
    later = [key for key in refused if key.note.startswith("not built yet")]
    removed = [key for key in refused if key.note.startswith("DeepSpeed has removed it")]
    rest = [key for key in refused if key not in later and key not in removed]
    rows = [
        ("honoured", [key for key in keys if key.status == HONOURED]),
        ("no effect: harmless here", [key for key in keys if key.status == NO_EFFECT]),
        ("refused: not built yet", later),
        ("refused: not planned", rest),
        ("refused: DeepSpeed itself has removed it", removed),
    ]
    return table(("status", "keys"), ((status, _named(group)) for status, group in rows))


def _named(keys: Iterable[Key]) -> str:
    return ", ".join(f"`{key.name}`" for key in keys)


def stages() -> str:
    """What each stage of ZeRO is here."""
    return f"{table(STAGE_HEADS, STAGES)}\n\n{LETTERS}"


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
