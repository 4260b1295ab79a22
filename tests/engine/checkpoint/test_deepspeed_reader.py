"""DeepSpeed's own checkpoints, of every stage: read bit for bit, gone on from, and refused where they are not whole.

What DeepSpeed wrote and what it makes of it are in ``tests/golden/deepspeed_checkpoints``;
``scripts/dev/record_deepspeed_checkpoints.py`` records them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import EngineError, initialize
from redline.checkpoint.deepspeed_files import MappedFiles
from redline.checkpoint.deepspeed_reader import DeepSpeedCheckpoint
from tests.distributed import run_ranks
from tests.golden import checkpoint_workload as workload

FOLDER = Path(__file__).parent.parent.parent / "golden" / "deepspeed_checkpoints"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
GROUPED = ("stage1-fp16-two", "stage2-bf16-two", "stage3-bf16-two-groups")  # with two parameter groups
OF_TWO = [
    name
    for name in CASES
    if name.endswith(("-two", "-subgroups", "-groups", "-gradients", "-elastic", "-round-robin", "-frozen"))
]
OF_ONE = ["stage0-fp32", "stage2-fp32", "stage3-fp32"]


def expected(name: str) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(FOLDER / name / "expected.pt", weights_only=True)
    return values


def opened(name: str) -> DeepSpeedCheckpoint:
    return DeepSpeedCheckpoint(FOLDER / name / (FOLDER / name / "latest").read_text())


def whole(checkpoint: DeepSpeedCheckpoint) -> dict[str, Tensor]:
    tensors = {key.removeprefix("model."): stored.read_full() for key, stored in checkpoint.entries.items()}
    return {**tensors, **{alias: tensors[name] for alias, name in checkpoint.aliases.items()}}


# -- bit for bit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_rounded_the_weights_are_the_models_and_buffers_and_ties_are_there(name: str) -> None:
    found, module = whole(opened(name)), expected(name)["module"]
    left_out = {"frozen.weight", "frozen.bias"} if name == "stage2-without-frozen" else set()
    assert found.keys() == module.keys() - left_out
    for key, tensor in found.items():
        assert torch.equal(tensor.to(module[key].dtype), module[key]), key
    assert found["counts"].dtype == torch.int64
    assert found["head.weight"] is found["embed.weight"]


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("stage0")])
def test_weights_and_moments_are_bit_for_bit_what_deepspeed_tells_of_them(name: str) -> None:
    checkpoint, told = opened(name), expected(name)
    # Of BF16_Optimizer's files DeepSpeed's tool makes nothing; with round robin it tells moments of other parameters.
    assert (told["consolidated"] is None) == (name == "stage1-bf16-fp32-gradients")
    assert (told["optimizer"] is None) == (name == "stage2-fp16-two-round-robin")
    if told["consolidated"] is not None:
        found = whole(checkpoint)
        assert len(told["consolidated"]) >= 9
        assert all(torch.equal(found[key], tensor) for key, tensor in told["consolidated"].items())
        # At stage 1 DeepSpeed's tool leaves frozen parameters out; here they are there.
        assert found.keys() - told["consolidated"].keys() <= {"frozen.weight", "frozen.bias"}
    if told["optimizer"] is not None:
        slots = {slot.name: slot for slot in checkpoint.slots()}
        assert slots.keys() == told["optimizer"].keys()
        for key, slot in slots.items():
            stored = {"weight": slot.weight, **slot.moments}
            assert stored.keys() == told["optimizer"][key].keys()
            assert all(torch.equal(stored[each].read_full(), value) for each, value in told["optimizer"][key].items())


@pytest.mark.parametrize("name", ["stage1-fp16-two", "stage2-fp16-two-round-robin", "stage3-fp16-two"])
def test_the_loss_scaler_is_read_as_an_inert_object_with_its_attributes(name: str) -> None:
    scaler = opened(name).shared["loss_scale"]
    assert scaler["value"] == expected(name)["loss_scale"] == 2.0**14
    assert (scaler["_updates"], scaler["_last_overflow"]) == (7, 5)


# -- going on ------------------------------------------------------------------------------------------------


def engine_for(name: str, **changes: Any) -> Any:
    """An engine with the case's own config, its ZeRO stage, too."""
    config = json.loads((FOLDER / name / "config.json").read_text()) | changes
    model = workload.build_model()
    parameters = workload.parameter_groups(model) if name in GROUPED else workload.trainable(model)
    return initialize(model, config, model_parameters=parameters, device="cpu")


