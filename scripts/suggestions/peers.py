"""What other tools suggest, by their own packages and with their own defaults, each on a fresh model and optimizer.

All learn the same thing: a module whose output is the task's loss on a batch, so that tasks whose loss wants the
model and the batch fit tools that want inputs and targets.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from redline.range_test.task import loss_of
from suggestions.tasks import Task, task_of

__all__ = ["METHODS", "PEERS", "ask", "missing", "version"]

PEERS = {"torch-lr-finder": "torch_lr_finder", "Lightning": "lightning", "fastai": "fastai",
         "pytorch-optimizer": "pytorch_optimizer"}  # fmt: skip
PACKAGES = {"torch-lr-finder": "torch-lr-finder", "Lightning": "lightning", "fastai": "fastai",
            "pytorch-optimizer": "pytorch-optimizer"}  # fmt: skip
METHODS = {
    "torch-lr-finder": ("torch-lr-finder",),
    "Lightning": ("Lightning",),
    "fastai": ("fastai (valley, its default)", "fastai (minimum / 10)"),
}


class _Learner(nn.Module):
    """A model whose output is its loss on a batch."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss_of(loss)

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(self.model, batch)


def missing(peer: str) -> bool:
    return importlib.util.find_spec(PEERS[peer]) is None


def version(peer: str) -> str:
    return importlib.metadata.version(PACKAGES[peer])


def ask(peer: str, name: str, seed: int) -> dict[str, Any]:
    """What a tool's methods suggest: {"lrs": {method: lr or None}, "steps": n}, or {"error": what it died of}."""
    task = task_of(name)
    torch.manual_seed(seed)
    model, data, loss, _ = task.build()
    generator = torch.Generator().manual_seed(1000 + seed)
    loader = DataLoader(data, task.batch_size, shuffle=True, drop_last=True, generator=generator)
    silent = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        warnings.simplefilter("ignore")
        try:
            return _ADAPTERS[peer](_Learner(model, loss), loader, task)
        except Exception as error:  # of whatever kind: that it fails is the finding
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _optimizer_of(task: Task) -> Callable[..., torch.optim.Optimizer]:
    params = {key: value for key, value in task.optimizer["params"].items() if key != "lr"}
    return partial(getattr(torch.optim, task.optimizer["type"]), **params)


def _torch_lr_finder(model: _Learner, loader: DataLoader[Any], task: Task) -> dict[str, Any]:
    """`range_test` from the grid's lowest rate to its highest in 100 steps, and the suggestion of `plot`."""
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib.pyplot as plt
    from torch_lr_finder import LRFinder, TrainDataLoaderIter

    class Whole(TrainDataLoaderIter):
        def inputs_labels_from_batch(self, batch: Any) -> tuple[Any, Any]:
            return batch, torch.zeros(1)

    class Single(nn.Module):  # it hands all inputs over as one
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, batch: Any) -> Tensor:
            return model(*batch)

    finder = LRFinder(Single(), _optimizer_of(task)(model.parameters(), lr=task.grid[0]), lambda loss, _: loss)
    finder.range_test(Whole(loader), end_lr=task.grid[-1], num_iter=100)
    _, axes = plt.subplots()
    answer = finder.plot(ax=axes, suggest_lr=True)
    plt.close("all")
    lr = float(answer[1]) if isinstance(answer, tuple) else None
    return {"lrs": {"torch-lr-finder": lr}, "steps": len(finder.history["lr"])}


def _lightning(model: _Learner, loader: DataLoader[Any], task: Task) -> dict[str, Any]:
    """`Tuner(trainer).lr_find(model)` and its `suggestion()`."""
    _mend_torchvision()
    import lightning
    from lightning.pytorch.tuner import Tuner

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.lr = model, float(task.optimizer["params"]["lr"])

        def training_step(self, batch: Any, index: int) -> Tensor:
            return model(*batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _optimizer_of(task)(model.parameters(), lr=self.lr)

    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, gradient_clip_val=task.clipping or None,
        )  # fmt: skip
        finder = Tuner(trainer).lr_find(Module(), train_dataloaders=loader)
    lr = finder.suggestion()
    return {"lrs": {"Lightning": None if lr is None else float(lr)}, "steps": len(finder.results["lr"])}


@cache
def _mend_torchvision() -> torch.library.Library | None:
    """Make torchvision importable beside a torch of another build, where its operators do not load.

    Lightning imports it through torchmetrics, and uses nothing of it here. What is returned must be kept.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return operators
    except ImportError:
        pass
    return None


def _fastai(model: _Learner, loader: DataLoader[Any], task: Task) -> dict[str, Any]:
    """`Learner.lr_find()`: from 1e-7 to 10 in 100 steps, read by two of its rules."""
    from fastai.callback.schedule import minimum, valley
    from fastai.callback.training import GradientClip
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    collate = loader.collate_fn
    loader.collate_fn = lambda samples: (*collate(samples), torch.zeros(1))  # a target, which it insists on
    make = _optimizer_of(task)

    def optimizer(groups: Any, lr: float, **_: Any) -> OptimWrapper:
        return OptimWrapper(opt=make(model.parameters(), lr=lr))

    with tempfile.TemporaryDirectory() as folder:
        learner = Learner(
            DataLoaders(loader, loader), model, loss_func=lambda loss, _: loss, opt_func=optimizer, path=folder,
            cbs=[GradientClip(task.clipping)] if task.clipping else [],
        )  # fmt: skip
        found = learner.lr_find(suggest_funcs=(valley, minimum), show_plot=False)
    lrs = (found.valley, found.minimum)
    return {"lrs": dict(zip(METHODS["fastai"], map(float, lrs))), "steps": len(learner.recorder.lrs)}


_ADAPTERS = {"torch-lr-finder": _torch_lr_finder, "Lightning": _lightning, "fastai": _fastai}
