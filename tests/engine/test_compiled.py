"""Modules that torch.compile has wrapped: they run compiled, and every file has the names of the module itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import initialize
from redline.checkpoint.deepspeed_reader import DeepSpeedCheckpoint
from redline.checkpoint.model_file import consolidate
from redline.compiled import plain_names, unwrap_compiled
from tests.distributed import run_ranks

# The compiler's own, when it looks at what one compiled module gives the next: torch hides it, but not as an error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
CONFIG = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params": {"lr": 0.05}}}
DEEPSPEEDS = Path(__file__).parent.parent / "golden" / "deepspeed_checkpoints"
GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints_0_1" / "compiled"


class Counting:
    """A backend that counts how often what it compiled has run."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.calls += 1
            return graph.forward(*args)

        return run


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.layers[0].linear.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.norm(self.tied(x)))
        return out


def build(what: str, backend: Any = "eager") -> nn.Module:
    """The same weights, compiled as a whole, in parts, both, a module of torch's own, or not at all."""
    torch.manual_seed(0)
    model: Any = Net()
    if what in ("parts", "both"):
        model.layers[0] = torch.compile(model.layers[0], backend=backend)
        model.layers[1] = torch.compile(model.layers[1], backend=backend)
    if what in ("whole", "both"):
        return torch.compile(model, backend=backend)
    if what == "torch's":
        return torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), backend=backend)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)) if what == "torch's, plain" else model


WAYS = ("whole", "parts", "both", "torch's")


def losses(engine: Any, steps: int = 3) -> list[float]:
    x = torch.linspace(-1, 1, 32).reshape(4, 8) * (1 + engine.global_rank)
    found = []
    for _ in range(steps):
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", WAYS)
def test_it_runs_compiled_and_trains_as_the_plain_one_does(what: str, precision: str) -> None:
    torch._dynamo.reset()
    config = {**CONFIG, **({} if precision == "fp32" else {precision: {"enabled": True}})}
    backend = Counting()
    engine = initialize(build(what, backend), config, device="cpu")
    plain = initialize(build("torch's, plain" if what == "torch's" else "no"), config, device="cpu")
    assert losses(engine) == losses(plain)
    assert backend.calls >= 3
    assert list(engine.module.state_dict()) == list(plain.module.state_dict())
    assert [name for name, _ in engine.module.named_modules()] == [name for name, _ in plain.module.named_modules()]


def train_at(stages: list[int], folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in stages:
        for what in ("no", "whole", "parts", "torch's, plain", "torch's"):
            torch._dynamo.reset()
            backend = Counting()
            config = {**CONFIG, "zero_optimization": {"stage": stage}}
            engine = initialize(build(what, backend), config, device="cpu")
            place = f"{folder}/{stage}/{what}"
            found[f"{stage} {what}"] = (losses(engine), backend.calls)
            engine.save_checkpoint(place)
    return found


def test_on_two_processes_it_runs_compiled_at_every_stage_and_saves_plain_names(tmp_path: Path) -> None:
    stages = [0, 1, 3]
    for found in run_ranks(train_at, 2, stages, str(tmp_path)):
        for stage in stages:
            for what, plain in (("whole", "no"), ("parts", "no"), ("torch's", "torch's, plain")):
                assert found[f"{stage} {what}"][0] == pytest.approx(found[f"{stage} {plain}"][0], rel=1e-5)
                assert found[f"{stage} {what}"][1] >= 3
    states = [path.read_bytes() for path in tmp_path.rglob("state.pt")]
    assert states and not any(b"_orig_mod" in state for state in states)
    engine = initialize(build("no"), CONFIG, device="cpu")
    for stage in stages:
        assert engine.load_checkpoint(tmp_path / str(stage) / "whole")[0]
        assert engine.global_steps == 3 and len(engine.optimizer.state) == 8  # type: ignore[union-attr]


@pytest.mark.parametrize("what", WAYS)
def test_no_file_has_the_wrappers_name(what: str, tmp_path: Path) -> None:
    model = build(what)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    engine = initialize(model, {"train_micro_batch_size_per_gpu": 4}, optimizer=optimizer, device="cpu")
    losses(engine)
    engine.save_checkpoint(tmp_path / "run")
    engine.save_16bit_model(tmp_path, "model.bin")
    engine.save_16bit_model(tmp_path, "model.safetensors")
    consolidate(tmp_path / "run", tmp_path / "whole.safetensors", progress=False)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 9 and not [path.name for path in files if b"_orig_mod" in path.read_bytes()]
    plain = build("torch's, plain" if what == "torch's" else "no")
    plain.load_state_dict(torch.load(tmp_path / "model.bin", weights_only=True))
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), model.parameters()))


