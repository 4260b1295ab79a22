"""The report: exit codes, JSON, text, origins, and a team's own rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, effective, fingerprint, load_config, origins, validate
from engine.errors import ConfigError

TEXT = """{
  "train_batch_size": 8,
  "optimizer": {"type": "OneBitAdam", "params": {}},
  "tensor_parallel": {"autotp_size": 2},
  "amp": {"enabled": false},
  "vocabulary_size": 50000
}
"""


@pytest.mark.parametrize(
    ("settings", "valid", "runnable", "exit_code"),
    [
        ({"train_batch_size": 8}, True, True, 0),
        ({"train_batch_size": 8, "tensor_parallel": {"autotp_size": 2}}, True, False, 3),
        ({"train_batch_size": -8}, False, False, 1),
        ({"train_batch_size": -8, "tensor_parallel": {"autotp_size": 2}}, False, False, 1),
    ],
)
def test_the_exit_code_tells_what_runs(settings: dict[str, Any], valid: bool, runnable: bool, exit_code: int) -> None:
    report = validate(settings)
    assert (report.valid, report.runnable, report.exit_code) == (valid, runnable, exit_code)


@pytest.mark.parametrize("source", ["{", "no-such-file", "[1]", {1: 2}, None])
def test_what_cannot_be_read_is_a_report_too(source: Any) -> None:
    report = validate(source)
    assert report.exit_code == 1
    assert report.to_json()["resolved"] == {}
    assert report.to_text()


def test_the_json_has_the_agreed_shape(write: Callable[[str], Path]) -> None:
    report = validate(write(TEXT.replace("8", '"8"')), world_size=2)
    assert json.loads(json.dumps(report.to_json())) == {
        "valid": False,
        "runnable": False,
        "errors": [
            {
                "path": "train_batch_size",
                "line": 2,
                "column": 3,
                "message": 'got "8"; expected a whole number >= 1; remove the quotes',
            }
        ],
        "keys": [
            {"path": "train_batch_size", "status": "honoured", "note": "samples per optimizer step"},
            {
                "path": "optimizer",
                "status": "honoured",
                "note": "torch's optimizers, with DeepSpeed's names and defaults",
            },
            {
                "path": "optimizer.type",
                "status": "refused",
                "note": '"OneBitAdam" is not built; it compresses communication, and DeepSpeed has '
                "removed it; use Adam",
            },
            {
                "path": "tensor_parallel",
                "status": "refused",
                "note": "not built yet; shard the model with torch.distributed.tensor.parallel first",
            },
            {"path": "amp", "status": "no effect", "note": "it switches nothing on"},
            {
                "path": "vocabulary_size",
                "status": "no effect",
                "note": "DeepSpeed only warns when it is no multiple of 8",
            },
        ],
        "resolved": {},
    }


def test_the_config_in_force_has_every_value() -> None:
    resolved = validate({"train_batch_size": 8, "optimizer": {"type": "sgd".upper()}}, world_size=2).to_json()[
        "resolved"
    ]
    assert set(resolved) == set(EngineConfig.model_fields)
    assert [resolved[name] for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "fp16")] == [8, 4, None]
    assert resolved["optimizer"] == {
        "type": "SGD",
        "params": {
            "lr": 0.001,
            "weight_decay": 0.0,
            "foreach": None,
            "fused": None,
            "momentum": 0.0,
            "dampening": 0.0,
            "nesterov": False,
            "maximize": False,
            "differentiable": False,
        },
        "legacy_fusion": False,
    }
    assert resolved["redline"]["schedules"] == "deepspeed"


def test_every_value_has_an_origin() -> None:
    config = load_config(
        {
            "train_batch_size": 8,
            "gradient_accumulation_steps": None,
            "optimizer": {"type": "adam", "params": {"betas": [0.8, 0.9]}},
            "scheduler": None,
        }
    )
    found = origins(config)
    assert {path: origin for path, origin in found.items() if origin != "default"} == {
        "train_batch_size": "given",
        "train_micro_batch_size_per_gpu": "derived",
        "gradient_accumulation_steps": "derived",
        "optimizer.type": "given",
        "optimizer.params.betas": "given",
        "scheduler": "given",
    }
    assert found["optimizer.params.weight_decay"] == found["redline.range_test.output_dir"] == "default"


def test_a_key_without_effect_in_a_section_that_has_one_is_unread_and_its_default_is_nobodys() -> None:
    zero = {"stage": 2, "overlap_comm": True, "prefetch_bucket_size": 9, "offload_optimizer": {"ratio": 1.0}}
    config = load_config({"train_batch_size": 8, "zero_optimization": zero})
    values = {path: value for path, value in effective(config).items() if path.startswith("zero_optimization.")}
    assert {path: value.origin for path, value in values.items() if value.origin != "default"} == {
        "zero_optimization.stage": "given",
        "zero_optimization.overlap_comm": "unread",
        "zero_optimization.stage3_prefetch_bucket_size": "unread",
        "zero_optimization.offload_optimizer.ratio": "unread",
    }
    assert "zero_optimization.reduce_bucket_size" not in values
    assert not [path for path in (*fingerprint(config), *origins(config)) if "overlap" in path or "ratio" in path]


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"bfloat16": {"enabled": True}}, "bf16.enabled"),
        ({"zero_optimization": True}, "zero_optimization.stage"),
    ],
)
def test_a_value_under_another_spelling_is_given(settings: dict[str, Any], path: str) -> None:
    assert origins(load_config({"train_batch_size": 8, **settings}))[path] == "given"


def test_the_text_shows_problems_keys_and_batch(write: Callable[[str], Path]) -> None:
    assert validate(write(TEXT), world_size=2).to_text() == (
        "ds_config.json: valid DeepSpeed, but asks for 2 things that Redline does not have\n"
        '  ds_config.json:3:17: optimizer.type: "OneBitAdam" is not built; it compresses communication, and DeepSpeed '
        "has removed it; use Adam\n"
        "  ds_config.json:4:3: tensor_parallel: not built yet; shard the model with "
        "torch.distributed.tensor.parallel first\n"
        "\n"
        "  train_batch_size  honoured   samples per optimizer step\n"
        "  optimizer         honoured   torch's optimizers, with DeepSpeed's names and defaults\n"
        '  optimizer.type    refused    "OneBitAdam" is not built; it compresses communication, and DeepSpeed '
        "has removed it; use Adam\n"
        "  tensor_parallel   refused    not built yet; shard the model with "
        "torch.distributed.tensor.parallel first\n"
        "  amp               no effect  it switches nothing on\n"
        "  vocabulary_size   no effect  DeepSpeed only warns when it is no multiple of 8\n"
        "\n"
        "batch: 8 = 4 a process x 1 accumulated x world size 2"
    )


def test_color_changes_nothing_but_color() -> None:
    import re

    report = validate({"train_batch_size": 8, "tensor_parallel": {"autotp_size": 2}, "lr": 1})
    assert "\x1b[31m" in report.to_text(color=True)
    assert re.sub(r"\x1b\[\d+m", "", report.to_text(color=True)) == report.to_text()


POLICY = {
    "required": ["gradient_clipping"],
    "properties": {"train_batch_size": {"maximum": 4}, "optimizer": {"properties": {"type": {"enum": ["AdamW"]}}}},
    "additionalProperties": {"$ref": "#/$defs/any"},
    "$defs": {"any": True},
}


def test_a_teams_own_rules_are_checked_against_the_document_as_written(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    path = write('{\n  "train_batch_size": 8,\n  "optimizer": {\n    "type": "Adam"}}')
    expected = [
        "1:1: 'gradient_clipping' is a required property ({})",
        "2:3: train_batch_size: 8 is greater than the maximum of 4 ({})",
        "4:5: optimizer.type: 'Adam' is not one of ['AdamW'] ({})",
    ]
    report = validate(path, policy=POLICY)
    assert [str(problem) for problem in report.errors] == [line.format("policy") for line in expected]
    assert report.exit_code == 1
    (tmp_path / "policy.json").write_text("// ours\n" + json.dumps(POLICY))
    report = validate(path, policy="policy.json")
    assert [str(problem) for problem in report.errors] == [line.format("policy.json") for line in expected]
    kept = {"train_batch_size": 4, "_why": "x", "$schema": "y", "optimizer": {"type": "AdamW"}, "gradient_clipping": 1}
    assert validate(kept, policy={**POLICY, "propertyNames": {"pattern": "^[a-z]"}}).exit_code == 0


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            {"type": "objekt"},
            "policy: 1 problem\n  type: no JSON Schema: 'objekt' is not valid under any of the given schemas",
        ),
        ({"$ref": "https://example.invalid/policy.json"}, "policy: 1 problem\n  cannot be applied: "),
        ({"properties": {"train_batch_size": {"$ref": "#/nowhere"}}}, "policy: 1 problem\n  cannot be applied: "),
        ({"propertyNames": {"pattern": "("}}, "policy: 1 problem\n  "),
        ({"minimum": float("nan")}, "config: 1 problem\n  minimum: got nan; expected a finite number"),
        ("no-such-policy.json", "no-such-policy.json: 1 problem\n  no such file"),
    ],
)
def test_a_broken_policy_is_a_clear_error(policy: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate({"train_batch_size": 8}, policy=policy)
    assert str(caught.value).startswith(message)


def test_a_schedule_that_leaves_what_its_optimizer_accepts_is_a_warning_with_the_step() -> None:
    params = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 3, "decay_step_size": 1}
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "OneCycle", "params": {**params, "decay_mom_rate": 0.05}},
    }
    report = validate(config)
    says = "the beta1 of parameter group 0 leaves what optimizers accept at optimizer step 9"
    assert report.runnable and report.exit_code == 0
    assert "valid; runs as written; 1 warning" in report.to_text() and says in report.to_text()
    assert says in report.to_json()["keys"][-1]["note"]
    assert validate({**config, "redline": {"schedules": "corrected"}}).warnings == []
    sgd = {**config, "optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}
    assert validate(sgd).warnings == [], "DeepSpeed leaves the momentum of SGD alone"


@pytest.mark.parametrize(
    ("kind", "params", "step"),
    [
        ("CosineAnnealingLR", {"T_max": 4, "eta_min": -1.0}, 1),
        ("StepLR", {"step_size": 3, "gamma": -1.0}, 3),
        ("StepLR", {"step_size": 3}, None),
        ("WarmupLR", {}, None),
    ],
)
def test_torchs_schedules_are_foreseen_too(kind: str, params: dict[str, Any], step: int | None) -> None:
    config = {"train_batch_size": 4, "optimizer": {"type": "RMSprop", "params": {"lr": 0.1}},
              "scheduler": {"type": kind, "params": params}}  # fmt: skip
    found = validate(config).warnings
    assert (f"at optimizer step {step}" in found[0].message) if step is not None else found == []
