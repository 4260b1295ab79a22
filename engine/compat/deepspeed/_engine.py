"""The engine that `deepspeed.initialize` returns: Redline's, with DeepSpeed's other names and its leniency."""

from __future__ import annotations

import logging
import weakref
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed import comm
from deepspeed._config import DeepSpeedConfig, raises_as_deepspeed
from deepspeed._engine_names import ENGINE
from deepspeed._not_built import ATTRIBUTES, not_built
from deepspeed._optimizer import face_of
from deepspeed.zero import ParameterOffload, full_tensor, mark_sharded
from redline.engine import Engine
from redline.errors import EngineError
from redline.log import log

__all__ = ["DeepSpeedEngine", "engine_of"]

_engines: weakref.WeakSet[DeepSpeedEngine] = weakref.WeakSet()


def _counter(name: str) -> property:
    """A counter of the engine that scripts also set, such as micro_steps = 0 at the start of an epoch."""

    def put(engine: DeepSpeedEngine, value: int) -> None:
        setattr(engine._counters, name, value)
        if name == "micro_steps":
            engine._state.micro_batches = value % engine._state.steps

    return property(getattr(Engine, name).fget, put)


@dataclass(slots=True)
class _LastStep:
    """What changes at every step, in an object of its own: nn.Module takes a microsecond to set an attribute."""

    steps: int = 0  # the counters before the last step()
    skipped: int = 0
    hidden: Any = ()  # parameters and gradients, which are hidden between backward() and the next or step()


class DeepSpeedEngine(Engine):
    """Redline's engine with the other names of DeepSpeed's. Names that it does not have are the module's."""

    config: Any  # DeepSpeedConfig
    optimizer: Any  # None, or an optimizer with its face
    _strategy: Any

    micro_steps = _counter("micro_steps")
    global_steps = _counter("global_steps")
    global_samples = _counter("global_samples")
    skipped_steps = _counter("skipped_steps")

    def wear_face(self, settings: dict[str, Any]) -> None:
        """Make an engine of Redline's, whose class was changed to this one, work as DeepSpeed's."""
        zero = self.config.zero_optimization
        self.config = self._config = DeepSpeedConfig(settings, loaded=self.config)
        self._last, self._stage = _LastStep(), 0 if zero is None else zero.stage
        self._warned: set[str] = set()
        if level := settings.get("log_level"):
            logging.getLogger("DeepSpeed").setLevel(level.upper())  # deepspeed.utils.logger
        if self.optimizer is not None:
            self.optimizer.__class__ = face_of(type(self.optimizer))
            self.optimizer.deepspeed_engine = weakref.ref(self)
            vars(self.optimizer).pop("zero_grad", None)
        if self._stage < 2:
            self._strategy.gradients_unchanged = partial(self._take_changes, self._strategy.gradients_unchanged)
        if self._stage == 3:
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
            if name in ENGINE:
                return ENGINE[name](self)
            module = super().__getattr__("module")
            if hasattr(module, name):
                return getattr(module, name)
            if name in ATTRIBUTES:
                return not_built(f"deepspeed.DeepSpeedEngine.{name}", ATTRIBUTES[name])
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'") from None

    # -- training ---------------------------------------------------------------------------------

    @raises_as_deepspeed
    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **_: Any) -> Tensor:
        self._show_gradients()
        loss = super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        self._hide_gradients()
        return loss

    def _hide_gradients(self) -> None:
        """As ZeRO does, whose `.grad` is None after backward(): what scripts do to it has no effect."""
        if self._stage > 1 or (self._stage and self._state.is_boundary()):
            self._last.hidden = hidden = [(param, param.grad) for param in self._strategy.params.model]
            for param, _ in hidden:
                param.grad = None

    def _show_gradients(self) -> None:
        hidden = self._last.hidden
        if not hidden:
            return
        self._last.hidden = ()
        if self._state.backwards:  # else they have been dropped
            for param, grad in hidden:
                param.grad = grad

    def _take_changes(self, unchanged: Callable[[], bool]) -> bool:
        """Whether gradients are the engine's, where they are not hidden: what a script has made of them is taken."""
        found = unchanged()
        if found or not self._state.backwards:
            return found
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

    @raises_as_deepspeed
    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """As DeepSpeed's: `lr_kwargs` are the arguments of the schedule's step()."""
        assert not self._state.in_no_sync, "It is illegal to call Engine.step() inside no_sync context manager"
        self._show_gradients()
        if not self._state.backwards and self._state.steps == 1 and self.scaler is None:
            self._take_plain_backward()
        self._last.steps, self._last.skipped = self._counters.global_steps, self._counters.skipped_steps
        if not lr_kwargs or self.lr_scheduler is None:
            super().step()
            return
        self.lr_scheduler.step = partial(self.lr_scheduler.step, **lr_kwargs)
        try:
            super().step()
        finally:
            del self.lr_scheduler.step

    def no_sync(self) -> Any:
        """As DeepSpeed's: up to stage 1, and not within itself."""
        stage = self._stage
        assert stage < 2, f"no_sync context manager is incompatible with ZeRO stage {stage}, which shards gradients"
        assert not self._state.in_no_sync, "no_sync context manager reentry is unsupported"
        return super().no_sync()

    def was_step_applied(self) -> bool:
        return self.global_steps > self._last.steps and not self.overflowed

    @property
    def overflowed(self) -> bool:
        return bool(self.skipped_steps > self._last.skipped)

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
        elif not state.pending and not state.micro_batches:
            self.drop_update()
        else:
            clears = self._stage == 0 and self.precision.compute is torch.float32
            self._warn_once("zero_grad() between two micro-batches: as in DeepSpeed it %s; leave it to step()",
                            "clears the gradients so far" if clears else "clears nothing here")  # fmt: skip
            if clears:
                self._strategy.clear_gradients()

    def _warn_once(self, message: str, *arguments: Any) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning(message, *arguments)

    def destroy(self) -> None:
        self.callbacks.clear()

    # -- checkpoints ------------------------------------------------------------------------------

    @raises_as_deepspeed
    def save_checkpoint(
        self, save_dir: str | Path, tag: Any = None, client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True, exclude_frozen_parameters: bool = False,
    ) -> bool:  # fmt: skip
        """As DeepSpeed's: into rank 0's folder. What in `client_state` is no data is left out with a warning."""
        return super().save_checkpoint(
            _folder_of_rank_0(str(save_dir or "")), None if tag is None else str(tag),
            {} if client_state is None else _as_data(client_state, "client_state"),
            save_latest, exclude_frozen_parameters,
        )  # fmt: skip

    @raises_as_deepspeed
    def load_checkpoint(self, load_dir: str | Path, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().load_checkpoint(load_dir, None if tag is None else str(tag), *args, **kwargs)

    def module_state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False, **_: Any) -> Any:
        """The model's full state dict."""
        state = self.module.state_dict(prefix=prefix, keep_vars=keep_vars)
        return {key: full_tensor(value) for key, value in state.items()}

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        """The full model in the dtype of the computation, on rank 0's CPU; None on other ranks. A collective."""
        from redline.checkpoint.model_file import full_state_dict

        return full_state_dict(self, exclude_frozen=exclude_frozen_parameters) or None

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

    # -- what a script may ask: the rest is in `_engine_names` -----------------------------------

    def get_global_grad_norm(self) -> Any:
        """As DeepSpeed's, a tensor in ZeRO, whose item() scripts call."""
        norm = super().get_global_grad_norm()
        return norm if norm is None or not self._stage else torch.tensor(norm)

    def zero_optimization_stage(self) -> int:
        return self._stage

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        self._move_states(torch.device("cpu"))

    def reload_states(self, *args: Any, **kwargs: Any) -> None:
        self._move_states(self.device)

    def _move_states(self, device: torch.device) -> None:
        if self.device.type == "cpu":
            return
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = value.to(device, non_blocking=True)


