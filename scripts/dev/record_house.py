"""Records what the package does as a whole into tests/golden/house, or compares two commits on one machine.

    python scripts/dev/record_house.py configs runs checkpoints finders   # record these, with this checkout's code
    python scripts/dev/record_house.py configs --collect                  # look for configs in the tests anew before
    python scripts/dev/record_house.py --check --against ../before    # two checkouts answer, bit for bit alike or not

Both checkouts run the functions of this one's ``tests/house.py``, each in a process that imports its package by the
name in its ``pyproject.toml``. The other checkout writes the checkpoints, and both load them. Wording is not compared.
``versions.json`` names the commit and the libraries of each recording. The recorded checkpoints are those of an older
version, which must still load: do not record them again without need.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind the package that is asked

from scripts.dev.checkout import ROOT, environment_of
from tests import house

BATCH = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
KEYS = json.loads((ROOT / "tests" / "golden" / "deepspeed_keys.json").read_text())
TOP = {*KEYS["top"], "redline", "fp32_allreduce"}
VALUES = (True, 2, "auto", {})  # what each key is tried with
OPTIMIZERS = ("Adam", "SGD", "Adagrad", "Lamb", "Lion", "Muon")
SCHEDULES = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


# -- the configs ---------------------------------------------------------------------------------------------------


def collect() -> list[Any]:
    """All configs that files and tests hold as they are, and some for each of DeepSpeed's keys; of files the text."""
    found: list[Any] = [path.read_text() for folder in ("configs", "tests/engine/config/deepspeed")
             for path in sorted((ROOT / folder).glob("*.json")) if path.name != "schema.json"]  # fmt: skip
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        found += [_with_batch(each) for each in _literals(ast.parse(path.read_text()))]
    for key in (*KEYS["top"], *KEYS["nested"]):
        found += [_with_batch(each) for each in _of_key(key)]
    return list({json.dumps(each): each for each in found if _is_json(each)}.values())


def _literals(node: ast.AST) -> Iterator[dict[str, Any]]:
    """Literal configs: dicts with a key of DeepSpeed's, calls with such arguments, pairs of a key and its value."""
    value: Any = None
    if isinstance(node, ast.Dict):
        value = _evaluated(node)
    elif isinstance(node, ast.Call) and node.keywords and not node.args:
        value = {each.arg or "": _evaluated(each.value) for each in node.keywords}
    elif isinstance(node, ast.Tuple) and len(node.elts) >= 2:
        pair = [_evaluated(each) for each in node.elts[:2]]
        value = {pair[0]: pair[1]} if isinstance(pair[0], str) else None
    if isinstance(value, dict) and value.keys() & TOP and ... not in value.values():
        yield value
    else:
        for child in ast.iter_child_nodes(node):
            yield from _literals(child)


def _evaluated(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ...


def _of_key(key: str) -> Iterator[dict[str, Any]]:
    *above, name = key.split(".")
    types = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULES}.get(above[0] if above else "", ())
    if types and above[1:] == ["params"]:
        wanted = [type_ for type_ in types if above[0] == "optimizer" or _takes(type_, name)]
        for type_ in wanted:
            for value in VALUES[:3]:
                yield {above[0]: {"type": type_, "params": {name: value}}}
        return
    for value in VALUES:
        config: Any = {name: value}
        for section in reversed(above):
            config = {section: config}
        yield config


def _takes(schedule: str, name: str) -> bool:
    starts = {"LRRangeTest": ("lr_range",), "OneCycle": ("cycle", "decay")}.get(schedule, ("warmup", "total", "cos"))
    return name.startswith((*starts, "last"))


def _with_batch(config: dict[str, Any]) -> dict[str, Any]:
    return config if config.keys() & BATCH else {"train_batch_size": 8, **config}


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


# -- answers -------------------------------------------------------------------------------------------------------


