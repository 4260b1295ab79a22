"""Training loops of a script's own with Accelerate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from tests.peers.tiny import VOCABULARY, Case, gpt, mean, sentences

__all__ = ["config_file", "evaluate", "hand_over", "resume", "train"]

STEPS, ACCUMULATION = 4, 2


@dataclass
class Loop:
    """What `prepare` makes, and the loop over it."""

    accelerator: Any
    model: Any
    optimizer: Any
    scheduler: Any
    loader: Any

    def fit(self, steps: int = STEPS) -> list[float]:
        """Some optimizer steps over the first batches; the losses of the micro-batches."""
        losses = []
        for _, tokens in zip(range(steps * ACCUMULATION), self.loader):
            with self.accelerator.accumulate(self.model):
                loss = self.model(input_ids=tokens, labels=tokens).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(mean(loss))
        return losses


def final_loss(state: dict[str, Any]) -> float:
    """Of the model that a state dict holds."""
    model: Any = gpt()
    # DeepSpeed leaves a tied weight out at stage 3.
    missing, _ = model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    assert {*missing} <= {"lm_head.weight"}
    tokens = torch.tensor([each["input_ids"] for each in sentences(8, seed=2)])
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


def accelerator(case: Case, plugin: Any = None) -> Any:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin

    PartialState(cpu=True)  # Accelerator(cpu=True) would train without the plugin
    plugin = plugin or DeepSpeedPlugin(
        zero_stage=case["stage"], gradient_accumulation_steps=ACCUMULATION, gradient_clipping=0.5,
        zero3_save_16bit_model=True, zero3_init_flag=False,
    )  # fmt: skip
    return Accelerator(deepspeed_plugin=plugin, mixed_precision="bf16" if case["precision"] == "bf16" else "no")


def loader() -> DataLoader[Any]:
    return DataLoader(torch.tensor([each["input_ids"] for each in sentences(64)]), batch_size=2)  # type: ignore[arg-type]


def loop(case: Case) -> Loop:
    """With an optimizer and a schedule of the script's own: the learning rate halves at each step."""
    made, model = accelerator(case), gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return Loop(made, *made.prepare(model, optimizer, scheduler, loader()))


def train(case: Case, folder: Path) -> dict[str, Any]:
    """The loop, and the trained model in the three ways in which scripts take it out."""
    made = loop(case)
    losses = made.fit()
    found = {"loss": losses, "lr": made.scheduler.get_last_lr()[0]}
    assert type(made.accelerator.unwrap_model(made.model)).__name__ == "GPT2LMHeadModel"
    state = made.accelerator.get_state_dict(made.model)
    made.accelerator.wait_for_everyone()
    if made.accelerator.is_main_process:
        found["final"] = final_loss(state)
    made.accelerator.save_model(made.model, folder / "model")
    made.accelerator.wait_for_everyone()
    if made.accelerator.is_main_process:
        from safetensors.torch import load_file

        found["saved"] = final_loss(load_file(folder / "model" / "model.safetensors"))
    return found


def resume(case: Case, folder: Path) -> dict[str, Any]:
    """`save_state` after half the steps; the other half, then again from there by `load_state` in a new model."""
    made = loop(case)
    made.fit(STEPS // 2)
    made.accelerator.save_state(str(folder / "state"))
    losses = made.fit(STEPS // 2)
    _start_over()
    made = loop(case)
    made.accelerator.load_state(str(folder / "state"))
    return {"loss": losses, "resumed": made.fit(STEPS // 2), "lr": made.scheduler.get_last_lr()[0]}


def config_file(case: Case, folder: Path) -> dict[str, Any]:
    """A config with optimizer and schedule, for which the script has Accelerate's dummies, and "auto" where it may."""
    from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler

    settings = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": ACCUMULATION, "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(
            ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")},
        "bf16": {"enabled": "auto"}, "steps_per_print": 1_000_000,
        "zero_optimization": {"stage": case["stage"], "reduce_bucket_size": "auto",
                              "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"},
    }  # fmt: skip
    made = accelerator(case, DeepSpeedPlugin(hf_ds_config=settings))
    model = gpt()
    optimizer = DummyOptim(model.parameters(), lr=0.01, weight_decay=0.1)
    scheduler = DummyScheduler(optimizer, total_num_steps=STEPS * case["ranks"], warmup_num_steps=1)
    prepared = Loop(made, *made.prepare(model, optimizer, scheduler, loader()))
    return {"loss": prepared.fit(), "lr": prepared.scheduler.get_last_lr()[0]}


def evaluate(case: Case, folder: Path) -> dict[str, Any]:
    """A model in training, evaluated between epochs, its predictions gathered from the ranks."""
    made = loop(case)
    losses, counts = [], []
    held_out = made.accelerator.prepare(loader())
    for _ in range(2):
        losses += made.fit(2)
        made.model.eval()
        right = []
        for tokens in held_out:
            with torch.no_grad():
                predicted = made.model(input_ids=tokens).logits.argmax(-1)
            predicted, known = made.accelerator.gather_for_metrics((predicted[:, :-1], tokens[:, 1:]))
            right.append((predicted == known).float())
        counts.append(len(torch.cat(right)))
        made.model.train()
    assert counts == [64, 64] and VOCABULARY
    return {"loss": losses, "accuracy": float(torch.cat(right).mean())}


def hand_over(case: Case, folder: Path) -> float:
    """Train and save the state, or load that of other ranks; the loss then."""
    made = loop(case)
    saved = (folder / "state").exists()
    made.accelerator.wait_for_everyone()
    if saved:
        made.accelerator.load_state(str(folder / "state"))
    else:
        made.fit()
        made.accelerator.save_state(str(folder / "state"))
    state = made.accelerator.get_state_dict(made.model)
    return final_loss(state) if made.accelerator.is_main_process else 0.0


def _start_over() -> None:
    from tests.peers.tiny import start_over

    start_over()
