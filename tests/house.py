"""What the package does as a whole, asked through public names and the command line: a net for changes of its inside.

Four kinds of answers: how configs validate, how short runs train, what loading a checkpoint restores, and what
`range-test` finds. Nothing here depends on module names, so that another commit can answer, too, under another
import name. ``scripts/dev/record_house.py`` records the answers and ``tests/test_house.py`` compares them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.distributed import run_ranks
from tests.golden import workload

__all__ = [
    "ARCHIVE", "ASKED", "COMMANDS", "FOLDER", "PACKAGE", "answer_command", "answer_configs", "ask_all", "asked",
    "explained", "load_checkpoints", "save_checkpoints", "train_all",
]  # fmt: skip

PACKAGE = os.environ.get("REDLINE_PACKAGE", "redline")  # the one place with the import name
FOLDER = Path(__file__).parent / "golden" / "house"
ASKED = FOLDER / "asked.json"  # configs
ARCHIVE = FOLDER / "checkpoints.tar.xz"
Record = dict[str, Any]


def _initialize(*args: Any, **kwargs: Any) -> Any:
    return importlib.import_module(PACKAGE).initialize(*args, device="cpu", **kwargs)


def _command(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output of the command line."""
    main = importlib.import_module(f"{PACKAGE}.cli").main
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        code = main(arguments)
    return code, out.getvalue()


# -- configs ---------------------------------------------------------------------------------------------------------

# Their values are the defaults of the comparison: a config with a batch size alone, and one with every section.
_PLAIN = {"train_batch_size": 8}
_SECTIONS = {
    **_PLAIN,
    "optimizer": {"type": "Adam"},
    "scheduler": {"type": "WarmupLR"},
    "zero_optimization": {"offload_param": {}, "offload_optimizer": {}},
    **{name: {} for name in ("bf16", "fp16", "torch_autocast", "data_types", "flops_profiler", "comms_logger")},
    **{name: {} for name in ("tensorboard", "wandb", "csv_monitor", "comet", "checkpoint", "timers")},
}


def answer_configs(configs: Sequence[Any], world_size: int = 1) -> Record:
    """The facts of `redline validate --json --effective`, without its wording.

    Returns:
        "usual": default values and their origins; "configs": what differs from these, for each config.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, config in enumerate([_PLAIN, _SECTIONS, *configs]):
            paths.append(Path(folder) / f"{number}.json")
            paths[-1].write_text(config if isinstance(config, str) else json.dumps(config))
        arguments = ["validate", *map(str, paths), "--json", "--effective", "--world-size", str(world_size)]
        plain, sections, *reports = json.loads(_command(*arguments)[1])
    values = {**dict(_flat(sections["resolved"])), **dict(_flat(plain["resolved"]))}
    origins = {**sections["origins"], **plain["origins"]}
    statuses = {path: status for path, (status, _) in explained().items()}
    answers = [_unusual(report, values, origins, statuses) for report in reports]
    return {"usual": {"values": values, "origins": origins}, "configs": answers}


def _unusual(report: Record, defaults: Record, origins: Record, statuses: Record) -> Record:
    answer: Record = {
        "exit": 0 if report["runnable"] else 3 if report["valid"] else 1,
        "errors": [[error["path"], error["line"], error["column"]] for error in report["errors"]],
        "keys": [[key["path"], key["status"]] for key in report["keys"] if statuses.get(key["path"]) != key["status"]],
        "values": _others(dict(_flat(report["resolved"])), defaults),
        "origins": _others(report.get("origins", {}), origins),
    }
    return {name: value for name, value in answer.items() if name == "exit" or value}


def _others(values: Record, usual: Record) -> Record:
    return {path: value for path, value in values.items() if path not in usual or usual[path] != value}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a config by their path."""
    if isinstance(value, dict) and (value or not path):
        for name, inner in value.items():
            yield from _flat(inner, f"{path}.{name}" if path else name)
    else:
        yield path, value


def asked(world_size: int = 1) -> list[Any]:
    """The recorded configs, as JSON values or as text; for several ranks those with a batch size of their own."""
    configs: list[Any] = json.loads(ASKED.read_text())
    return configs if world_size == 1 else [config for config in configs if _has_batch(config)]


