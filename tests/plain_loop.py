"""A training loop written by hand: what a program of `tests.programs` must come to, whatever engine runs it.

One process with the full model in plain torch: no engine, no process group, no sharding, no fused kernels. It plays all
ranks in turn. What it does is the contract of the engine:

- The optimizer step takes the mean of the ranks' gradients, summed in fp32 over the micro-batches. A gradient that no
  loss has reached is zero, so that weight decay and momentum still move the parameter. A frozen one does not move.
- In bf16 the optimizer has fp32 master params. What a script writes into the model replaces the elements of the master
  param that differ from it after rounding.
- The norm is that before clipping, over the optimizer's parameters that require gradients. In fp32 at ZeRO stage 0 the
  other parameters that have a gradient count, too, as DeepSpeed has it.
- Where a program has lost gradients or added some of its own, `must_refuse` names why the engine has to raise
  `EngineError` now, `may_refuse` why it may.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LEFT_OUT", "NEVER_SHARDED", "Broken", "Impossible", "Loop", "Net", "Setup", "batch", "mse"]

FEATURES, WIDTH, OUTPUTS, SAMPLES = 4, 6, 3, 5

# Why a program may be refused, as the counts of refusals name it.
PLAIN = "plain backward that was not cleared"
CLEARED = "clearing within an accumulation"
NO_GRADIENT = "step without a gradient on any rank"
NO_GRAPH = "loss without a graph"
NEVER_SHARDED = "add_param_group of parameters that stage 3 never sharded"

LEFT_OUT = "late"  # the module that the optimizer does not have at first
BROKEN = "out of memory"


class Broken(RuntimeError):
    """What a forward or a backward raises and the script catches: out of memory, say."""


class Impossible(Exception):
    """No script could say this here: a step without a backward, a load of what was never saved."""


class _BreaksInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise Broken(BROKEN)


class Gain(nn.Module):
    """A module of one element, which not every rank can have a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Net(nn.Module):
    """A trunk and heads, of which a forward uses those that its `route` names."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk = nn.Linear(FEATURES, WIDTH)
            self.gain = Gain()
            self.branch = nn.Linear(WIDTH, WIDTH)
            self.a = nn.Linear(WIDTH, OUTPUTS)
            self.b = nn.Linear(WIDTH, OUTPUTS)
            self.late = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor, route: Sequence[str], breaks: str = "") -> Tensor:
        hidden = torch.tanh(self.gain(self.trunk(x)))
        if breaks == "forward":
            raise Broken(BROKEN)
        if "branch" in route:
            hidden = hidden + self.branch(hidden)
        if breaks == "backward":  # the heads have their gradients by then
            hidden = _BreaksInBackward.apply(hidden)  # type: ignore[no-untyped-call]
        heads = [getattr(self, name)(hidden) for name in route if name != "branch"]
        return torch.stack(heads).sum(0)

    def loss(self, x: Tensor, y: Tensor, route: Sequence[str]) -> Tensor:
        """A method that calls the submodules by itself, as models with a `training_step` do."""
        hidden = torch.tanh(self.gain(self.trunk(x)))
        if "branch" in route:
            hidden = hidden + self.branch(hidden)
        heads = [getattr(self, name)(hidden) for name in route if name != "branch"]
        return mse(torch.stack(heads).sum(0), y)

    def add_head(self, dtype: torch.dtype) -> nn.Linear:
        """A head that the model did not have when the engine was made."""
        self.new = nn.Linear(WIDTH, OUTPUTS)
        nn.init.constant_(self.new.weight, 0.125)
        nn.init.constant_(self.new.bias, -0.25)
        self.new.to(dtype)
        return self.new


def batch(number: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A rank's micro-batch of this number."""
    generator = torch.Generator().manual_seed(2 * number + rank)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return x.to(dtype), torch.randn(SAMPLES, OUTPUTS, generator=generator)


def mse(output: Tensor, y: Tensor) -> Tensor:
    """The mean squared error, in fp32."""
    return (output.float() - y).square().mean()


