"""Two real processes: they share data, gradients and nothing else, and end as cleanly as one."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from redline import Engine, EngineError, initialize
from redline.distributed import process_group
from redline.distributed.ddp import DDPStrategy
from redline.distributed.process_group import World, join_world
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

    reduce = engine._strategy._reduce

    def count(status: Any) -> Any:
        sent.append(engine.micro_steps)
        return reduce(status)

    engine._strategy._reduce = count
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


@pytest.mark.parametrize("stage", [0, 3])
def test_alone_nothing_is_wrapped_and_every_stage_is_stage_0(stage: int) -> None:
    engine = make_engine(4, zero_optimization={"stage": stage})
    assert type(engine._strategy) is DDPStrategy
    assert engine._strategy.prepare_forward(is_last=True, no_sync=False) is engine.module


def test_more_processes_than_gpus_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=r"LOCAL_RANK 1: this host has 1 GPU\(s\); start at most 1"):
        join_world()


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with Apple's GPU, as far as torch's answer goes: no tensor can be made there."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA comes first")
@pytest.mark.usefixtures("apple")
def test_one_rank_computes_on_apples_gpu_and_several_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_world().device == torch.device("mps")
    assert process_group._device_of(0, 2) == torch.device("cpu")
    monkeypatch.setattr(process_group, "_place_by_launcher", lambda: (0, 0, 2))
    with pytest.raises(EngineError, match=r"mps on 2 ranks.* on the CPU"):
        join_world("mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA comes first")
@pytest.mark.usefixtures("apple")
@pytest.mark.parametrize("section, dtype", [("fp16", {}), ("torch_autocast", {"dtype": "fp16"})])
def test_fp16_is_refused_on_apples_gpu(section: str, dtype: dict[str, str]) -> None:
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "Adam"}, section: {"enabled": True, **dtype}}
    with pytest.raises(EngineError, match=r"fp16: .*Apple's GPU.* bf16 or fp32"):
        initialize(make_model(), config)


# -- other launchers, and groups that the script makes -------------------------------------------------------

LAUNCHERS = {
    "srun": {"SLURM_PROCID": "{}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_LOCALID": "{}"},
    "mpirun": {"OMPI_COMM_WORLD_RANK": "{}", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "{}"},
    "mpiexec": {"PMI_RANK": "{}", "PMI_SIZE": "2", "MPI_LOCALRANKID": "{}"},
}


def place(engine: Engine) -> tuple[int, int, int, int]:
    return engine.global_rank, engine.local_rank, engine.world_size, engine.train_batch_size()


def join_by(launcher: str) -> tuple[int, int, int, int]:
    rank = os.environ["RANK"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        os.environ.pop(name, None)
    os.environ.update({name: value.format(rank) for name, value in LAUNCHERS[launcher].items()})
    return place(make_engine(4, train_batch_size=16))  # of which one rank would have 8


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_of_other_launchers_join_where_an_address_is_known(launcher: str) -> None:
    assert run_ranks(join_by, 2, launcher, fresh=True) == [(0, 0, 2, 16), (1, 1, 2, 16)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_of_other_launchers_are_refused_without_an_address(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value.format(1))
    with pytest.raises(EngineError, match=f"{launcher} started 2 ranks, .* start with `torchrun"):
        make_engine(4)


def test_a_batch_script_of_slurm_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert make_engine(4).world_size == 1


def join_own_group(environment: dict[str, str]) -> tuple[int, int, int, int]:
    """A script that makes the process group itself, as under torch.multiprocessing.spawn."""
    dist.init_process_group("gloo")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update(environment)
    return place(make_engine(4, train_batch_size=16))


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}], ids=str)
def test_a_process_group_of_the_scripts_own_counts_as_it_is(environment: dict[str, str]) -> None:
    assert run_ranks(join_own_group, 2, environment) == [(0, 0, 2, 16), (1, 1, 2, 16)]


def test_the_local_rank_in_a_group_of_the_scripts_own_is_the_launchers() -> None:
    answers = run_ranks(join_own_group, 2, {"SLURM_LOCALID": "0"})
    assert [local_rank for _, local_rank, _, _ in answers] == [0, 0]


# -- where ranks meet ----------------------------------------------------------------------------------------

SIZE = 3


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The store of torchrun's agent, and the environment of its workers."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    yield server


def meet(late: int, seconds: float = 20.0, missing: tuple[int, ...] = ()) -> dict[int, Any]:
    """What each rank of a start gets, one of them a little later than the others: a store, or an error."""
    got: dict[int, Any] = {}

    def come(rank: int) -> None:
        try:
            time.sleep(0.3 if rank == late else 0.0)
            got[rank] = process_group._meet_in_store(rank, SIZE, timedelta(seconds=seconds))
        except RuntimeError as error:
            got[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(SIZE) if rank not in missing]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


@pytest.mark.parametrize("late", range(SIZE))
def test_what_an_earlier_start_wrote_is_not_seen(late: int, agent: Any) -> None:
    first = meet(late)
    first[0].set("address of rank 0", "that of a dead process")
    assert all(store.get("address of rank 0") == b"that of a dead process" for store in first.values())
    second = meet(late)
    assert not any(store.check(["address of rank 0"]) for store in second.values())
    second[1].set("address of rank 1", "new")
    assert all(store.get("address of rank 1") == b"new" for store in second.values())
    assert not first[0].check(["address of rank 1"])


@pytest.mark.parametrize("missing", range(SIZE))
def test_who_does_not_come_is_waited_for_within_the_timeout(missing: int, agent: Any) -> None:
    meet(late=1)
    got = meet(late=1, seconds=1.0, missing=(missing,))
    if missing == 0:
        assert all(isinstance(each, RuntimeError) for each in got.values())
    else:
        assert str(got[0]) in ("2 of 3 processes came", "1 of 3 processes came")  # a busy machine may be late itself


def test_another_program_that_has_the_port_and_says_nothing_is_waited_for_within_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_group, "_GRACE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(silent.getsockname()[1]))
        with pytest.raises(RuntimeError, match="something accepts connections there and does not answer"):
            process_group._meet_in_store(1, 2, timedelta(seconds=1))


# -- the network ---------------------------------------------------------------------------------------------


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One of two hosts, with two networks, whose own name is a loopback address."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(process_group, "_address_of_name", lambda: "127.0.1.1")
    monkeypatch.setattr(
        process_group, "_interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.2", "docker0": "172.17.0.1"}
    )
    monkeypatch.setattr(process_group, "address_towards", lambda host: "10.0.0.2")
    return monkeypatch


def chosen(size: int = 4) -> str | None:
    """What is in the environment afterwards; it is put back as it was."""
    try:
        process_group._choose_interface(size)
        return os.environ.get("GLOO_SOCKET_IFNAME")
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)


@pytest.mark.parametrize("address", ["127.0.1.1", "::1", None])
def test_the_interface_that_leads_to_the_master_is_taken(address: str | None, host: pytest.MonkeyPatch) -> None:
    host.setattr(process_group, "_address_of_name", lambda: address)
    assert chosen() == "eth0"


def test_gloo_is_left_alone_where_the_hosts_name_can_be_reached(host: pytest.MonkeyPatch) -> None:
    host.setattr(process_group, "_address_of_name", lambda: "10.0.0.2")
    assert chosen() is None


def test_gloo_is_left_alone_on_a_single_host(host: pytest.MonkeyPatch) -> None:
    assert chosen(size=2) is None
    host.delenv("LOCAL_WORLD_SIZE")
    assert chosen(size=4) is None


def test_what_the_user_has_set_stays(host: pytest.MonkeyPatch) -> None:
    host.setenv("GLOO_SOCKET_IFNAME", "docker0")
    process_group._choose_interface(4)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "docker0"


def test_a_master_that_is_loopback_here_is_an_error_that_lists_the_interfaces(host: pytest.MonkeyPatch) -> None:
    host.setattr(process_group, "address_towards", lambda host: "127.0.0.1")
    with pytest.raises(EngineError, match=r"interfaces: eth0 \(10\.0\.0\.2\), docker0 \(172\.17\.0\.1\); set GLOO"):
        process_group._choose_interface(4)
    host.setattr(process_group, "_interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.2"})
    assert chosen() == "eth0"  # there is no other


def test_what_this_machine_says_of_itself_can_be_read() -> None:
    assert process_group._interfaces().get("lo", "127.0.0.1") == "127.0.0.1"
    assert process_group.address_towards("127.0.0.1") == "127.0.0.1"
    assert process_group.address_towards("no.such.host.invalid") is None


# -- under torchrun ------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys
import torch
from torch import nn
from redline import initialize

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
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.long
def test_a_script_under_torchrun_speaks_with_one_voice_and_ends_cleanly_every_time(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for run in range(3):
        done = torchrun(script, str(tmp_path / f"out{run}"))
        starts = ("redline: 2 ranks", "step=10,", "step=20,", "Written to")
        said = [start for line in done.stderr.splitlines() for start in starts if line.startswith(start)]
        assert done.returncode == 0, done.stderr
        assert said == list(starts), done.stderr
        assert "Traceback" not in done.stderr
        assert "terminate" not in done.stderr
        record = json.loads((tmp_path / f"out{run}" / "range_test.json").read_text())
        assert (record["world_size"], len(record["curves"][0]["losses"])) == (2, 24)
