"""The report: exit codes, JSON, text, origins, what is foreseen, and a team's own rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redline.cli import main
from redline.config import EngineConfig, effective, fingerprint, load_config, origins, validate
from redline.config import report as report_module
from redline.config.explain import top_keys
from redline.config.schema import whole_schema
from redline.config.section import HONOURED, NO_EFFECT
from redline.console import paint_on_terminal
from redline.errors import ConfigError

TEXT = """{
  "train_batch_size": 8,
  "optimizer": {"type": "OneBitAdam", "params": {}},
  "tensor_parallel": {"autotp_size": 2},
  "amp": {"enabled": false},
  "hostfile": "x"
}
"""


@pytest.mark.parametrize("source", ["{", "no-such-file", "[1]", {1: 2}, None])
def test_what_cannot_be_read_is_a_report_too(source: Any) -> None:
    report = validate(source)
    assert report.exit_code == 1 and report.to_text() and report.to_json()["resolved"] == {}


def test_the_json_has_the_agreed_shape(write: Callable[[str], Path]) -> None:
    found = json.loads(json.dumps(validate(write(TEXT.replace("8", '"8"')), world_size=2).to_json()))
    assert set(found) == {"valid", "runnable", "errors", "keys", "resolved"}
    assert (found["valid"], found["runnable"], found["resolved"]) == (False, False, {})
    (error,) = found["errors"]
    assert "remove the quotes" in error.pop("message")
    assert error == {"path": "train_batch_size", "line": 2, "column": 3}
    assert all(key.keys() == {"path", "status", "note"} and key["note"] for key in found["keys"])
    assert {key["path"]: key["status"] for key in found["keys"]} == {
        "train_batch_size": "honoured", "optimizer": "honoured", "optimizer.type": "refused",
        "tensor_parallel": "refused", "amp": "no effect", "hostfile": "refused",
    }  # fmt: skip


def test_the_text_shows_problems_keys_and_batch(write: Callable[[str], Path]) -> None:
    report = validate(write(TEXT), world_size=2)
    lines = report.to_text().splitlines()
    assert lines[0] == "ds_config.json: valid DeepSpeed, but asks for 3 things that Redline does not have"
    assert lines[1].startswith('  ds_config.json:3:17: optimizer.type: "OneBitAdam" is not built; ')
    assert lines[2].startswith("  ds_config.json:4:3: tensor_parallel: not built yet; ")
    assert [line.split("  ")[1] for line in lines[5:11]] == [
        "train_batch_size", "optimizer", "optimizer.type", "tensor_parallel", "amp", "hostfile",
    ]  # fmt: skip
    assert lines[12] == "batch: 8 = 4 per rank x 1 accumulated x world size 2"
    colored = report.to_text(paint=paint_on_terminal)
    assert "\x1b[31m" in colored and re.sub(r"\x1b\[\d+m", "", colored) == report.to_text()
    assert "  gradient_clipping " in report.to_text(whole=True)


# -- the status of a key


@pytest.mark.parametrize("key", [key.path for key in top_keys() if key.status != HONOURED])
def test_a_default_is_never_refused(key: str) -> None:
    for value in (None, whole_schema()["properties"][key]["default"]):
        load_config({"train_batch_size": 8, key: value})


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("tensor_parallel", {"autotp_size": "auto"}),
        ("amp", {"enabled": False, "opt_level": "O1"}),
        ("zero_optimization", {"stage": 0, "overlap_comm": True}),
        ("zero_optimization", {"stage": "auto", "offload_param": {"device": "cpu"}, "zero_hpz_partition_size": 8}),
        ("zero_optimization", {"stage": 0, "offload_optimizer": {"device": "nvme"}, "legacy_stage1": True}),
        ("zero_optimization", {"zenflow": {}, "zero_quantized_weights": True}),
        ("zero_optimization", False),
        ("weight_quantization", {"enabled": False}),
        ("weight_quantization", {}),
        ("sequence_parallel_size", 1.0),
    ],
)
def test_a_key_that_switches_nothing_on_has_no_effect(name: str, off: Any) -> None:
    report = validate({"train_batch_size": 8, name: off})
    assert report.exit_code == 0
    assert (report.keys[1].path, report.keys[1].status) == (name, NO_EFFECT)


@pytest.mark.parametrize(
    "settings",
    [
        {"fp16": {"enabled": "auto", "_why": "later", "fp16_master_weights_and_grads": False}},
        {"bf16": {}, "data_types": {}},
        {"bfloat16": False},
        {"communication_data_type": "fp32", "gradient_allreduce_op": "mean"},
        {"zero_optimization": True},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "zero_hpz_partition_size": 8}},
        {"zero_optimization": {"stage": 2, "cpu_offload": True, "zero_quantized_weights": "auto", "zenflow": "auto"}},
        {"zero_optimization": {"stage": 1}, "prescale_gradients": True},
        {"zero_optimization": {"stage": 2, "reduce_scatter": False}, "gradient_predivide_factor": 2.0},
        {"zero_optimization": {"stage": 2, "compute_grad_norm": False}, "gradient_clipping": 0},
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 3}},
        {"zero_optimization": {"stage": 3, "mics_shard_size": 0, "offload_optimizer": {"device": "auto"}}},
        {"communication_data_type": "fp16", "data_types": {"grad_accum_dtype": "fp32"},
         "zero_optimization": {"stage": 2}, "redline": {"zero": {"accumulate": "shared"}}},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_honoured_runs_as_written(settings: dict[str, Any]) -> None:
    report = validate({"train_batch_size": 8, **settings}, world_size=2)
    assert report.exit_code == 0, report.to_text()
    assert HONOURED in {key.status for key in report.keys[1:]}


# -- values in force


def test_the_config_in_force_has_every_value() -> None:
    resolved = validate({"train_batch_size": 8, "optimizer": {"type": "SGD"}}, world_size=2).to_json()["resolved"]
    assert set(resolved) == set(EngineConfig.model_fields)
    assert [resolved[name] for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "fp16")] == [8, 4, None]
    params = {"lr": 0.001, "weight_decay": 0.0, "foreach": None, "fused": None, "momentum": 0.0, "dampening": 0.0}
    params |= {"nesterov": False, "maximize": False, "differentiable": False}
    assert resolved["optimizer"] == {"type": "SGD", "params": params, "legacy_fusion": False}
    assert resolved["redline"]["schedules"] == "deepspeed"


def test_every_value_has_an_origin() -> None:
    config = {"train_batch_size": 8, "gradient_accumulation_steps": None, "scheduler": None}
    zero = {"stage": 2, "overlap_comm": True, "prefetch_bucket_size": 9, "offload_optimizer": {"ratio": 1.0}}
    others = {"bfloat16": {"enabled": True}, "zero_optimization": zero, "aio": {"queue_depth": 4}}
    loaded = load_config({**config, **others, "optimizer": {"type": "adam", "params": {"betas": [0.8, 0.9]}}})
    assert {path: value.origin for path, value in effective(loaded).items() if value.origin != "default"} == {
        "train_batch_size": "given",
        "train_micro_batch_size_per_gpu": "derived",
        "gradient_accumulation_steps": "derived",
        "optimizer.type": "given",
        "optimizer.params.betas": "given",
        "scheduler": "given",
        "bf16.enabled": "given",
        "zero_optimization.stage": "given",
        "zero_optimization.overlap_comm": "unread",
        "zero_optimization.stage3_prefetch_bucket_size": "unread",
        "zero_optimization.offload_optimizer.ratio": "unread",
        "aio.queue_depth": "unread",
    }
    # Nobody reads the default of a key without effect, and ranks need not agree on it.
    assert "zero_optimization.reduce_bucket_size" not in effective(loaded)
    assert not [path for path in (*fingerprint(loaded), *origins(loaded)) if "overlap" in path or "ratio" in path]
    assert origins(load_config({**config, "zero_optimization": True}))["zero_optimization.stage"] == "given"


# -- what a schedule will do


def test_a_schedule_that_leaves_what_its_optimizer_accepts_is_a_warning_with_the_step() -> None:
    params = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 3, "decay_step_size": 1}
    scheduler = {"type": "OneCycle", "params": {**params, "decay_mom_rate": 0.05}}
    config = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}, "scheduler": scheduler}
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
    ],
)
def test_torchs_schedules_are_foreseen_too(kind: str, params: dict[str, Any], step: int | None) -> None:
    config = {"train_batch_size": 4, "optimizer": {"type": "RMSprop", "params": {"lr": 0.1}},
              "scheduler": {"type": kind, "params": params}}  # fmt: skip
    found = validate(config).warnings
    assert (f"at optimizer step {step}" in found[0].message) if step is not None else found == []


# -- a team's own rules

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
    (tmp_path / "policy.json").write_text("// ours\n" + json.dumps(POLICY))
    policies: list[Any] = [POLICY, "policy.json"]
    for name, policy in zip(("policy", "policy.json"), policies):
        report = validate(path, policy=policy)
        assert report.exit_code == 1
        assert [str(problem) for problem in report.errors] == [
            f"1:1: 'gradient_clipping' is a required property ({name})",
            f"2:3: train_batch_size: 8 is greater than the maximum of 4 ({name})",
            f"4:5: optimizer.type: 'Adam' is not one of ['AdamW'] ({name})",
        ]
    kept = {"train_batch_size": 4, "_why": "x", "$schema": "y", "optimizer": {"type": "AdamW"}, "gradient_clipping": 1}
    assert validate(kept, policy={**POLICY, "propertyNames": {"pattern": "^[a-z]"}}).exit_code == 0


def test_a_policy_whose_patterns_take_for_ever_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "POLICY_TIMEOUT", 0.1)
    for policy in ({"propertyNames": {"pattern": "^(a+)+$"}}, {"patternProperties": {"^(a+)+$": True}}):
        with pytest.raises(ConfigError, match=r"its patterns take longer than 0\.1 s on this config"):
            validate({"train_batch_size": 8, "a" * 60 + "!": 1}, policy=policy)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"type": "objekt"}, "policy: 1 problem\n  type: no JSON Schema: 'objekt' is not valid under any of the given"),
        ({"$ref": "https://example.invalid/policy.json"}, "policy: 1 problem\n  cannot be applied: "),
        ({"propertyNames": {"pattern": "("}}, "policy: 1 problem\n  "),
        ({"minimum": float("nan")}, "config: 1 problem\n  minimum: got NaN; expected a finite number"),
        ("no-such-policy.json", "no-such-policy.json: 1 problem\n  no such file"),
    ],
)
def test_a_broken_policy_is_a_clear_error(policy: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate({"train_batch_size": 8}, policy=policy)
    assert str(caught.value).startswith(message)


# -- the command line


def test_two_configs_are_compared_as_they_are_in_force(
    write: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write('{"train_batch_size": 8, "gradient_clipping": 1.0, "_note": "mine", "my_own_key": 1}')
    Path("other.json").write_text('{"train_micro_batch_size_per_gpu": 8}')
    Path("third.json").write_text('{"train_batch_size": 8, "gradient_clipping": 0.5, "aio": {"queue_depth": 4}}')
    assert main(["diff", "ds_config.json", "other.json"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["diff", "ds_config.json", "third.json"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "  gradient_clipping  1.0 (given)  0.5 (given)",
        "  aio.queue_depth    -            4 (unread)",
    ]
    # What follows from these three changes, such as the micro-batch and the other type's defaults, is no change.
    write('{"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}')
    scheduler = '"scheduler": {"type": "WarmupLR"}'
    Path("third.json").write_text(f'{{"train_batch_size": 4, "optimizer": {{"type": "Adam"}}, {scheduler}}}')
    assert main(["diff", "ds_config.json", "third.json"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert rows == ["train_batch_size", "optimizer.params.lr", "scheduler.type"]
    Path("broken.json").write_text('{"train_batch_size": 0}')
    assert main(["diff", "ds_config.json", "broken.json"]) == 1
    assert "train_batch_size: got 0" in capsys.readouterr().err


def test_validate_shows_the_config_in_force(write: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    write('{"train_batch_size": 8}')
    assert main(["validate", "--effective", "ds_config.json"]) == 0
    assert re.search("gradient_clipping +default  1.0\n", capsys.readouterr().out)
    assert main(["validate", "--effective", "--json", "ds_config.json"]) == 0
    assert json.loads(capsys.readouterr().out)["origins"]["gradient_clipping"] == "default"
    write('{"train_batch_size": 8, "my_own_key": {"deep": [1]}}')  # refused, and the rest has values in force
    assert main(["validate", "--effective", "ds_config.json"]) == 3
    assert re.search("gradient_clipping +default  1.0\n", capsys.readouterr().out)
