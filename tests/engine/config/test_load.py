"""Sources, and everything that is wrong found in one reading: the texts that users see."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, UnsupportedConfigError, load_config
from engine.errors import ConfigError

TYPICAL = """{
  "train_batch_size": 64, "train_micro_batch_size_per_gpu": 16, "steps_per_print": 100,
  "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
  "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 100,
                                                    "total_num_steps": 10000}},
  "gradient_clipping": 1.0, "prescale_gradients": false, "wall_clock_breakdown": false,
  "fp16": {"enabled": false, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
  "zero_optimization": {"stage": 0, "allgather_partitions": true, "reduce_scatter": true, "overlap_comm": false}
}"""


def error(source: Any, **options: Any) -> str:
    """The text of what is raised for an invalid config."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, **options)
    assert type(caught.value) is ConfigError
    return str(caught.value)


def wrong(**settings: Any) -> str:
    return error({"train_batch_size": 8, **settings}).removeprefix("config: 1 problem\n  ")


# Sources


def test_a_path_a_dict_and_a_text_are_the_same_config(write: Callable[[str], Path]) -> None:
    text = '// mine\n{"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.9],}}}'
    path = write(text)
    given = {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"betas": (0.8, 0.9)}}}
    kept = copy.deepcopy(given)
    assert load_config(path) == load_config(str(path)) == load_config(text) == load_config(given)
    assert given == kept


def test_a_config_knows_what_it_was_read_from() -> None:
    config = load_config('{"_note": "why", "train_batch_size": 8}')
    assert config.document() == {"_note": "why", "train_batch_size": 8}
    config.document()["train_batch_size"] = 9
    assert config.document()["train_batch_size"] == 8


def test_a_loaded_config_is_kept_or_resolved_for_another_world() -> None:
    config = load_config({"train_batch_size": 8})
    assert load_config(config) is config
    assert load_config(config, world_size=1) is config
    again = load_config(config, world_size=4)
    assert (again.train_batch_size, again.train_micro_batch_size_per_gpu, again.world_size) == (8, 2, 4)
    assert load_config(again) is again
    assert "with world size 3: 6 (train_micro_batch_size_per_gpu 2) or 9 (" in error(again, world_size=3)


def test_a_config_can_be_copied_and_sent_to_another_process() -> None:
    config = load_config(TYPICAL, world_size=2)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)).world_size == 2


def test_a_model_built_by_hand_can_be_resolved() -> None:
    assert load_config(EngineConfig(train_micro_batch_size_per_gpu=4), world_size=2).train_batch_size == 8


def test_the_world_size_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert load_config({"train_batch_size": 8}).train_micro_batch_size_per_gpu == 2
    monkeypatch.setenv("WORLD_SIZE", "four")
    assert error({"train_batch_size": 8}) == (
        'config: 1 problem\n  environment variable WORLD_SIZE: got "four"; expected a whole number >= 1'
    )


def test_a_string_that_is_neither_file_nor_json_says_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    says = f'neither a file nor JSON text: nothing of this name in {tmp_path}, and JSON text starts with "{{"'
    assert error("ds_confg.json") == f'"ds_confg.json": 1 problem\n  {says}'
    assert error("") == f'"": 1 problem\n  {says}'
    assert error("[1, 2]" * 999).endswith(says)
    assert error("a\0b").endswith(says)


@pytest.mark.parametrize("source", [None, 3, ["a"], b"{}", object])
def test_a_source_of_another_kind_is_an_error(source: Any) -> None:
    kind = type(source).__name__
    assert (
        error(source)
        == f"config: 1 problem\n  got a Python {kind}; expected a path, a dict, JSON text or an EngineConfig"
    )


# Defaults


def test_defaults_are_deepspeeds() -> None:
    config = load_config({"train_batch_size": 8})
    assert config.gradient_clipping == 1.0
    assert config.steps_per_print is None
    assert config.dataloader_drop_last is False
    assert (config.optimizer, config.scheduler) == (None, None)
    assert (config.redline.schedules, config.redline.find_unused_parameters) == ("deepspeed", False)
    assert config.redline.range_test.output_dir == "range_test"


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config({"train_batch_size": 8}).gradient_clipping = 2.0


