"""Everything that can be wrong with a config: where it is reported, and the words that matter in the message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redline.config import UnsupportedConfigError, load_config, validate
from redline.errors import ConfigError
from redline.schedulers import registry

CYCLE = {"cycle_min_lr": 0, "cycle_max_lr": 1}


def problems(config: Any, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(config, **options)
    return [str(problem) for problem in caught.value.problems]


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "Adam", "params": params}}


def optimizer(name: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": name, "params": params}}


def scheduler(name: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": name, "params": params}}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


# Settings with one mistake, its path, and words of the message that belongs to it.
MISTAKES = [
    # unknown keys
    ({"gradient_clipp1ng": 1.0}, "gradient_clipp1ng", 'did you mean "gradient_clipping"?'),
    ({"redline": {"range_test": {"outputdir": "x"}}}, "redline.range_test.outputdir", 'did you mean "output_dir"?'),
    ({"aio": {"queue_dept": 8}}, "aio.queue_dept", 'did you mean "queue_depth"?'),
    (adam(learning_rate=0.1), "optimizer.params.learning_rate", "known here: lr, weight_decay"),
    (optimizer("RMSprop", alhpa=0.9), "optimizer.params.alhpa", 'did you mean "alpha"?'),
    (scheduler("WarmupLR", warmup_nm_steps=9), "scheduler.params.warmup_nm_steps", '"warmup_num_steps"?'),
    # values at the top
    ({"gradient_clipping": "1.0"}, "gradient_clipping", 'got "1.0"; expected a number >= 0; remove the quotes'),
    ({"gradient_clipping": -1}, "gradient_clipping", "got -1; expected a number >= 0"),
    ({"gradient_clipping": [1] * 99}, "gradient_clipping", f"got [{'1, ' * 18}1,...; expected"),
    ({"steps_per_print": 0}, "steps_per_print", "expected a whole number >= 1 or null"),
    ({"dataloader_drop_last": "true"}, "dataloader_drop_last", "expected true or false; remove the quotes"),
    ({"dump_state": 2}, "dump_state", "got 2; expected true, false or null"),
    ({"train_batch_size": True}, "train_batch_size", "got true; expected a whole number >= 1"),
    ({"train_micro_batch_size_per_gpu": 4.5}, "train_micro_batch_size_per_gpu", "got 4.5"),
    ({"communication_data_type": "fp8"}, "communication_data_type", '"fp16", "bf16", "fp32" or null'),
    ({"vocabulary_size": 1.5}, "vocabulary_size", "a whole number or null"),
    ({"fp16": True}, "fp16", "an object: { ... }, false or null"),
    ({"zero_optimization": 1}, "zero_optimization", "an object: { ... }, true, false or null"),
    # "auto" where Hugging Face's integration does not write it
    ({"steps_per_print": "auto"}, "steps_per_print", "Hugging Face's integration; give a number"),
    ({"dataloader_drop_last": "auto"}, "dataloader_drop_last", "integration; give true or false"),
    (scheduler("OneCycle", cycle_min_lr="auto", cycle_max_lr=1), "scheduler.params.cycle_min_lr", "auto"),
    # the optimizer
    ({"optimizer": {}}, "optimizer.type", 'missing; expected a string such as "Adam"'),
    ({"optimizer": {"type": "sgd"}}, "optimizer.type", 'unknown optimizer "sgd"; did you mean "SGD"?'),
    ({"optimizer": {"type": "Xyzzy"}}, "optimizer.type", "known: ASGD, "),
    ({"optimizer": {"type": "Adam", "params": []}}, "optimizer.params", "an object"),
    (adam(lr=-1), "optimizer.params.lr", "got -1; expected a number >= 0"),
    (adam(betas=[0.9]), "optimizer.params.betas", "got [0.9]; expected a list of 2 numbers >= 0 and < 1"),
    (adam(betas=[0.9, 1]), "optimizer.params.betas[1]", "got 1; expected a number >= 0 and < 1"),
    (adam(amsgrad=True), "optimizer.params.amsgrad", '"torch_adam": true'),
    (adam(fused=True, foreach=True), "optimizer.params.fused", "foreach: true"),
    (optimizer("Lamb", amsgrad=True), "optimizer.params.amsgrad", "expected false"),
    (optimizer("Lamb", max_coeff=0.1, min_coeff=0.5), "optimizer.params.min_coeff", "at most max_coeff, which is 0.1"),
    (optimizer("SGD", nesterov=True), "optimizer.params.nesterov", "a momentum > 0 and a dampening of 0"),
    (optimizer("RMSprop", centered=2), "optimizer.params.centered", "true or false"),
    (optimizer("RMSprop", eps="x"), "optimizer.params.eps", "a number or a list of numbers"),
    # the schedule
    (scheduler("WarmupDecay"), "scheduler.type", 'unknown scheduler "WarmupDecay"; did you mean "WarmupDecayLR"?'),
    (scheduler("LRRangeTest", lr_range_test_min_lr=0), "scheduler.params.lr_range_test_min_lr", "numbers > 0"),
    (scheduler("LRRangeTest", lr_range_test_min_lr=[0.1, -1]), "scheduler.params.lr_range_test_min_lr[1]", "got -1"),
    (scheduler("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.01), "scheduler.params.cycle_min_lr", "at most cycle_max"),
    (scheduler("OneCycle", cycle_min_lr=[0.1, 0.2], cycle_max_lr=[1, 0.15]), "scheduler.params.cycle_min_lr",
     "got [0.1, 0.2]; expected at most cycle_max_lr, which is [1.0, 0.15]"),
    (scheduler("OneCycle", cycle_min_lr=[0.1, 0.2], cycle_max_lr=[1, 1, 1]), "scheduler.params.cycle_max_lr",
     "got 3 values; expected 2, one per parameter group"),
    (scheduler("OneCycle", **CYCLE, cycle_min_mom=0.95), "scheduler.params.cycle_min_mom", "which is 0.9 by default"),
    (scheduler("WarmupLR", warmup_min_lr=1, warmup_max_lr=0.1), "scheduler.params.warmup_min_lr", "warmup_max_lr"),
    (scheduler("WarmupDecayLR"), "scheduler.params.total_num_steps", "missing; expected a whole number >= 1"),
    (scheduler("WarmupDecayLR", total_num_steps=500), "scheduler.params.warmup_num_steps", "got 1000 by default"),
    (scheduler("StepLR"), "scheduler.params.step_size", "missing"),
    (scheduler("CosineAnnealingLR", T_max="x"), "scheduler.params.T_max", "a whole number"),
    ({**optimizer("Adagrad"), **scheduler("OneCycle", **CYCLE, cycle_max_mom=0.95)}, "scheduler.params.cycle_max_mom",
     "Adagrad has no momentum to cycle"),
    ({**adam(lr=0.01), **scheduler("WarmupLR", warmup_min_lr=0.1)}, "scheduler.params.warmup_min_lr",
     "at most optimizer.params.lr, which is 0.01"),
    # precision
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bf16.enabled", "set one of the two to false"),
    ({"fp16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "torch_autocast.enabled", "fp16.enabled: true"),
    ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype",
     'got "float16" with bf16.enabled: true; expected "bfloat16" or null'),
    ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "fp16.loss_scale_window", "the scale is dynamic"),
    ({"fp16": {"fp16_master_weights_and_grads": True}}, "fp16.fp16_master_weights_and_grads", "stage 1, 2 or 3"),
    ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states", '"bf16_master_weights_and_grads": true'),
    # ZeRO
    (zero(4), "zero_optimization.stage", "got 4; expected 0, 1, 2 or 3"),
    (zero(2, offload_optimizer={"ratio": 0.5}), "zero_optimization.offload_optimizer", "ratio is 0.5; expected 1"),
    (zero(0, compute_grad_norm=False), "zero_optimization.compute_grad_norm", "or stage 1 or 2; stage is 0"),
    (zero(2, compute_grad_norm=False), "zero_optimization.compute_grad_norm", "gradient_clipping is 1"),
    (zero(2, cpu_offload=True, offload_optimizer={}), "zero_optimization.cpu_offload", "given next to"),
    (zero(0, max_live_parameters=1, stage3_max_live_parameters=2), "zero_optimization.max_live_parameters", "the same"),
    (zero(0, max_live_parameters="1"), "zero_optimization.max_live_parameters", "remove the quotes"),
    (zero(2, offload_param={"device": "cpu"}), "zero_optimization.offload_param", 'expected "none", or stage 3'),
    (zero(1, cpu_offload_param=True), "zero_optimization.cpu_offload_param", "expected false, or stage 3"),
    (zero(1, zero_hpz_partition_size=2), "zero_optimization.zero_hpz_partition_size", "expected 1, or stage 3"),
    (zero(0, mics_shard_size=2), "zero_optimization.mics_shard_size", "or stage 1, 2 or 3"),
    (zero(3, mics_shard_size=2, zero_hpz_partition_size=2), "zero_optimization.mics_shard_size", "take one of the two"),
    ({**zero(3), "gradient_allreduce_op": "sum"}, "gradient_allreduce_op", "not supported with ZeRO stage 3"),
    ({**zero(2), "prescale_gradients": True}, "prescale_gradients", '"reduce_scatter": false'),
    ({**zero(3), "gradient_predivide_factor": 2.0}, "gradient_predivide_factor", "got 2; expected 1"),
    # sections that are not honoured
    ({"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": True}}}},
     "data_efficiency.data_sampling.curriculum_learning.enabled", "curriculum_metrics"),
    ({"data_efficiency": {"data_sampling": {"dynamic_batching": {"enabled": True}}}},
     "data_efficiency.data_sampling.dynamic_batching.enabled", "max_tokens"),
    ({"compile": {"offload_parameters": True, "offload_activation": True}}, "compile.offload_activation", "one of"),
    ({"compile": {"enabled": True, "disable": True}}, "compile.disable", "give one"),
    ({"gradient_allreduce_op": "sum", "compile": {"deepcompile": True}}, "gradient_allreduce_op", "DeepCompile"),
    ({"tensor_parallel": {"tensor_parallel": {"tp_size": 0}}}, "tensor_parallel.tensor_parallel.tp_size", ">= 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "path", "words"), MISTAKES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_mistake_is_reported_where_it_is_with_what_is_allowed(
    settings: dict[str, Any], path: str, words: str
) -> None:
    report = validate({"train_batch_size": 8, **settings})
    assert report.exit_code == 1
    assert [problem.path for problem in report.errors] == [path]
    assert words in report.errors[0].message


# Settings that DeepSpeed accepts and that are not built, the path that is refused, and words of the message.
REFUSALS = [
    ({"offload_optimizer": {}}, "offload_optimizer", "it belongs in zero_optimization"),
    ({"lr": 0.1}, "lr", "it belongs in optimizer.params"),
    ({"warmup_num_steps": 10}, "warmup_num_steps", "it belongs in scheduler.params"),
    ({"hostfile": "x"}, "hostfile", 'rename it to "_hostfile" if it is a comment'),
    ({"lr_scheduler": {}}, "lr_scheduler", 'did you mean "scheduler"?'),
    ({"max_grad_norm": 1}, "max_grad_norm", 'by "gradient_clipping"'),
    (adam(max_grad_norm=1.0), "optimizer.params.max_grad_norm", 'the top-level key "gradient_clipping"'),
    ({"flops_profiler": {"end_profile_step": 5}}, "flops_profiler.end_profile_step", "did you mean"),
    ({"optimizer": {"type": "Adam", "adam_w_mode": True}}, "optimizer.adam_w_mode", "move it into optimizer.params"),
    ({"compression_training": {"weight_quantization": {}}}, "compression_training", "DeepSpeed has removed it"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size", "got 2; there is no sequence parallelism"),
    ({"compile": {"deepcompile": True}}, "compile.deepcompile", "engine.compile()"),
    ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype", 'got "bf16"'),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype", "own dtype, which is fp32"),
    ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}, **zero(3)}, "data_types.grad_accum_dtype",
     "redline.zero.accumulate"),
    ({"communication_data_type": "fp16", "data_types": {"grad_accum_dtype": "fp32"}, **zero(3)},
     "data_types.grad_accum_dtype", 'expected "fp16" or null'),
    ({"fp16": {"fp16_master_weights_and_grads": True}, **zero(1)}, "fp16.fp16_master_weights_and_grads", "fp32"),
    (zero(1, offload_optimizer={"device": "nvme"}), "zero_optimization.offload_optimizer.device", '"cpu"'),
    (zero(3, zenflow={}), "zero_optimization.zenflow", "leave it out"),
    (zero(1, legacy_stage1=True), "zero_optimization.legacy_stage1", "DeepSpeed has removed it"),
    (zero(3, zero_quantized_weights=True), "zero_optimization.zero_quantized_weights", "quantized communication"),
    *((optimizer(name, lr=0.1, freeze_step=3), "optimizer.type", f'"{name}" is not built; ') for name in (
        "MuAdam", "MuAdamW", "MuSGD", "OneBitAdam", "OneBitLamb", "ZeroOneAdam", "CPUAdam", "LBFGS")),
    *((scheduler(name), "scheduler.type", f'"{name}" is not built; ') for name in (
        "LambdaLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")),
    (scheduler("WarmupDecayLR", total_num_steps="auto"), "scheduler.params.total_num_steps", "give a number"),
    ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, "train_batch_size", "a number"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "path", "words"), REFUSALS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_valid_deepspeed_and_not_built_is_told_apart(settings: dict[str, Any], path: str, words: str) -> None:
    config = {"train_batch_size": 8, **settings}
    with pytest.raises(UnsupportedConfigError) as caught:
        load_config(config)
    assert [problem.path for problem in caught.value.problems] == [path]
    assert words in caught.value.problems[0].message
    assert validate(config).exit_code == 3


def test_all_mistakes_are_named_at_once_with_line_and_column(write: Callable[[str], Path]) -> None:
    path = write("""{
  // a config with a mistake in every corner
  "train_batch_size": 10,
  "train_micro_batch_size_per_gpu": 4,
  "shceduler": {},
  "optimizer": {
    "type": "Adam",
    "params": {
      "lr": "0.001",
      "max_grad_norm": 1.0
    }
  },
  "scheduler": {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.01}
  },
  "compile": {"deepcompile": true}
}
""")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(
        "ds_config.json: 6 problems\n  3:3: train_batch_size: got 10; expected a multiple"
    )
    assert [(problem.line, problem.column, problem.path) for problem in caught.value.problems] == [
        (3, 3, "train_batch_size"), (5, 3, "shceduler"), (9, 7, "optimizer.params.lr"),
        (10, 7, "optimizer.params.max_grad_norm"), (15, 16, "scheduler.params.cycle_min_lr"),
        (17, 15, "compile.deepcompile"),
    ]  # fmt: skip


def test_one_mistake_does_not_hide_another() -> None:
    config = {
        "train_batch_size": 8,
        **optimizer("Adagrad", lr=0.1, lr_decai=1),
        **scheduler("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.01, cycle_min_mom=0.5, cycle_frist_step_size=9),
        "fp16": {"enabled": True, "loss_scale_window": 0, "hysterisis": 2},
        "bf16": {"enabled": True},
        **zero(5, cpu_offload=True, offload_optimizer={}),
        "aio": {"block_size": 0},
    }
    assert sorted(line.partition(": ")[0] for line in problems(config)) == [
        "aio.block_size", "bf16.enabled", "fp16.hysterisis", "fp16.loss_scale_window", "optimizer.params.lr_decai",
        "scheduler.params.cycle_frist_step_size", "scheduler.params.cycle_min_lr", "scheduler.params.cycle_min_mom",
        "zero_optimization.cpu_offload", "zero_optimization.stage",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        (scheduler("OneCycle", cycle_min_lr=0.1, cycle_max_lr="0.01"), "scheduler.params.cycle_max_lr"),
        ({**adam(lr="0.01"), **scheduler("WarmupLR", warmup_min_lr=0.1)}, "optimizer.params.lr"),
        ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": "4"}, "train_micro_batch_size_per_gpu"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": "fp32"}}, "scheduler.params"),
    ],
)
def test_a_rule_does_not_count_that_reads_what_has_a_mistake(settings: dict[str, Any], path: str) -> None:
    assert [line.partition(": ")[0] for line in problems({"train_batch_size": 8, **settings})] == [path]


def test_a_registered_class_is_checked_against_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine:
        def __init__(
            self, params: Any, lr: float, *, nuance: int = 1, schema: str = "", deep: bool = False
        ) -> None: ...

    monkeypatch.setattr("redline.optimizers._registered", {"Mine": Mine})
    monkeypatch.setattr(registry, "_registered", {"Mine": Mine})
    for section in ("optimizer", "scheduler"):
        given = {"lr": 1, "nuance": 2e3, "schema": "x"}
        config = load_config({"train_batch_size": 8, section: {"type": "Mine", "params": given}})
        assert getattr(config, section).arguments() == {"lr": 1.0, "nuance": 2000, "schema": "x"}
        found = problems(
            {"train_batch_size": 8, section: {"type": "Mine", "params": {"nuanse": 2, "schema": 1, "deep": 2}}}
        )
        assert sorted(line.partition(";")[0] for line in found) == [
            f"{section}.params.deep: got 2", f"{section}.params.lr: missing", f"{section}.params.nuanse: unknown key",
            f"{section}.params.schema: got 1",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        (zero(1, mics_shard_size=4), "mics_shard_size"),
        (zero(3, mics_shard_size=12), "mics_shard_size"),
        (zero(3, zero_hpz_partition_size=5), "zero_hpz_partition_size"),
    ],
)
def test_a_shard_group_divides_the_world_size(settings: dict[str, Any], path: str) -> None:
    config = {"train_micro_batch_size_per_gpu": 1, **settings}
    (line,) = problems(config, world_size=6)
    assert line.startswith(f"zero_optimization.{path}: got ") and line.endswith("from the argument): 1, 2, 3 or 6")
    load_config(config, world_size=1)  # where nothing is sharded


FOLDER = Path(__file__).parent / "deepspeed"
# Configs as people write them for DeepSpeed: exit code, and what is refused (3) or wrong (1).
WRITTEN = {
    "hf_zero3_offload": (3, ["scheduler.params.total_num_steps", "train_batch_size"]),
    "old_bert_lamb": (3, ["sparse_attention"]),
    "old_cpu_offload": (3, ["optimizer.params.max_grad_norm", "flops_profiler.end_profile_step"]),
    "plain_one_cycle": (0, []),
    "zero_pp_moe": (3, [
        *(f"zero_optimization.{key}" for key in (
            "zero_quantized_weights", "zero_quantized_gradients", "offload_optimizer.device",
            "offload_optimizer.ratio")),
        "checkpoint.load_universal", "seed"]),
    "refused_by_deepspeed": (1, [
        "bf16.loss_scale", "bf16.auto_cast", "fp16.opt_level", "zero_optimization.cpu_offload_params"]),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_a_config_for_deepspeed_comes_back_with_its_code_and_reasons(name: str) -> None:
    report = validate(FOLDER / f"{name}.json")
    code, paths = WRITTEN[name]
    assert report.exit_code == code, report.to_text()
    assert [problem.path for problem in report.errors or report.refusals] == paths
    assert all(problem.line for problem in (*report.errors, *report.refusals))
    assert json.loads(json.dumps(report.to_json()))["valid"] == (code != 1)
