""" "auto": which keys may be it, and what it comes to where nobody has filled it in."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import UnsupportedConfigError, load_config, origins, validate
from engine.errors import ConfigError

ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}


def test_auto_is_the_default_or_inferred_and_its_origin_is_auto() -> None:
    config = load_config(
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "optimizer": ADAMW,
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {
                    "warmup_min_lr": "auto",
                    "warmup_max_lr": "auto",
                    "warmup_num_steps": "auto",
                    "total_num_steps": 9000,
                },
            },
            "fp16": {"enabled": "auto", "loss_scale": 0},
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"reduce_bucket_size": "auto", "offload_param": {"device": "auto"}},
        },
        world_size=2,
    )
    assert (config.train_batch_size, config.gradient_accumulation_steps, config.gradient_clipping) == (8, 1, 1.0)
    assert config.optimizer is not None and config.scheduler is not None
    assert config.optimizer.arguments() == {}
    assert config.scheduler.arguments() == {"total_num_steps": 9000, "warmup_max_lr": None}  # the optimizer's
    found = origins(config)
    assert {path for path, origin in found.items() if origin == "auto"} == {
        "train_batch_size",
        "gradient_accumulation_steps",
        "gradient_clipping",
        *(f"optimizer.params.{name}" for name in ("lr", "betas", "eps", "weight_decay")),
        *(f"scheduler.params.warmup_{name}" for name in ("min_lr", "max_lr", "num_steps")),
        "fp16.enabled",
        "bf16.enabled",
        "zero_optimization.offload_param.device",
    }


def test_auto_for_a_torch_optimizer_is_left_to_torch() -> None:
    config = load_config({"train_batch_size": 8, "optimizer": {"type": "RMSprop", "params": {"lr": "auto"}}})
    assert config.optimizer is not None and config.optimizer.arguments() == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"},
            'train_batch_size: got "auto", which Hugging Face\'s integration fills in and nothing here can; '
            "give train_batch_size or train_micro_batch_size_per_gpu a number",
        ),
        (
            {"train_batch_size": 8, "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}},
            'scheduler.params.total_num_steps: got "auto", which Hugging Face\'s integration fills in and '
            "nothing here can; give a number",
        ),
    ],
)
def test_what_nothing_tells_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfigError) as caught:
        load_config(settings)
    assert str(caught.value) == f"config: 1 problem\n  {message}"
    assert validate(settings).exit_code == 3


def test_a_config_whose_batch_nothing_tells_is_judged_all_the_same() -> None:
    report = validate({"train_batch_size": "auto", "optimizer": ADAMW})
    assert report.config is not None and report.config.world_size is None
    assert report.to_json()["resolved"] == {}
    assert "batch:" not in report.to_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"steps_per_print": "auto"},
        {"optimizer": {"type": "auto"}},
        {"optimizer": {"type": "Adam", "params": {"amsgrad": "auto"}}},
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": "auto", "cycle_max_lr": 1}}},
        {"activation_checkpointing": {"profile": "auto"}},
        {"vocabulary_size": "auto"},
    ],
)
def test_auto_elsewhere_is_a_mistake(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="auto"):
        load_config({"train_batch_size": 8, **settings})
    assert validate({"train_batch_size": 8, **settings}).exit_code == 1