# C1: typos are not taken in silence, and a key can be switched off by renaming it


def test_typos_are_found_at_every_level() -> None:
    config = {
        "train_batch_size": 8,
        "gradient_clipp1ng": 1.0,
        "schedulerr": {},
        "optimizer": {"type": "Adam", "parms": {}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_nm_steps": 10}},
        "redline": {"range_test": {"outputdir": "x"}, "schedule": "corrected"},
        "reticulate_splines": True,
        "lr": 0.1,
        "warmup_num_steps": 10,
    }
    assert error(config) == "\n".join(
        [
            "config: 9 problems",
            '  gradient_clipp1ng: unknown key; did you mean "gradient_clipping"?',
            '  schedulerr: unknown key; did you mean "scheduler"?',
            '  optimizer.parms: unknown key; did you mean "params"?',
            '  scheduler.params.warmup_nm_steps: unknown key; did you mean "warmup_num_steps"?',
            '  redline.range_test.outputdir: unknown key; did you mean "output_dir"?',
            '  redline.schedule: unknown key; did you mean "schedules"?',
            '  reticulate_splines: unknown key; rename it to "_reticulate_splines" if it is a comment',
            "  lr: unknown key here; it belongs in optimizer.params",
            "  warmup_num_steps: unknown key here; it belongs in scheduler.params",
        ]
    )


def test_a_key_that_deepspeed_ignores_and_that_is_no_slip_is_refused() -> None:
    for settings, message in (
        ({"offload_optimizer": {}}, "offload_optimizer: unknown key here; it belongs in zero_optimization"),
        ({"hostfile": "x"}, 'hostfile: unknown key; rename it to "_hostfile" if it is a comment'),
        ({"lr_scheduler": {}}, 'lr_scheduler: unknown key; did you mean "scheduler"?'),
        ({"max_grad_norm": 1}, 'max_grad_norm: unknown key here; gradients are clipped by "gradient_clipping"'),
        ({"flops_profiler": {"end_profile_step": 5}}, "flops_profiler.end_profile_step: unknown key; did you mean"),
        ({"flops_profiler": {"color": 1}}, "flops_profiler.color: unknown key; known here: enabled, "),
    ):
        with pytest.raises(UnsupportedConfigError) as caught:
            load_config({"train_batch_size": 8, **settings})
        assert str(caught.value).startswith(f"config: 1 problem\n  {message}")


def test_a_key_renamed_into_a_comment_is_skipped() -> None:
    config = {
        "$schema": "./schema.json",
        "_fp16": {"enabled": True},
        "//lr": 1,
        "train_batch_size": 8,
        "optimizer": {"type": "Adam", "_type": 3, "params": {"//lr": "x", "_comment": None}},
    }
    assert load_config(config).optimizer is not None


# C3: values are checked before anything runs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clipping": "1.0"}, 'gradient_clipping: got "1.0"; expected a number >= 0; remove the quotes'),
        ({"gradient_clipping": -1}, "gradient_clipping: got -1; expected a number >= 0"),
        ({"gradient_clipping": None}, "gradient_clipping: got null; expected a number >= 0"),
        ({"gradient_clipping": [1] * 99}, f"gradient_clipping: got [{'1, ' * 18}1,...; expected a number >= 0"),
        ({"steps_per_print": 0}, "steps_per_print: got 0; expected a whole number >= 1 or null"),
        (
            {"dataloader_drop_last": "true"},
            'dataloader_drop_last: got "true"; expected true or false; remove the quotes',
        ),
        (
            {"redline": {"schedules": "deepsped"}},
            'redline.schedules: got "deepsped"; expected "deepspeed" or "corrected"; did you mean "deepspeed"?',
        ),
        ({"train_batch_size": True}, "train_batch_size: got true; expected a whole number >= 1"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps: got -1; expected a whole number >= 1"),
        (
            {"train_micro_batch_size_per_gpu": 4.5},
            "train_micro_batch_size_per_gpu: got 4.5; expected a whole number >= 1",
        ),
    ],
)
def test_a_wrong_value_says_what_was_given_what_is_allowed_and_what_to_do(
    settings: dict[str, Any], message: str
) -> None:
    assert wrong(**settings) == message