def _has_batch(config: Any) -> bool:
    """Whether a config sets its batch size; those that do not were recorded with that of `_PLAIN`."""
    sizes = {name: value for name, value in config.items() if "batch" in name} if isinstance(config, dict) else None
    return sizes not in ({}, _PLAIN)


def explained() -> dict[str, list[str]]:
    """Status and default of every key, from `redline explain`."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in _command("explain", "*")[1].splitlines()]
    return {row[0]: row[1:3] for row in rows if row[0] != "key"}


# -- short runs ------------------------------------------------------------------------------------------------------

_PRECISIONS: dict[str, Record] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 16, "hysteresis": 1, "loss_scale_window": 2}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
_OPTIMIZERS: dict[str, Record] = {
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1, "betas": [0.8, 0.95], "amsgrad": True, "torch_adam": True},
    "SGD": {"lr": 0.02, "momentum": 0.9, "nesterov": True},
    "Adagrad": {"lr": 0.05},
    "Lamb": {"lr": 0.02, "weight_decay": 0.01},
    "Lion": {"lr": 0.002},
    "Muon": {"lr": 0.01},
}
_SCHEDULES: dict[str, Record] = {
    "fixed": {},
    "LRRangeTest": {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 3, "lr_range_test_step_rate": 2.0},
    "OneCycle": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.02, "cycle_first_step_size": 3, "decay_step_size": 2},
    "WarmupLR": {"warmup_max_lr": 0.02, "warmup_num_steps": 4},
    "WarmupDecayLR": {"warmup_max_lr": 0.02, "warmup_num_steps": 3, "total_num_steps": 7},
    "WarmupCosineLR": {"warmup_num_steps": 3, "total_num_steps": 7, "warmup_min_ratio": 0.1},
    "StepLR": {"step_size": 2, "gamma": 0.5},
}
_STEPS = 6


def _run(
    precision: str, stage: int, optimizer: str, schedule: str, accumulation: int, **more: Any
) -> tuple[str, Record]:
    """Name and config of a short run."""
    own = {"progress": False, "zero": {"smallest_block": 50}, **more.pop("redline", {})}
    config = {
        "train_micro_batch_size_per_gpu": workload.MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": optimizer, "params": _OPTIMIZERS[optimizer]},
        "zero_optimization": {"stage": stage},
        "redline": own,
        **_PRECISIONS[precision],
        **more,
    }
    if schedule != "fixed":
        config["scheduler"] = {"type": schedule, "params": _SCHEDULES[schedule]}
    if schedule == "LRRangeTest":  # its report is written when the process ends, and nobody reads it
        own["range_test"] = {"output_dir": str(Path(tempfile.gettempdir()) / "redline_house")}
    return f"{precision} stage {stage} {optimizer} {schedule}", config


def runs(ranks: int) -> dict[str, Record]:
    """The configs of the short runs on so many ranks: 14 on one, 16 on two."""
    if ranks == 1:
        given = [
            _run("fp32", 0, "Adam", "OneCycle", 1),
            _run("fp32", 0, "AdamW", "WarmupCosineLR", 2, gradient_clipping=0.3),
            _run("fp32", 0, "SGD", "OneCycle", 1, gradient_clipping=0.0),
            _run("fp32", 0, "Adagrad", "StepLR", 1),
            _run("fp32", 0, "Lamb", "WarmupLR", 3),
            _run("fp32", 0, "Lion", "WarmupDecayLR", 1),
            _run("fp32", 0, "Muon", "fixed", 2),
            _run("fp32", 0, "SGD", "LRRangeTest", 1),
            _run("fp32", 3, "Adam", "WarmupDecayLR", 1, redline={"schedules": "corrected"}),
            _run("bf16", 0, "Adam", "WarmupLR", 2),
            _run("bf16", 2, "SGD", "OneCycle", 1, steps_per_print=2),
            _run("fp16", 0, "Adam", "WarmupLR", 1),
            _run("fp16", 1, "Lamb", "OneCycle", 2),
            _run("autocast", 0, "AdamW", "WarmupDecayLR", 2),
        ]
    else:
        optimizers, schedules = [*_OPTIMIZERS][:5], [*_SCHEDULES]
        schedules.remove("LRRangeTest")
        given = []
        for number, (precision, stage) in enumerate((each, stage) for each in _PRECISIONS for stage in range(4)):
            optimizer = optimizers[number % 5]
            more: Record = {"gradient_clipping": (1.0, 0.2, 0.0)[number % 3]}
            if number == 8:
                more["prescale_gradients"] = True
            if number % 7 == 5:
                more["communication_data_type"] = "bf16"
            given.append(_run(precision, stage, optimizer, schedules[number % 6], 1 + number % 3, **more))
    return {f"{number:02} {name}": config for number, (name, config) in enumerate(given)}


def train_all(ranks: int) -> list[dict[str, Record]]:
    """Losses, norms, learning rates and counters of the short runs, for each rank."""
    return run_ranks(_train_each, ranks, runs(ranks), fresh=True)


def _train_each(configs: dict[str, Record]) -> dict[str, Record]:
    return {name: _train(config) for name, config in configs.items()}


def _train(config: Record) -> Record:
    engine = _initialize(workload.build_model(), config)
    dataset = workload.build_dataset()
    record: Record = {name: [] for name in ("loss", "norm", "lr", "momentum", "scale")}
    accumulation = config["gradient_accumulation_steps"]
    for index in range(_STEPS * accumulation):
        x, y = workload.micro_batch(dataset, index, engine.global_rank, engine.world_size)
        loss = workload.loss_fn(engine(x.to(workload.compute_dtype(config))).float(), y)
        engine.backward(loss)
        record["loss"].append(float(loss.detach()))
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
            continue
        record["lr"].append([float(lr) for lr in engine.get_lr()])
        record["momentum"].append([list(m) if isinstance(m, (list, tuple)) else m for m in engine.get_mom()])
        engine.step()
        record["norm"].append(engine.get_global_grad_norm())
        record["scale"].append(engine.loss_scale)
    record["counts"] = [engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps]
    record["squares"] = [float(_full(each).double().square().sum()) for each in engine.module.parameters()]
    return record


def _full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; a collective."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


# -- checkpoints -----------------------------------------------------------------------------------------------------

CHECKPOINTS: dict[str, Record] = {
    **{f"stage{stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)},
    "stage2-bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "stage1-fp16": {"zero_optimization": {"stage": 1}, **_PRECISIONS["fp16"]},
}
_CYCLE = {"type": "OneCycle", "params": _SCHEDULES["OneCycle"]}


class Tiny(nn.Module):
    """Dropout, running statistics, a tied weight, a frozen one, and sizes that two ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inputs, self.inner = nn.Linear(5, 5, bias=False), nn.Linear(5, 7)
        self.norm, self.drop = nn.BatchNorm1d(7), nn.Dropout(0.2)
        self.outputs = nn.Linear(7, 5)
        self.last = nn.Linear(5, 5, bias=False)
        self.last.weight = self.inputs.weight
        self.gain = nn.Parameter(torch.full((5,), 1.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.inner(torch.tanh(self.inputs(x)))))
        answer: Tensor = self.last(torch.tanh(self.outputs(hidden))) * self.gain
        return answer