def go_on(name: str) -> dict[str, Any]:
    """Load a case and train on as DeepSpeed did; runs on one process or several."""
    engine = engine_for(name)
    path, client_state = engine.load_checkpoint(FOLDER / name, load_module_strict=name != "stage2-without-frozen")
    told: dict[str, Any] = {
        "path": path,
        "client_state": client_state,
        "counters": (engine.global_steps, engine.global_samples, engine.skipped_steps, engine.loss_scale),
        "module": _whole_state(engine.module),
        "losses": [],
        "lrs": [],
    }
    for step in range(workload.STEPS_BEFORE, workload.STEPS_BEFORE + workload.STEPS_AFTER):
        loss = workload.loss_of(engine, step, engine.global_rank, engine.world_size)
        engine.backward(loss)
        told["lrs"].append([float(lr) for lr in engine.get_lr()])
        engine.step()
        mean = loss.detach().float().clone()
        if engine.world_size > 1:
            torch.distributed.all_reduce(mean)
        told["losses"].append(float(mean / engine.world_size))
    told["weights"] = _whole_state(engine.module)
    return told


def _whole_state(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in module.state_dict().items()
    }


def go_on_with_all(names: list[str]) -> dict[str, dict[str, Any]]:
    return {name: go_on(name) for name in names}


def load_at(name: str, stage: int) -> dict[str, Any]:
    """What a case's checkpoint comes to at another stage."""
    engine = engine_for(name, zero_optimization={"stage": stage})
    engine.load_checkpoint(FOLDER / name)
    moments = {
        key: engine.optimizer.state[weight]["exp_avg"] for key, weight in engine.module.named_parameters()
        if weight in engine.optimizer.state
    }  # fmt: skip
    return {
        "module": _whole_state(engine.module),
        "moments": {key: value.full_tensor() for key, value in moments.items() if hasattr(value, "full_tensor")},
    }


def load_elsewhere() -> list[dict[str, Any]]:
    return [load_at(name, stage) for name, stage in ELSEWHERE]


ELSEWHERE = (("stage0-fp32", 3), ("stage3-fp32", 1), ("stage3-fp32", 2), ("stage2-fp32", 3))


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Any]]:
    """All cases of one and of two processes, gone on with."""
    return go_on_with_all(OF_ONE) | run_ranks(go_on_with_all, 2, OF_TWO)[0]


@pytest.mark.parametrize("name", [*OF_ONE, *OF_TWO])
def test_training_goes_on_from_deepspeeds_checkpoint_as_deepspeed_does(
    name: str, runs: dict[str, dict[str, Any]]
) -> None:
    told, wanted = runs[name], expected(name)
    assert told["path"] == str(FOLDER / name / "global_step7")
    assert told["client_state"] == {"epoch": 3, "note": "client's own"}
    counters = (wanted["global_steps"], wanted["global_samples"], wanted["skipped_steps"], wanted["loss_scale"])
    assert told["counters"] == counters
    low = "16" in name
    for key, tensor in wanted["module"].items():
        if name != "stage2-without-frozen" or not key.startswith("frozen"):
            assert torch.equal(told["module"][key].to(tensor.dtype), tensor), key
    assert told["lrs"] == wanted["lrs"]
    # DeepSpeed's stage 3 sums bf16 and fp16 gradients in that format; where a loss scale grows, it divides twice.
    assert told["losses"] == pytest.approx(wanted["losses"], rel=5e-3 if "fp16" in name else 1e-3 if low else 2e-5)
    for key, tensor in wanted["weights"].items():
        distance = (told["weights"][key].float() - tensor.float()).abs().max()
        assert distance <= (0.02 if low else 2e-6), key


