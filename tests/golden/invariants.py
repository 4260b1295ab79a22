"""Short scripts of the kinds that an engine easily gets wrong, and the loop by hand that says what is right.

A script is written once, against the names that DeepSpeed, this engine and the loop by hand have in common, and runs on
any of them. ``scripts/dev/record_deepspeed_invariants.py`` runs it on DeepSpeed, ``test_deepspeed_invariants.py`` on
this engine. Knows torch and `tests.plain_loop` only.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.plain_loop import Net, batch, mse

__all__ = ["PROGRAMS", "Case", "Driver", "HandDriver", "Script", "cases", "compute_dtype", "differences", "run"]

Case = dict[str, Any]  # program, precision, stage, processes

ACCUMULATION = 2
CLIPPING = 0.5
# With a small eps, rounding in low precision decides the first steps.
ADAMW = {"lr": 0.05, "betas": [0.9, 0.99], "eps": 1e-2, "weight_decay": 0.5}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 64}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TOLERANCE = {"fp32": 2e-4, "fp16": 5e-3, "bf16": 2e-2, "autocast": 2e-2}
BOTH = ("branch", "a", "b")


def config_of(case: Case) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 5,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIPPING,
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}},
        "zero_optimization": {"stage": case["stage"]},
        "steps_per_print": 1_000_000,
        "redline": {"progress": False},
        **PRECISIONS[case["precision"]],
        **PROGRAMS[case["program"]].more,
    }


def compute_dtype(case: Case) -> torch.dtype:
    """Of the model's parameters."""
    return _LOW.get(case["precision"], torch.float32)


class Driver(Protocol):
    """What a script can't ask of all engines by the same name."""

    def initialize(self, model: nn.Module, case: Case) -> Any:
        """An engine whose optimizer has all parameters of the model, frozen ones included."""

    def write(self, engine: Any, write: Callable[[Any], None]) -> None:
        """Let a function write into the model's parameters, which it finds in full; all ranks at once."""

    def read(self, engine: Any) -> dict[str, Tensor]:
        """The model's parameters in full; all ranks at once."""


class Script:
    """A program under way on one rank, and what it has come to.

    Args:
        case: says where it runs.
        driver: makes the engines.
    """

    def __init__(self, case: Case, driver: Driver) -> None:
        self.case, self.driver = case, driver
        self.rank, self.size, self.dtype = dist.get_rank(), dist.get_world_size(), compute_dtype(case)
        self.losses: list[float] = []
        self.norms: list[float | None] = []
        self.engines: list[Any] = []

    def engine(self, model: nn.Module) -> Any:
        engine = self.driver.initialize(model, self.case)
        self.engines.append(engine)
        return engine

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        return batch(number, self.rank, self.dtype)

    def loss(self, call: Callable[..., Tensor], number: int, *route: str) -> Tensor:
        x, y = self.batch(number)
        return mse(call(x, route or BOTH), y)

    def backward(self, engine: Any, loss: Tensor, **options: Any) -> None:
        engine.backward(loss, **options)
        mean = loss.detach().double()
        dist.all_reduce(mean)
        self.losses.append(float(mean) / self.size)

    def note_norm(self, engine: Any) -> None:
        norm = engine.get_global_grad_norm()
        self.norms.append(None if norm is None else float(norm))

    def step(self, engine: Any, number: int, *routes: tuple[str, ...]) -> None:
        """One optimizer step; each micro-batch has its own route where there are several."""
        for index in range(ACCUMULATION):
            route = routes[index % len(routes)] if routes else BOTH
            self.backward(engine, self.loss(engine, ACCUMULATION * number + index, *route))
            engine.step()
        self.note_norm(engine)

    def record(self) -> dict[str, Any]:
        """Losses (means over the ranks), norms, and a number of each weight's values."""
        weights = {
            f"{index}.{name}": _fingerprint(weight.to(self.dtype))
            for index, engine in enumerate(self.engines)
            for name, weight in self.driver.read(engine).items()
        }
        digits = lambda value: None if value is None else float(f"{value:.8g}")  # noqa: E731
        return {
            "loss": list(map(digits, self.losses)),
            "norm": list(map(digits, self.norms)),
            "weights": {name: digits(value) for name, value in weights.items()},
        }


def _fingerprint(weight: Tensor) -> float:
    """A number that depends on every value, on its sign and its place."""
    flat = weight.detach().flatten().double()
    return float(torch.linalg.vector_norm((flat + 1) * torch.linspace(1, 2, len(flat), dtype=torch.float64)))


# -- programs ----------------------------------------------------------------------------------------------


