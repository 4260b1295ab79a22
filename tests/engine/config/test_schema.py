"""The JSON Schema: fresh, sound, and of one mind with the loader."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from redline import initialize
from redline.config import EngineConfig, OptimizerConfig, SchedulerConfig, build_schema, load_config
from redline.config.schema import section_of, whole_schema
from redline.errors import ConfigError, EngineError

RUNS = int(os.environ.get("REDLINE_MUTATED_CONFIGS", "200"))  # 20000 for a long look
CONFIGS = Path(__file__).parents[3] / "configs"
SCHEMA = build_schema()
EDITOR = Draft202012Validator(SCHEMA)


def judge(source: Any) -> list[str]:
    try:
        load_config(source)
    except ConfigError as error:
        return [problem.message for problem in error.problems]
    return []


def sections(properties: dict[str, Any]) -> dict[str, Any]:
    """Sections with a value for each of their keys."""
    found = {name: section_of(key) for name, key in properties.items() if name not in ("optimizer", "scheduler")}
    return {
        name: {key: each["default"] for key, each in section["properties"].items() if "default" in each}
        for name, section in found.items()
        if section is not None
    }


# Sound values for many keys, so that a change of one breaks nothing but that key.
KEYS = whole_schema()["properties"]
OURS = sections({name: key for name, key in KEYS.items() if name in EngineConfig.model_fields})
OURS["zero_optimization"] |= {"stage": 0, "offload_optimizer": {"device": "cpu", "ratio": 1}, "prefetch_bucket_size": 1}
del OURS["zero_optimization"]["stage3_prefetch_bucket_size"]
OURS["compile"] = {"deepcompile": False, "passes": ["z1"]}  # with a backend it would compile
OTHERS = sections({name: key for name, key in KEYS.items() if name not in EngineConfig.model_fields})
OTHERS["weight_quantization"] = {"enabled": False}
OTHERS["data_efficiency"]["data_sampling"] = {
    "curriculum_learning": {"enabled": False, "curriculum_metrics": {"seqlen": {"schedule_type": "fixed_linear"}}}
}
ADAMW = {"type": "adamw", "params": {"lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 0, "torch_adam": True}}
SCHEDULES: list[dict[str, Any]] = [
    {"lr_range_test_min_lr": [0.1, 0.2], "lr_range_test_step_size": 3, "lr_range_test_staircase": True},
    {"cycle_min_lr": 0, "cycle_max_lr": 1e308, "cycle_first_step_size": 2, "decay_lr_rate": 1, "cycle_momentum": False},
    {"warmup_min_lr": 0, "warmup_max_lr": [1e308], "warmup_type": "log"},
    {"total_num_steps": 10**30, "warmup_num_steps": 3, "warmup_max_lr": None},
    {"total_num_steps": 10**30, "warmup_min_ratio": 0.5, "cos_min_ratio": 1},
]
BASE = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": None, "optimizer": ADAMW}
FLAT = {"gradient_clipping": "auto", "steps_per_print": 10, "sparse_gradients": False, "sequence_parallel_size": 1.0}
BASES: list[dict[str, Any]] = [
    *({**BASE, "scheduler": {"type": name, "params": each}} for name, each in zip(SchedulerConfig.models, SCHEDULES)),
    {
        **BASE,
        **FLAT,
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "amp": {"enabled": False},
        "aio": {"thread_count": 1},
    },
    {**BASE, **OURS},
    {**BASE, **OTHERS},
    {**BASE, "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.5}}},
]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, 1, 0.5, 2e3, 1e308, "", "auto", "1", "fp32", "mean", "linear", "Lion", "deepspeed"]),
    st.text(max_size=5),
)
NAMES = st.sampled_from(
    ["enabled", "stage", "device", "seed", "offload_param", "type", "params", "lr", "_x", "//", "x", "load_universal"]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=4
)


def places(value: Any, route: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if route:
        yield route
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*route, key))


@st.composite
def mutated(draw: st.DrawFn, changes: int = 1) -> dict[str, Any]:
    """A sound config with some of its keys given another value, renamed, removed or joined by a new one."""
    config: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(BASES)))
    for _ in range(changes):
        *way, key = draw(st.sampled_from(list(places(config)) or [("x",)]))
        holder: Any = config
        for part in way:
            holder = holder[part]
        change = draw(st.sampled_from(["set", "set", "set", "remove", "rename", "comment", "add"]))
        if change == "set" or not isinstance(holder, dict):
            holder[key] = draw(VALUES)
        elif change == "add":
            holder[draw(NAMES | st.text(max_size=4))] = draw(VALUES)
        else:
            value = holder.pop(key, None)
            if change != "remove":
                holder[f"{key}x" if change == "rename" else f"_{key}"] = value
    return config


@pytest.mark.skipif(
    not pydantic.VERSION.startswith("2.14."), reason="another pydantic may write the same schema in other words"
)
def test_the_schema_in_the_repository_is_fresh() -> None:
    assert json.loads((CONFIGS / "schema.json").read_text()) == SCHEMA, "python scripts/dev/write_docs.py"


def test_the_schema_is_a_schema_and_knows_every_base() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    for base in BASES:
        assert judge(base) == []
        EDITOR.validate(base)


def test_another_editors_schema_checker_agrees(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    wrong = [
        {**BASES[0], "fp16": {"enabled": 3}},
        {**BASES[0], "zero_optimization": {"stage": 2, "legacy_stage1": True}},
    ]
    files = {str(tmp_path / f"config_{index}.json"): config for index, config in enumerate([*BASES, *wrong])}
    for name, config in files.items():
        Path(name).write_text(json.dumps(config))
    command = [sys.executable, "-m", "check_jsonschema", "--schemafile", str(schema), "-o", "json", *files]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert {error["filename"] for error in answer["errors"]} == set(list(files)[-len(wrong) :])


def test_every_setting_has_a_type_and_a_description() -> None:
    for holder in [SCHEMA, *SCHEMA["$defs"].values()]:
        for name, setting in holder["properties"].items():
            assert setting.get("description", "").endswith("."), name
            assert name == "$schema" or setting.keys() & {"type", "anyOf", "enum", "const", "$ref"}, name


# What no schema can tell: rules across keys, and names that torch or a script knows.
BEYOND_A_SCHEMA = (
    "expected at most", "expected a multiple of", "give train_batch_size", "one per parameter group",
    "given next to", " with it", "got true with", "or max_tokens", "or curriculum_metrics", "expected true, or stage",
    "or stage 3", "or zero_optimization.stage", "with zero_optimization", "with compile", "the scale is dynamic",
    "take one of the two", "or stage 1, 2 or 3", "expected a divisor of", "see redline.zero.accumulate",
    "fills in and nothing here can; give train", "no momentum to cycle", "inside itself", "nested deeper",
)  # fmt: skip


@settings(max_examples=RUNS, deadline=None, database=None)
@given(mutated())
def test_an_editor_and_the_loader_agree_on_any_single_change(config: dict[str, Any]) -> None:
    known = {"optimizer": ("adamw", *OptimizerConfig.models), "scheduler": tuple(SchedulerConfig.models)}
    for name, types in known.items():
        kind = config.get(name)
        if isinstance(kind, dict) and kind.get("type") not in types:
            config = {**config, name: None}  # another class: its parameters are beyond a schema
    messages = judge(config)
    if not any(beyond in message for beyond in BEYOND_A_SCHEMA for message in messages):
        assert EDITOR.is_valid(config) == (not messages), messages


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # if it compiles
@settings(max_examples=RUNS, deadline=None, database=None)
@given(mutated(changes=3))
def test_a_mutated_config_makes_an_engine_or_is_a_config_error(config: dict[str, Any]) -> None:
    assert sorted(judge(json.dumps(config))) == sorted(judge(config))
    try:
        loaded = load_config(config)
        engine = initialize(torch.nn.Linear(2, 2), loaded, device="cpu")
    except EngineError:
        return
    assert engine.train_batch_size() == loaded.train_batch_size


@settings(max_examples=RUNS, deadline=None, database=None)
@given(st.data())
def test_a_mutated_text_is_accepted_or_a_config_error(data: st.DataObject) -> None:
    text = json.dumps(data.draw(st.sampled_from(BASES)), indent=data.draw(st.sampled_from([None, 2])))
    start = data.draw(st.integers(1, len(text)))
    end = data.draw(st.integers(start, min(start + 3, len(text))))
    new = data.draw(st.text(max_size=3) | st.sampled_from(['"', "//", "/*", "\\", "NaN", "1e999"]))
    judge(text[:start] + new + text[end:])
