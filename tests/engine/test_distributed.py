"""Two real processes: they share data, gradients and nothing else, and end as cleanly as one."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Engine, EngineError, initialize
from engine.distributed import World, join_world
from tests.distributed import run_ranks

ROOT = Path(__file__).parent.parent.parent
mse = nn.functional.mse_loss


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 4, generator=generator), torch.randn(64, 1, generator=generator)


def make_engine(micro_batch: int, *, model: nn.Module | None = None, **config: Any) -> Engine:
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        **config,
    }
    return initialize(model or make_model(), config, device="cpu")


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


def train(engine: Engine, micro_batch: int) -> dict[str, Any]:
    """Eight updates over the data in order, each process its slice of every micro-batch."""
    x, y = make_data()
    record: dict[str, Any] = {"losses": [], "norms": []}
    for index in range(16):
        start = (index * engine.world_size + engine.global_rank) * micro_batch % len(x)
        rows = slice(start, start + micro_batch)
        engine.backward(mse(engine(x[rows]), y[rows]))
        engine.step()
        if engine.micro_steps % 2 == 0:
            record["losses"].append(engine.world.mean(engine.loss).item())
            record["norms"].append(engine.get_global_grad_norm())
    return record | {"weights": weights(engine)}


# -- what each of two ranks does -----------------------------------------------------------------------------


def work() -> dict[str, Any]:
    answers: dict[str, Any] = {"own weights first": make_weights_of_own()}
    engine = make_engine(4)
    answers["training"] = train(engine, 4)
    answers["place"] = (engine.global_rank, engine.local_rank, engine.world_size, engine.train_batch_size())
    answers["gradients"] = watch_the_gradients()
    answers["no_sync"] = watch_no_sync()
    answers["second backward"] = backward_twice()
    answers["shares"] = deal_out_data()
    answers["evaluation"] = evaluate_alone()
    answers["buffers"] = watch_the_buffers()
    answers["numbers"] = agree_on_numbers(engine.world)
    answers["frozen"] = make_engine(4, model=nn.Flatten(), optimizer=None)(torch.ones(2, 2)).shape == (2, 2)
    answers["unused"] = leave_parameters_out()
    answers["compiled"] = train_compiled()
    return answers


def make_weights_of_own() -> Tensor:
    model = make_model()
    with torch.no_grad():
        model[0].weight.fill_(float(os.environ["RANK"]))
    make_engine(4, model=model)
    return weights(model)


def watch_the_gradients() -> dict[str, Any]:
    """Gradients before and at the boundary of an update of three micro-batches, and what DDP sends when."""
    engine = make_engine(4, gradient_accumulation_steps=3, gradient_clipping=0)
    sent: list[int] = []

    reduce = engine._parallel._reduce

    def count(status: Any) -> Any:
        sent.append(engine.micro_steps)
        return reduce(status)

    engine._parallel._reduce = count
    x, y = make_data()
    seen = []
    for index in range(6):
        start = (index * 2 + engine.global_rank) * 4
        engine.backward(mse(engine(x[start : start + 4]), y[start : start + 4]))
        seen.append(gradients(engine).clone())
        engine.step()
    return {"seen": seen, "sent": sorted(set(sent))}


def watch_no_sync() -> list[Tensor]:
    engine = make_engine(4, gradient_accumulation_steps=1, gradient_clipping=0)
    x, y = make_data()
    seen = []
    with engine.no_sync():
        engine.backward(mse(engine(x[engine.global_rank :: 2]), y[engine.global_rank :: 2]))
        seen.append(gradients(engine).clone())
    engine.backward(mse(engine(x[engine.global_rank :: 2]), y[engine.global_rank :: 2]))
    seen.append(gradients(engine).clone())
    engine.step()
    return seen


def backward_twice() -> tuple[Tensor, Tensor]:
    """Gradients after two backwards before a step, and after one of the sum of their losses."""
    x, y = make_data()
    rows = slice(int(os.environ["RANK"]), None)
    one, two = (make_engine(4, gradient_clipping=0, gradient_accumulation_steps=1) for _ in range(2))
    for each in (mse(one(x[rows]), y[rows]), 2 * mse(one(x[rows]), y[rows])):
        one.backward(each)
    two.backward(3 * mse(two(x[rows]), y[rows]))
    return gradients(one).clone(), gradients(two).clone()


def deal_out_data() -> list[list[int]]:
    data = torch.utils.data.TensorDataset(torch.arange(24))
    engine = initialize(make_model(), {"train_micro_batch_size_per_gpu": 4}, training_data=data, device="cpu")
    assert engine.training_dataloader is not None
    return [[int(number) for (batch,) in engine.training_dataloader for number in batch] for _ in range(2)]


def evaluate_alone() -> float:
    """A forward that only one of the processes makes: nobody waits for the other."""
    engine = make_engine(4)
    x, y = make_data()
    with torch.no_grad():
        return mse(engine(x), y).item() if engine.global_rank == 1 else 0.0


def watch_the_buffers() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    with torch.no_grad():
        model[1].running_mean.fill_(float(os.environ["RANK"]))
    engine = make_engine(4, model=model)
    start = model[1].running_mean.clone()
    x, y = make_data()
    for _ in range(2):
        engine.backward(mse(engine(x[engine.global_rank :: 2]), y[engine.global_rank :: 2]))
        engine.step()
    return {"start": start, "end": model[1].running_mean.clone(), "weights": weights(engine)}


def agree_on_numbers(world: World) -> dict[str, Any]:
    value = torch.tensor([1.0 + world.rank])
    return {"mean": world.mean(value), "sum": world.sum(value), "own": value}


def leave_parameters_out() -> Tensor:
    model = make_model()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    engine = make_engine(4, model=model, redline={"find_unused_parameters": True})
    train(engine, 4)
    return weights(engine)


def train_compiled() -> dict[str, Any]:
    """Training of a compiled model whose weights fill more than one of DDP's buckets."""
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 1))  # 1 MiB, then 25 at most
    plain = train(make_engine(4, model=copy.deepcopy(model)), 4)
    engine = make_engine(4, model=model)
    engine.compile(backend=backend)
    return {"plain": plain, "compiled": train(engine, 4), "graphs": graphs}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What two gloo processes saw, by rank."""
    return run_ranks(work, 2)


# -- and what comes of it ------------------------------------------------------------------------------------


def test_each_process_knows_its_place(ranks: list[dict[str, Any]]) -> None:
    assert [answers["place"] for answers in ranks] == [(0, 0, 2, 16), (1, 1, 2, 16)]


def test_all_start_from_rank_zeros_weights(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["own weights first"], ranks[1]["own weights first"])
    assert ranks[1]["own weights first"][0] == 0.0


def test_two_processes_train_as_one_with_twice_the_micro_batch(ranks: list[dict[str, Any]]) -> None:
    alone = train(make_engine(8), 8)
    for answers in ranks:
        together = answers["training"]
        assert together["losses"] == pytest.approx(alone["losses"], abs=1e-6)
        assert together["norms"] == pytest.approx(alone["norms"], abs=1e-6)
        torch.testing.assert_close(together["weights"], alone["weights"], rtol=0, atol=1e-6)
    assert torch.equal(ranks[0]["training"]["weights"], ranks[1]["training"]["weights"])


def test_nothing_is_sent_before_the_accumulation_boundary(ranks: list[dict[str, Any]]) -> None:
    ours, theirs = (answers["gradients"] for answers in ranks)
    assert ours["sent"] == theirs["sent"] == [2, 5]
    for micro_step, (mine, other) in enumerate(zip(ours["seen"], theirs["seen"])):
        assert torch.equal(mine, other) == (micro_step in (2, 5))


def test_what_no_sync_kept_is_shared_by_the_backward_after_it(ranks: list[dict[str, Any]]) -> None:
    (own, shared), (other, same) = (answers["no_sync"] for answers in ranks)
    assert not torch.equal(own, other)
    assert torch.equal(shared, same)
    torch.testing.assert_close(shared, own + other)


def test_two_backwards_before_a_step_add_up(ranks: list[dict[str, Any]]) -> None:
    for answers in ranks:
        torch.testing.assert_close(*answers["second backward"])
    assert torch.equal(ranks[0]["second backward"][0], ranks[1]["second backward"][0])


def test_training_data_is_dealt_out_whole_and_once(ranks: list[dict[str, Any]]) -> None:
    ours, theirs = (answers["shares"] for answers in ranks)
    for mine, other in zip(ours, theirs):
        assert sorted(mine + other) == list(range(24))
    assert ours[0] != ours[1]


def test_one_process_may_evaluate_by_itself(ranks: list[dict[str, Any]]) -> None:
    x, y = make_data()
    assert ranks[1]["evaluation"] == pytest.approx(mse(make_model()(x), y).item())


def test_buffers_start_as_rank_zeros_and_then_are_each_process_own(ranks: list[dict[str, Any]]) -> None:
    ours, theirs = (answers["buffers"] for answers in ranks)
    assert torch.equal(ours["start"], theirs["start"])
    assert not torch.equal(ours["end"], theirs["end"])
    assert torch.equal(ours["weights"], theirs["weights"])


def test_processes_agree_on_sums_and_means_and_keep_their_own_number(ranks: list[dict[str, Any]]) -> None:
    for rank, answers in enumerate(ranks):
        numbers = answers["numbers"]
        assert (numbers["mean"].item(), numbers["sum"].item(), numbers["own"].item()) == (1.5, 3.0, 1.0 + rank)


def test_a_model_with_nothing_to_train_is_not_wrapped(ranks: list[dict[str, Any]]) -> None:
    assert [answers["frozen"] for answers in ranks] == [True, True]


def test_unused_parameters_are_found_where_the_config_says_so(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["unused"], ranks[1]["unused"])


def test_a_compiled_model_trains_the_same_and_stays_one_graph(ranks: list[dict[str, Any]]) -> None:
    for answers in ranks:
        compiled = answers["compiled"]
        assert compiled["graphs"] == 1
        assert compiled["compiled"]["losses"] == pytest.approx(compiled["plain"]["losses"], rel=1e-6)
        torch.testing.assert_close(compiled["compiled"]["weights"], compiled["plain"]["weights"])


# -- alone ---------------------------------------------------------------------------------------------------


def test_alone_the_mean_is_the_value_itself() -> None:
    world = join_world("cpu")
    assert world == World(0, 0, 1, torch.device("cpu"))
    value = torch.tensor(3.0)
    assert world.mean(value) is value
    assert world.sum(value).item() == 3.0


def test_more_processes_than_gpus_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=r"LOCAL_RANK 1: this host has 1 GPU\(s\); start at most 1"):
        join_world()


# -- under torchrun ------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys
import torch
from torch import nn
from engine import initialize

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
config = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Adam"},
    "scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_step_size": 5, "lr_range_test_step_rate": 5}},
    "steps_per_print": 10,
    "redline": {"range_test": {"output_dir": sys.argv[1]}},
}
engine = initialize(model, config, training_data=data, device="cpu")
for epoch in range(3):
    for x, y in engine.training_dataloader:
        engine.backward(nn.functional.mse_loss(engine(x), y))
        engine.step()
"""


def torchrun(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.long
def test_a_script_under_torchrun_speaks_with_one_voice_and_ends_cleanly_every_time(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for run in range(3):
        done = torchrun(script, str(tmp_path / f"out{run}"))
        starts = ("redline: 2 processes", "step=10,", "step=20,", "Written to")
        said = [start for line in done.stderr.splitlines() for start in starts if line.startswith(start)]
        assert done.returncode == 0, done.stderr
        assert said == list(starts), done.stderr
        assert "Traceback" not in done.stderr
        assert "terminate" not in done.stderr
        record = json.loads((tmp_path / f"out{run}" / "range_test.json").read_text())
        assert (record["world_size"], len(record["curves"][0]["losses"])) == (2, 24)