def test_a_module_that_is_compiled_later_keeps_plain_names_too(tmp_path: Path) -> None:
    engine = initialize(build("no"), CONFIG, device="cpu")
    engine.module.layers[1] = torch.compile(engine.module.layers[1], backend="eager")
    losses(engine)
    engine.save_checkpoint(tmp_path)
    engine.save_16bit_model(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"_orig_mod" in path.read_bytes()]
    engine.load_checkpoint(tmp_path)


@pytest.mark.parametrize("what", ["no", "whole", "parts"])
def test_checkpoints_with_the_wrappers_name_still_load(what: str, tmp_path: Path) -> None:
    # As version 0.1.0 saved a compiled model after the same losses.
    before = initialize(build("no"), CONFIG, device="cpu")
    losses(before)
    engine = initialize(build(what), CONFIG, device="cpu")
    _, state = engine.load_checkpoint(GOLDEN)
    assert state is not None and state["best"] == "_orig_mod.weight" and list(state["ema"]) == ["_orig_mod.weight"]
    assert losses(engine) == pytest.approx(losses(before), rel=1e-3)
    consolidate(GOLDEN, tmp_path / "model.pt", progress=False)
    assert set(torch.load(tmp_path / "model.pt", weights_only=True)) == set(build("no").state_dict())


def test_a_checkpoint_that_deepspeed_wrote_of_a_compiled_model_has_plain_names(tmp_path: Path) -> None:
    source = next((DEEPSPEEDS / "stage0-fp32").glob("global_step*")) / "mp_rank_00_model_states.pt"
    content = torch.load(source, weights_only=True)
    named = {**content, "buffer_names": [f"_orig_mod.{name}" for name in content["buffer_names"]]}
    named["module"] = {f"_orig_mod.{name}": value for name, value in content["module"].items()}
    torch.save(named, tmp_path / source.name)
    tensors = DeepSpeedCheckpoint(tmp_path).entries
    assert tensors.keys() == DeepSpeedCheckpoint(source.parent).entries.keys()


def test_a_copy_of_the_model_runs_its_own_weights() -> None:
    for what in WAYS:
        engine = initialize(build(what), CONFIG, device="cpu")
        x = torch.ones(4, 8)
        engine(x)
        twin = copy.deepcopy(engine.module)
        for parameter in twin.parameters():
            nn.init.zeros_(parameter)
        assert not twin(x).any() and engine(x).any()


def test_hooks_of_the_wrapper_still_run_and_can_be_removed() -> None:
    wrapper: Any = build("whole")
    seen: list[str] = []
    handles = [
        wrapper.register_forward_pre_hook(lambda module, args: seen.append(f"before {type(module).__name__}")),
        wrapper.register_forward_hook(lambda module, args, out: seen.append("after")),
    ]
    engine = initialize(wrapper, CONFIG, device="cpu")
    engine(torch.ones(4, 8))
    assert seen == ["before Net", "after"]
    assert torch.equal(wrapper(torch.ones(4, 8)), engine(torch.ones(4, 8))), "the wrapper itself still runs the model"
    seen.clear()
    for handle in handles:
        handle.remove()
    engine(torch.ones(4, 8))
    assert not seen


def test_names_are_plain_wherever_they_stand() -> None:
    model = build("no")
    assert unwrap_compiled(model) is model and model._compiled_call_impl is None
    given = {"_orig_mod.a._orig_mod.weight": ["b._orig_mod", 1, None], "a_orig_mod.b": (1, "_orig_mod.c")}
    assert plain_names(given) == {"a.weight": ["b", 1, None], "a_orig_mod.b": (1, "_orig_mod.c")}
