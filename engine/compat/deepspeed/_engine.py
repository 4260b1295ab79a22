"""The engine that `deepspeed.initialize` returns: Redline's, with DeepSpeed's other names and its leniency."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from deepspeed import comm
from deepspeed._client_state import LEFT_OUT, as_data, folder_of_rank_0
from deepspeed._config import DeepSpeedConfig, Settings, as_deepspeed, deepspeeds_errors
from deepspeed._modules import not_built
from deepspeed._names import ENGINE_GETTERS, NOT_BUILT, config_value
from deepspeed.ops import face_of
from redline.engine import Engine
from redline.errors import EngineError
from redline.log import log

__all__ = ["DeepSpeedEngine", "engine_of"]

_engines: weakref.WeakSet[DeepSpeedEngine] = weakref.WeakSet()


class DeepSpeedEngine(Engine):
    """Redline's engine with the other names of DeepSpeed's. Names that it does not have are the module's."""

    def _wear_face(self, settings: dict[str, Any]) -> None:
        self.config: Any = Settings(settings, self.config)
        self._last = _LastStep(self.zero_optimization_stage())
        self._warned: set[str] = set()
        if self.optimizer is not None:
            self.optimizer.__class__ = face_of(type(self.optimizer))
            self.__dict__["_optimizer_face"] = self.optimizer
            self.optimizer.deepspeed_engine = weakref.ref(self)
            vars(self.optimizer).pop("zero_grad", None)
        if self._last.stage < 2:
            strategy: Any = self._strategy
            strategy.gradients_unchanged = partial(self._take_changes, strategy.gradients_unchanged)
        if self.zero_optimization_stage() == 3:
            from deepspeed.zero import ParameterOffload, mark_sharded

            vars(self.module).pop("zero_grad", None)  # FSDP2's gradients stay, as they are hidden
            mark_sharded(self.module)
            if self.optimizer is not None:
                self.optimizer.parameter_offload = ParameterOffload(self.module)
        _engines.add(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("module", "_modules") or name.startswith("__"):
                raise
            if name in _METHODS:
                return partial(_METHODS[name], self)
            if name in _VALUES:
                return _VALUES[name](self)
            if name in ENGINE_GETTERS:
                return partial(config_value, self.config, name)
            module = super().__getattr__("module")
            if hasattr(module, name):
                return getattr(module, name)
            if name in NOT_BUILT:
                return not_built(f"deepspeed.DeepSpeedEngine.{name}", NOT_BUILT[name])
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'") from None

    # -- training ---------------------------------------------------------------------------------

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **_: Any) -> Tensor:
        self._show_gradients()
        try:
            loss = super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        except EngineError as error:
            raise as_deepspeed(error) from error
        self._hide_gradients()
        return loss

    def _hide_gradients(self) -> None:
        """As ZeRO does, whose `.grad` is None after backward(): what scripts do to it has no effect."""
        stage = self._last.stage
        if stage > 1 or (stage and self._state.is_boundary()):
            self._last.hidden = hidden = [(param, param.grad) for param in self._strategy.params.model]
            for param, _ in hidden:
                param.grad = None

    def _show_gradients(self) -> None:
        hidden, self._last.hidden = self._last.hidden, ()
        if self._state.backwards:  # else they have been dropped
            for param, grad in hidden:
                param.grad = grad

    def _take_changes(self, unchanged: Callable[[], bool]) -> bool:
        """Whether gradients are the engine's, where they are not hidden: what a script has made of them is taken."""
        if unchanged() or not self._state.backwards:
            return unchanged()
        self._warn_once("gradients were changed after backward(), as by clip_grad_norm_: the step takes them so; "
                        "gradient_clipping in the config clips by the norm of all ranks")  # fmt: skip
        self._strategy.accept_changes()  # up to stage 1, it is DDP's
        return True

    def _take_plain_backward(self) -> None:
        """Take the gradients of a plain loss.backward(), as DeepSpeed does; without accumulation and fp16."""
        if any(param.grad is not None for param in self._strategy.params.model):
            self._warn_once("gradients of loss.backward() are taken; engine.backward(loss) also reports the loss")
            self._strategy.collect_gradients()
            self._state.add_backward(torch.zeros((), device=self.device), divided=True)

    def gradient_of(self, param: Tensor) -> Tensor | None:
        self._show_gradients()
        found = super().gradient_of(param)
        self._hide_gradients()
        return found

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """As DeepSpeed's: `lr_kwargs` are the arguments of the schedule's step()."""
        assert not self._state.in_no_sync, "It is illegal to call Engine.step() inside no_sync context manager"
        self._show_gradients()
        if not self._state.backwards and self._state.steps == 1 and self.scaler is None:
            self._take_plain_backward()
        last, counters, schedule = self._last, self._counters, self.lr_scheduler
        last.steps, last.skipped = counters.global_steps, counters.skipped_steps
        if lr_kwargs and schedule is not None:
            self.lr_scheduler = _WithArguments(schedule, lr_kwargs)
        try:
            super().step()
        except EngineError as error:
            raise as_deepspeed(error) from error
        finally:
            if lr_kwargs and schedule is not None:
                self.lr_scheduler = schedule

    def no_sync(self) -> Any:
        """As DeepSpeed's: up to stage 1, and not within itself."""
        stage = self.zero_optimization_stage()
        assert stage < 2, f"no_sync context manager is incompatible with ZeRO stage {stage}, which shards gradients"
        assert not self._state.in_no_sync, "no_sync context manager reentry is unsupported"
        return super().no_sync()

    def was_step_applied(self) -> bool:
        return self.global_steps > self._last.steps and not self.overflowed

    @property
    def overflowed(self) -> bool:
        return self.skipped_steps > self._last.skipped

    def flush(self) -> bool:
        self._show_gradients()
        return super().flush()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As DeepSpeed's: within an accumulation it clears fp32 gradients at stage 0, and nothing elsewhere.

        It also clears those of no_sync().
        """
        state = self._state
        if not state.backwards:
            super().zero_grad(set_to_none)
            return
        if not state.pending and not state.micro_batches:
            self.drop_update()
            return
        self._warn_once("zero_grad() between two micro-batches: as in DeepSpeed it %s; leave it to step()",
                        "clears the gradients so far" if self._clears_grads else "clears nothing here")  # fmt: skip
        if self._clears_grads:
            self._strategy.clear_gradients()

    @property
    def _clears_grads(self) -> bool:
        return self.zero_optimization_stage() == 0 and self.precision.compute is torch.float32

    def _warn_once(self, message: str, *arguments: Any) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning(message, *arguments)

    def destroy(self) -> None:
        self.callbacks.clear()

    # -- checkpoints ------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """As DeepSpeed's. What in `client_state` is no data is left out with a warning."""
        state = {key: as_data(value, f"client_state[{key!r}]") for key, value in (client_state or {}).items()}
        with deepspeeds_errors():
            return super().save_checkpoint(
                folder_of_rank_0(str(save_dir or "")), None if tag is None else str(tag),
                {key: value for key, value in state.items() if value is not LEFT_OUT},
                save_latest, exclude_frozen_parameters,
            )  # fmt: skip

    def load_checkpoint(self, load_dir: str | Path, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        with deepspeeds_errors():
            return super().load_checkpoint(load_dir, None if tag is None else str(tag), *args, **kwargs)

    def module_state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False, **_: Any) -> Any:
        """The model's full state dict."""
        state = self.module.state_dict(prefix=prefix, keep_vars=keep_vars)
        return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        """The full model in the dtype of the computation, on rank 0's CPU; None on other ranks. A collective."""
        from redline.checkpoint.model_file import gather_16bit_state

        return gather_16bit_state(self, exclude_frozen=exclude_frozen_parameters) or None

    def load_module_state_dict(
        self, checkpoint: Any, strict: bool = True, custom_load_fn: Any = None, **_: Any
    ) -> None:
        """Load the model from a checkpoint's ``["module"]``."""
        state = checkpoint.get("module", checkpoint)
        if custom_load_fn is not None:
            custom_load_fn(src=state, dst=self.module)
        else:
            self.module.load_state_dict(state, strict=strict)

    def save_fp16_model(self, save_dir: str | Path, save_filename: str = "pytorch_model.bin") -> bool:
        return self.save_16bit_model(save_dir, save_filename)

    def get_global_grad_norm(self) -> Any:
        """As DeepSpeed's, a tensor in ZeRO, whose item() scripts call."""
        norm = super().get_global_grad_norm()
        return norm if norm is None or not self._last.stage else torch.tensor(norm)

    # -- what a script may ask: the rest is in _METHODS and _VALUES -------------------------------

    def zero_optimization_stage(self) -> int:
        zero = self.config.zero_optimization
        return 0 if zero is None else zero.stage

    def _enabled(self, section: str) -> bool:
        found = getattr(self.config, section)
        return found is not None and bool(found.enabled)

    def _params(self, section: str) -> dict[str, Any] | None:
        return self.config[section].get("params", {}) if section in self.config else None

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @property
    def _config(self) -> DeepSpeedConfig:
        return DeepSpeedConfig(self.config)

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        if self.device.type != "cpu":
            self._move_states(torch.device("cpu"))

    def reload_states(self, *args: Any, **kwargs: Any) -> None:
        if self.device.type != "cpu":
            self._move_states(self.device)

    def _move_states(self, device: torch.device) -> None:
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = value.to(device, non_blocking=True)


