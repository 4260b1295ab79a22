"""Models that are shared out, on two and four gloo processes: every stage trains as stage 0 does, to a rounding."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import run_ranks

ROWS, STEPS = 4, 4
Config = dict[str, Any]


class Perceptron(nn.Module):
    """Repeated layers of a width that neither two nor four processes divide, with what real models have beside them."""

    def __init__(self, *, width: int = 33, norm: bool = False) -> None:
        super().__init__()
        self.inputs = nn.Linear(16, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.head = nn.Linear(width, 5)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inputs(x)) + self.shift.to(x.dtype)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: Tensor = self.head(self.norm(x)) * self.temperature.to(x.dtype)
        return out


class Tied(nn.Module):
    """An embedding whose weight is also the head's, and a head of which forwards use one in two."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16, sparse=sparse)
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.spare = nn.Linear(16, 5)
        self.head = nn.Linear(16, 11, bias=False)
        if not sparse:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.layers(self.embedding(tokens))))
        return out


def config(stage: int, *, zero: Config | None = None, own: Config | None = None, **extra: Any) -> Config:
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "gradient_clipping": 0.3,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "redline": {"zero": {"smallest_block": 100, **(own or {})}, "find_unused_parameters": stage == 0},
        **extra,
    }


def build(stage: int, model: nn.Module | None = None, *, give: Config | None = None, **settings: Any) -> Any:
    from redline import initialize

    if model is None:
        torch.manual_seed(0)
        model = Perceptron()
    return initialize(model, config(stage, **settings), device="cpu", **(give or {}))


def rows(engine: Any, generator: torch.Generator) -> Tensor:
    """This process's share of a batch that is the same for every number of processes."""
    per_rank = 16 // engine.world_size
    batch = torch.randn(16, 16, generator=generator)
    return batch[engine.global_rank * per_rank :][:per_rank]


def train(engine: Any, steps: int = STEPS) -> list[tuple[float, float]]:
    """Losses and norms of some updates."""
    generator = torch.Generator().manual_seed(5)
    record = []
    for _ in range(steps):
        for _ in range(engine.gradient_accumulation_steps()):
            x = rows(engine, generator)
            engine.backward((engine(x).float() - x[:, :5]).square().mean())
            engine.step()
        record.append((float(engine.world.mean(engine.loss)), engine.get_global_grad_norm()))
    return record


# -- what is trained, at any stage -------------------------------------------------------------------------------------


def optimizer(stage: int, name: str, **params: Any) -> Any:
    return train(build(stage, optimizer={"type": name, "params": {"lr": 0.01, **params}}))


def settings(stage: int, **given: Any) -> Any:
    return train(build(stage, **given))


def batch_norm(stage: int) -> Any:
    torch.manual_seed(0)
    return train(build(stage, Perceptron(norm=True), bf16={"enabled": True}))


def client_instance(stage: int) -> Any:
    """Groups of its own, and moments from training before."""
    torch.manual_seed(0)
    model = Perceptron()
    first = list(model.inputs.parameters())
    rest = [parameter for parameter in model.parameters() if all(parameter is not each for each in first)]
    own = torch.optim.SGD([{"params": first, "lr": 0.2}, {"params": rest}], lr=0.1, momentum=0.9, fused=True)
    x = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1))
    model(x).square().mean().backward()
    own.step()
    own.zero_grad()
    given = config(stage)
    del given["optimizer"]
    from redline import initialize

    engine = initialize(model, given, optimizer=own, device="cpu")
    assert engine.optimizer is own
    return train(engine), engine.get_lr()


def looked_at(stage: int, name: str, **params: Any) -> Any:
    """Steps that torch makes, since somebody waits for them; and a frozen parameter in the groups."""
    torch.manual_seed(0)
    model = Perceptron()
    model.layers[1].requires_grad_(False)
    given = {"optimizer": {"type": name, "params": {"lr": 0.01, **params}}}
    engine = build(stage, model, give={"model_parameters": list(model.parameters())}, **given)
    record = train(engine, 2)
    seen = []
    engine.optimizer.register_step_post_hook(lambda *_: seen.append(1))
    record += train(engine, 2)
    assert len(seen) == 2
    return record


def flushed_sum(stage: int) -> Any:
    """What flush() finds is summed once."""
    engine = build(stage, gradient_accumulation_steps=2, gradient_allreduce_op="sum", gradient_clipping=0)
    x = rows(engine, torch.Generator().manual_seed(5))
    engine.backward((engine(x) - x[:, :5]).square().mean())
    engine.step()
    engine.flush()
    return engine.get_global_grad_norm()


