"""From a checkpoint's files into an engine: first all that can be wrong, then the tensors, then the rest at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.checkpoint import layout
from engine.checkpoint.layout import Found
from engine.checkpoint.plain import unpack
from engine.checkpoint.state import buffers_of, extra_states_of, weights_of
from engine.errors import EngineError
from engine.randomness import reseed, set_random_state

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["Restore", "Wanted", "plan_restore"]


@dataclass(frozen=True)
class Wanted:
    """What of a checkpoint is wanted: the arguments of `load_checkpoint`."""

    strict: bool = True
    optimizer: bool = True
    schedule: bool = True
    module_only: bool = False
    custom_load: Callable[..., Any] | None = None

    @property
    def asked(self) -> tuple[bool, ...]:
        return self.strict, self.optimizer, self.schedule, self.module_only, self.custom_load is not None


class Restore:
    def __init__(self, engine: Engine, found: Found, wanted: Wanted) -> None:
        from engine.checkpoint.tensors import read_metadata

        self._engine, self._found, self._wanted = engine, found, wanted
        self._metadata = read_metadata(found.folder)
        self._shared = json.loads((found.folder / layout.STATE).read_text(encoding="utf-8"))
        rank = engine.global_rank
        self._has_own = rank < found.manifest.world_size
        self._own = torch.load(
            found.folder / layout.rank_file(rank if self._has_own else 0), map_location="cpu", weights_only=True
        )
        self._targets: dict[str, Tensor] = {}
        self._plan()

    def _plan(self) -> None:
        saved = self._metadata.state_dict_metadata
        for name, tensor in {**weights_of(self._engine), **buffers_of(self._engine.module)}.items():
            key = f"model.{name}"
            if key not in saved:
                raise EngineError(f"{name} is missing")
            self._targets[key] = torch.empty_like(tensor.detach())
        if self._loads_optimizer:
            weights = weights_of(self._engine)
            for name, state in self._shared["optimizer"]["state"].items():
                weight = weights[name]
                for each in state.values():
                    if isinstance(each, dict) and "$tensor" in each:
                        key = each["$tensor"]
                        entry = saved[key]
                        if entry.size == weight.shape and weight.dim():
                            self._targets[key] = torch.empty_like(weight.detach(), dtype=entry.properties.dtype)
        for key, entry in saved.items():
            if key not in self._targets and not key.startswith("model."):
                self._targets[key] = torch.empty(entry.size, dtype=entry.properties.dtype)

    @property
    def _loads_optimizer(self) -> bool:
        wanted = self._wanted
        return (
            wanted.optimizer
            and not wanted.module_only
            and self._engine.optimizer is not None
            and self._shared["optimizer"] is not None
        )

    def read(self) -> None:
        from engine.checkpoint.tensors import read

        read(self._found.folder, self._metadata, self._targets)

    @torch.no_grad()
    def install(self) -> dict[str, Any]:
        engine, shared = self._engine, self._shared
        engine.drop_update()
        weights = weights_of(engine)
        for name, tensor in {**weights, **buffers_of(engine.module)}.items():
            tensor.copy_(self._targets.pop(f"model.{name}"))
        if engine._masters is not None:
            engine._masters.publish()
        if self._has_own and self._found.manifest.world_size == engine.world_size:
            buffers = buffers_of(engine.module)
            for name, value in self._own.get("buffers", {}).items():
                buffers[name].copy_(value)
        for name, module in extra_states_of(engine.module):
            if name in shared["extra_state"]:
                module.set_extra_state(unpack(shared["extra_state"][name], self._targets))
        client_state = unpack(shared["client_state"], self._targets)
        if self._wanted.module_only:
            return client_state
        if self._loads_optimizer:
            optimizer = engine.optimizer
            assert optimizer is not None
            optimizer.state.clear()
            for name, state in shared["optimizer"]["state"].items():
                optimizer.state[weights[name]] = unpack(state, self._targets)
            for group, saved in zip(optimizer.param_groups, shared["optimizer"]["groups"]):
                for key, value in unpack(saved["settings"], self._targets).items():
                    group[key] = value
        if self._wanted.schedule and engine.lr_scheduler is not None and shared["schedule"] is not None:
            engine.lr_scheduler.load_state_dict(unpack(shared["schedule"]["state"], self._targets))
        if engine.scaler is not None and shared["loss_scale"] is not None:
            engine.scaler.load_state_dict(unpack(shared["loss_scale"], self._targets))
        counters = shared["counters"]
        engine.global_steps = counters["global_steps"]
        engine.global_samples = counters["global_samples"]
        engine.micro_steps = counters["micro_steps"]
        engine._skipped = counters["skipped_steps"]
        if engine.training_dataloader is not None and shared["data"] is not None:
            engine.training_dataloader.load_state_dict(unpack(shared["data"], self._targets))
        if self._has_own:
            set_random_state(self._own["random"])
        else:
            reseed(self._own["random"], engine.global_rank)
        return client_state


def plan_restore(engine: Engine, found: Found, wanted: Wanted) -> Restore:
    return Restore(engine, found, wanted)
