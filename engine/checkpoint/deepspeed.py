"""A checkpoint that DeepSpeed wrote, as tensors by name: weights, buffers, moments; and the plain things beside them.

At stage 0 one file has the model and the optimizer. At stages 1 and 2 each parameter group is one flat vector of fp32
weights, cut into as many equal parts as there were processes; the last may have been padded, and with
`parameter_alignment` there is padding between parameters. At stage 3 each parameter is cut on its own, rounded up, and
each process's file has its parts of all, one flat vector for each sub-group. After `_get_zero_param_shapes` in
`deepspeed/runtime/engine.py`, `state_dict` in `runtime/zero/stage_1_and_2.py`, `stage3.py`, `runtime/bf16_optimizer.py`
and `runtime/fp16/*_optimizer.py`, and after the files that these write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.deepspeed_files import Files, Mapped, files_of
from engine.checkpoint.deepspeed_flat import Place, cut_from, in_equal_parts, one_after_the_other, whole
from engine.checkpoint.stored import Stored, bytes_of
from engine.errors import EngineError

__all__ = ["DeepSpeedCheckpoint", "Group", "Slot"]

_KEYS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum", "max_exp_avg_sq")  # flat as the weights are


@dataclass(frozen=True)
class Slot:
    """One parameter in the optimizer.

    Attributes:
        name: its name in the model; "" where DeepSpeed tells none, at stage 0.
        weight: in fp32; None where the optimizer has the model's own.
        moments: by DeepSpeed's names, which are torch's.
        step: updates that its moments have seen; None where the optimizer does not count.
    """

    name: str
    weight: Stored | None
    moments: Mapping[str, Stored]
    step: float | None


@dataclass(frozen=True)
class Group:
    """One parameter group: its slots and what it was set to, such as `lr` and `betas`."""

    slots: list[Slot]
    settings: Mapping[str, Any]


class DeepSpeedCheckpoint:
    """One tag's folder.

    Args:
        folder: with DeepSpeed's files.

    Attributes:
        state: what the (first) file of the model holds: counters, the schedule's state, the script's own.
        stage: of ZeRO.
        processes: that wrote it.

    Raises:
        EngineError: it cannot be read; says which file and why.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: Files = files_of(folder)
        model, optimizer = self._files.model, self._files.optimizer
        # Not the tensors: as long as one is held, the whole file stays mapped.
        self.state: Mapping[str, Any] = {k: v for k, v in model[0].content().items() if k not in _TENSORS}
        with self._understood():
            self.processes = int(self.state["dp_world_size"])
            self._buffers: list[str] = list(self.state["buffer_names"])
            sharded = self.state["param_shapes"] is not None
            shapes = self.state["param_shapes"] or []
            self._shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in shapes]
        cut = model[0].path.name.startswith("zero_pp_rank_")  # each process's part, not the whole model
        self.stage = 0
        if sharded or optimizer:
            self._expect(optimizer, "optimizer states")
            zero_stage = self._optimizer_state(0).get("zero_stage")
            with self._understood():  # BF16_Optimizer writes no stage; it is stage 1
                self.stage = 1 if zero_stage is None else int(getattr(zero_stage, "arguments", [zero_stage])[0])
        if cut:
            self._expect(model, "model states")
        if cut != (self.stage == 3):
            raise EngineError(f"{folder}: files of a model at stage 3 and an optimizer at another are mixed")
        if self.state.get("num_experts") or (optimizer and "ds_zero_partition_groups" in self._optimizer_state(0)):
            raise EngineError(f"{folder}: it is of an MoE model whose experts are shared out, which is not read here")

    def _expect(self, files: Sequence[Mapped], what: str) -> None:
        if len(files) != self.processes:
            raise EngineError(
                f"{self.folder}: it was written by {self.processes} processes, and {len(files)} files of {what} are "
                "there; bring those of all hosts into the folder"
            )

    # -- the model -------------------------------------------------------------------------------

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of tied parameters, with the one that counts."""
        shared = self.state.get("shared_params")
        if shared is not None:
            return dict(shared)
        first: dict[Any, str] = {}
        aliases = {}
        for name, tensor in self._module().items():
            if name in self._buffers or tensor.numel() == 0:
                continue
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if first.setdefault(place, name) != name:
                aliases[name] = first[place]
        return aliases

    @property
    def buffers(self) -> list[str]:
        """Names of the buffers."""
        return self._buffers

    def tensors(self) -> dict[str, Stored]:
        """The whole model by name: fp32 weights where there are some, the rest as the model had it; no aliases."""
        weights = {slot.name: slot.weight for group in self.groups() for slot in group.slots} if self.stage else {}
        with self._understood():
            frozen = self._frozen()
            aliases = self.aliases
        tensors: dict[str, Stored] = {}
        for name in self._module():
            weight = weights.get(name) or frozen.get(name)
            if name in aliases:
                continue
            if weight is None and (self.stage != 3 or name in self._buffers):
                weight = whole(self._files, Place(self._files.model[0], ("module", name)))
            if weight is None:
                raise EngineError(f"{self.folder}: {name} is in none of the files; it was not saved")
            tensors[name] = weight
        # A parameter that was left out of the state dict may still be in the optimizer.
        tensors |= {name: weight for name, weight in weights.items() if weight and name not in tensors}
        self._files.most = max([self._files.most, *map(bytes_of, tensors.values())])
        return tensors

    def _module(self) -> dict[str, Tensor]:
        module = self._files.model[0].content().get("module")
        if not isinstance(module, Mapping):
            raise EngineError(f"{self._files.model[0].path}: it has no model; it is not as DeepSpeed writes it")
        return {name: value for name, value in module.items() if isinstance(value, Tensor)}

    def _frozen(self) -> dict[str, Stored]:
        """Parameters that no optimizer has, at stage 3, where each process has a part of them."""
        if self.stage != 3 or self.state.get("frozen_param_shapes") is None:
            return {}
        frozen: dict[str, Stored] = {}
        for name, shape in self.state["frozen_param_shapes"].items():
            keys = ("frozen_param_fragments", name)
            places = [Place(file, keys) for file in self._files.model]
            frozen[name] = in_equal_parts(self._files, places, torch.Size(shape))
        return frozen

    # -- the optimizer ---------------------------------------------------------------------------

    def groups(self, order: Sequence[Sequence[tuple[str, torch.Size]]] = ()) -> list[Group]:
        """The optimizer's parameter groups.

        Args:
            order: names and shapes in the groups of the optimizer that it is for: stage 0 tells neither.

        Raises:
            EngineError: they do not fit what is there.
        """
        with self._understood():
            if self.stage == 0:
                return self._groups_at_0(order)
            return self._groups_at_3() if self.stage == 3 else self._groups_at_1()

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """What stumbles here has found something else than DeepSpeed writes."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"{self.folder}: it is not as DeepSpeed 0.19 writes it: {error!r}") from error

    def _optimizer_state(self, rank: int) -> Mapping[str, Any]:
        file = self._files.optimizer[rank]
        state = file.content().get(_STATE)
        if not isinstance(state, Mapping):
            raise EngineError(f"{file.path}: it has no optimizer; it is not as DeepSpeed writes it")
        return state

    def _groups_at_1(self) -> list[Group]:
        state = self._optimizer_state(0)
        base = state["base_optimizer_state"]
        elastic = isinstance(base, list)  # one state a group, without the groups' settings
        paddings = state.get("param_alignment_paddings") or [[0] * len(names) for names in self._shapes]
        groups = []
        for index, shapes in enumerate(self._shapes):
            of_state = (index,) if elastic else ("state", index)
            found = base[index] if elastic else base["state"].get(index, {})
            settings = {} if elastic else base["param_groups"][index]
            counted = {"step": state["base_optimizer_state_step"]} if "base_optimizer_state_step" in state else {}
            step = _step([found], [settings, counted])
            places: dict[str, tuple[Any, ...]] = {"weight": ("single_partition_of_fp32_groups", index)}
            places |= {key: ("base_optimizer_state", *of_state, key) for key in _KEYS if key in found}
            vectors = {
                key: one_after_the_other(self._files, [Place(file, (_STATE, *place)) for file in self._files.optimizer])
                for key, place in places.items()
            }
            slots, start = [], 0
            for (name, shape), padding in zip(shapes.items(), paddings[index]):
                stored = {key: vector(start, shape) for key, vector in vectors.items()}
                slots.append(Slot(name, stored.pop("weight"), stored, step))
                start += shape.numel() + padding
            groups.append(Group(slots, settings))
        return groups

    def _groups_at_3(self) -> list[Group]:
        state = self._optimizer_state(0)
        inner = state[_STATE]
        groups, subgroup = [], 0
        for settings in inner["param_groups"]:
            slots = []
            for _ in settings["params"]:
                found = inner["state"].get(subgroup, {})
                step = _step([found], [settings])
                places: dict[str, tuple[Any, ...]] = {"weight": ("fp32_flat_groups", subgroup)}
                places |= {key: (_STATE, "state", subgroup, key) for key in _KEYS if key in found}
                start = 0
                for name, shape in self._shapes[subgroup].items():
                    stored = {
                        key: in_equal_parts(
                            self._files, [Place(file, (_STATE, *keys), start) for file in self._files.optimizer], shape
                        )
                        for key, keys in places.items()
                    }
                    slots.append(Slot(name, stored.pop("weight"), stored, step))
                    start += math.ceil(shape.numel() / self.processes)
                subgroup += 1
            groups.append(Group(slots, settings))
        return groups

    def _groups_at_0(self, order: Sequence[Sequence[tuple[str, torch.Size]]]) -> list[Group]:
        """The model's file has the optimizer's state dict, of torch (fp32) or of DeepSpeed's wrapper (fp16, bf16)."""
        file = self._files.model[0]
        outer = file.content().get("optimizer") or {}
        keys: tuple[Any, ...] = ("optimizer",)
        inner = outer
        if _STATE in outer:
            keys, inner = (*keys, _STATE), outer[_STATE]
        if not inner:
            return []
        sizes = [len(group["params"]) for group in inner["param_groups"]]
        flat = "fp32_groups_flat" in outer  # one vector for each group
        if len(order) != len(sizes) or (not flat and [len(group) for group in order] != sizes):
            raise EngineError(
                f"{file.path}: its optimizer has parameter groups of {'flat vectors' if flat else sizes}, this one of "
                f"{[len(group) for group in order]}; give initialize the same parameters in the same order"
            )
        groups, index = [], 0
        for number, (names, settings) in enumerate(zip(order, inner["param_groups"])):
            states = [inner["state"].get(index + place, {}) for place in range(sizes[number])]
            step = _step(states, [settings])
            slots, start = [], 0
            for place, (name, shape) in enumerate(names):
                at = index if flat else index + place
                found = inner["state"].get(at, {})
                spots = {key: (*keys, "state", at, key) for key in _KEYS if key in found}
                if flat:
                    spots["weight"] = ("optimizer", "fp32_groups_flat", number)
                elif "fp32_groups" in outer:
                    spots["weight"] = ("optimizer", "fp32_groups", number, place)
                stored = {
                    key: cut_from(self._files, Place(file, spot, start if flat else 0), shape)
                    for key, spot in spots.items()
                }
                own = found.get("step")
                slots.append(
                    Slot(name, stored.pop("weight", None), stored, float(own) if isinstance(own, Tensor) else step)
                )
                start += shape.numel()
            groups.append(Group(slots, settings))
            index += sizes[number]
        return groups

    # -- what else there is ----------------------------------------------------------------------

    @property
    def loss_scaler(self) -> Mapping[str, Any]:
        """The attributes of DeepSpeed's loss scaler; empty where there is none."""
        if self.stage:
            scaler = self._optimizer_state(0).get("loss_scaler")
            return {} if scaler is None else vars(scaler)
        outer = self._files.model[0].content().get("optimizer") or {}
        return {k: v for k, v in outer.items() if k.startswith(("cur_", "last_", "dyn"))}

    def release(self) -> None:
        """Give the memory of all files back; what is wanted later is read anew."""
        self._files.release()


_STATE = "optimizer_state_dict"
_TENSORS = ("module", "optimizer", "frozen_param_fragments")  # where a model's file has them


def _step(states: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]) -> float | None:
    """The updates of a group.

    DeepSpeed's fused optimizers count in the state of the last parameter only, older ones in the group.
    """
    counts = [float(each["step"]) for each in (*states, *settings) if "step" in each]
    return max(counts) if counts else None