def strange_layouts(stage: int) -> Any:
    """Buffers that are views of one row, weights in another order, numbers of another format."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 5)).double()
    model = model.to(memory_format=torch.channels_last)
    model[0].register_buffer("position", torch.arange(4.0).expand(4000, 4))
    engine = build(stage, model)
    generator = torch.Generator().manual_seed(5)
    record = []
    for _ in range(STEPS):
        x = torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64)[engine.global_rank :: engine.world_size]
        engine.backward(engine(x).square().mean())
        engine.step()
        record.append((float(engine.world.mean(engine.loss)), engine.get_global_grad_norm()))
    assert engine.module[0].position[-1].tolist() == [0, 1, 2, 3]
    assert engine(x).dtype is torch.float64
    return record


def model_parameters(stage: int) -> Any:
    torch.manual_seed(0)
    model = Perceptron()
    groups = [{"params": model.inputs.parameters(), "lr": 0.2}, {"params": list(model.layers.parameters())}]
    # At stage 0 in fp32 clipping counts parameters that the optimizer does not have, too, as in DeepSpeed.
    model.requires_grad_(False)
    for param in (*model.inputs.parameters(), *model.layers.parameters()):
        param.requires_grad_(True)
    engine = build(stage, model, give={"model_parameters": groups})
    return train(engine), engine.get_lr()


def frozen(stage: int) -> Any:
    torch.manual_seed(0)
    model = Perceptron()
    model.layers[1].requires_grad_(False)
    before = model.layers[1].weight.detach().clone()
    engine = build(stage, model, bf16={"enabled": True})
    record = train(engine)
    after = whole(engine, "layers.1.weight")
    assert torch.equal(before if stage == 3 else before.bfloat16(), after)
    return record


def tied(stage: int, **given: Any) -> Any:
    torch.manual_seed(0)
    engine = build(stage, Tied(), **given)
    generator = torch.Generator().manual_seed(5)
    record = []
    for _ in range(STEPS):
        tokens = torch.randint(0, 11, (8, 3), generator=generator)[engine.global_rank :: engine.world_size]
        engine.backward(nn.functional.cross_entropy(engine(tokens).flatten(0, 1), tokens.flatten()))
        engine.step()
        record.append((float(engine.world.mean(engine.loss)), engine.get_global_grad_norm()))
    assert engine.module.head.weight is engine.module.embedding.weight
    return record


class Turns(nn.Module):
    """A trunk and two heads, of which a forward uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(16, 16)
        self.heads = nn.ModuleList([nn.Linear(16, 5), nn.Linear(16, 5)])

    def forward(self, x: Tensor, turn: int) -> Tensor:
        out: Tensor = self.heads[turn % 2](torch.tanh(self.trunk(x)))
        return out


def turns(stage: int, by_rank: bool) -> Any:
    """Heads that are used in turn, on all processes alike or on each another."""
    torch.manual_seed(0)
    finds = stage == 0 or by_rank
    engine = build(stage, Turns(), redline={"find_unused_parameters": finds, "zero": {"blocks": []}})
    generator = torch.Generator().manual_seed(5)
    record = []
    for step in range(STEPS):
        x = rows(engine, generator)
        loss = (engine(x, step + (engine.global_rank if by_rank else 0)) - x[:, :5]).square().mean()
        engine.backward(loss)
        engine.step()
        record.append((float(engine.world.mean(engine.loss)), engine.get_global_grad_norm()))
    return record


def sparse_embedding(stage: int) -> Any:
    torch.manual_seed(0)
    engine = build(stage, Tied(sparse=True), optimizer={"type": "SGD", "params": {"lr": 0.1}}, gradient_clipping=0)
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        tokens = torch.randint(0, 11, (8, 3), generator=generator)[engine.global_rank :: engine.world_size]
        engine.backward(nn.functional.cross_entropy(engine(tokens).flatten(0, 1), tokens.flatten()))
        engine.step()
    return engine.get_global_grad_norm()


def late(stage: int, how: str, accumulate: str | None = None) -> Any:
    """Gradients that are shared at the last moment, each in its way."""
    managed = how != "unmanaged"
    engine = build(
        stage, own={"accumulate": accumulate}, gradient_accumulation_steps=3, managed_gradient_accumulation=managed
    )
    generator = torch.Generator().manual_seed(5)
    record = []
    for _ in range(STEPS):
        for micro in range(3):
            x = rows(engine, generator)
            if how == "boundary":
                engine.set_gradient_accumulation_boundary(micro == 2)
            if how == "no_sync" and micro < 2:
                with engine.no_sync():
                    engine.backward((engine(x) - x[:, :5]).square().mean())
                continue
            engine.backward((engine(x) - x[:, :5]).square().mean())
            if how == "evaluation":  # whole weights are left behind, and must not outlive the update
                with torch.no_grad():
                    engine(x)
            if managed or micro == 2:
                engine.step()
            if how == "flush" and micro == 1:
                engine.flush()
                break
        if how == "no_sync":
            engine.flush()
        record.append((float(engine.world.mean(engine.loss)), engine.get_global_grad_norm()))
    return record