class Program:
    """A script of one kind.

    Args:
        run: what it does.
        stages, precisions: where it makes sense.
        more: further keys of the config.
    """

    def __init__(
        self,
        run: Callable[[Script], None],
        stages: tuple[int, ...] = (0, 1, 2, 3),
        precisions: tuple[str, ...] = tuple(PRECISIONS),
        **more: Any,
    ) -> None:
        self.run, self.stages, self.precisions, self.more = run, stages, precisions, more


def frozen(*names: str, seed: int = 0) -> Net:
    model = Net(seed)
    for name in names:
        getattr(model, name).requires_grad_(False)
    return model


def set_flag(engine: Any, name: str, flag: bool) -> None:
    for param in getattr(engine.module, name).parameters():
        param.requires_grad_(flag)


def unused_head(script: Script) -> None:
    engine = script.engine(Net())
    for number in range(3):
        script.step(engine, number, ("branch", "a"))


def one_head_a_step(script: Script) -> None:
    engine = script.engine(Net())
    for number, head in enumerate("abba"):
        script.step(engine, number, (head,))


def another_head_on_each_rank(script: Script) -> None:
    engine = script.engine(Net())
    route = [("a",), ("branch", "b"), ("late",)][script.rank % 3]
    for number in range(3):
        script.step(engine, number, route)


def branch_of_some_micro_batches(script: Script) -> None:
    engine = script.engine(Net())
    for number in range(3):
        script.step(engine, number, ("a",), ("branch", "a"))


def frozen_in_the_optimizer(script: Script) -> None:
    engine = script.engine(frozen("branch", "a"))
    for number in range(3):
        script.step(engine, number)


def frozen_later(script: Script) -> None:
    engine = script.engine(Net())
    script.step(engine, 0)
    set_flag(engine, "branch", False)
    for number in range(1, 4):
        script.step(engine, number)


def thawed_later(script: Script) -> None:
    engine = script.engine(frozen("branch"))
    script.step(engine, 0)
    set_flag(engine, "branch", True)
    for number in range(1, 4):
        script.step(engine, number)


def two_backwards(script: Script) -> None:
    engine = script.engine(Net())
    for number in range(3):
        for index in range(ACCUMULATION):
            script.backward(engine, script.loss(engine, 10 * number + 2 * index, "a"))
            script.backward(engine, script.loss(engine, 10 * number + 2 * index + 1, "b"))
            engine.step()
        script.note_norm(engine)


def weighted_by_tokens(script: Script) -> None:
    engine = script.engine(Net())
    for number in range(3):
        numbers = [ACCUMULATION * number + index for index in range(ACCUMULATION)]
        tokens = sum(_tokens(each, rank) for each in numbers for rank in range(script.size))
        for each in numbers:
            x, y = script.batch(each)
            own = _tokens(each, script.rank)
            errors = (engine(x[:own], BOTH).float() - y[:own]).square().mean(1)
            script.backward(engine, errors.sum() * script.size / tokens, scale_wrt_gas=False)
            engine.step()
        script.note_norm(engine)


def _tokens(number: int, rank: int) -> int:
    """How many samples of a micro-batch count."""
    return 1 + (number + 2 * rank) % 5


@torch.no_grad()
def _copy(model: Any) -> None:
    model.a.weight.copy_(torch.linspace(-0.5, 0.5, model.a.weight.numel()).view_as(model.a.weight))


@torch.no_grad()
def _clamp(model: Any) -> None:
    for param in model.parameters():
        param.clamp_(-0.125, 0.125)


def _load(model: Any) -> None:
    model.load_state_dict(Net(seed=3).state_dict())


def written_between_steps(script: Script) -> None:
    engine = script.engine(Net())
    script.step(engine, 0)
    for number, write in enumerate((_load, _copy, _clamp), 1):
        script.driver.write(engine, write)
        script.step(engine, number)


def evaluated_in_between(script: Script) -> None:
    engine = script.engine(Net())
    for number in range(3):
        for index in range(ACCUMULATION):
            engine.eval()
            with torch.no_grad():
                script.loss(engine, 50)
                script.loss(engine.module, 51, "a")
            engine.train()
            loss = script.loss(engine, ACCUMULATION * number + index)
            with torch.no_grad():
                script.loss(engine, 52)
            script.backward(engine, loss)
            engine.step()
        script.note_norm(engine)


def by_the_module(script: Script) -> None:
    engine = script.engine(Net())
    for number in range(3):
        for index in range(ACCUMULATION):
            script.backward(engine, script.loss(engine.module, ACCUMULATION * number + index))
            engine.step()
        script.note_norm(engine)


