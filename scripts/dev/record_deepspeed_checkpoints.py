"""Let real DeepSpeed train a tiny model, save a checkpoint and go on, and keep what it wrote.

Run by hand with DeepSpeed 0.19.8 installed (``pip install deepspeed==0.19.8``) on a machine without GPU:

    python scripts/dev/record_deepspeed_checkpoints.py --output tests/golden/deepspeed_checkpoints

One folder per case: ``latest`` and ``TAG/`` as DeepSpeed wrote them (without the scripts that it copies beside them),
``config.json``, and ``expected.pt``, a dict of tensors and plain types:

    consolidated             the weights as DeepSpeed's own zero_to_fp32 puts them together, where it can: at ZeRO
                             stages 1 to 3, but not of its BF16_Optimizer, which writes no stage; else None
    module                   the model's state dict, whole, in the format that it computes in
    global_steps, global_samples, skipped_steps
    loss_scale               of the next loss; None without fp16
    optimizer                for stages 1 to 3 each parameter's fp32 weight and moments, whole, as DeepSpeed's own
                             safe_get_full_fp32_param and safe_get_full_optimizer_state tell them; None where these are
                             mistaken, as with round_robin_gradients: the weights do not round to the model's
    saved_16bit              what save_16bit_model returned on each process and wrote: the type of each tensor by name,
                             or None for no file; whether tied weights are one tensor, and its other files
    losses, lrs, weights     of the steps that followed the save: each loss (mean over the processes), each update's
                             rate, and all weights at the end

The model, its data and the number of steps are in ``tests/golden/checkpoint_workload.py``, which the tests share.
``versions.json`` says what recorded them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.distributed import run_ranks  # noqa: E402
from tests.golden import checkpoint_workload as workload  # noqa: E402

DEEPSPEED_VERSION = "0.19.8"
Case = dict[str, Any]

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 17, "loss_scale_window": 3, "hysteresis": 1}}
SGD = {
    "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
    "zero_allow_untested_optimizer": True,
}
TORCH_ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}}}


def case(name: str, stage: int, processes: int, /, *sections: dict[str, Any], zero: Any = None, **given: Any) -> Case:
    """One case; ``given``: groups (parameter groups), exclude_frozen_parameters."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": workload.MICRO_BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 20}},
    }
    if stage:
        config["zero_optimization"] = {"stage": stage, **(zero or {})}
    for section in sections:
        config |= section
    return {"name": name, "processes": processes, "config": config, **given}


CASES = (
    case("stage0-fp32", 0, 1),
    case("stage0-bf16-two", 0, 2, BF16),
    case("stage0-fp16", 0, 1, FP16),
    case("stage0-fp16-torch-adam", 0, 1, FP16, TORCH_ADAM),
    case("stage1-fp32-two", 1, 2),
    case("stage1-bf16-fp32-gradients", 1, 2, BF16, {"data_types": {"grad_accum_dtype": "fp32"}}),
    case("stage1-fp16-two", 1, 2, FP16, groups=True),
    case("stage1-sgd-elastic", 1, 2, SGD, zero={"elastic_checkpoint": True}),
    case("stage2-fp32", 2, 1),
    case("stage2-bf16-two", 2, 2, BF16, groups=True),
    case("stage2-fp16-two-round-robin", 2, 2, FP16, zero={"round_robin_gradients": True}),
    case("stage2-aligned-two", 2, 2, TORCH_ADAM, zero={"parameter_alignment": True}),
    case("stage2-without-frozen", 2, 2, exclude_frozen_parameters=True),
    case("stage3-fp32", 3, 1),
    case("stage3-fp32-two-subgroups", 3, 2, zero={"sub_group_size": 40}),
    case("stage3-bf16-two-groups", 3, 2, BF16, zero={"stage3_gather_16bit_weights_on_model_save": True}, groups=True),
    case("stage3-fp16-two", 3, 2, FP16),
    case("stage3-bf16-three", 3, 3, BF16, TORCH_ADAM),
)  # fmt: skip