def broken_off(stage: int) -> Any:
    """A forward that raises in the middle, and gradients that are dropped, leave nothing behind."""
    engine = build(stage, gradient_accumulation_steps=2)
    generator = torch.Generator().manual_seed(7)
    engine.backward(engine(rows(engine, generator)).square().mean())
    engine.step()

    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    hook = engine.module.layers[1].register_forward_pre_hook(fail)
    try:
        engine(rows(engine, generator))
    except ValueError:
        hook.remove()
    engine.drop_update()
    return train(engine)


def range_test(stage: int) -> Any:
    """Training after a range test is training without it, bit for bit."""
    from redline import run_range_test

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - batch[:, :5]).square().mean()

    generator = torch.Generator().manual_seed(3)
    data = torch.utils.data.TensorDataset(torch.randn(64, 16, generator=generator))
    records = []
    for tested in (False, True):
        engine = build(stage)
        train(engine, 2)
        if tested:
            batches = [row for (row,) in torch.utils.data.DataLoader(data, batch_size=ROWS)]
            result = run_range_test(engine, batches, loss, steps=10, rates=[50], baseline=False, progress=False)
            records.append(result.curves[0].losses[-1] if hasattr(result.curves[0], "losses") else 0.0)
        records.append(train(engine, 2))
    assert records[0] == records[-1]
    return records[0]


def compiled(stage: int) -> Any:
    engine = build(stage)
    engine.compile(backend="eager")
    return train(engine)


def methods(stage: int) -> Any:
    """The bare module, called between updates, computes with the weights as they are."""
    engine = build(stage)
    train(engine)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        first = engine.module(x)
    train(engine, 1)
    with torch.no_grad():
        return first.tolist(), engine.module(x).tolist()


def whole(engine: Any, name: str) -> Tensor:
    """A parameter, put together."""
    engine.reshard()
    parameter = dict(engine.module.named_parameters())[name].detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


Case = tuple[str, Callable[..., Any], dict[str, Any]]
LOW = {"bf16": {"enabled": True}}


def watched(stage: int) -> Any:
    """Everything that watches looks on, and changes nothing; what blocks send is counted."""
    from redline.monitoring.comms import CommsLogger

    engine = build(
        stage,
        comms_logger={"enabled": True, "prof_all": True, "debug": False, "verbose": True},
        flops_profiler={"enabled": True, "profile_step": 1},
        wall_clock_breakdown=True,
        memory_breakdown=True,
    )
    record = train(engine)
    table = next(each for each in engine.callbacks if isinstance(each, CommsLogger)).summary()
    assert ("reduce_scatter" in table) == ("all_gather " in table) == (stage > 0), table
    return record


def unfit(stage: int) -> Any:
    """An optimizer that cannot work on shares says so."""
    from redline.errors import EngineError

    try:
        return train(build(stage, optimizer={"type": "Adafactor", "params": {"lr": 0.01}}), 1)
    except EngineError as error:
        assert stage and "Adafactor" in str(error) and "stage 0" in str(error), error
        return train(build(0, optimizer={"type": "Adafactor", "params": {"lr": 0.01}}), 1)


def second_engine(stage: int) -> Any:
    """Another engine trains the model on, with an optimizer of its own."""
    first = build(stage)
    train(first, 2)
    assert type(first.module).__name__ == "Perceptron"
    return train(build(stage, first.module), 2)