def test_any_stage_on_any_number_of_processes_loads_into_any_other() -> None:
    for told in run_ranks(load_elsewhere, 2):
        for (name, _), found in zip(ELSEWHERE, told):
            module = expected(name)["module"]
            assert found["module"].keys() == module.keys()
            assert all(torch.equal(value, module[key]) for key, value in found["module"].items())
            moments = {slot.name: slot.moments["exp_avg"] for slot in opened(name).slots(_order())}
            assert len(found["moments"]) >= 5
            assert all(torch.equal(value, moments[key].read_full()) for key, value in found["moments"].items())


def _order() -> list[dict[str, torch.Size]]:
    return [{name: each.shape for name, each in workload.build_model().named_parameters() if each.requires_grad}]


def test_a_checkpoint_of_three_processes_loads_into_one_in_another_precision() -> None:
    engine = engine_for("stage3-bf16-three", bf16={"enabled": False})
    engine.load_checkpoint(FOLDER / "stage3-bf16-three")
    consolidated = expected("stage3-bf16-three")["consolidated"]
    for name, value in _whole_state(engine.module).items():
        assert torch.equal(value, consolidated[name]), name
    assert engine.global_steps == 7


@pytest.mark.parametrize("name", ["stage0-fp16", "stage0-fp16-torch-adam"])
def test_at_stage_0_fp32_weights_come_from_the_optimizer_by_the_order_of_parameters(name: str) -> None:
    engine = engine_for(name)
    engine.load_checkpoint(FOLDER / name)
    assert engine.loss_scale == expected(name)["loss_scale"]
    masters = engine.master_params
    assert masters is not None and len(masters.of) == 6
    for low, master in masters.of.items():
        assert torch.equal(master.to(low.dtype), low)
    assert any(not torch.equal(master, low.float()) for low, master in masters.of.items())
    assert all(float(engine.optimizer.state[master]["step"]) >= 7 for master in masters.of.values())


def test_at_stage_0_another_order_of_parameters_is_found_out_and_nothing_is_loaded() -> None:
    config = json.loads((FOLDER / "stage0-fp16-torch-adam" / "config.json").read_text())
    model = workload.build_model()
    engine = initialize(model, config, model_parameters=workload.trainable(model)[::-1], device="cpu")
    before = _whole_state(model)
    with pytest.raises(EngineError, match="same parameters in the same order"):
        engine.load_checkpoint(FOLDER / "stage0-fp16-torch-adam")
    assert all(torch.equal(value, before[name]) for name, value in _whole_state(model).items())
    engine.load_checkpoint(FOLDER / "stage0-fp16-torch-adam", load_optimizer_states=False)
    assert engine.global_steps == 7


def test_load_module_only_leaves_the_rest_of_the_run_as_it_is() -> None:
    engine = engine_for("stage3-fp32")
    path, client_state = engine.load_checkpoint(FOLDER / "stage3-fp32", load_module_only=True)
    assert path is not None and client_state is not None and client_state["epoch"] == 3
    module = expected("stage3-fp32")["module"]
    assert all(torch.equal(value, module[name]) for name, value in _whole_state(engine.module).items())
    assert engine.global_steps == 0 and not engine.optimizer.state and engine.lr_scheduler.last_batch_iteration == -1


def test_the_schedule_and_the_optimizers_state_can_be_left_behind() -> None:
    engine = engine_for("stage2-fp32")
    engine.load_checkpoint(FOLDER / "stage2-fp32", load_optimizer_states=False, load_lr_scheduler_states=False)
    assert engine.global_steps == 7
    assert not engine.optimizer.state and engine.lr_scheduler.last_batch_iteration == -1


def test_custom_load_fn_gets_the_whole_model_with_every_name() -> None:
    seen: dict[str, Any] = {}

    def custom(src: dict[str, Tensor], dst: nn.Module) -> None:
        seen.update(src)
        dst.load_state_dict(src)

    engine = engine_for("stage1-fp32-two", zero_optimization={"stage": 0})
    engine.load_checkpoint(FOLDER / "stage1-fp32-two", custom_load_fn=custom)
    assert seen.keys() == expected("stage1-fp32-two")["module"].keys()
    assert torch.equal(engine.module.mix.weight, expected("stage1-fp32-two")["module"]["mix.weight"])


# -- what does not go together -------------------------------------------------------------------------------