# -- what a script gives to save_checkpoint ------------------------------------------------------------


def _folder_of_rank_0(save_dir: str) -> str:
    """Rank 0's folder, with a warning where this rank's differs."""
    folders = [save_dir]
    comm.broadcast_object_list(folders, src=0)
    if folders[0] != save_dir:
        log.warning("save_checkpoint: rank 0 saves into %s, this rank gave %s; rank 0's is taken", *folders, save_dir)
    return folders[0]


_NOTHING = object()


def _as_data(value: Any, where: str) -> Any:
    """A value as a checkpoint stores it: namespaces are dicts, arrays tensors; functions and objects are left out."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        items = {key: _as_data(each, f"{where}[{key!r}]") for key, each in value.items()}
        return {key: each for key, each in items.items() if each is not _NOTHING}
    if isinstance(value, (list, tuple)):
        return type(value)(each for each in (_as_data(each, where) for each in value) if each is not _NOTHING)
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        return torch.from_numpy(value.copy()) if getattr(value, "ndim", 0) else value.item()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor, torch.dtype, set)):
        return value
    log.warning("%s: a %s is no data, and is not saved", where, type(value).__name__)
    return _NOTHING


def engine_of(param: Tensor) -> DeepSpeedEngine:
    """The engine that trains a parameter.

    Raises:
        EngineError: there is none.
    """
    for engine in _engines:
        if any(param is each for each in engine.module.parameters()):
            return engine
    raise EngineError("this parameter is not one of an engine's that deepspeed.initialize has made")