def _build(changes: Record) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": _OPTIMIZERS["Adam"]},
        "scheduler": _CYCLE,
        "redline": {"progress": False, "zero": {"smallest_block": 20}},
        **changes,
    }
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    return _initialize(Tiny(), config, training_data=TensorDataset(torch.arange(40), rows))


def _go_on(engine: Any, steps: int) -> list[list[Any]]:
    """Train for some optimizer steps; loss and samples of each micro-batch, and the norm of each step."""
    record: list[list[Any]] = []
    end = engine.global_steps + steps
    while engine.global_steps < end:
        for indices, x in engine.training_dataloader:
            loss = (engine(x).float() - x.float()).square().mean()
            engine.backward(loss)
            done = engine.global_steps
            engine.step()
            record.append([float(loss.detach()), indices.tolist()])
            if engine.global_steps > done:
                record[-1].append(engine.get_global_grad_norm())
            if engine.global_steps == end:
                break
    return record


def save_checkpoints(folder: Path) -> None:
    """Train and save one checkpoint of each kind on two ranks."""
    run_ranks(_save_each, 2, folder, fresh=True)


def _save_each(folder: Path) -> None:
    for name, changes in CHECKPOINTS.items():
        engine = _build(changes)
        random.seed(engine.global_rank)
        torch.manual_seed(engine.global_rank)
        _go_on(engine, 4)
        engine.save_checkpoint(folder / name, tag="saved", client_state={"epoch": 3, "best": 0.25})


