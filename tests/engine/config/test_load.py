"""Where a config can come from, its defaults, the models, and the parameters that reach a class."""

from __future__ import annotations

import copy
import inspect
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from redline import schedulers
from redline.config import EngineConfig, OptimizerConfig, SchedulerConfig, build_schema, load_config, origins, validate
from redline.config.document import read
from redline.errors import ConfigError
from redline.optimizers import known

TYPICAL = """{
  "train_batch_size": 64, "train_micro_batch_size_per_gpu": 16, "steps_per_print": 100,
  "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
  "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 100,
                                                    "total_num_steps": 10000}},
  "gradient_clipping": 1.0, "prescale_gradients": false, "wall_clock_breakdown": false,
  "fp16": {"enabled": false, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
  "zero_optimization": {"stage": 0, "allgather_partitions": true, "reduce_scatter": true, "overlap_comm": false}
}"""
CONFIGS = sorted(path for path in (Path(__file__).parents[3] / "configs").glob("*.json") if path.name != "schema.json")


def error(source: Any, **options: Any) -> str:
    """The text of what is raised for an invalid config."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, **options)
    assert type(caught.value) is ConfigError
    return str(caught.value)


def arguments(section: str, type: str, **params: Any) -> dict[str, Any]:
    config = load_config({"train_batch_size": 8, section: {"type": type, "params": params or None}})
    found: dict[str, Any] = getattr(config, section).arguments()
    return found


# -- sources


def test_a_path_a_dict_and_a_text_are_the_same_config(write: Callable[[str], Path]) -> None:
    text = '// mine\n{"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.9],}}}'
    path = write(text)
    given = {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"betas": (0.8, 0.9)}}}
    kept = copy.deepcopy(given)
    assert load_config(path) == load_config(str(path)) == load_config(text) == load_config(given)
    assert given == kept


def test_a_config_knows_what_it_was_read_from() -> None:
    config = load_config('{"_note": "why", "train_batch_size": 8}')
    config.document()["train_batch_size"] = 9
    assert config.document() == {"_note": "why", "train_batch_size": 8}


def test_a_loaded_config_is_kept_or_resolved_for_another_world() -> None:
    config = load_config({"train_batch_size": 8})
    assert load_config(config) is load_config(config, world_size=1) is config
    again = load_config(config, world_size=4)
    assert (again.train_batch_size, again.train_micro_batch_size_per_gpu, again.world_size) == (8, 2, 4)
    assert load_config(again) is again
    assert "with world size 3: 6 (train_micro_batch_size_per_gpu 2) or 9 (" in error(again, world_size=3)
    assert load_config(EngineConfig(train_micro_batch_size_per_gpu=4), world_size=2).train_batch_size == 8


def test_a_config_can_be_copied_and_sent_to_another_process() -> None:
    config = load_config(TYPICAL, world_size=2)
    sent = pickle.loads(pickle.dumps(config))
    assert sent == copy.deepcopy(config) == config and sent.world_size == 2


def test_the_world_size_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert load_config({"train_batch_size": 8}).train_micro_batch_size_per_gpu == 2
    monkeypatch.setenv("WORLD_SIZE", "four")
    assert 'environment variable WORLD_SIZE: got "four"' in error({"train_batch_size": 8})


@pytest.mark.parametrize("source", ["ds_confg.json", "", "[1, 2]" * 999, "a\0b"])
def test_a_string_that_is_neither_file_nor_json_says_both(source: str) -> None:
    assert "neither a file nor JSON text" in error(source)


@pytest.mark.parametrize("source", [None, 3, ["a"], b"{}", object])
def test_a_source_of_another_kind_is_an_error(source: Any) -> None:
    assert f"got a Python {type(source).__name__}; expected a path, a dict, JSON text or an EngineConfig" in error(
        source
    )


def test_comment_keys_are_skipped_at_any_level() -> None:
    config = {
        "$schema": "./schema.json", "_fp16": {"enabled": True}, "//lr": 1, "train_batch_size": 8,
        "optimizer": {"type": "Adam", "_type": 3, "params": {"//lr": "x", "_comment": None}},
    }  # fmt: skip
    assert load_config(config).optimizer is not None


# -- values


def test_defaults_are_deepspeeds_and_a_config_is_frozen() -> None:
    config = load_config({"train_batch_size": 8})
    assert (config.gradient_clipping, config.steps_per_print, config.dataloader_drop_last) == (1.0, None, False)
    assert (config.optimizer, config.scheduler, config.redline.schedules) == (None, None, "deepspeed")
    assert config.redline.range_test.output_dir == "range_test"
    with pytest.raises(ValueError, match="frozen"):
        config.gradient_clipping = 2.0


def test_an_integral_float_is_a_whole_number_and_null_infers() -> None:
    config = load_config(
        {"train_batch_size": 2e3, "train_micro_batch_size_per_gpu": 4.0, "gradient_accumulation_steps": None}
    )
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (2000, 500)
    assert all(type(size) is int for size in (config.train_batch_size, config.train_micro_batch_size_per_gpu))


def test_deepspeeds_other_spellings_are_taken_as_it_takes_them() -> None:
    given = {"steps_per_print": float("inf"), "prescale_gradients": 1, "gradient_allreduce_op": "SUM",
             "bf16": {"enabled": 1}, "optimizer": {"type": "RMSprop", "params": {"centered": 1}}}  # fmt: skip
    config = load_config({"train_batch_size": 8, **given})
    assert (config.steps_per_print, config.prescale_gradients, config.gradient_allreduce_op) == (None, True, "sum")
    assert config.bf16 is not None and config.bf16.enabled is True
    assert config.optimizer is not None and config.optimizer.arguments() == {"centered": True}
    assert load_config('{"train_batch_size": 8, "steps_per_print": inf}').steps_per_print is None
    for wrong in ("-Infinity", "NaN"):
        assert f"got {wrong}" in error(f'{{"train_batch_size": 8, "steps_per_print": {wrong}}}')
    assert "gradient_clipping: got Infinity" in error('{"train_batch_size": 8, "gradient_clipping": Infinity}')


@pytest.mark.parametrize(
    ("section", "compiles"),
    [
        ({"enabled": True}, True), ({"backend": "eager"}, True), ({"disable": False, "backend": "inductor"}, True),
        ({"enabled": False, "backend": "eager"}, False), ({"disable": True}, False), ({"deepcompile": False}, False),
    ],
)  # fmt: skip
def test_the_section_compile_tells_whether_the_model_is_compiled(section: dict[str, Any], compiles: bool) -> None:
    compile = load_config({"train_batch_size": 8, "compile": section}).compile
    assert compile is not None and compile.compiles == compiles


def test_true_is_stage_1_and_false_is_none_as_in_deepspeed() -> None:
    stages = {}
    for value in (True, False, None):
        zero = load_config({"train_batch_size": 8, "zero_optimization": value}).zero_optimization
        stages[value] = zero and zero.stage
    assert stages == {True: 1, False: None, None: None}


def test_a_second_copy_of_more_ranks_than_there_are_is_among_all_as_in_deepspeed() -> None:
    load_config({"train_batch_size": 8, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, world_size=4)


ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}


def test_auto_is_the_default_or_inferred_and_its_origin_is_auto() -> None:
    warmup = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": 9000}
    config = load_config(
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "optimizer": ADAMW,
            "scheduler": {"type": "WarmupDecayLR", "params": warmup},
            "fp16": {"enabled": "auto", "loss_scale": 0},
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"reduce_bucket_size": "auto", "offload_param": {"device": "auto"}},
        },
        world_size=2,
    )
    assert (config.train_batch_size, config.gradient_accumulation_steps, config.gradient_clipping) == (8, 1, 1.0)
    assert config.optimizer is not None and config.optimizer.arguments() == {}
    assert config.scheduler is not None
    assert config.scheduler.arguments() == {"total_num_steps": 9000, "warmup_max_lr": None}  # the optimizer's
    assert {path for path, origin in origins(config).items() if origin == "auto"} == {
        "train_batch_size", "gradient_accumulation_steps", "gradient_clipping", "fp16.enabled", "bf16.enabled",
        *(f"optimizer.params.{name}" for name in ("lr", "betas", "eps", "weight_decay")),
        *(f"scheduler.params.warmup_{name}" for name in ("min_lr", "max_lr", "num_steps")),
        "zero_optimization.offload_param.device",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("epochs", "samples", "drop_last", "steps"), [(3, 100, 0, 19), (3, 100, 1, 18), (1, 3, 0, 1), (2, 9, 0, 2)]
)
def test_epochs_and_the_samples_tell_a_number_of_steps_that_is_auto(
    epochs: int, samples: int, drop_last: int, steps: int
) -> None:
    params = {"total_num_steps": "auto", "warmup_num_steps": 1}
    given = {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "dataloader_drop_last": drop_last,
        "scheduler": {"type": "WarmupDecayLR", "params": params}, "redline": {"epochs": epochs},
    }  # fmt: skip
    config = load_config(given, world_size=2, num_samples=samples)
    assert config.scheduler is not None and config.scheduler.arguments()["total_num_steps"] == steps
    assert origins(config)["scheduler.params.total_num_steps"] == "auto"
    for missing in ({"num_samples": samples, "epochs": None}, {"num_samples": None, "epochs": epochs}):
        unknown = {**given, "redline": {"epochs": missing["epochs"]}}
        with pytest.raises(ConfigError, match=r"total_num_steps: got \"auto\".*give a number, or redline\.epochs"):
            load_config(unknown, world_size=2, num_samples=missing["num_samples"])


def test_a_config_whose_batch_nothing_tells_is_judged_all_the_same() -> None:
    report = validate({"train_batch_size": "auto", "optimizer": ADAMW})
    assert report.config is not None and report.config.world_size is None
    assert report.to_json()["resolved"] == {}
    assert "batch:" not in report.to_text()


# -- optimizers and schedules


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        # deepspeed 0.19.8, inspect.signature of deepspeed.ops.adam.FusedAdam, FusedLion, and of FusedLamb less
        # max_grad_norm, which is refused
        ("Adam", {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "adam_w_mode": True,
                  "weight_decay": 0.0, "amsgrad": False, "set_grad_none": True}),
        ("Lamb", {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "eps_inside_sqrt": False,
                  "weight_decay": 0.0, "max_coeff": 10.0, "min_coeff": 0.01, "amsgrad": False}),
        ("Lion", {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "set_grad_none": True}),
        # what MuonWithAuxAdam sets where the config has nothing
        ("Muon", {"momentum": 0.95, "weight_decay": 0.0, "ns_method": "gram", "betas": (0.9, 0.95), "eps": 1e-10}),
    ],
    ids=["Adam", "Lamb", "Lion", "Muon"],
)  # fmt: skip
def test_deepspeeds_optimizers_have_its_parameters_and_defaults(name: str, signature: dict[str, Any]) -> None:
    fields = OptimizerConfig.models[name].model_fields
    assert {each: fields[each].default for each in signature} == signature


@pytest.mark.parametrize(
    ("model", "cls"),
    [
        *((OptimizerConfig.models[name], getattr(torch.optim, name)) for name in ("SGD", "Adagrad")),
        *((model, getattr(schedulers, name)) for name, model in SchedulerConfig.models.items()),
    ],
)
def test_a_model_has_the_names_and_defaults_of_its_constructor(model: Any, cls: Any) -> None:
    _, *parameters = inspect.signature(cls).parameters.values()
    signature = {
        parameter.name: ... if parameter.default is parameter.empty else parameter.default
        for parameter in parameters
        if parameter.name not in ("corrected", "growth")  # these are keys of `redline`
    }
    fields = {name: ... if field.is_required() else field.default for name, field in model.model_fields.items()}
    assert fields == signature


@pytest.mark.parametrize(
    ("written", "canonical"),
    [("adam", "Adam"), ("ADAMW", "AdamW"), ("AdaGrad", "Adagrad"), ("RMSprop", "RMSprop"), ("LAMB", "Lamb"),
     ("lion", "Lion"), ("muon", "Muon")],
)  # fmt: skip
def test_names_are_read_in_the_case_that_deepspeed_reads_them_in(written: str, canonical: str) -> None:
    optimizer = load_config({"train_batch_size": 8, "optimizer": {"type": written}}).optimizer
    assert optimizer is not None and optimizer.type == canonical


def test_arguments_are_what_was_given_and_nothing_else() -> None:
    assert arguments("optimizer", "Adam") == arguments("scheduler", "WarmupLR") == {}
    assert arguments("optimizer", "Adam", betas=[0, 0.5], lr=1) == {"lr": 1.0, "betas": (0.0, 0.5)}
    assert arguments("optimizer", "RMSprop", alpha=0.9, centered=True) == {"alpha": 0.9, "centered": True}
    assert arguments("optimizer", "RMSprop", lr="auto") == {}, "left to torch"
    assert arguments("optimizer", "RAdam", betas=[0.8, 0.9])["betas"] == (0.8, 0.9)
    assert arguments("scheduler", "StepLR", step_size=30) == {"step_size": 30}
    for name in known().keys() - {"LBFGS"}:
        assert arguments("optimizer", name, lr=0.1) == {"lr": 0.1}
    given = {
        "cycle_min_lr": [0.1, 0.2],
        "cycle_max_lr": 1,
        "cycle_first_step_size": 2e3,
        "cycle_second_step_size": None,
    }
    assert arguments("scheduler", "OneCycle", **given) == {
        "cycle_min_lr": (0.1, 0.2), "cycle_max_lr": 1.0, "cycle_first_step_size": 2000, "cycle_second_step_size": None,
    }  # fmt: skip


def test_momentum_is_only_judged_where_it_is_cycled() -> None:
    cycle = {"cycle_min_lr": 0, "cycle_max_lr": 1}
    arguments("scheduler", "OneCycle", **cycle, cycle_min_mom=0.95, cycle_momentum=False)
    for name in ("Adam", "SGD", "RMSprop", "RAdam"):
        section = {"type": "OneCycle", "params": {**cycle, "cycle_max_mom": 0.95}}
        load_config({"train_batch_size": 8, "optimizer": {"type": name}, "scheduler": section})
    load_config(
        {"train_batch_size": 8, "optimizer": {"type": "Adagrad"}, "scheduler": {"type": "OneCycle", "params": cycle}}
    )


# -- the configs that we ship


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_runs_as_written_and_satisfies_its_schema(path: Path) -> None:
    assert validate(path).exit_code == 0
    document = read(path).value
    assert (path.parent / document["$schema"]).samefile(path.parent / "schema.json")
    Draft202012Validator(build_schema()).validate(document)


def test_the_range_test_is_that_of_the_tutorial() -> None:
    config = load_config(next(path for path in CONFIGS if path.stem == "lr_range_test"))
    assert config.scheduler is not None
    assert config.scheduler.arguments() == {
        "lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 200, "lr_range_test_step_rate": 5.0,
        "lr_range_test_staircase": False,
    }  # fmt: skip


def test_a_typical_config_is_read_in_milliseconds() -> None:
    def once() -> float:
        start = time.perf_counter()
        load_config(TYPICAL)
        return time.perf_counter() - start

    assert min(once() for _ in range(50)) < 4e-3


def test_an_error_comes_out_of_a_pickle_with_its_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"train_batch_size": "x", "shceduler": {}})
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (copied.problems, str(copied)) == (caught.value.problems, str(caught.value))
