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

from engine import initialize
from engine.config import OptimizerConfig, SchedulerConfig, build_schema, load_config
from engine.config.explain import reference
from engine.errors import ConfigError, EngineError

RUNS = int(os.environ.get("REDLINE_MUTATED_CONFIGS", "300"))  # 20000 for a long look
CONFIGS = Path(__file__).parents[3] / "configs"
SCHEMA = build_schema()
EDITOR = Draft202012Validator(SCHEMA)

# One sound value for many keys, so that a change of one key breaks nothing but that key.
BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": None,
    "optimizer": {"type": "adamw", "params": {"lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 0, "torch_adam": True}},
    "scheduler": {
        "type": "LRRangeTest",
        "params": {"lr_range_test_min_lr": [0.1, 0.2], "lr_range_test_staircase": True},
    },
    "gradient_clipping": 1.0,
    "steps_per_print": 10,
    "dataloader_drop_last": False,
    "redline": {"schedules": "corrected", "find_unused_parameters": True, "range_test": {"output_dir": "x"}},
    "fp16": {"enabled": False},
    "zero_optimization": {"stage": 0},
    "checkpoint": {"load_universal": False},
    "weight_quantization": {},
    "amp": {"enabled": False},
    "gradient_allreduce_op": "mean",
    "communication_data_type": None,
    "sequence_parallel_size": 1,
    "vocabulary_size": 8,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "managed_gradient_accumulation": True,
    "sparse_gradients": False,
    "log_level": "info",
    "aio": {},
}
RARE: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "min_loss_scale": 1},
    "bf16": {"enabled": False, "immediate_grad_update": True},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"]},
    "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": "auto"},
    "zero_optimization": {
        "stage": 0, "overlap_comm": True, "reduce_bucket_size": "auto", "allgather_bucket_size": 5e8,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 1}, "prefetch_bucket_size": 1e6,
        "stage3_gather_16bit_weights_on_model_save": True, "leaf_module": {"names": "experts"},
    },
    "aio": {"block_size": 1e6, "thread_count": 1, "single_submit": False},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None, "profile": False},
    "pipeline": {"stages": "auto", "seed_layers": True},
    "tensor_parallel": {"autotp_size": 0, "tp": {"tp_size": 1}},
    "expert_parallel": {"enabled": False, "top_k": 2},
    "hybrid_engine": {"enabled": False, "max_out_tokens": 512},
    "compile": {"deepcompile": False, "passes": ["z1"]},
    "data_efficiency": {
        "enabled": False, "seed": 1,
        "data_sampling": {"curriculum_learning": {"enabled": False, "curriculum_metrics": {"seqlen": {
            "schedule_type": "fixed_linear", "schedule_config": {"difficulty_step": 8}}}}},
    },
    "tensorboard": {"enabled": False, "output_path": "x"},
    "flops_profiler": {"enabled": False, "profile_step": 1, "output_file": None},
    "comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]},
    "timers": {"throughput": {"enabled": True}},
    "checkpoint": {"tag_validation": "Warn", "writer": {"type": "FAST", "io_buffer_size": 1e6}},
    "autotuning": {"enabled": False, "model_info": {"num_params": 1e9}},
    "elasticity": {"enabled": False, "max_train_batch_size": 8},
}  # fmt: skip
SCHEDULES: list[dict[str, Any]] = [
    {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 3, "lr_range_test_step_rate": 2},
    {"cycle_min_lr": 0, "cycle_max_lr": 1e308, "cycle_first_step_size": 2, "decay_lr_rate": 1, "cycle_momentum": False},
    {"warmup_min_lr": 0, "warmup_max_lr": [1e308], "warmup_type": "log"},
    {"total_num_steps": 10**30, "warmup_num_steps": 3, "warmup_max_lr": None},
    {"total_num_steps": 10**30, "warmup_min_ratio": 0.5, "cos_min_ratio": 1},
]
BASES = [
    BASE,
    *({**BASE, "scheduler": {"type": name, "params": each}} for name, each in zip(SchedulerConfig.models, SCHEDULES)),
    RARE,
    {**RARE, "zero_optimization": {**RARE["zero_optimization"], "stage": 3}},
    {**BASE, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.5}}},
]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, 1, 0.5, 2e3, 1e308, "", "auto", "1", "fp32", "mean", "linear", "Lion", "deepspeed"]),
    st.text(max_size=5),
)
KEYS = st.sampled_from(
    ["enabled", "stage", "device", "seed", "offload_param", "type", "params", "lr", "_x", "//", "x", "load_universal"]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=4
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
            holder[draw(KEYS | st.text(max_size=4))] = draw(VALUES)
        else:
            value = holder.pop(key, None)
            if change != "remove":
                holder[f"{key}x" if change == "rename" else f"_{key}"] = value
    return config


def judge(source: Any) -> list[str]:
    try:
        load_config(source)
    except ConfigError as error:
        return [problem.message for problem in error.problems]
    return []


@pytest.mark.skipif(
    not pydantic.VERSION.startswith("2.14."), reason="another pydantic may write the same schema in other words"
)
def test_the_schema_in_the_repository_is_fresh() -> None:
    assert json.loads((CONFIGS / "schema.json").read_text()) == SCHEMA, "python scripts/write_docs.py"


def test_the_reference_is_fresh() -> None:
    assert (CONFIGS.parent / "docs" / "config.md").read_text() == reference(), "python scripts/write_docs.py"


def test_another_editors_schema_checker_agrees_on_the_bases(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    schema, good, bad = (tmp_path / name for name in ("schema.json", "good.json", "bad.json"))
    schema.write_text(json.dumps(SCHEMA))
    good.write_text(json.dumps(RARE))
    bad.write_text(json.dumps({**RARE, "zero_optimization": {"stage": 4}}))
    for path, code in ((good, 0), (bad, 1)):
        command = [sys.executable, "-m", "check_jsonschema", "--schemafile", str(schema), str(path)]
        assert subprocess.run(command, capture_output=True).returncode == code


def test_another_editors_schema_checker_agrees_on_mutated_configs(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    configs: list[dict[str, Any]] = []

    @settings(max_examples=RUNS, deadline=None, database=None)
    @given(mutated())
    def collect(config: dict[str, Any]) -> None:
        configs.append(config)

    collect()
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    files = {str(tmp_path / f"config_{index}.json"): config for index, config in enumerate(configs)}
    for name, config in files.items():
        Path(name).write_text(json.dumps(config))
    command = [sys.executable, "-m", "check_jsonschema", "--schemafile", str(schema), "-o", "json", *files]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert not answer.get("parse_errors")
    refused = {error["filename"] for error in answer["errors"]}
    assert refused == {name for name, config in files.items() if not EDITOR.is_valid(config)}
    assert 0 < len(refused) < len(files)


def test_the_schema_is_a_schema_and_knows_every_base() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    for base in BASES:
        assert judge(base) == []
        EDITOR.validate(base)


def test_every_setting_has_a_type_and_a_description() -> None:
    closed = [SCHEMA, *SCHEMA["$defs"].values()]
    for holder in closed:
        for name, setting in holder["properties"].items():
            assert setting.get("description", "").endswith("."), name
            assert name == "$schema" or setting.keys() & {"type", "anyOf", "enum", "const", "$ref"}, name


# What no schema can tell: rules across keys, and names that torch or a script knows.
BEYOND_A_SCHEMA = (
    "expected at most",
    "expected a multiple of",
    "give train_batch_size",
    "one per parameter group",
    "beside it",
    "beside fp16.enabled",
    "takes its place",
    "expected true, or stage",
    "or stage 3",
    "or zero_optimization.stage",
    "with zero_optimization",
    "with compile",
    "the scale is dynamic",
    "take one of the two",
    "or stage 1, 2 or 3",
    "expected a divisor of",
    "see redline.zero.accumulate",
    "fills in and nothing here can; give train",
    "no momentum to cycle",
    "inside itself",
    "nested deeper",
)


@settings(max_examples=RUNS, deadline=None, database=None)
@given(mutated())
def test_an_editor_and_the_loader_agree_on_any_single_change(config: dict[str, Any]) -> None:
    for name in ("optimizer", "scheduler"):
        kind = config.get(name)
        if isinstance(kind, dict) and kind.get("type") not in (
            "adamw",
            *OptimizerConfig.models,
            *SchedulerConfig.models,
        ):
            config = {**config, name: None}  # another class: its parameters are beyond a schema
    messages = judge(config)
    if not any(beyond in message for beyond in BEYOND_A_SCHEMA for message in messages):
        assert EDITOR.is_valid(config) == (not messages), messages


@settings(max_examples=RUNS, deadline=None, database=None)
@given(mutated(changes=4))
def test_a_mutated_config_is_accepted_or_a_config_error(config: dict[str, Any]) -> None:
    judge(config)
    judge(json.dumps(config))


@settings(max_examples=RUNS, deadline=None, database=None)
@given(st.data())
def test_a_mutated_text_is_accepted_or_a_config_error(data: st.DataObject) -> None:
    text = json.dumps(data.draw(st.sampled_from(BASES)), indent=data.draw(st.sampled_from([None, 2])))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 3, len(text))))
    judge(
        "{"
        + text[1:start]
        + data.draw(st.text(max_size=3) | st.sampled_from(['"', "//", "/*", "\\", "NaN", "1e999"]))
        + text[end:]
    )


@settings(max_examples=RUNS, deadline=None, database=None)
@given(mutated(changes=2))
def test_an_accepted_config_makes_an_engine_or_says_why_not(config: dict[str, Any]) -> None:
    try:
        loaded = load_config(config)
    except ConfigError:
        return
    try:
        engine = initialize(torch.nn.Linear(2, 2), loaded, device="cpu")
    except EngineError:
        return
    assert engine.train_batch_size() == loaded.train_batch_size
