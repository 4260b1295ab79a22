"""Training runs of Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from tests.peers.tiny import Case, gpt, mean, sentences

__all__ = ["hand_over", "resume", "train"]

STEPS = 4


def module() -> Any:
    """A LightningModule around the model, that notes its losses."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt()
            self.losses: list[float] = []

        def loss(self, tokens: Any) -> Any:
            return self.model(input_ids=tokens, labels=tokens).loss

        def training_step(self, tokens: Any, index: int) -> Any:
            loss = self.loss(tokens)
            self.losses.append(mean(loss))
            self.log("train_loss", loss)
            return loss

        def validation_step(self, tokens: Any, index: int) -> None:
            self.log("val_loss", self.loss(tokens), sync_dist=True)

        def test_step(self, tokens: Any, index: int) -> None:
            self.log("test_loss", self.loss(tokens), sync_dist=True)

        def predict_step(self, tokens: Any, index: int) -> Any:
            return self.model(input_ids=tokens).logits.argmax(-1)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def trainer(case: Case, folder: Path, **more: Any) -> Any:
    import lightning
    from lightning.pytorch.strategies import DeepSpeedStrategy

    class OnCPU(DeepSpeedStrategy):  # without the checks of CUDA and its indices
        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    precision = {"fp32": "32-true", "bf16": "bf16-true", "mixed": "bf16-mixed"}[case["precision"]]
    given = {
        "accelerator": "cpu", "devices": case["ranks"], "precision": precision, "max_steps": STEPS,
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder),
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    strategy = OnCPU(stage=case["stage"], logging_batch_size_per_gpu=2)
    return lightning.Trainer(strategy=strategy, **{**given, **more})


def loader(seed: int, number: int = 32) -> DataLoader[Any]:
    tokens = torch.tensor([each["input_ids"] for each in sentences(number, seed)])
    return DataLoader(tokens, batch_size=2)  # type: ignore[arg-type]


def train(case: Case, folder: Path) -> dict[str, Any]:
    """fit with validation in between, then validate, test and predict."""
    made, model = trainer(case, folder, val_check_interval=2 if case["ranks"] == 2 else 4), module()
    made.fit(model, loader(0), loader(1, 8))
    validated = made.validate(model, loader(1, 8), verbose=False)[0]["val_loss"]
    tested = made.test(model, loader(2, 8), verbose=False)[0]["test_loss"]
    predicted = made.predict(model, loader(2, 8))
    assert sum(len(each) for each in predicted) == 8 // case["ranks"]
    return {"loss": model.losses, "validated": validated, "tested": tested}


def resume(case: Case, folder: Path) -> dict[str, Any]:
    """The second half of the steps again, from a checkpoint of Lightning's; then the last checkpoint is tested.

    All rows are the same: Lightning shuffles them, and within an epoch it continues with the loader's first batch.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint

    tokens = torch.tensor([each["input_ids"] for each in sentences(1)]).repeat(32, 1)

    def fit(model: Any, **more: Any) -> Any:
        keep = ModelCheckpoint(folder / "kept", filename="{step}", every_n_train_steps=2, save_top_k=-1)
        made = trainer(case, folder, enable_checkpointing=True, callbacks=[keep])
        made.fit(model, DataLoader(tokens, batch_size=2), **more)
        assert made.global_step == STEPS
        return made

    whole, again = module(), module()
    fit(whole)
    made = fit(again, ckpt_path=folder / "kept" / "step=2.ckpt")
    tested = made.test(again, loader(2, 8), ckpt_path=folder / "kept" / "step=4.ckpt", verbose=False)
    return {"loss": whole.losses, "resumed": again.losses, "tested": tested[0]["test_loss"]}


def hand_over(case: Case, folder: Path) -> float:
    """Train and save a checkpoint, or go on from that of other ranks at the last step; the loss then."""
    saved, model = folder / "saved.ckpt", module()
    resumes = saved.exists()
    made = trainer(case, folder)
    dist.barrier()
    made.fit(model, loader(0), ckpt_path=saved if resumes else None)
    assert made.global_step == STEPS
    if not resumes:
        made.save_checkpoint(saved)
    return float(made.test(model, loader(2, 8), verbose=False)[0]["test_loss"])