def by_a_method(script: Script) -> None:
    engine = script.engine(Net())
    for number in range(3):
        for index in range(ACCUMULATION):
            x, y = script.batch(ACCUMULATION * number + index)
            script.backward(engine, engine.module.loss(x, y, BOTH))
            engine.step()
        script.note_norm(engine)


def a_seed_on_each_rank(script: Script) -> None:
    engine = script.engine(Net(seed=script.rank))
    for number in range(3):
        script.step(engine, number)


def _mlp(*sizes: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [(nn.Linear(one, two), nn.Tanh()) for one, two in itertools.pairwise(sizes)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


def gan(script: Script) -> None:
    generator, critic = script.engine(_mlp(4, 6, 3)), script.engine(_mlp(3, 6, 1))
    for number in range(3):
        for index in range(ACCUMULATION):
            noise, real = script.batch(ACCUMULATION * number + index)
            fake = generator(noise)
            if index == 0:
                critic.zero_grad()  # the generator's loss has left gradients there
            script.backward(critic, _real(critic(real.to(script.dtype)), 1) + _real(critic(fake.detach()), 0))
            critic.step()
            for param in critic.module.parameters():
                param.requires_grad_(False)
            script.backward(generator, _real(critic(fake), 1))
            generator.step()
            for param in critic.module.parameters():
                param.requires_grad_(True)
        script.note_norm(generator)
        script.note_norm(critic)


def gan_that_leaves_gradients(script: Script) -> None:
    generator, critic = script.engine(_mlp(4, 6, 3)), script.engine(_mlp(3, 6, 1))
    for number in range(3):
        batches = [script.batch(ACCUMULATION * number + index) for index in range(ACCUMULATION)]
        critic.zero_grad()  # the generator's loss has left gradients there
        for noise, real in batches:
            fake = generator(noise).detach()
            script.backward(critic, _real(critic(real.to(script.dtype)), 1) + _real(critic(fake), 0))
            critic.step()
        for noise, _ in batches:
            script.backward(generator, _real(critic(generator(noise)), 1))
            generator.step()
        script.note_norm(generator)
        script.note_norm(critic)


def _real(output: Tensor, label: int) -> Tensor:
    output = output.float()
    return nn.functional.binary_cross_entropy_with_logits(output, torch.full_like(output, label))


class Headed(nn.Module):
    """An encoder, which may have other heads, and a head."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor, route: Any = ()) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.encoder(x)))
        return out


def shared_encoder(script: Script) -> None:
    encoder = _mlp(4, 6)
    first, second = (script.engine(Headed(encoder, _mlp(6, 3))) for _ in range(2))
    for number in range(3):
        script.step(first, 2 * number)
        script.step(second, 2 * number + 1)


class Normalized(nn.Module):
    """A layer that keeps the rows of its weight at length 1, by writing into it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _mlp(4, 6, 3)

    def forward(self, x: Tensor, route: Any = ()) -> Tensor:
        weight = self.layers[0].weight
        with torch.no_grad():
            weight.copy_(nn.functional.normalize(weight.float(), dim=1))
        out: Tensor = self.layers(x)
        return out


def normalized_in_forward(script: Script) -> None:
    engine = script.engine(Normalized())
    for number in range(4):
        script.step(engine, number)


UNSHARDED = (0, 1, 2)
PROGRAMS: dict[str, Program] = {
    "an unused head": Program(unused_head),
    "one head a step": Program(one_head_a_step),
    "another head on each rank": Program(another_head_on_each_rank),
    "a branch of some micro-batches": Program(branch_of_some_micro_batches),
    "frozen in the optimizer": Program(frozen_in_the_optimizer),
    "frozen later": Program(frozen_later),
    "thawed later": Program(thawed_later),
    "two backwards before a step": Program(two_backwards),
    "losses weighted by tokens": Program(weighted_by_tokens),
    "written between steps": Program(written_between_steps),
    "evaluated in between": Program(evaluated_in_between),
    "forward by engine.module": Program(by_the_module),
    "forward by a method": Program(by_a_method),
    "a seed on each rank": Program(a_seed_on_each_rank),
    "a GAN": Program(gan),
    "a GAN that leaves gradients": Program(gan_that_leaves_gradients),
    # FSDP2 shards a module once, and loses what is written into a gathered parameter.
    "a shared encoder": Program(shared_encoder, UNSHARDED),
    "normalized in forward": Program(normalized_in_forward, UNSHARDED),
    "gradients added up in bf16": Program(unused_head, UNSHARDED, ("bf16",), data_types={"grad_accum_dtype": "bf16"}),
}


def cases() -> Iterator[Case]:
    """Every program on two ranks; on one and three, what is another situation there."""
    stages: dict[int, tuple[int, ...]] = {1: (0,), 2: (0, 1, 2, 3), 3: (0, 2, 3)}  # stages 1 and 2 are one mechanism
    for (name, program), processes in itertools.product(PROGRAMS.items(), stages):
        for precision, stage in itertools.product(program.precisions, stages[processes]):
            if stage in program.stages and (processes == 2 or precision in ("fp32", "bf16")):
                yield {"program": name, "precision": precision, "stage": stage, "processes": processes}


def run(case: Case, driver: Driver) -> dict[str, Any]:
    """Run a program on every rank; what it has come to."""
    script = Script(case, driver)
    PROGRAMS[case["program"]].run(script)
    return script.record()


def differences(case: Case, mine: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What differs by more than the dtype's rounding. A norm that either side does not have is not compared."""
    tolerance = _TOLERANCE[case["precision"]]
    pairs: list[tuple[str, Any, Any]] = []
    for name in ("loss", "norm"):
        pairs += [(f"{name} {index}", *each) for index, each in enumerate(zip(mine[name], expected[name], strict=True))]
    assert mine["weights"].keys() == expected["weights"].keys()
    pairs += [(name, mine["weights"][name], value) for name, value in expected["weights"].items()]
    wide = {"norm": 3.0, "loss": 3.0}  # sums over all weights, or all samples
    return [
        f"{name} is {one:.6g} instead of {other:.6g}"
        for name, one, other in pairs
        if one is not None and other is not None
        and not abs(one - other) <= tolerance * wide.get(name.split()[0], 1.0) * max(abs(other), 0.05)
    ]  # fmt: skip


# -- by hand -----------------------------------------------------------------------------------------------


class HandDriver:
    """The loop by hand, on every rank."""

    def initialize(self, model: nn.Module, case: Case) -> HandLoop:
        return HandLoop(model, case)

    def write(self, engine: HandLoop, write: Callable[[Any], None]) -> None:
        write(engine.module)

    def read(self, engine: HandLoop) -> dict[str, Tensor]:
        return {name: param.detach() for name, param in engine.module.named_parameters()}


class HandLoop:
    """A loop in plain torch: full parameters, fp32 master params in low precision, gradients averaged in fp32."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.module, self.case = model, case
        for param in model.parameters():
            dist.broadcast(param.data, 0)
        self._params = list(model.parameters())
        self._masters = [param.detach().clone().float() for param in self._params]
        model.to(compute_dtype(case))
        self._optimizer = torch.optim.AdamW(self._masters, **ADAMW)  # type: ignore[arg-type]
        self._sums: dict[Tensor, Tensor] = {}
        self._scale = 64.0 if case["precision"] == "fp16" else 1.0
        self._micro_batches = 0
        self._norm: float | None = None

    def __call__(self, *inputs: Any) -> Tensor:
        context: Any = contextlib.nullcontext()
        if self.case["precision"] == "autocast":
            context = torch.autocast("cpu", torch.bfloat16)
        with context:
            out: Tensor = self.module(*inputs)
        return out

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def eval(self) -> None:
        self.module.eval()

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def get_global_grad_norm(self) -> float | None:
        return self._norm

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        (loss.float() * self._scale / (ACCUMULATION if scale_wrt_gas else 1)).backward()  # type: ignore[no-untyped-call]
        for param in self._params:
            if param.grad is not None:
                gradient = param.grad.float() / self._scale
                self._sums[param] = self._sums.get(param, torch.zeros(())) + gradient
                param.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self._micro_batches += 1
        if self._micro_batches % ACCUMULATION:
            return
        gradients = []
        for param, master in zip(self._params, self._masters):
            # What was written into the model since the last step counts; the other elements keep their precision.
            master.copy_(torch.where(master.to(param.dtype) == param, master, param.float()))
            master.grad = None
            if param.requires_grad:
                master.grad = self._sums.get(param, torch.zeros_like(master)) / dist.get_world_size()
                dist.all_reduce(master.grad)
                gradients.append(master.grad)
        self._norm = float(torch.linalg.vector_norm(torch.cat([each.flatten() for each in gradients])))
        for gradient in gradients:
            gradient.mul_(min(1.0, CLIPPING / (self._norm + 1e-6)))
        self._optimizer.step()
        for param, master in zip(self._params, self._masters):
            param.copy_(master)
        self._sums = {}
