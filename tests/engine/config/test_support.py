"""The status table: complete, and a key that switches nothing on is not refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, UnsupportedConfigError, load_config, validate
from engine.config.catalog import catalog
from engine.config.support import HONOURED, INSIDE, KEYS, NO_EFFECT, REFUSED
from engine.errors import ConfigError


def load(**settings: Any) -> EngineConfig:
    return load_config({"train_batch_size": 8, **settings})


KNOWN_TO_DEEPSPEED = json.loads((Path(__file__).parents[2] / "golden" / "deepspeed_keys.json").read_text())
OLDER = {"fp32_allreduce", "aio.thread_count", "activation_checkpointing.partitioned_activations"}


def test_no_key_of_deepspeed_is_missing() -> None:
    assert set(KNOWN_TO_DEEPSPEED["top"]) <= set(KEYS)
    assert set(KEYS) - set(KNOWN_TO_DEEPSPEED["top"]) - OLDER == {"redline"}
    ours = {entry.key for entry in catalog().values()} | {"optimizer.params", "scheduler.params"}
    assert set(KNOWN_TO_DEEPSPEED["nested"]) <= ours


def test_what_is_ours_alone_is_torchs_or_older_or_redlines() -> None:
    known = {*KNOWN_TO_DEEPSPEED["top"], *KNOWN_TO_DEEPSPEED["nested"], *OLDER}
    known |= {key.rpartition(".")[0] for key in known}
    extra = {entry.key for entry in catalog().values() if entry.key not in known}
    torchs = {"foreach", "fused", "momentum", "dampening", "nesterov", "maximize", "differentiable"}
    torchs |= {"lr_decay", "initial_accumulator_value"}
    lambs, muons = {"eps_inside_sqrt", "max_coeff", "min_coeff"}, {"muon_lr", "adam_lr", "ns_method", "per_head_muon"}
    ours = {f"optimizer.params.{name}" for name in torchs | lambs | muons}
    assert {key for key in extra if not key.startswith("redline")} == ours - known


def test_a_removed_key_says_so() -> None:
    for path in KNOWN_TO_DEEPSPEED["removed"]:
        assert "DeepSpeed has removed it" in catalog()[path].note


def test_every_row_inside_a_section_is_a_key_of_it() -> None:
    assert set(INSIDE) <= {entry.key for entry in catalog().values()}


def test_every_key_has_a_meaning_values_and_a_status() -> None:
    for entry in catalog().values():
        assert entry.meaning.endswith("."), entry.path
        assert entry.values, entry.path
        assert entry.status in (HONOURED, NO_EFFECT, REFUSED)
        assert entry.note or entry.status != REFUSED, entry.path


def test_the_honoured_keys_are_those_of_the_model() -> None:
    assert {name for name, key in KEYS.items() if key.status == HONOURED} == {
        *EngineConfig.model_fields,
        *EngineConfig.aliases,
    }


def test_every_key_says_why() -> None:
    assert all(key.note for key in KEYS.values())


def test_a_default_is_never_refused() -> None:
    for name, key in KEYS.items():
        if key.status != HONOURED:
            load(**{name: key.default})
            load(**{name: None})


@pytest.mark.parametrize(
    "off",
    [
        {"fp16": {"enabled": False, "loss_scale": 0}},
        {"fp16": {"enabled": "auto"}},
        {"fp16": {"_why": "later", "enabled": False}},
        {"bf16": {}},
        {"bf16": None},
        {"bfloat16": False},
        {"data_types": {}},
        {"communication_data_type": "fp32"},
        {"gradient_allreduce_op": "mean"},
        {"managed_gradient_accumulation": True},
    ],
    ids=str,
)
def test_what_switches_nothing_on_leaves_training_as_it_is(off: dict[str, Any]) -> None:
    on = [
        name
        for name in ("fp16", "bf16", "torch_autocast")
        if (section := getattr(load(**off), name)) and section.enabled
    ]
    assert on == []


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("tensor_parallel", {"autotp_size": "auto"}),
        ("amp", {"enabled": False, "opt_level": "O1"}),
        ("zero_optimization", {"stage": 0, "overlap_comm": True}),
        ("zero_optimization", {"allgather_partitions": True}),
        ("zero_optimization", {"stage": "auto", "offload_param": {"device": "cpu"}, "zero_hpz_partition_size": 8}),
        ("zero_optimization", {"stage": 0, "offload_optimizer": {"device": "nvme"}, "legacy_stage1": True}),
        ("zero_optimization", {"zenflow": {}, "zero_quantized_weights": True}),
        ("zero_optimization", {}),
        ("zero_optimization", False),
        ("weight_quantization", {"enabled": False}),
        ("weight_quantization", {}),
        ("sequence_parallel_size", 1.0),
        ("sparse_gradients", False),
        ("compile", {"deepcompile": False, "passes": ["z1"]}),
    ],
)
def test_a_key_that_switches_nothing_on_has_no_effect(name: str, off: Any) -> None:
    load(**{name: off})
    report = validate({"train_batch_size": 8, name: off})
    assert report.exit_code == 0
    assert (report.keys[1].path, report.keys[1].status) == (name, NO_EFFECT)


@pytest.mark.parametrize(
    ("name", "on"),
    [
        ("weight_quantization", {"quantized_initialization": {}}),
        ("compression_training", {"weight_quantization": {}}),
        ("sequence_parallel_size", 2),
        ("compile", {"deepcompile": True}),
        ("elasticity", {"max_train_batch_size": 8}),
    ],
)
def test_a_refused_key_that_is_on_is_refused_by_name(name: str, on: Any) -> None:
    with pytest.raises(UnsupportedConfigError) as caught:
        load(**{name: on})
    assert [problem.path for problem in caught.value.problems] == [name]
    assert KEYS[name].status == REFUSED
    assert caught.value.problems[0].message.endswith(KEYS[name].note)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dump_state", "yes", 'got "yes"; expected true, false or null'),
        ("dump_state", 1, "got 1; expected true, false or null; write true"),
        ("wall_clock_breakdown", "true", 'got "true"; expected true, false or null; remove the quotes'),
        ("vocabulary_size", 1.5, "got 1.5; expected a whole number or null"),
        ("gradient_predivide_factor", "2", 'got "2"; expected a number > 0; remove the quotes'),
        ("communication_data_type", "fp8", 'got "fp8"; expected "fp16", "bf16", "fp32" or null'),
        ("fp16", True, "got true; expected an object: { ... }"),
        ("aio", [], "got []; expected an object: { ... }, false or null"),
        ("checkpoint", 0, "got 0; expected an object: { ... }"),
        ("zero_optimization", 1, "got 1; expected an object: { ... }"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_mistake_and_not_a_refusal(name: str, value: Any, message: str) -> None:
    report = validate({"train_batch_size": 8, name: value})
    assert report.exit_code == 1
    assert [str(problem) for problem in report.errors] == [f"{name}: {message}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: got 4; expected 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stagee": 2}},
            'zero_optimization.stagee: unknown key; did you mean "stage"?',
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": 0}},
            "zero_optimization.reduce_bucket_size: got 0; expected a whole number >= 1",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cup"}}},
            'zero_optimization.offload_param.device: got "cup"; expected "none", "cpu" or "nvme"; did you mean "cpu"?',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "zero_optimization.offload_optimizer: ratio is 0.5; expected 1, or stage 3; stage is 2",
        ),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm: got false; expected true, or stage 1 or 2; stage is 0",
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.cpu_offload: given beside offload_optimizer, which takes its place; remove it",
        ),
        (
            {"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 2}},
            "zero_optimization.max_live_parameters: given beside stage3_max_live_parameters, which is the same; "
            "remove it",
        ),
        (
            {"zero_optimization": {"max_live_parameters": "1"}},
            'zero_optimization.max_live_parameters: got "1"; expected a whole number >= 0; remove the quotes',
        ),
        ({"fp16": {"enabledd": False}}, 'fp16.enabledd: unknown key; did you mean "enabled"?'),
        (
            {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
            "bf16.enabled: got true beside fp16.enabled: true; a run has one number format; "
            "set one of the two to false",
        ),
        (
            {"fp16": {"enabled": True, "loss_scale_window": 0}},
            "fp16.loss_scale_window: got 0; expected > 0: the scale is dynamic",
        ),
        (
            {"fp16": {"fp16_master_weights_and_grads": True}},
            "fp16.fp16_master_weights_and_grads: got true; expected false, or zero_optimization.stage 1, 2 or 3",
        ),
        (
            {"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}},
            'gradient_allreduce_op: got "sum"; expected "mean" with zero_optimization.stage 3',
        ),
        (
            {"prescale_gradients": True, "zero_optimization": {"stage": 2}},
            "prescale_gradients: got true; expected false with zero_optimization.stage 2, "
            'or "reduce_scatter": false there',
        ),
        (
            {"gradient_predivide_factor": 2.0, "zero_optimization": {"stage": 3}},
            "gradient_predivide_factor: got 2; expected 1 with zero_optimization.stage 3, "
            'or "reduce_scatter": false there',
        ),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            'zero_optimization.compute_grad_norm: got false; expected true, or "gradient_clipping": 0 beside it; '
            "gradient_clipping is 1",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            'zero_optimization.offload_param: device is "cpu"; expected "none", or stage 3; stage is 2',
        ),
        (
            {"zero_optimization": {"stage": 1, "cpu_offload_param": True}},
            "zero_optimization.cpu_offload_param: got true; expected false, or stage 3; stage is 1",
        ),
        (
            {"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 2}},
            "zero_optimization.zero_hpz_partition_size: got 2; expected 1, or stage 3; stage is 1",
        ),
        (
            {"zero_optimization": {"mics_shard_size": 2}},
            "zero_optimization.mics_shard_size: got 2; expected -1, or stage 1, 2 or 3; stage is 0",
        ),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": 2, "zero_hpz_partition_size": 2}},
            "zero_optimization.mics_shard_size: got 2 beside zero_hpz_partition_size: 2; take one of the two",
        ),
        (
            {"zero_optimization": {"mics_shard_size": -2}},
            "zero_optimization.mics_shard_size: got -2; expected a whole number >= -1",
        ),
        (
            {"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": True}}}},
            "data_efficiency.data_sampling.curriculum_learning.enabled: got true; "
            "expected curriculum_metrics beside it",
        ),
        (
            {"aio": {"queue_dept": 8}},
            'aio.queue_dept: unknown key; did you mean "queue_depth"?',
        ),
        (
            {"checkpoint": {"tag_validation": "Warning"}},
            'checkpoint.tag_validation: got "Warning"; expected "Ignore", "Warn", "Fail", "IGNORE", "WARN" or "FAIL"; '
            'did you mean "WARN"?',
        ),
    ],
)
def test_a_mistake_is_found_in_a_section_that_is_refused_or_off(settings: dict[str, Any], message: str) -> None:
    report = validate({"train_batch_size": 8, **settings})
    assert [str(problem) for problem in report.errors] == [message]


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device",
        ),
        ({"zero_optimization": {"stage": 3, "zenflow": {}}}, "zero_optimization.zenflow"),
        ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, "zero_optimization.legacy_stage1"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights",
        ),
        (
            {
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "bf16"},
                "zero_optimization": {"stage": 2},
            },
            "data_types.grad_accum_dtype",
        ),
        (
            {
                "communication_data_type": "fp16",
                "data_types": {"grad_accum_dtype": "fp32"},
                "zero_optimization": {"stage": 2},
            },
            "data_types.grad_accum_dtype",
        ),
        ({"compile": {"backend": "inductor"}}, "compile.backend"),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}}, "optimizer.params.max_grad_norm"),
    ],
)
def test_a_key_inside_a_section_can_be_refused(settings: dict[str, Any], path: str) -> None:
    report = validate({"train_batch_size": 8, **settings})
    assert report.exit_code == 3
    assert [problem.path for problem in report.refusals] == [path]


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_optimization": True},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "zero_hpz_partition_size": 8}},
        {"zero_optimization": {"stage": 2, "cpu_offload": True, "zero_quantized_weights": "auto", "zenflow": "auto"}},
        {"zero_optimization": {"stage": 1}, "prescale_gradients": True},
        {"zero_optimization": {"stage": 2, "reduce_scatter": False}, "gradient_predivide_factor": 2.0},
        {"zero_optimization": {"stage": 2, "compute_grad_norm": False}, "gradient_clipping": 0},
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 3}},
        {"zero_optimization": {"stage": 3, "mics_shard_size": 0, "offload_optimizer": {"device": "auto"}}},
        {
            "communication_data_type": "fp16",
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 2},
            "redline": {"zero": {"accumulate": "shared"}},
        },
    ],
    ids=str,
)
def test_zero_is_honoured(settings: dict[str, Any]) -> None:
    report = validate({"train_batch_size": 8, **settings}, world_size=2)
    assert report.exit_code == 0, report.to_text()
    assert ("zero_optimization", HONOURED) in [(key.path, key.status) for key in report.keys]


def test_true_is_stage_1_as_in_deepspeed() -> None:
    zero = load(zero_optimization=True).zero_optimization
    assert zero is not None and zero.stage == 1
    assert load(zero_optimization=None).zero_optimization is load(zero_optimization=False).zero_optimization is None


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 1, "mics_shard_size": 4}, "zero_optimization.mics_shard_size: got 4"),
        ({"stage": 3, "mics_shard_size": 12}, "zero_optimization.mics_shard_size: got 12"),
        ({"stage": 3, "zero_hpz_partition_size": 5}, "zero_optimization.zero_hpz_partition_size: got 5"),
    ],
)
def test_a_group_of_processes_divides_their_number(zero: dict[str, Any], message: str) -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    with pytest.raises(ConfigError) as caught:
        load_config(config, world_size=6)
    expected = "expected a divisor of 6 (world size, from the argument): 1, 2, 3 or 6"
    assert str(caught.value) == f"config: 1 problem\n  {message}; {expected}"
    load_config(config, world_size=1)  # where nothing is shared out


def test_a_second_copy_of_more_processes_than_there_are_is_among_all_as_in_deepspeed() -> None:
    load_config({"train_batch_size": 8, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, world_size=4)


def test_other_spellings_are_known() -> None:
    load(zero_optimization={"stage3_gather_fp16_weights_on_model_save": True, "prefetch_bucket_size": 1e6})
    load(aio={"thread_count": 1})
