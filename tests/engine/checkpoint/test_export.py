"""`save_16bit_model`: what DeepSpeed's writes and returns, at every stage, whole or not at all.

DeepSpeed's own answers are in ``tests/golden/deepspeed_checkpoints/*/expected.pt`` as ``saved_16bit``.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from redline import EngineError, initialize
from redline.checkpoint import model_file, storage
from tests.distributed import run_ranks
from tests.engine.checkpoint.test_consolidate import read
from tests.golden import checkpoint_workload as workload

FOLDER = Path(__file__).parent.parent.parent / "golden" / "deepspeed_checkpoints"
ALONE = ["stage0-fp32", "stage0-fp16", "stage2-fp32", "stage3-fp32"]
OF_TWO = [
    "stage0-bf16-two", "stage1-fp16-two", "stage2-bf16-two", "stage2-without-frozen", "stage3-fp32-two-subgroups",
    "stage3-bf16-two-groups",
]  # fmt: skip
CONFIG = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def save_as_recorded(name: str, folder: str) -> bool:
    """Load a case, and save it as the recording did; what was returned."""
    config = json.loads((FOLDER / name / "config.json").read_text())
    model = workload.build_model()
    engine = initialize(model, config, model_parameters=workload.trainable(model), device="cpu")
    without = name == "stage2-without-frozen"
    engine.load_checkpoint(FOLDER / name, load_module_strict=not without, load_optimizer_states=False)
    return engine.save_16bit_model(f"{folder}/{name}/made/as needed", exclude_frozen_parameters=without)


def save_all_as_recorded(names: list[str], folder: str) -> dict[str, bool]:
    return {name: save_as_recorded(name, folder) for name in names}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[bool]]]:
    """The cases of one and two processes, saved; the folder, and what each process got."""
    folder = tmp_path_factory.mktemp("saved")
    returned = {name: [value] for name, value in save_all_as_recorded(ALONE, str(folder)).items()}
    of_two = run_ranks(save_all_as_recorded, 2, OF_TWO, str(folder))
    return folder, returned | {name: [each[name] for each in of_two] for name in OF_TWO}


@pytest.mark.parametrize("name", [*ALONE, *OF_TWO])
def test_it_writes_and_returns_what_deepspeed_does(name: str, saved: tuple[Path, dict[str, list[bool]]]) -> None:
    folder, returned = saved
    expected = torch.load(FOLDER / name / "expected.pt", weights_only=True)
    told = expected["saved_16bit"]
    assert returned[name] == told["returned"]
    made = folder / name / "made" / "as needed"
    assert (sorted(path.name for path in made.iterdir()) if made.exists() else []) == told["files"]
    if told["dtypes"] is None:
        return
    tensors = torch.load(made / "pytorch_model.bin", weights_only=True)
    assert {key: str(each.dtype) for key, each in tensors.items()} == told["dtypes"]
    assert tensors["head.weight"].data_ptr() == tensors["embed.weight"].data_ptr()
    assert all(torch.equal(each, expected["module"][key]) for key, each in tensors.items())


def test_the_file_goes_into_the_bare_model(saved: tuple[Path, dict[str, list[bool]]]) -> None:
    folder, _ = saved
    model = workload.build_model().bfloat16()
    state = torch.load(
        folder / "stage3-bf16-two-groups" / "made" / "as needed" / "pytorch_model.bin", weights_only=True
    )
    model.load_state_dict(state)
    assert torch.equal(model.mix.weight, state["mix.weight"])


def test_stage_3_says_why_it_saves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = initialize(workload.build_model(), CONFIG | {"zero_optimization": {"stage": 3}}, device="cpu")
    assert engine.save_16bit_model(tmp_path) is False
    assert "stage3_gather_16bit_weights_on_model_save is false" in caplog.text
    assert list(tmp_path.iterdir()) == []


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.norm, self.outputs = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.tied = self.outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.tied(self.norm(self.inputs(x)))
        return output


def full_state_after_a_step(stage: int, precision: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    engine = initialize(Tied(), {**CONFIG, "zero_optimization": {"stage": stage}, **precision}, device="cpu")
    engine.backward(engine(torch.ones(4, 4)).float().square().mean())
    engine.step()
    return engine.full_state_dict()


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_the_full_state_dict_is_on_rank_0_and_the_same_at_every_stage(precision: dict[str, Any]) -> None:
    states = []
    for stage in (0, 2, 3):
        state, of_other_rank = run_ranks(full_state_after_a_step, 2, stage, precision)
        assert of_other_rank == {}
        Tied().load_state_dict(state)
        states.append(state)
    assert states[0]["tied.weight"].dtype is (torch.bfloat16 if precision else torch.float32)
    for state in states[1:]:
        torch.testing.assert_close(state, states[0])  # types and dtypes, too


def test_a_name_that_ends_in_safetensors_has_that_format(tmp_path: Path) -> None:
    engine = initialize(workload.build_model(), CONFIG | {"bf16": {"enabled": True}}, device="cpu")
    assert engine.save_16bit_model(tmp_path, "model.safetensors")
    tensors, metadata = read(tmp_path / "model.safetensors")
    assert metadata == {"format": "pt", "head.weight": "embed.weight"}
    assert tensors.keys() == workload.build_model().state_dict().keys() - {"head.weight"}
    others = {name: each.dtype for name, each in tensors.items() if each.dtype != torch.bfloat16}
    assert others == {"counts": torch.int64, "shift": torch.float32}
    assert torch.equal(tensors["mix.weight"], engine.module.mix.weight)


def test_a_parameter_that_is_a_view_is_saved_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.randn(100, 2)[:2])
    engine = initialize(model, CONFIG, device="cpu")
    engine.save_16bit_model(tmp_path)
    assert torch.load(tmp_path / "pytorch_model.bin", weights_only=True)["weight"].untyped_storage().nbytes() == 16


class Extra(nn.Linear):
    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_of_plain_types_is_saved_and_other_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = initialize(Extra({"seen": [1, 2.5, "x"]}), CONFIG, device="cpu")
    engine.save_16bit_model(tmp_path)
    other = Extra(None)
    other.load_state_dict(torch.load(tmp_path / "pytorch_model.bin", weights_only=True))
    assert other.extra == {"seen": [1, 2.5, "x"]}
    engine.save_16bit_model(tmp_path, "m.safetensors")
    assert "_extra_state are not tensors, and not in the file" in caplog.text
    engine.module.extra = Path("x")
    with pytest.raises(EngineError, match=r"_extra_state is of type .*Path"):
        engine.save_16bit_model(tmp_path / "other")
    assert not (tmp_path / "other").exists()


# -- whole or not at all ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "name"), [("", "model.bin"), ("file/in/the/way", "model.bin"), (".", "")])
def test_a_place_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    engine = initialize(nn.Linear(2, 2), CONFIG, device="cpu")
    with pytest.raises(EngineError, match=r"save_16bit_model: (got save_dir|Not a directory)"):
        engine.save_16bit_model(folder, name)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_room_on_the_disk_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = initialize(nn.Linear(2, 2), CONFIG, device="cpu")
    usage = storage.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=3))
    with pytest.raises(EngineError, match=r"the disk has 0\.0 MB free; nothing was written"):
        engine.save_16bit_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def fail_while_writing(folder: str) -> list[str]:
    """Two saves on a disk that is full on rank 0 only; what each process hears, and then one that succeeds."""
    patch = pytest.MonkeyPatch()
    config = CONFIG | {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "redline": {"zero": {"blocks": []}},
    }
    engine = initialize(workload.build_model(), config, device="cpu")
    heard = []

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    targets = ((model_file, "save_state_dict"), (model_file, "write_safetensors"))
    for name, target in zip(("model.bin", "model.safetensors"), targets):
        with patch.context() as patched:
            patched.setattr(*target, full)
            try:
                engine.save_16bit_model(folder, name)
            except EngineError as error:
                heard.append(str(error))
    engine.save_16bit_model(folder)
    return heard


def test_all_processes_hear_of_a_disk_that_is_full_on_one_and_can_go_on(tmp_path: Path) -> None:
    heard = run_ranks(fail_while_writing, 2, str(tmp_path))
    assert heard[0] == heard[1] and len(heard[0]) == 2
    assert all("rank 0: " in each and "No space left on device; no partial file is left" in each for each in heard[0])
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]