def record(chosen: Case, folder: str) -> None:
    """Runs in every rank: trains, saves, goes on; rank 0 writes what is expected."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On the CPU it asks for instructions that make fp16 fast; torch computes fp16 without them.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    model = workload.build_model()
    config = json.loads(json.dumps(chosen["config"]))
    parameters = workload.parameter_groups(model) if chosen.get("groups") else workload.trainable(model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    for step in range(workload.STEPS_BEFORE):
        _update(deepspeed, engine, step)
    frozen = {"exclude_frozen_parameters": True} if chosen.get("exclude_frozen_parameters") else {}
    engine.save_checkpoint(folder, client_state={"epoch": 3, "note": "client's own"}, **frozen)
    scale = engine._get_optimizer_loss_scale() if "fp16" in config else None
    expected: dict[str, Any] = {
        "module": _whole_module(deepspeed, engine),
        "optimizer": _whole_optimizer(deepspeed, engine) if "zero_optimization" in config else None,
        "saved_16bit": _save_16bit(engine, Path(folder), frozen),
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "loss_scale": None if scale is None else float(scale),
        "losses": [],
        "lrs": [],
    }
    for step in range(workload.STEPS_BEFORE, workload.STEPS_BEFORE + workload.STEPS_AFTER):
        loss, lr = _update(deepspeed, engine, step)
        expected["losses"].append(loss)
        expected["lrs"].append(lr)
    expected["weights"] = _whole_module(deepspeed, engine)
    if torch.distributed.get_rank() == 0:
        _write(Path(folder), config, expected)
    torch.distributed.barrier()
    engine.destroy()


def _update(deepspeed: Any, engine: Any, step: int) -> tuple[float, list[float]]:
    """One update; its loss over all processes, and the rates it ran at."""
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    loss = workload.loss_of(engine, step, rank, world_size)
    engine.backward(loss)
    lr = [float(lr) for lr in engine.get_lr()]
    engine.step()
    mean = loss.detach().float()
    torch.distributed.all_reduce(mean)
    return float(mean / world_size), lr


def _whole_module(deepspeed: Any, engine: Any) -> dict[str, torch.Tensor]:
    """The model's state dict with every parameter whole."""
    parameters = list(engine.module.parameters())
    if engine.zero_optimization_partition_weights():
        with deepspeed.zero.GatheredParameters(parameters):
            return {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}


def _save_16bit(engine: Any, folder: Path, frozen: dict[str, bool]) -> dict[str, Any]:
    """What save_16bit_model does; its files are removed."""
    returned: list[Any] = [None] * torch.distributed.get_world_size()
    target = folder / "made" / "as needed"
    torch.distributed.all_gather_object(returned, engine.save_16bit_model(str(target), **frozen))
    torch.distributed.barrier()
    path = target / "pytorch_model.bin"
    found: dict[str, Any] = {"returned": returned, "dtypes": None, "one_tensor": None, "files": []}
    if torch.distributed.get_rank() == 0 and target.exists():
        found["files"] = sorted(each.name for each in target.iterdir())
        tensors = torch.load(path, weights_only=True)
        found["dtypes"] = {name: str(tensor.dtype) for name, tensor in tensors.items()}
        found["one_tensor"] = tensors["head.weight"].data_ptr() == tensors["embed.weight"].data_ptr()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder / "made", ignore_errors=True)
    return found


def _whole_optimizer(deepspeed: Any, engine: Any) -> dict[str, dict[str, torch.Tensor]] | None:
    """Of each trained parameter the fp32 weight and the moments; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False  # it linked after the first of several groups
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        entry = {"weight": safe_get_full_fp32_param(parameter)}
        keys = ("momentum_buffer",) if engine.config["optimizer"]["type"] == "SGD" else ("exp_avg", "exp_avg_sq")
        for key in keys:
            entry[key] = safe_get_full_optimizer_state(parameter, key)
        found[name] = {key: value.detach().clone().view(_shape(parameter)) for key, value in entry.items()}
    module = _whole_module(deepspeed, engine)
    right = all(torch.equal(each["weight"].to(module[name].dtype), module[name]) for name, each in found.items())
    return found if right else None


def _shape(parameter: Any) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _write(folder: Path, config: dict[str, Any], expected: dict[str, Any]) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    expected["consolidated"] = None
    if "zero_optimization" in config:
        try:
            consolidated = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        except ValueError as error:
            assert "is not a zero checkpoint" in str(error), error
        else:
            expected["consolidated"] = {name: tensor.detach().clone() for name, tensor in consolidated.items()}
    for script in ("zero_to_fp32.py", "zero_to_torch.py"):
        (folder / script).unlink(missing_ok=True)
    torch.save(expected, folder / "expected.pt")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CASE", help="cases to record (default: all)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "tests" / "golden" / "deepspeed_checkpoints", metavar="DIR",
        help="folder to write into; cases that are there are replaced (default: %(default)s)",
    )  # fmt: skip
    given = parser.parse_args()
    unknown = set(given.names) - {each["name"] for each in CASES}
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(c['name'] for c in CASES)}")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        parser.error(f"DeepSpeed cannot be imported ({error}); install deepspeed=={DEEPSPEED_VERSION} beside torch")
    if deepspeed.__version__ != DEEPSPEED_VERSION:
        parser.error(f"the tests expect files of DeepSpeed {DEEPSPEED_VERSION}; this is {deepspeed.__version__}")
    for each in CASES:
        if given.names and each["name"] not in given.names:
            continue
        folder = given.output / each["name"]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run_ranks(record, each["processes"], each, str(folder), timeout=600.0, fresh=True)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{each['name']}: {size / 1000:.0f} kB")
    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__, "python": platform.python_version()}
    (given.output / "versions.json").write_text(json.dumps(versions) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
