"""The engine: a model that trains as its config says.

Owns what a script may ask and call besides the step loop, which is in `redline.step_loop`; `build.py` makes the parts.
The names are DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from redline.callbacks import Validation
from redline.data import CollateFn, Loader, build_loader
from redline.errors import EngineError
from redline.evaluation import evaluate
from redline.loaders import divide
from redline.log import log
from redline.resumable import ResumableLoop

__all__ = ["Engine"]


class Engine(ResumableLoop):
    """A model, its optimizer and its schedule, driven by a config. Made by :func:`redline.initialize`.

    Attributes:
        module: the model as it was given, on the engine's device. Up to ZeRO stage 2 its parameters are full on every
            rank, in the dtype of the computation; at stage 3 they are DTensors, of which each rank has its fp32 shard.
        optimizer: None when neither config nor script gave one; the engine then only evaluates. Its groups have the
            master params in low precision and at stages 1 and 2 (there as DTensors), else the model's own.
        lr_scheduler: None for a fixed learning rate.
        training_dataloader: over `training_data`, or what :meth:`prepare` returned first; else None.
        config: the config in force, batch sizes resolved.
        device: where the model is.
        global_rank, local_rank, world_size: this rank among all.
        is_compiled: whether the model runs as :meth:`compile` made it.
        precision: the dtypes of the run.
        scaler: of the loss, in fp16; None elsewhere.
        callbacks: called at every optimizer step, in this order; see :class:`redline.callbacks.Callback`.
        client_state_on_sigterm: gives the `client_state` of the checkpoint that SIGTERM asks for; None for none.
        steps_per_print: optimizer steps between two progress lines; None for no lines. May be changed at any time, on
            all ranks alike.
    """

    # -- what a user may ask ---------------------------------------------------------------------

    @property
    def global_steps(self) -> int:
        """Optimizer steps done, skipped ones included."""
        return self._counters.global_steps

    @property
    def global_samples(self) -> int:
        """Samples of these steps, over all ranks."""
        return self._counters.global_samples

    @property
    def micro_steps(self) -> int:
        """Micro-batches done."""
        return self._counters.micro_steps

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped for a gradient that was not finite; 0 in fp32."""
        self.resolve_pending_step()
        return self._counters.skipped_steps

    @property
    def loss(self) -> Tensor | None:
        """This rank's mean loss over the last optimizer step's micro-batches, on the device; None before it."""
        return self._optimizer_step.loss

    @property
    def grad_norm(self) -> Tensor | float | None:
        """The last optimizer step's gradient norm before clipping, over all ranks; on CUDA a tensor there."""
        return self._optimizer_step.grad_norm

    def get_global_grad_norm(self) -> float | None:
        """The last optimizer step's gradient norm before clipping, over all ranks; None before it.

        Of the optimizer's parameters that require grad; at stage 0 without fp16 or bf16, of all that have a gradient.
        Not finite after a step that was skipped for that. Waits for the device.
        """
        norm = self._optimizer_step.grad_norm
        return None if norm is None else float(norm)

    @property
    def loss_scale(self) -> float | None:
        """The factor of the next loss in fp16; None where there is none."""
        self.resolve_pending_step()
        return None if self.scaler is None else self.scaler.value

    def get_lr(self) -> list[Any]:
        """The learning rate of each parameter group, for the next optimizer step."""
        self.resolve_pending_step()
        return [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """The momentum, or betas, of each parameter group, for the next optimizer step."""
        self.resolve_pending_step()
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group["betas"] if "betas" in group else group.get("momentum") for group in groups]

    def train_batch_size(self) -> int:
        """Samples of one optimizer step, over all ranks."""
        return self._state.steps * self.config.train_micro_batch_size_per_gpu * self.world_size

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples of an optimizer step from here on, by changing the gradient accumulation steps.

        The micro-batch stays. Every rank calls this, between two optimizer steps.

        Args:
            train_batch_size: samples of one optimizer step, over all ranks.

        Raises:
            EngineError: it is no multiple of the micro-batches of all ranks; it is called within an accumulation.
        """
        micro_batch, ranks = self.config.train_micro_batch_size_per_gpu, self.world_size
        stride = micro_batch * ranks
        if self._state.backwards:
            raise EngineError(
                "set_train_batch_size: called within an accumulation, whose losses so far are divided by "
                f"{self._state.steps}; call it after the step() that ends it, or after flush()"
            )
        if not isinstance(train_batch_size, int) or train_batch_size < 1 or train_batch_size % stride:
            below = int(train_batch_size // stride) * stride if isinstance(train_batch_size, (int, float)) else 0
            nearest = f"{below} and {below + stride}" if below > 0 else f"{stride}"
            raise EngineError(
                f"set_train_batch_size: got {train_batch_size!r}; expected a multiple of {stride}, the micro-batch of "
                f"{micro_batch} on {ranks} rank{'s' if ranks > 1 else ''}; nearest: {nearest}"
            )
        self._state.steps = train_batch_size // stride

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one forward on one rank."""
        return self.config.train_micro_batch_size_per_gpu

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one optimizer step on one rank."""
        return self._state.steps

    def gradient_clipping(self) -> float:
        """The norm above which gradients are scaled down to it; 0 for never."""
        return self.config.gradient_clipping

    # -- data ------------------------------------------------------------------------------------

    def prepare(self, loader: DataLoader[Any]) -> Loader:
        """Divide a `DataLoader` for training among the ranks; on one rank, too, it moves batches and can be resumed.

        The first prepared loader becomes ``training_dataloader``: checkpoints save where it is, and it has the bar.
        Prepare it before :meth:`load_checkpoint`. For an evaluation, :meth:`evaluate` takes the `DataLoader` itself.

        Args:
            loader: its `batch_size` is the micro-batch of one rank. Its dataset, `collate_fn` and workers are taken
                over, and its order, or sampler; ``shuffle=True`` is drawn from `redline.data.seed` and the epoch.

        Returns:
            This rank's batches, on the device, as many on every rank; some samples are repeated where needed.

        Raises:
            EngineError: it is no `DataLoader`; its batches are not the micro-batches of the config.
        """
        size, micro_batch = getattr(loader, "batch_size", None), self.config.train_micro_batch_size_per_gpu
        if size not in (None, micro_batch):
            raise EngineError(
                f"prepare: the DataLoader has batch_size {size}, and train_micro_batch_size_per_gpu is {micro_batch}; "
                "make it with batch_size=engine.train_micro_batch_size_per_gpu(), or change the config"
            )
        survives = self.config.redline.checkpoint.save_on_sigterm is not None
        prepared = divide(loader, self.world, seed=self.config.redline.data.seed, survives_sigterm=survives)
        if self.training_dataloader is None:
            self._use_for_training(prepared)
        else:
            log.warning("prepare: checkpoints save the position in the first loader only, and this is another one")
        return prepared

    def evaluate(
        self,
        data: DataLoader[Any] | Dataset[Any],
        metric: Any,
        forward: Callable[[Engine, Any], Any] | None = None,
    ) -> Any:
        """The mean of a metric over data, each sample counted once on any number of ranks; every rank calls this.

        The model is in eval mode meanwhile, without gradients. Training goes on as if there had been no evaluation.

        Args:
            data: each rank takes its part; a dataset in micro-batches.
            metric: called as ``metric(outputs, targets)``; returns the mean over the batch, or one value for each
                sample, or a dict of these. Or an object with ``update(outputs, targets)`` and ``compute()``, which
                itself joins the ranks: torchmetrics' are such.
            forward: called as ``forward(engine, batch)``; returns the metric's arguments. None takes
                ``(engine(inputs), targets)`` for batches of two, and ``engine(**batch)`` for a dict.

        Returns:
            A float, or a dict of floats, or what ``compute()`` returns; the same on every rank.

        Raises:
            EngineError: the data are empty, or divided already; what `metric` returned is no number.
        """
        if isinstance(data, Loader):
            raise EngineError(
                "evaluate: got a loader of the engine's, which has divided the samples already, and repeats some to be "
                "even; give the DataLoader or the dataset itself"
            )
        if isinstance(data, DataLoader):
            loader = divide(data, self.world, seed=self.config.redline.data.seed, even=False, method="evaluate")
        else:
            micro_batch = self.config.train_micro_batch_size_per_gpu
            loader = build_loader(data, self.world, micro_batch=micro_batch, shuffle=False, even=False)
        self._strategy.begin_call("evaluate")
        return evaluate(self, loader, metric, forward)

    def record_validation(self, loss: Validation) -> None:
        """Give the callbacks a validation loss of the current model; a range test records it.

        Args:
            loss: this rank's, a scalar, of which the mean over all ranks is taken; what :meth:`evaluate` returned, say.
                Or a dict of several; a range test records its "loss", or the first one.
        """
        for callback in self.callbacks:
            callback.on_validation(self, loss)

    def deepspeed_io(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: Literal["train", "eval", "predict"] = "train",
        pin_memory: bool = True,
        data_sampler: Iterable[int] | None = None,
        collate_fn: CollateFn | None = None,
        num_local_io_workers: int | None = None,
    ) -> Loader:
        """A loader over this rank's samples of another dataset, such as one for evaluation.

        Args:
            dataset: map-style or iterable.
            batch_size: samples of one forward on one rank; None takes the micro-batch.
            route: "train" is shuffled as the config says, "eval" and "predict" are in order.
            pin_memory: copy batches into pinned memory where the device is a GPU.
            data_sampler: indices of this rank's samples, in place of the order.
            collate_fn: samples to batch; None takes the one of the training data.
            num_local_io_workers: worker processes that prefetch; None takes the config's.

        Returns:
            Micro-batches on the device, as many on every rank; some samples are repeated where needed.
        """
        settings = self.config.redline.data.arguments()
        settings |= {"shuffle": settings["shuffle"] and route == "train", "pin_memory": pin_memory}
        settings["split_by_rank"] = bool(settings["split_by_rank"])  # not compared: one rank alone may call this
        if num_local_io_workers is not None:
            settings["workers"] = num_local_io_workers
        if collate_fn is None and self.training_dataloader is not None:
            collate_fn = self.training_dataloader.collate_fn
        return build_loader(
            dataset,
            self.world,
            micro_batch=self.config.train_micro_batch_size_per_gpu if batch_size is None else batch_size,
            collate_fn=collate_fn,
            sampler=data_sampler,
            drop_last=self.config.dataloader_drop_last,
            survives_sigterm=self.config.redline.checkpoint.save_on_sigterm is not None,
            **settings,
        )

    # -- checkpoints -----------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save the whole run; every rank calls this.

        Args:
            save_dir: a folder that all ranks share; created where it does not exist.
            tag: the checkpoint's name in it; None takes ``global_stepN``. An existing one is replaced.
            client_state: the script's own: numbers, strings, lists, dicts, tensors. Rank 0's is saved.
            save_latest: whether `load_checkpoint` takes it by default.
            exclude_frozen_parameters: leave out parameters that do not require gradients.

        Returns:
            True; with `redline.checkpoint.async_save` as soon as the state is copied.

        Raises:
            EngineError: on all ranks, if one could not save; existing checkpoints stay intact. With async_save the next
                save, step, flush or :meth:`wait_for_checkpoint` raises it.
        """
        self.resolve_pending_step()
        self._strategy.begin_call("save_checkpoint")
        return self._checkpointer.save(
            self, save_dir, tag, client_state or {}, save_latest=save_latest, exclude_frozen=exclude_frozen_parameters
        )

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Continue from a checkpoint, saved by any number of ranks; every rank calls this.

        Args:
            load_dir: where `save_checkpoint` saved, or DeepSpeed's.
            tag: which one; None takes the latest, or the newest intact one if that is corrupt.
            load_module_strict: refuse a model with other names than the checkpoint's.
            load_optimizer_states: whether to load the optimizer's state.
            load_lr_scheduler_states: whether to load the schedule's state.
            load_module_only: load the model only.
            custom_load_fn: called as ``custom_load_fn(src=state_dict, dst=module)`` to load the model.

        Returns:
            The checkpoint's folder and the `client_state` that was saved; (None, None) if there is no checkpoint.

        Raises:
            EngineError: on all ranks; the tag is corrupt or does not exist, no checkpoint is intact, or it does not fit
                this engine. The engine is unchanged.
        """
        self.resolve_pending_step()
        self._strategy.begin_call("load_checkpoint")
        return self._checkpointer.load(
            self,
            load_dir,
            tag,
            strict=load_module_strict,
            optimizer=load_optimizer_states,
            schedule=load_lr_scheduler_states,
            module_only=load_module_only,
            custom_load=custom_load_fn,
        )

    def wait_for_checkpoint(self) -> None:
        """Wait until the checkpoint that `redline.checkpoint.async_save` is writing is on disk.

        Raises:
            EngineError: it could not be written.
        """
        self._checkpointer.wait()

    def full_state_dict(self) -> dict[str, Any]:
        """The model's state dict with full tensors in its compute dtype, on rank 0's CPU; every rank calls this.

        Returns:
            What the bare model takes with ``load_state_dict``; empty on the other ranks.
        """
        self._strategy.begin_call("full_state_dict")
        return self._checkpointer.full_state_dict(self)

    def save_16bit_model(
        self, save_dir: str | Path, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Save the full model only, in its compute dtype; every rank calls this, rank 0 writes.

        Args:
            save_dir: a folder; created where it does not exist.
            save_filename: a file in it: ``.safetensors``, in which a tied weight has one of its names, or any other
                for ``torch.load``, whose content the bare model takes with ``load_state_dict``.
            exclude_frozen_parameters: leave out parameters that do not require gradients.

        Returns:
            True; False in ZeRO stage 3 without `stage3_gather_16bit_weights_on_model_save`: then nothing is saved.

        Raises:
            EngineError: on all ranks, if it could not be saved.
        """
        return self._checkpointer.save_16bit_model(self, save_dir, save_filename, exclude_frozen_parameters)

    def compile(
        self, backend: str | Callable[..., Any] = "inductor", compile_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Compile the model with `torch.compile`, in place; a second call does nothing.

        Parameters, `module` and the keys of the state dict do not change. Up to ZeRO stage 2 the model is compiled as a
        whole; at stage 3 it is compiled block by block.

        Args:
            backend: as in `torch.compile`.
            compile_kwargs: its other arguments: `mode`, `dynamic`, `fullgraph`, `options`.

        Raises:
            EngineError: `compile_kwargs` names a backend, too.
        """
        if compile_kwargs and "backend" in compile_kwargs:
            raise EngineError('compile: compile_kwargs has "backend"; give it as compile(backend=...)')
        if self.is_compiled:
            return
        self._strategy.compile(backend=backend, **(compile_kwargs or {}))
        self.is_compiled = True