def write_answers(output: Path, checkpoints: Path, kinds: Sequence[str] = ()) -> None:
    """One JSON file per kind of question, one line per answer."""
    output.mkdir(parents=True, exist_ok=True)
    for name, ask in house.ask_all(checkpoints).items():
        if not kinds or name in kinds:
            print(f"{name} ...", flush=True)
            (output / f"{name}.json").write_text(as_lines(ask()) + "\n")


def as_lines(value: Any, depth: int = 3) -> str:
    """JSON with the outer levels on lines of their own."""
    if depth == 0 or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value)
    if isinstance(value, dict):
        return (
            "{\n" + ",\n".join(f"{json.dumps(key)}: {as_lines(each, depth - 1)}" for key, each in value.items()) + "\n}"
        )
    return "[\n" + ",\n".join(as_lines(each, depth - 1) for each in value) + "\n]"


def record(kinds: Sequence[str], *, anew: bool) -> None:
    """Write these kinds of answers into tests/golden/house, and with which versions."""
    if anew or not house.ASKED.exists():
        house.ASKED.write_text(as_lines(collect(), 1) + "\n")
    with tempfile.TemporaryDirectory() as name:
        if "checkpoints" in kinds:
            house.save_checkpoints(Path(name))
            with tarfile.open(house.ARCHIVE, "w:xz") as archive:
                for folder in sorted(Path(name).iterdir()):
                    archive.add(folder, folder.name)
        write_answers(house.FOLDER, Path(name), kinds)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    here = {name: version(name) for name in ("torch", "numpy", "pydantic")} | {"python": platform.python_version()}
    here |= {"commit": commit, "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"}
    path = house.FOLDER / "versions.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(as_lines(known | dict.fromkeys(kinds, here), 1) + "\n")


# -- two checkouts -------------------------------------------------------------------------------------------------


def compare(old: Path) -> int:
    """Let both checkouts answer and print where they differ.

    Returns:
        1 where they differ, else 0.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, checkout in (("old", old), ("new", ROOT)):
            environment = environment_of(checkout, folder / f"{label} packages")
            script, out = str(Path(__file__).resolve()), str(folder / label)
            command = [sys.executable, script, "--output", out, "--checkpoints", str(folder / "checkpoints")]
            print(f"{checkout}, imported as {environment['REDLINE_PACKAGE']}:", flush=True)
            subprocess.run(command, env=environment, check=True)
        found = []
        for path in sorted((folder / "new").iterdir()):
            one, other = (json.loads((folder / label / path.name).read_text()) for label in ("old", "new"))
            found += [f"{path.stem}: {line}" for line in differences(one, other)]
    print("\n".join(found[:200]) or "bit for bit the same")
    return int(bool(found))


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where two JSON values differ; floats bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(each for each in other if each not in one)]:
            yield from differences(one.get(key, "(none)"), other.get(key, "(none)"), f"{path}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (left, right) in enumerate(zip(one, other)):
            yield from differences(left, right, f"{path}/{number}")
    elif json.dumps(one) != json.dumps(other):
        yield f"{path}: {json.dumps(one)[:150]} -> {json.dumps(other)[:150]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = list(house.ask_all(Path()))
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"what to record: {', '.join(kinds)}")
    parser.add_argument("--collect", action="store_true", help="look for the configs to ask about anew")
    parser.add_argument("--check", action="store_true", help="compare this checkout with another one")
    parser.add_argument("--against", type=Path, help="the other checkout, for --check")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)  # one side of a comparison
    parser.add_argument("--checkpoints", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check != bool(options.against):
        parser.error("--check and --against PATH_TO_OTHER_CHECKOUT go together")
    if options.check:
        sys.exit(compare(options.against))
    if options.output is None:
        if not options.kinds or not set(options.kinds) <= set(kinds):
            parser.error(f"say what to record: {', '.join(kinds)}")
        record(options.kinds, anew=options.collect)
        return
    if not options.checkpoints.exists():  # the old checkout is the first one
        house.save_checkpoints(options.checkpoints)
    write_answers(options.output, options.checkpoints)


if __name__ == "__main__":
    main()