def _writable(name: str) -> property:
    """A counter of the engine that scripts also set, such as micro_steps = 0 at the start of an epoch."""

    def put(engine: DeepSpeedEngine, value: int) -> None:
        setattr(engine._counters, name, value)
        if name == "micro_steps":
            engine._state.micro_batches = value % engine._state.steps

    return property(getattr(Engine, name).fget, put)


for _name in ("micro_steps", "global_steps", "global_samples", "skipped_steps"):
    setattr(DeepSpeedEngine, _name, _writable(_name))


_METHODS: dict[str, Callable[..., Any]] = {
    "get_batch_info": lambda self: (
        self.train_batch_size(), self.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()
    ),
    "zero_optimization": lambda self: self.zero_optimization_stage() > 0,
    "zero_optimization_partition_gradients": lambda self: self.zero_optimization_stage() >= 2,
    "zero_optimization_partition_weights": lambda self: self.zero_optimization_stage() >= 3,
    "zero_gather_16bit_weights_on_model_save": lambda self: (
        self.config.zero_optimization is not None
        and self.config.zero_optimization.stage3_gather_16bit_weights_on_model_save
    ),
    "fp16_enabled": lambda self: self._enabled("fp16"),
    "bfloat16_enabled": lambda self: self._enabled("bf16"),
    "torch_autocast_enabled": lambda self: self._enabled("torch_autocast"),
    "dynamic_loss_scale": lambda self: self.scaler is not None and self.scaler.dynamic,
    "optimizer_name": lambda self: None if self.config.optimizer is None else self.config.optimizer.type.lower(),
    "optimizer_params": lambda self: self._params("optimizer"),
    "scheduler_name": lambda self: None if self.config.scheduler is None else self.config.scheduler.type,
    "scheduler_params": lambda self: self._params("scheduler"),
    "get_type": lambda self: [group.get("type") for group in self.optimizer.param_groups],
    "get_data_types": lambda self: (self.precision.compute, self.precision.accumulate),
    "wall_clock_breakdown": lambda self: bool(self.config.wall_clock_breakdown),
    "postscale_gradients": lambda self: not self.config.prescale_gradients,
    "empty_partition_cache": lambda self: self.reshard(),
    "get_sequence_parallel_group": lambda self: None,  # sequences are not split
    "get_data_parallel_rank": lambda self: self.global_rank,
    "get_model_parallel_rank": lambda self: 0,
    "get_tensor_parallel_rank": lambda self: 0,
    "is_first_weights_partition_group": lambda self: self.zero_optimization_stage() >= 3,
    "clip_fp32_gradients": lambda self: None,  # step() clips
    "allreduce_gradients": lambda self, *args, **kwargs: None,  # backward() has reduced them
}  # fmt: skip
_VALUES: dict[str, Callable[[Any], Any]] = {
    "dp_world_size": lambda self: self.world_size,
    "mp_world_size": lambda self: 1,
    "data_parallel_group": lambda self: comm.get_world_group(),
    "basic_optimizer": lambda self: self.optimizer,
    "sparse_tensor_module_names": lambda self: set(),
    "communication_data_type": lambda self: self.precision.reduce,
    "mpu": lambda self: None,
    "has_moe_layers": lambda self: False,
    "pipeline_parallelism": lambda self: False,
    "seq_parallel_group": lambda self: None,
    "inside_no_sync_ctxt": lambda self: self._state.in_no_sync,
    "tput_timer": lambda self: _THROUGHPUT,
}


# The progress line has the throughput; scripts call this at the end of an epoch.
_THROUGHPUT = SimpleNamespace(update_epoch_count=lambda: None, start=lambda: None, stop=lambda *args, **kwargs: None)


class _LastStep:
    """What changes at every step, in an object of its own: nn.Module takes a microsecond to set an attribute."""

    __slots__ = ("hidden", "skipped", "stage", "steps")

    def __init__(self, stage: int) -> None:
        self.steps = self.skipped = 0  # the counters before the last step()
        self.stage = stage
        self.hidden: Any = ()  # gradients, which are hidden between backward() and the next or step()


class _WithArguments:
    """A schedule whose step() is called with a script's arguments."""

    def __init__(self, schedule: Any, arguments: dict[str, Any]) -> None:
        self._schedule, self._arguments = schedule, arguments

    def step(self) -> None:
        self._schedule.step(**self._arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)


def engine_of(param: Tensor) -> DeepSpeedEngine:
    """The engine that trains a parameter.

    Raises:
        EngineError: there is none.
    """
    for engine in _engines:
        if any(param is each for each in engine.module.parameters()):
            return engine
    raise EngineError("this parameter is not one of an engine's that deepspeed.initialize has made")
