"""DeepSpeed's files next to Redline's own: the same that DeepSpeed wrote, key by key and bit by bit.

DeepSpeed's checkpoints in ``tests/golden`` are loaded and saved again. That DeepSpeed itself loads what is written, and
goes on as from its own files, is checked by hand: ``scripts/dev/check_deepspeed_loads.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redline import initialize, load_config
from redline.checkpoint.deepspeed_files import MappedFiles
from redline.checkpoint.deepspeed_reader import DeepSpeedCheckpoint
from redline.errors import ConfigError
from tests.distributed import run_ranks
from tests.golden import checkpoint_workload as workload

FOLDER = Path(__file__).parent.parent.parent / "golden" / "deepspeed_checkpoints"
OF_ONE = ["stage0-fp32", "stage2-fp32", "stage3-fp32"]
OF_TWO = [
    "stage1-fp32-two", "stage1-fp16-two", "stage2-bf16-two", "stage2-without-frozen", "stage3-fp32-two-subgroups",
    "stage3-bf16-two-groups", "stage3-fp16-two",
]  # fmt: skip
GROUPED = ("stage1-fp16-two", "stage2-bf16-two", "stage3-bf16-two-groups")
# What DeepSpeed has no use for when it loads: its own bookkeeping, and how it wrote a count that it does not read.
UNUSED = {"ds_config", "param_slice_mappings", "zero_stage", "universal_checkpoint_info", "frozen_param_fragments"}


def save_again(name: str, directory: str) -> None:
    """Runs in every rank."""
    config = json.loads((FOLDER / name / "config.json").read_text())
    model = workload.build_model()
    params = workload.parameter_groups(model) if name in GROUPED else workload.trainable(model)
    engine = initialize(
        model, {**config, "redline": {"checkpoint": {"format": "deepspeed"}}}, model_parameters=params, device="cpu"
    )
    _, client_state = engine.load_checkpoint(FOLDER / name, load_module_strict=not name.endswith("frozen"))
    engine.save_checkpoint(directory, client_state=client_state, exclude_frozen_parameters=name.endswith("frozen"))


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Where two files differ; what only ours has does not count."""
    if isinstance(theirs, Tensor):
        same = isinstance(ours, Tensor) and (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        same = same and ("fp32_flat_groups" in place or torch.equal(ours, theirs))
        return [] if same else [f"{place}: {ours} is not {theirs}"]
    if type(theirs).__name__ in ("LossScaler", "DynamicLossScaler"):
        return [] if vars(ours) == vars(theirs) and type(ours) is type(theirs) else [f"{place}: {vars(ours)}"]
    if isinstance(theirs, dict):
        # Its fused Adam counts in the last parameter of a group only, and starts to count where there is nothing.
        read = {key: each for key, each in theirs.items() if key not in UNUSED and (key, each) != ("step", 0)}
        return [f"{place}.{key} is missing" for key in read if key not in ours] + [
            each for key in read if key in ours for each in differences(ours[key], read[key], f"{place}.{key}")
        ]
    if isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        return [each for i, pair in enumerate(zip(ours, theirs)) for each in differences(*pair, f"{place}[{i}]")]
    if theirs is None and "frozen_param" in place:  # which DeepSpeed leaves out at stage 1, and where none were saved
        return []
    return [] if ours == theirs else [f"{place}: {ours!r} is not {theirs!r}"]


def test_what_deepspeed_would_lay_out_otherwise_is_refused_by_name() -> None:
    asked = {"train_micro_batch_size_per_gpu": 1, "redline": {"checkpoint": {"format": "deepspeed"}}}
    for given, message in (
        ({"bf16": {"enabled": True}}, 'got "deepspeed"; at stage 0 .* expected zero_optimization.stage 1, 2 or 3'),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 1}}, "mics_shard_size"),
        ({"optimizer": {"type": "Muon"}}, "Muon"),
    ):
        with pytest.raises(ConfigError, match=message) as refused:
            load_config({**asked, **given})
        assert [problem.path for problem in refused.value.problems] == ["redline.checkpoint.format"]


@pytest.mark.parametrize("name", [*OF_ONE, *OF_TWO])
def test_what_deepspeed_wrote_is_written_again_as_it_wrote_it(name: str, tmp_path: Path) -> None:
    run_ranks(save_again, 1 if name in OF_ONE else 2, name, str(tmp_path))
    theirs, ours = (MappedFiles(folder / "global_step7") for folder in (FOLDER / name, tmp_path))
    assert (tmp_path / "latest").read_text() == "global_step7"
    for kind in ("model", "optimizer"):
        expected = getattr(theirs, kind)
        assert [path.name for path in getattr(ours, kind)] == [path.name for path in expected]
        for path in expected:
            found = differences(ours.content(tmp_path / "global_step7" / path.name), theirs.content(path))
            assert found == []
    # What DeepSpeed pads shards of stage 3 with is what was in the memory: they are compared as they are read.
    read, again = (DeepSpeedCheckpoint(folder / "global_step7").entries for folder in (FOLDER / name, tmp_path))
    assert read.keys() <= again.keys()
    assert all(torch.equal(stored.read_full(), again[key].read_full()) for key, stored in read.items())