def load_checkpoints(folder: Path) -> dict[str, Any]:
    """What loading restores: on two ranks at the stage that was saved, and on one rank at stage 0."""
    first, second = run_ranks(_load_each, 2, folder, fresh=True)
    (alone,) = run_ranks(_load_each, 1, folder, fresh=True)
    return {"rank 0": first, "rank 1": second, "one rank": alone}


def _load_each(folder: Path) -> dict[str, Record]:
    return {name: _load(folder / name, changes) for name, changes in CHECKPOINTS.items()}


def _load(folder: Path, changes: Record) -> Record:
    own = int(os.environ["WORLD_SIZE"]) == 2  # as many ranks as saved it: they resume exactly
    engine = _build(changes if own else {**changes, "zero_optimization": {"stage": 0}})
    _, client_state = engine.load_checkpoint(folder)
    record: Record = {
        "client_state": client_state,
        "module": {name: _digest(value) for name, value in engine.module.state_dict().items()},
        "lr": [float(lr) for lr in engine.get_lr()],
        "momentum": [list(betas) for betas in engine.get_mom()],
        "scale": engine.loss_scale,
        "counts": [engine.global_steps, engine.skipped_steps],
    }
    masters = [master for group in engine.optimizer.param_groups for master in group["params"]]
    record["masters"] = [_digest(master) for master in masters if master.requires_grad]
    record["state"] = [
        {name: _digest(value) for name, value in sorted(engine.optimizer.state[master].items())} for master in masters
    ]
    if own:
        record["counts"] += [engine.micro_steps, engine.global_samples]
        record["draws"] = [random.random(), *torch.rand(2).tolist()]
        record["next"] = _go_on(engine, 3)
    return record


def _digest(value: Any) -> str:
    """Dtype, shape and a hash of the full tensor's bytes."""
    if not isinstance(value, Tensor):
        return repr(value)
    whole = _full(value).contiguous().cpu()
    content = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(whole.dtype).removeprefix("torch.")
    return f"{dtype}{list(whole.shape)} {hashlib.sha256(content).hexdigest()[:16]}"


# -- learning rates --------------------------------------------------------------------------------------------------

_FINDERS: dict[str, Record] = {
    "linear": {"type": "SGD", "params": {"lr": 0.01}},
    "classes": {"type": "AdamW", "params": {"lr": 0.001}},
    "flat": {"type": "SGD", "params": {"lr": 0.01}},
}
COMMANDS = [("range-test", task) for task in _FINDERS]
# Keys with sentences, or with what depends on the machine's speed.
_WORDING = {"why", "reason", "reasons", "remedy", "notes", "left_out", "seconds", "message", "note", "spent"}
_EVERY = 5  # of a curve's points, one in so many is compared


def answer_command(command: str, task: str) -> Record:
    """Exit code and JSON files of `redline range-test` on a small task."""
    optimizer, own = _FINDERS[task], ["--step-rates", "5,150", "--train-steps", "400"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({"train_batch_size": 8, "optimizer": optimizer}))
        address, out = f"{FOLDER / 'task.py'}:{task}", str(folder / "out")
        code, _ = _command(
            command, address, "--config", str(folder / "config.json"), "--out", out, "--seed", "0", "--quiet", *own
        )
        files = {path.name: json.loads(path.read_text()) for path in sorted((folder / "out").glob("*.json"))}
    return {"exit": code, "files": _shorter(files)}


def _shorter(value: Any) -> Any:
    """Without wording, and with fewer points of each curve."""
    if isinstance(value, dict):
        return {name: _shorter(inner) for name, inner in value.items() if name not in _WORDING}
    if isinstance(value, list):
        return [_shorter(inner) for inner in (value[::_EVERY] if len(value) > 10 else value)]
    return value


def ask_all(checkpoints: Path) -> dict[str, Callable[[], Any]]:
    """A function for each kind of answer, by the name of its file."""
    return {
        "configs": lambda: {
            "explain": explained(),
            "one rank": answer_configs(asked()),
            "four ranks": answer_configs(asked(4), 4),
        },
        "runs": lambda: {"one rank": train_all(1), "two ranks": train_all(2)},
        "checkpoints": functools.partial(load_checkpoints, checkpoints),
        "finders": lambda: {f"{command} {task}": answer_command(command, task) for command, task in COMMANDS},
    }