CASES: list[Case] = [
    *((f"{name}", optimizer, {"name": name, **params}) for name, params in {
        "Adam": {}, "AdamW": {"weight_decay": 0.1, "torch_adam": True, "amsgrad": True},
        "SGD": {"momentum": 0.9, "dampening": 0.5}, "Adagrad": {}, "Lamb": {}, "Lion": {}, "Muon": {}, "RMSprop": {},
        "NAdam": {},
    }.items()),
    ("accumulation", settings, {"gradient_accumulation_steps": 3}),
    ("accumulation in low precision", settings, {"gradient_accumulation_steps": 3, **LOW}),
    ("sum", settings, {"gradient_allreduce_op": "sum"}),
    ("no clipping", settings, {"gradient_clipping": 0}),
    ("bf16", settings, LOW),
    ("bf16 weights", settings, {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}),
    ("fp16", settings, {"fp16": {"enabled": True, "initial_scale_power": 8}}),
    ("autocast", settings, {"torch_autocast": {"enabled": True}}),
    ("sums in bf16", settings, {"communication_data_type": "bf16"}),
    ("recomputing", settings, {"redline": {"activation_checkpointing": True, "zero": {"smallest_block": 100}}}),
    ("one block", settings, {"own": {"blocks": []}}),
    ("named blocks", settings, {"own": {"blocks": ["layers.*", "head"]}}),
    ("batch norm", batch_norm, {}),
    ("client's optimizer", client_instance, {}),
    ("model_parameters", model_parameters, {}),
    ("sum that is flushed", flushed_sum, {}),
    ("strange layouts", strange_layouts, {}),
    *((f"{name} with hooks", looked_at, {"name": name, **params}) for name, params in {
        "AdamW": {}, "SGD": {"momentum": 0.9}, "Adagrad": {},
    }.items()),
    ("frozen", frozen, {}),
    ("tied", tied, {}),
    ("heads in turn", turns, {"by_rank": False}),
    ("another head on each process", turns, {"by_rank": True}),
    ("sparse embedding", sparse_embedding, {}),
    *((f"late by {how}", late, {"how": how}) for how in ("no_sync", "unmanaged", "flush", "boundary", "evaluation")),
    ("broken off", broken_off, {}),
    ("range test", range_test, {}),
    ("compiled", compiled, {}),
    ("bare module", methods, {}),
    ("watched", watched, {}),
    ("second engine", second_engine, {}),
    ("unfit optimizer", unfit, {}),
]  # fmt: skip
MESHES: list[Case] = [
    ("plain", settings, {}),
    ("second copy", settings, {"zero": {"zero_hpz_partition_size": 2}}),
    ("shard groups", settings, {"zero": {"mics_shard_size": 2}}),
    ("shard groups, accumulating", settings, {"zero": {"mics_shard_size": 2}, "gradient_accumulation_steps": 2}),
    ("shard groups, late", late, {"how": "flush"}),
    ("Lamb", optimizer, {"name": "Lamb"}),
]


def run_all(jobs: list[tuple[str, int, Callable[..., Any], dict[str, Any]]]) -> dict[tuple[str, int], Any]:
    """Every job's result or traceback, in a process that `run_ranks` started."""
    results: dict[tuple[str, int], Any] = {}
    for name, stage, job, given in jobs:
        try:
            results[name, stage] = job(stage, **given)
        except Exception:
            results[name, stage] = traceback.format_exc()
    return results


def jobs_of(cases: list[Case], stages: tuple[int, ...]) -> list[tuple[str, int, Callable[..., Any], dict[str, Any]]]:
    jobs = []
    for name, job, given in cases:
        for stage in stages:
            # What only shards have is left out of stage 0, which all are compared with.
            plain = {key: value for key, value in given.items() if stage or key not in ("zero", "accumulate")}
            if not (stage == 3 and "sum" in name.split()):  # refused, as by DeepSpeed
                jobs.append((name, stage, job, plain))
    return jobs


@pytest.fixture(scope="module")
def on_two() -> dict[tuple[str, int], Any]:
    shared = [(f"{name}, shared", job, {**given, "accumulate": "shared"}) for name, job, given in CASES if job is late]
    return run_ranks(run_all, 2, jobs_of([*CASES, *shared], (0, 1, 3)))[0]


@pytest.fixture(scope="module")
def on_four() -> dict[tuple[str, int], Any]:
    return run_ranks(run_all, 4, jobs_of(MESHES, (0, 2, 3)))[0]


def assert_same(results: dict[tuple[str, int], Any], name: str, stage: int) -> None:
    ours, whole = results[name, stage], results[name, 0]
    for result in (ours, whole):
        assert not isinstance(result, str), result
    low = any(word in name for word in ("bf16", "fp16", "low", "autocast", "batch norm", "frozen", "Muon"))
    assert flat(ours) == pytest.approx(flat(whole), rel=2e-2 if low else 1e-4, abs=1e-6)


def flat(value: Any) -> list[float]:
    if isinstance(value, (list, tuple)):
        return [number for each in value for number in flat(each)]
    return [float(value)]


SHARED = [f"{name}, shared" for name, job, _ in CASES if job is late]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", [*(name for name, _, _ in CASES), *SHARED])
def test_a_stage_trains_as_stage_0_does(name: str, stage: int, on_two: dict[tuple[str, int], Any]) -> None:
    if (name, stage) not in on_two:
        pytest.skip("stage 3 takes no sum")
    assert_same(on_two, name, stage)


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", [name for name, _, _ in MESHES])
def test_four_processes_train_alike_however_they_share(
    name: str, stage: int, on_four: dict[tuple[str, int], Any]
) -> None:
    if name == "second copy" and stage != 3:
        pytest.skip("stage 3 only")
    assert_same(on_four, name, stage)


def test_one_process_can_share_with_itself_as_it_does_to_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(build(0))
    monkeypatch.setattr("redline.build._effective_stage", lambda config, world: 3)
    try:
        engine = build(3)
        assert type(engine._strategy).__name__ == "FSDPStrategy"
        assert flat(train(engine)) == pytest.approx(flat(whole), rel=1e-5)
    finally:
        torch.distributed.destroy_process_group()
