"""The mistakes that users of DeepSpeed report most: the whole text that each gets here.

Typos, values that fail at the first step, the batch, "auto", the format, defaults that surprise.
"""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import load_config, origins
from engine.errors import ConfigError


def text_of(source: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, **options)
    return str(caught.value)


SOUND = {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"lr": 0.001}}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # Typos at any level
        ({"gradient_clipp1ng": 1.0}, 'gradient_clipp1ng: unknown key; did you mean "gradient_clipping"?'),
        ({"schedulerr": {}}, 'schedulerr: unknown key; did you mean "scheduler"?'),
        ({"zero_optimization": {"stagee": 2}}, 'zero_optimization.stagee: unknown key; did you mean "stage"?'),
        ({"fp16": {"enabledd": True}}, 'fp16.enabledd: unknown key; did you mean "enabled"?'),
        # Values that DeepSpeed finds at the first step or never
        (
            {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.01}}},
            "scheduler.params.cycle_min_lr: got 0.1; expected at most cycle_max_lr, which is 0.01",
        ),
        (
            {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": -0.1, "cycle_max_lr": 0.01}}},
            "scheduler.params.cycle_min_lr: got -0.1; expected a number >= 0 or a list of numbers >= 0",
        ),
        ({"gradient_clipping": "1.0"}, 'gradient_clipping: got "1.0"; expected a number >= 0; remove the quotes'),
        (
            {"optimizer": {"params": {"lr": 0.1}}, "scheduler": {"type": "WarmupLR"}},
            'optimizer.type: missing; expected a string such as "Adam"',
        ),
        (
            {"gradient_accumulation_steps": -1},
            "gradient_accumulation_steps: got -1; expected a whole number >= 1",
        ),
        (
            {"train_micro_batch_size_per_gpu": 4.5},
            "train_micro_batch_size_per_gpu: got 4.5; expected a whole number >= 1",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"learning_rate": 0.1}}},
            "optimizer.params.learning_rate: unknown key; known here: lr, weight_decay, foreach, fused, betas, eps, "
            "bias_correction, amsgrad, adam_w_mode, torch_adam, set_grad_none, fp32_optimizer_states",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_step": 10}}},
            'scheduler.params.warmup_step: unknown key; did you mean "warmup_type"?',
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.0]}}},
            "optimizer.params.betas[1]: got 1.0; expected a number >= 0 and < 1",
        ),
        (
            {
                "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 900, "total_num_steps": 500}},
            },
            "scheduler.params.warmup_num_steps: got 900; expected at most total_num_steps, which is 500",
        ),
        # The batch
        (
            {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4},
            "train_batch_size: got 10; expected a multiple of 8 = 4 (train_micro_batch_size_per_gpu, given) x "
            "2 (world size, from the argument); with world size 2: 8 (gradient_accumulation_steps 1) or "
            "16 (gradient_accumulation_steps 2)",
        ),
    ],
)
def test_a_mistake_says_where_what_and_what_to_do(settings: dict[str, Any], message: str) -> None:
    text = text_of({**SOUND, **settings}, world_size=2 if "train_batch_size" in settings else None)
    assert text == f"config: 1 problem\n  {message}"


def test_what_deepspeeds_reader_lets_pass_is_read_and_a_key_given_twice_is_not() -> None:
    text = '{\n  # DeepSpeed reads Hjson\n  "train_batch_size": 8, // samples\n  /* so do we */\n}'
    assert load_config(text).train_batch_size == 8
    assert text_of('{"train_batch_size": 8,\n "train_batch_size": 16}') == (
        "config: 1 problem\n  2:2: train_batch_size: given twice, on line 1 and on line 2; remove one"
    )


def test_defaults_that_surprise_can_be_seen() -> None:
    config = load_config({"train_batch_size": 8, "optimizer": {"type": "Adam"}})
    assert config.gradient_clipping == 1.0
    assert origins(config)["gradient_clipping"] == "default"
    assert config.optimizer is not None
    assert config.optimizer.params.model_dump()["adam_w_mode"] is True


def test_one_mistake_does_not_hide_another() -> None:
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "Adagrad", "params": {"lr": 0.1, "lr_decai": 1}},
        "scheduler": {
            "type": "OneCycle",
            "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.01, "cycle_min_mom": 0.5, "cycle_frist_step_size": 9},
        },
        "fp16": {"enabled": True, "loss_scale_window": 0, "hysterisis": 2},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 5, "cpu_offload": True, "offload_optimizer": {}},
    }
    assert text_of(config).splitlines() == [
        "config: 9 problems",
        '  optimizer.params.lr_decai: unknown key; did you mean "lr_decay"?',
        '  scheduler.params.cycle_frist_step_size: unknown key; did you mean "cycle_first_step_size"?',
        '  fp16.hysterisis: unknown key; did you mean "hysteresis"?',
        "  zero_optimization.stage: got 5; expected 0, 1, 2 or 3",
        "  scheduler.params.cycle_min_lr: got 0.1; expected at most cycle_max_lr, which is 0.01",
        "  fp16.loss_scale_window: got 0; expected > 0: the scale is dynamic",
        "  zero_optimization.cpu_offload: given beside offload_optimizer, which takes its place; remove it",
        "  scheduler.params.cycle_min_mom: Adagrad has no momentum to cycle; set cycle_momentum to false and leave its "
        "bounds out",
        "  bf16.enabled: got true beside fp16.enabled: true; a run has one number format; set one of the two to false",
    ]


def test_a_rule_is_not_judged_by_what_has_a_mistake() -> None:
    scheduler = {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": "0.01"}}
    assert text_of({**SOUND, "scheduler": scheduler}) == (
        'config: 1 problem\n  scheduler.params.cycle_max_lr: got "0.01"; expected a number > 0 or '
        "a list of numbers > 0; remove the quotes"
    )