def test_an_integral_float_is_a_whole_number() -> None:
    config = load_config({"train_batch_size": 2e3, "train_micro_batch_size_per_gpu": 4.0})
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (2000, 500)
    assert all(type(size) is int for size in (config.train_batch_size, config.train_micro_batch_size_per_gpu))


def test_null_batch_sizes_are_inferred() -> None:
    assert load_config({"train_batch_size": 8, "gradient_accumulation_steps": None}).gradient_accumulation_steps == 1


# C4: the batch triple; its texts are in test_batch.py


def test_the_batch_is_not_judged_while_one_of_its_numbers_is_wrong() -> None:
    assert error({"train_batch_size": 10, "train_micro_batch_size_per_gpu": "4"}) == (
        'config: 1 problem\n  train_micro_batch_size_per_gpu: got "4"; expected a whole number >= 1; remove the quotes'
    )


def test_a_batch_that_is_not_given_is_an_error_at_its_key() -> None:
    assert (
        error({})
        == "config: 1 problem\n  train_batch_size: missing; give train_batch_size or train_micro_batch_size_per_gpu"
    )


# C5: "auto"


def test_auto_is_an_error_where_nobody_fills_it_in() -> None:
    auto = '"auto" is filled in by Hugging Face\'s integration'
    assert wrong(steps_per_print="auto") == (
        f'steps_per_print: got "auto"; expected a whole number >= 1 or null; {auto}; give a number'
    )
    assert wrong(dataloader_drop_last="auto") == (
        f'dataloader_drop_last: got "auto"; expected true or false; {auto}; give true or false'
    )


# C6: format


def test_a_key_given_twice_names_both_lines(write: Callable[[str], Path]) -> None:
    path = write('{\n  "train_batch_size": 8,\n  "train_batch_size": 16\n}')
    assert error(path) == (
        "ds_config.json: 1 problem\n  3:3: train_batch_size: given twice, on line 2 and on line 3; remove one"
    )


# All at once


def test_five_mistakes_of_five_kinds_are_named_at_once_with_line_and_remedy(write: Callable[[str], Path]) -> None:
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
    expected = """ds_config.json: 6 problems
  3:3: train_batch_size: got 10; expected a multiple of 4 = 4 (train_micro_batch_size_per_gpu, given) x 1 (world size, the default: WORLD_SIZE is not set); with world size 1: 8 (gradient_accumulation_steps 2) or 12 (gradient_accumulation_steps 3)
  5:3: shceduler: unknown key; did you mean "scheduler"?
  9:7: optimizer.params.lr: got "0.001"; expected a number >= 0; remove the quotes
  10:7: optimizer.params.max_grad_norm: unknown key here; gradients are clipped by the top-level key "gradient_clipping"; move the number there
  15:16: scheduler.params.cycle_min_lr: got 0.1; expected at most cycle_max_lr, which is 0.01
  17:3: compile: not built yet; engine.compile() compiles without it"""  # noqa: E501
    assert error(path) == expected


def test_a_config_that_only_asks_for_what_is_not_built_is_told_apart() -> None:
    config = {"train_batch_size": 8, "tensor_parallel": {"autotp_size": 2}, "optimizer": {"type": "OneBitLamb"}}
    with pytest.raises(UnsupportedConfigError) as caught:
        load_config(config)
    assert [problem.path for problem in caught.value.problems] == ["tensor_parallel", "optimizer.type"]


def test_a_typical_config_is_read_in_two_milliseconds() -> None:
    def once() -> float:
        start = time.perf_counter()
        load_config(TYPICAL)
        return time.perf_counter() - start

    assert min(once() for _ in range(20)) < 2e-3