@dataclass(frozen=True)
class Setup:
    """What a script begins with: the config, the model, and which of its parameters the optimizer gets."""

    ranks: int = 1
    stage: int = 0
    precision: str = "fp32"
    accumulation: int = 1
    managed: bool = True
    clipping: float = 0.0
    optimizer: str = "SGD"
    groups: bool = False  # two parameter groups rather than one
    own_optimizer: bool = False  # the script makes torch's optimizer itself
    frozen: tuple[str, ...] = ()  # modules that are frozen before the engine is made
    seed_per_rank: bool = False  # each rank starts from other weights; rank 0's count
    blocks: bool = False  # at stage 3 each module is gathered by itself

    @property
    def low(self) -> bool:
        return self.precision == "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward."""
        return torch.bfloat16 if self.low else torch.float32

    @property
    def sharded(self) -> bool:
        """Whether a script sees fp32 shards of the parameters between steps."""
        return self.stage == 3 and self.ranks > 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Of torch's optimizer."""
        if self.optimizer == "SGD":
            return {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
        # With a small eps the first steps are the sign of a gradient, which is a matter of rounding near zero.
        return {"lr": 0.05, "betas": [0.9, 0.99], "eps": 1e-2, "weight_decay": 0.5}

    @property
    def group_names(self) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
        """Options and module names of each parameter group."""
        if not self.groups:
            return [({}, ("trunk", "gain", "branch", "a", "b"))]
        return [({"lr": 0.02}, ("trunk", "gain", "branch")), ({"weight_decay": 0.0}, ("a", "b"))]

    @property
    def config(self) -> dict[str, Any]:
        """The engine's."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": SAMPLES,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clipping,
            "zero_optimization": {"stage": self.stage},
            "steps_per_print": 1_000_000,
            "redline": {"progress": False},
        }
        if not self.own_optimizer:
            config["optimizer"] = {"type": self.optimizer, "params": self.arguments}
        if not self.managed:
            config["managed_gradient_accumulation"] = False
        if self.low:
            config["bf16"] = {"enabled": True}
        if self.blocks:
            config["redline"]["zero"] = {"blocks": ["trunk", "branch", "a", "b", "late"]}
        return config


@dataclass
class _Rank:
    """What one rank has accumulated since the last optimizer step."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    backwards: int = 0
    micro_batches: int = 0
    pending: bool = False  # a backward whose step() has not come yet


class Loop:
    """The hand-written loop; see the top of this file.

    Attributes:
        model: as a script sees it between steps.
        norm: of the last optimizer step; None before it.
        steps: optimizer steps.
        seen: losses of evaluations, one list per rank.
        must_refuse: why the engine has to refuse the last operation; empty where it must not.
        may_refuse: why the engine may refuse the last operation.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = Net(7)
        for name in setup.frozen:
            getattr(self.model, name).requires_grad_(False)
        self.norm: float | None = None
        self.steps = 0
        self.seen: list[list[float]] = [[] for _ in range(setup.ranks)]
        self.must_refuse = self.may_refuse = ""
        self.ranks = [_Rank() for _ in range(setup.ranks)]
        self.boundary: bool | None = None
        self.scalings: set[bool] = set()  # of the losses of this accumulation
        self.plain = self.cleared = self.no_graph = False
        self.never_sharded = False  # whether the optimizer has parameters that stage 3 has not seen
        self.frozen_within: set[str] = set()  # during this accumulation
        self.saved: dict[str, dict[str, Any]] = {}
        self.snapshot: dict[str, Tensor] = {}  # the script's own copy of the weights
        self.masters = {name: nn.Parameter(param.detach().clone()) for name, param in self.model.named_parameters()}
        groups = [{"params": self._masters_of(modules), **options} for options, modules in setup.group_names]
        cls: Any = getattr(torch.optim, setup.optimizer)
        self.optimizer = cls(groups, **setup.arguments, foreach=False, fused=False)
        # A parameter that does not train has no master param yet: its precision is the model's.
        self.has_master = {name for name in self.grouped if self.params[name].requires_grad}
        if setup.low and not setup.sharded:
            self.model.to(torch.bfloat16)

    def begin_operation(self) -> None:
        """Forget why the last operation might be refused."""
        self.must_refuse, self.may_refuse = "", NEVER_SHARDED if self.never_sharded else ""
        if self.no_graph:  # the ranks may find it out together at any time before the optimizer step
            self.may_refuse = NO_GRAPH

    # -- what trains -----------------------------------------------------------------------------

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @property
    def grouped(self) -> list[str]:
        """The names of the optimizer's parameters."""
        names = {id(master): name for name, master in self.masters.items()}
        return [names[id(each)] for group in self.optimizer.param_groups for each in group["params"]]

    @property
    def trained(self) -> list[str]:
        params = self.params
        return [name for name in self.grouped if params[name].requires_grad]

    def _masters_of(self, modules: Iterable[str]) -> list[nn.Parameter]:
        return [master for name, master in self.masters.items() if name.split(".")[0] in modules]

    @property
    def accumulating(self) -> bool:
        return any(rank.backwards for rank in self.ranks)

    @property
    def pending(self) -> bool:
        return self.ranks[0].pending

    @property
    def ends_step(self) -> bool:
        """Whether the next step() is an optimizer step."""
        if not self.setup.managed:
            return True
        if self.boundary is not None:
            return self.boundary
        return self.ranks[0].micro_batches + 1 >= self.setup.accumulation

    # -- forward and backward --------------------------------------------------------------------

    def call(self, rank: int, number: int, route: Sequence[str], flipped: bool = False) -> Tensor:
        """The loss of one forward of a rank, in whichever way a script would make it."""
        x, y = batch(number, rank, self.setup.dtype)
        if flipped:
            x = x.flip(0)
        if not self.setup.sharded or not self.setup.low:
            return mse(self.model(x, route), y)
        low = {name: param.bfloat16() for name, param in self.model.named_parameters()}
        return mse(torch.func.functional_call(self.model, low, (x, route)), y)

    def backward(self, losses: Callable[[int], Tensor], *, scale: bool = True, sync: bool = True) -> None:
        """One `engine.backward` on every rank.

        Args:
            losses: the loss of a rank.
            scale: divide by the accumulation steps.
            sync: not within `no_sync`.
        """
        for rank in range(self.setup.ranks):
            self.backward_of(rank, losses(rank), scale=scale, sync=sync)

    def backward_of(self, rank: int, loss: Tensor, *, scale: bool = True, sync: bool = True) -> None:
        self._refuse_lost_gradients(now=True)
        if self.no_graph:  # of an earlier micro-batch, on one rank: all find out when they reduce
            self.may_refuse = self.may_refuse or NO_GRAPH
        self.scalings.add(scale)
        state = self.ranks[rank]
        if loss.requires_grad:
            self._accumulate(state, loss / self.setup.accumulation if scale else loss)
        else:
            self.no_graph = True
            self.may_refuse = self.may_refuse or NO_GRAPH
        state.backwards += 1
        state.pending = sync

    def _accumulate(self, state: _Rank, loss: Tensor) -> None:
        wanted = {name: param for name, param in self.params.items() if param.requires_grad}
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, gradients):
            if gradient is not None:
                before = state.gradients.get(name)
                state.gradients[name] = gradient.float() if before is None else before + gradient.float()

    def plain_backward(self, losses: Callable[[int], Tensor]) -> None:
        """`loss.backward()`, past the engine."""
        trained = self.trained
        for rank in range(self.setup.ranks):
            loss = losses(rank)
            gradients = torch.autograd.grad(loss, [self.params[name] for name in trained], allow_unused=True) if (
                loss.requires_grad and trained
            ) else ()  # fmt: skip
            if all(gradient is None for gradient in gradients):
                raise Impossible("a plain backward that reaches nothing")
        self.plain = True

    def _refuse_lost_gradients(self, *, now: bool) -> None:
        """Note what the engine has to say about gradients that are not those it has left; `now`: at the latest here."""
        if self.cleared:
            self.must_refuse, self.may_refuse = (CLEARED if now else ""), CLEARED
        elif self.plain:
            self.may_refuse = PLAIN

    # -- the optimizer step ----------------------------------------------------------------------

    def step(self) -> None:
        if not self.pending:
            raise Impossible("step without backward")
        ends = self.ends_step
        self._refuse_lost_gradients(now=ends)
        if self.plain and ends and not self.must_refuse:
            self.must_refuse = self.may_refuse = PLAIN
        for rank in self.ranks:
            rank.micro_batches += 1
            rank.pending = False
        if ends:
            self._take_step(1.0)

    def flush(self) -> None:
        counts = [self._accumulated(rank) for rank in self.ranks]
        if not sum(counts):
            if self.plain:
                self.may_refuse = PLAIN
            return
        self._refuse_lost_gradients(now=True)
        if self.plain and not self.must_refuse:
            self.must_refuse = self.may_refuse = PLAIN
        if len(self.scalings) > 1:
            raise Impossible("a flush of losses that were scaled in two ways has no one meaning")
        factor = self.setup.accumulation * self.setup.ranks / sum(counts) if self.scalings == {True} else 1.0
        self._take_step(factor)

    def _accumulated(self, rank: _Rank) -> int:
        """Micro-batches; several backwards before one step() are one micro-batch, unless the script counts itself."""
        if not self.setup.managed:
            return rank.backwards
        return max(rank.micro_batches + rank.pending, 1) if rank.backwards else 0

    def _take_step(self, factor: float) -> None:
        trained, params = self.trained, self.params
        if self.no_graph and not self.must_refuse:
            self.must_refuse = self.may_refuse = NO_GRAPH
        if not any(name in rank.gradients for rank in self.ranks for name in trained) and not self.must_refuse:
            self.may_refuse = NO_GRADIENT
            # A loss that reached what the optimizer does not have, or what is frozen by now, may count as a gradient.
            if not trained or not (self.frozen_within or any(rank.gradients for rank in self.ranks)):
                self.must_refuse = NO_GRADIENT
        if self.must_refuse:
            return
        gradients = {name: self._mean(name) * factor for name in trained}
        counted = list(gradients.values())
        if self.setup.stage == 0 and not self.setup.low:
            own = set(self.grouped)
            others = [name for name, param in params.items() if name not in own and param.requires_grad]
            reached = [name for name in others if any(name in rank.gradients for rank in self.ranks)]
            counted += [self._mean(name) * factor for name in reached]
        norm = torch.stack([gradient.double().square().sum() for gradient in counted]).sum().sqrt().item()
        if self.setup.clipping and norm > self.setup.clipping:
            gradients = {name: each * (self.setup.clipping / (norm + 1e-6)) for name, each in gradients.items()}
        with torch.no_grad():
            for name in set(trained) - self.has_master:
                self.masters[name].copy_(params[name])
                self.has_master.add(name)
        for name in self.grouped:
            self.masters[name].grad = gradients.get(name)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name in trained:
                params[name].copy_(self.masters[name])
        self.norm = norm
        self.steps += 1
        self.forget()

    def _mean(self, name: str) -> Tensor:
        zero = torch.zeros_like(self.masters[name])
        total = zero
        for rank in self.ranks:
            total = total + rank.gradients.get(name, zero)
        return total / self.setup.ranks

    def forget(self) -> None:
        """Begin a new accumulation; nothing of the old one is left."""
        self.ranks = [_Rank() for _ in self.ranks]
        self.scalings, self.frozen_within = set(), set()
        self.plain = self.cleared = self.no_graph = False

    def zero_grad(self) -> None:
        self.plain = False
        if not self.accumulating:
            return
        trained = self.trained
        if not all(any(name in rank.gradients for name in trained) for rank in self.ranks):
            raise Impossible("some ranks have nothing to clear, and have another fault")
        self.cleared = True

    def broken(self, where: str) -> None:
        """A forward or a backward that raised on all ranks; the accumulation of a broken backward is void."""
        if where == "backward":
            self._refuse_lost_gradients(now=True)
            if not self.must_refuse:
                self.forget()

    # -- between steps ---------------------------------------------------------------------------

    def set_boundary(self, boundary: bool) -> None:
        if not self.setup.managed:
            raise Impossible("the script ends its accumulations itself")
        self.boundary = boundary

    def set_requires_grad(self, modules: Sequence[str], flag: bool) -> None:
        for name, param in self.params.items():
            if name.split(".")[0] not in modules or param.requires_grad is flag:
                continue
            if flag and name in self.frozen_within:
                raise Impossible("whether gradients from before the freezing count is nobody's business")
            param.requires_grad_(flag)
            if not flag and self.accumulating:
                self.frozen_within.add(name)
                for rank in self.ranks:
                    rank.gradients.pop(name, None)

    def add_param_group(self, modules: Sequence[str], **options: Any) -> None:
        if self.accumulating or set(self._masters_of(modules)) & {self.masters[name] for name in self.grouped}:
            raise Impossible("parameters come into the optimizer between steps, and once")
        self.optimizer.add_param_group({"params": self._masters_of(modules), **options})

    def add_head(self) -> None:
        """A module that the engine has not seen, with a group of its own."""
        if hasattr(self.model, "new") or self.accumulating:
            raise Impossible("one new head, between steps")
        if self.setup.sharded and self.setup.low:
            raise Impossible("whether its dtype is that of the shards or that of the forward is nobody's business")
        self.model.add_head(self.setup.dtype)
        for name, param in self.model.new.named_parameters():
            self.masters[f"new.{name}"] = nn.Parameter(param.detach().float().clone())
        self.add_param_group(["new"])
        self.never_sharded = self.setup.sharded

    @torch.no_grad()
    def written(self) -> None:
        """The script has written into the model: the master params follow."""
        for name, param in self.params.items():
            if name in self.has_master:
                master = self.masters[name]
                master.copy_(torch.where(master.to(param.dtype) == param, master, param.float()))

    def save(self, tag: str) -> None:
        self.saved[tag] = copy.deepcopy(
            {
                "params": {name: param.detach() for name, param in self.params.items()},
                "masters": {name: self.masters[name].detach() for name in self.has_master},
                "state": {name: dict(self.optimizer.state.get(self.masters[name], {})) for name in self.grouped},
            }
        )

    @torch.no_grad()
    def load(self, tag: str) -> None:
        saved = copy.deepcopy(self.saved.get(tag))
        if saved is None or set(saved["state"]) != set(self.grouped) or set(saved["params"]) != set(self.params):
            raise Impossible("what was saved is of another model")
        if self.plain or self.cleared:
            raise Impossible("which of two faults counts is nobody's business")
        for name, param in self.params.items():
            param.copy_(saved["params"][name])
        self.has_master = set(saved["masters"])
        for name, master in saved["masters"].items():
            self.masters[name].copy_(master)
        self.optimizer.state.clear()
        for name, state in saved["state"].items():
            if state:
                self.optimizer.state[self.masters[name]] = state
        self.forget()