def test_a_changed_schedule_is_named_and_loads_only_when_overridden() -> None:
    other = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.03, "warmup_num_steps": 20}}
    engine = engine_for("stage2-fp32", scheduler=other)
    with pytest.raises(EngineError, match=r"warmup_max_lr was 0\.02, is 0\.03.*override_schedule"):
        engine.load_checkpoint(FOLDER / "stage2-fp32")
    assert engine.global_steps == 0
    cosine = {"type": "WarmupCosineLR", "params": {"total_num_steps": 50, "warmup_num_steps": 20}}
    engine = engine_for("stage2-fp32", scheduler=cosine)
    with pytest.raises(EngineError, match="type was WarmupLR, is WarmupCosineLR"):
        engine.load_checkpoint(FOLDER / "stage2-fp32")
    engine = engine_for("stage2-fp32", scheduler=cosine, redline={"checkpoint": {"override_schedule": True}})
    engine.load_checkpoint(FOLDER / "stage2-fp32")
    assert engine.lr_scheduler.last_batch_iteration == 6


def test_moments_of_another_optimizer_are_refused_by_name() -> None:
    engine = engine_for("stage1-fp32-two", optimizer={"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}})
    with pytest.raises(EngineError, match=r"exp_avg, exp_avg_sq.*SGD needs momentum_buffer.*load_optimizer_states=F"):
        engine.load_checkpoint(FOLDER / "stage1-fp32-two")
    engine.load_checkpoint(FOLDER / "stage1-fp32-two", load_optimizer_states=False)


def test_a_model_of_other_names_or_shapes_is_refused_and_can_be_loaded_in_part() -> None:
    with pytest.raises(EngineError, match=r"lacks frozen\.weight, frozen\.bias.*load_module_strict=False"):
        engine_for("stage2-without-frozen").load_checkpoint(FOLDER / "stage2-without-frozen")
    config = {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
    model = workload.build_model()
    model.out = nn.Linear(7, 4)
    with pytest.raises(EngineError, match=r"out\.weight is \[3, 7\] in the checkpoint, \[4, 7\] in the model"):
        initialize(model, config, device="cpu").load_checkpoint(FOLDER / "stage2-fp32")
    model = workload.build_model()
    model.extra = nn.Linear(2, 2)  # type: ignore[assignment]
    del model.out
    engine = initialize(model, config, device="cpu")
    with pytest.raises(EngineError, match=r"lacks extra\.weight.*has out\.weight, out\.bias, which"):
        engine.load_checkpoint(FOLDER / "stage2-fp32")
    engine.load_checkpoint(FOLDER / "stage2-fp32", load_module_strict=False, load_lr_scheduler_states=False)
    assert torch.equal(model.mix.weight, expected("stage2-fp32")["module"]["mix.weight"])


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Any:
    """Copies of cases that a test may break; gives the tag's folder."""

    def copy(name: str) -> Path:
        shutil.copytree(FOLDER / name, tmp_path / name)
        return tmp_path / name / "global_step7"

    return copy


class _Bomb:
    """Pickled, it makes a file when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_pickle_with_code_in_it_is_refused_by_name_and_not_run(copied: Any, tmp_path: Path, file: str) -> None:
    folder = copied("stage1-fp32-two")
    torch.save({"optimizer_state_dict": _Bomb(tmp_path / "ran")}, folder / file)
    with pytest.raises(EngineError, match=rf"{file}: refused: it asks for (posix|nt)\.system"):
        engine_for("stage1-fp32-two").load_checkpoint(folder.parent)
    assert not (tmp_path / "ran").exists()
    with open(folder / file, "rb") as opened_file:  # the bomb is live: the plain unpickler runs it
        data = zipfile.ZipFile(opened_file).read(f"{Path(file).stem}/data.pkl")
    pickle.loads(data)
    assert (tmp_path / "ran").exists()


class _By:
    """Pickles as ``getattr(kind, name)``."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> Any:
        return getattr, (self.kind, self.name)


@pytest.mark.parametrize(
    ("name", "stage"), [("stage1-fp32-two", "optimizer_states"), ("stage2-fp32", "gradients"),
                        ("stage3-fp32-two-subgroups", "weights")],
)  # fmt: skip
def test_a_stage_that_an_early_python_3_11_pickled_by_its_name_is_read(
    copied: Any, monkeypatch: pytest.MonkeyPatch, name: str, stage: str
) -> None:
    kind = type("ZeroStageEnum", (), {"__module__": "deepspeed.runtime.zero.config"})
    folder = copied(name)
    for place in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.zero.config"):
        monkeypatch.setitem(sys.modules, place, types.ModuleType(place))
    monkeypatch.setattr(sys.modules["deepspeed.runtime.zero.config"], "ZeroStageEnum", kind, raising=False)
    for path in folder.glob("*optim_states.pt"):
        torch.save({"optimizer_state_dict": {"zero_stage": _By(kind, stage)}}, path)
        states = MappedFiles(folder).content(path)["optimizer_state_dict"]
        assert states["zero_stage"].arguments == (int(name[5]),)


class _Harmless:
    pass


@pytest.mark.parametrize(
    ("value", "asked"),
    [(_By(torch.Tensor, "numpy"), "getattr; nothing else is read"), (_Harmless(), r"\S+_Harmless; .*client_state")],
)
def test_anything_else_is_refused_though_it_does_nothing(copied: Any, value: Any, asked: str) -> None:
    folder = copied("stage0-fp32")
    torch.save({"module": value}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(EngineError, match=f"refused: it asks for {asked}"):
        engine_for("stage0-fp32").load_checkpoint(folder.parent)


def test_a_truncated_file_is_named(copied: Any) -> None:
    folder = copied("stage3-fp32-two-subgroups")
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(EngineError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt: cannot be read"):
        opened_entries = DeepSpeedCheckpoint(folder).entries
        assert not opened_entries


@pytest.mark.parametrize("key", ["dp_world_size", "buffer_names", "param_shapes", "module"])
def test_a_file_without_what_deepspeed_writes_is_refused(copied: Any, key: str) -> None:
    folder = copied("stage0-fp32")
    path = folder / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in content.items() if name != key}, path)
    with pytest.raises(EngineError, match="not as DeepSpeed"):
        opened_entries = DeepSpeedCheckpoint(folder).entries
        assert not opened_entries


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        ("stage3-bf16-three", "zero_pp_rank_1_mp_rank_00_model_states.pt", "rank_1_mp_rank_00_model_states.pt is mis"),
        ("stage3-bf16-three", "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", "there are 2 files of optim"),
        ("stage1-fp32-two", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "the part of rank 0"),
    ],
)  # fmt: skip
def test_the_missing_part_of_a_process_is_named(copied: Any, name: str, gone: str, message: str) -> None:
    folder = copied(name)
    (folder / gone).unlink()
    with pytest.raises(EngineError, match=message):
        DeepSpeedCheckpoint(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("layer_00-model_00_model_states.pt", "PipelineModule"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts of an MoE model"),
        ("zero", "universal format"),
    ],
)
def test_what_is_of_another_kind_of_parallelism_or_format_is_refused_by_name(
    copied: Any, file: str, message: str
) -> None:
    folder = copied("stage2-fp32")
    (folder / file).touch()
    with pytest.raises(EngineError, match=message):
        DeepSpeedCheckpoint(folder)


def test_a_flat_vector_that_is_too_short_is_refused(copied: Any) -> None:
    folder = copied("stage0-fp32")
    path = folder / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    content["optimizer"]["state"][1]["exp_avg"] = torch.zeros(3)
    torch.save(content, path)
    engine = engine_for("stage0-fp32")
    with pytest.raises(EngineError, match=r"optimizer\.state\.1\.exp_avg has 3 elements for a parameter of 35"):
        engine.load_checkpoint(folder.parent)


def test_a_folder_without_latest_gives_none_as_in_deepspeed(copied: Any) -> None:
    folder = copied("stage0-fp32")
    (folder.parent / "latest").unlink()
    engine = engine_for("stage0-fp32")
    assert engine.load_checkpoint(folder.parent) == (None, None)
    assert engine.load_checkpoint(folder.parent, tag="global_step7")[0] == str(folder)
