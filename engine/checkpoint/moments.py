"""An optimizer's state and settings, from a checkpoint into an engine's optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.checkpoint.compare import listed, setting_changes
from engine.checkpoint.plain import tensors_in, unpack
from engine.checkpoint.state import set_setting, settings_of, weights_of
from engine.errors import EngineError
from engine.log import log
from engine.schedule_state import SCHEDULED

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["Moments"]

_WITHOUT = "or go on without the optimizer's state: load_optimizer_states=False"


class Moments:
    """What a checkpoint has for an optimizer, found to fit it.

    Args:
        engine: with an optimizer.
        shared: the checkpoint's state.json.
        strict: whether the groups have to have the same weights; else those that both have are loaded.

    Raises:
        EngineError: it does not fit.
    """

    def __init__(self, engine: Engine, shared: Mapping[str, Any], *, strict: bool) -> None:
        assert engine.optimizer is not None
        self._optimizer: Optimizer = engine.optimizer
        self._saved: dict[str, Any] | None = shared["optimizer"]
        self._weights = weights_of(engine)
        if self._saved is None:
            log.warning("load_checkpoint: the checkpoint has no optimizer; the engine's begins anew")
            return
        kind = type(self._optimizer).__name__
        if self._saved["type"] != kind:
            raise EngineError(
                f"optimizer: was {self._saved['type']}, is {kind}; give the config the old one, {_WITHOUT}"
            )
        self._check_groups(strict)
        if "whole" in self._saved and any(hasattr(weight, "placements") for weight in self._weights.values()):
            raise EngineError(
                f"optimizer {kind}: its state_dict() is its own, and cannot be shared out among processes; use ZeRO "
                f"stage 0, {_WITHOUT}"
            )
        self._say_changes(scheduled=engine.lr_scheduler is not None or shared["schedule"] is not None)

    def _check_groups(self, strict: bool) -> None:
        assert self._saved is not None
        names = {id(weight): name for name, weight in self._weights.items()}
        groups, saved = self._optimizer.param_groups, self._saved["groups"]
        if len(groups) != len(saved):
            raise EngineError(
                f"optimizer: had {len(saved)} groups of weights, has {len(groups)}; make the same, {_WITHOUT}"
            )
        for index, (group, before) in enumerate(zip(groups, saved)):
            now = [names[id(weight)] for weight in group["params"]]
            came, gone = set(now) - set(before["weights"]), set(before["weights"]) - set(now)
            if (came or gone) and strict:
                said = [
                    f"{text} {listed(sorted(which))}" for text, which in (("without", gone), ("with", came)) if which
                ]
                raise EngineError(
                    f"optimizer: group {index} of the checkpoint has {len(before['weights'])} weights; the engine's is "
                    f"{' and '.join(said)}; make the same groups, {_WITHOUT}"
                )

    def _say_changes(self, *, scheduled: bool) -> None:
        assert self._saved is not None
        ignored = SCHEDULED if scheduled else ()
        changes = setting_changes(
            self._saved["defaults"], settings_of(self._optimizer.defaults, "defaults", {}), ignored
        )
        if changes:
            log.warning(
                "load_checkpoint: optimizer: %s; the checkpoint's values are in force, as in DeepSpeed; set "
                "engine.optimizer.param_groups after loading, or load with load_optimizer_states=False",
                ", ".join(changes),
            )

    def targets(self, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors to be filled, by key: shared out as the weights are."""
        targets: dict[str, Tensor] = {}
        if self._saved is None or "state" not in self._saved:
            return targets
        groups = {id(weight): group for group in self._optimizer.param_groups for weight in group["params"]}
        on_cpu = set(self._saved["on_cpu"])
        for name, state in self._saved["state"].items():
            weight = self._weights.get(name)
            if weight is None or id(weight) not in groups:  # frozen since
                continue
            model = metadata.get(f"model.{name}")
            for key, packed in state.items():
                for place in tensors_in(packed):
                    device = self._device(weight, key, groups[id(weight)], place in on_cpu)
                    was = None if model is None else model.properties.dtype
                    targets[place] = _target(weight, metadata[place], was, device)
        return targets

    @staticmethod
    def _device(weight: Tensor, key: str, group: Mapping[str, Any], on_cpu: bool) -> torch.device:
        """Where a small tensor of the state goes; torch's optimizers look for their count of steps at these places."""
        if key == "step":
            on_cpu = not (group.get("fused") or group.get("capturable"))
        return torch.device("cpu") if on_cpu else weight.device

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the optimizer state and settings; the tensors themselves, not copies."""
        if self._saved is None:
            return
        optimizer = self._optimizer
        if "whole" in self._saved:
            optimizer.load_state_dict(unpack(self._saved["whole"], tensors))
            return
        optimizer.state.clear()
        own = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        for name, state in self._saved["state"].items():
            if name in self._weights and id(self._weights[name]) in own:
                optimizer.state[self._weights[name]] = unpack(state, tensors)
        for group, saved in zip(optimizer.param_groups, self._saved["groups"]):
            for key, value in unpack(saved["settings"], tensors).items():
                set_setting(group, key, value)


def _target(weight: Tensor, entry: Any, weight_was: torch.dtype | None, device: torch.device) -> Tensor:
    dtype: torch.dtype = entry.properties.dtype
    if entry.size == weight.shape and weight.dim():
        follows = dtype is weight_was and weight.is_floating_point()
        return torch.empty_like(weight.detach(), dtype=weight.dtype if follows else dtype)
    if hasattr(weight, "placements") and len(entry.size):
        # What torch's optimizers make of another shape than a shared weight's is whole on all processes.
        from torch.distributed.tensor import Replicate, empty  # of FSDP2, which is there

        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]  # it is a DTensor
        return empty(entry.size, dtype=dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)
    return torch.empty(entry.size, dtype=dtype, device=device)
