"""What load_checkpoint gives back, what it leaves alone, and what it refuses; a step at a time, in one process."""

from __future__ import annotations

import logging
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import EngineError, initialize
from redline.checkpoint import load
from redline.checkpoint.model_file import consolidate
from redline.checkpoint.storage import CorruptCheckpoint
from redline.checkpoint.tensors import open_tensors
from tests.resume import Case, build, trained

ROOT = Path(__file__).parents[3]
WARM = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 10}}}
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}}
CASE = Case({**ADAM, **WARM})


def saved(folder: Path, case: Case = CASE, steps: int = 3, **give: Any) -> Any:
    """An engine that has trained and saved."""
    engine = build(case)
    trained(engine, steps)
    engine.save_checkpoint(folder, **give)
    return engine


def weights(engine: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


# -- what comes back, as DeepSpeed has it --------------------------------------------------------------


def test_the_default_tag_is_the_step_and_the_path_is_its_folder_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = saved(tmp_path, client_state={"epoch": 3})
    assert (tmp_path / "latest").read_text() == "global_step3"
    engine = build(CASE)
    with caplog.at_level(logging.INFO, logger="redline"):
        caplog.clear()
        assert engine.load_checkpoint(tmp_path) == (str(tmp_path / "global_step3"), {"epoch": 3})
    assert caplog.messages == [f"load_checkpoint: {tmp_path}/global_step3, after step 3, saved by 1 rank"]
    assert (engine.global_steps, engine.global_samples, engine.micro_steps) == (3, 6, 3)
    assert engine.get_lr() == before.get_lr()


def test_saving_returns_true_and_no_client_state_is_an_empty_one(tmp_path: Path) -> None:
    engine = build(CASE)
    assert engine.save_checkpoint(tmp_path, tag=7) is True
    assert engine.load_checkpoint(tmp_path, tag=7) == (str(tmp_path / "7"), {})


def test_a_tag_that_is_not_the_latest_is_loaded_by_its_name(tmp_path: Path) -> None:
    engine = saved(tmp_path, tag="good", client_state={"which": 1})
    trained(engine, 1)
    engine.save_checkpoint(tmp_path, tag="best", client_state={"which": 2}, save_latest=False)
    assert (tmp_path / "latest").read_text() == "good"
    assert build(CASE).load_checkpoint(tmp_path)[1] == {"which": 1}
    assert build(CASE).load_checkpoint(tmp_path, "best")[1] == {"which": 2}


@pytest.mark.parametrize("folder", [".", "missing", "not the latest"])
def test_no_checkpoint_at_all_is_none_and_a_warning(
    folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "not the latest", tag="best", save_latest=False)
    assert build(CASE).load_checkpoint(tmp_path / folder) == (None, None)
    hint = "; tags that were saved with save_latest=False have to be named: best" if folder == "not the latest" else ""
    assert f"load_checkpoint: no checkpoint in {tmp_path / folder}: nothing is loaded{hint}" in caplog.messages


# -- what is not the engine's ----------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)  # an ordinary read would wait for a writer


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


LATEST: dict[str, Callable[[Path], object]] = {
    "a pipe": pipe,
    "a device": endless,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to another file": lambda path: path.symlink_to("/etc/passwd"),
    "a tag outside of the directory": lambda path: path.write_text("../elsewhere"),
    "256 characters": lambda path: path.write_text("a" * 256),
    "a terabyte": lambda path: path.touch() or os.truncate(path, 1 << 40),
    "bytes that are no text": lambda path: path.write_bytes(b"\xff\xfe\0"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes with a path")
@pytest.mark.parametrize("kind", LATEST)
def test_a_file_latest_that_names_no_tag_loses_nothing_and_keeps_nobody_waiting(kind: str, tmp_path: Path) -> None:
    engine = saved(tmp_path)
    (tmp_path / "latest").unlink()
    LATEST[kind](tmp_path / "latest")
    assert build(CASE).load_checkpoint(tmp_path)[0] == str(tmp_path / "global_step3")
    trained(engine, 1)
    engine.save_checkpoint(tmp_path)
    assert build(CASE).load_checkpoint(tmp_path)[0] == str(tmp_path / "global_step4")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes with a path")
@pytest.mark.parametrize("name", ["manifest.json", "state.pt", "rank_0.pt", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("kind", [pipe, endless, Path.mkdir], ids=["pipe", "device", "directory"])
def test_a_file_that_is_none_makes_its_checkpoint_corrupt_and_the_one_before_is_loaded(
    kind: Callable[[Path], object], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = saved(tmp_path)
    trained(engine, 1)
    engine.save_checkpoint(tmp_path)
    damaged = tmp_path / "global_step4" / name
    damaged.unlink()
    kind(damaged)
    assert build(CASE).load_checkpoint(tmp_path)[0] == str(tmp_path / "global_step3")
    assert str(damaged) in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes with a path")
def test_foreign_files_and_directories_are_ignored(tmp_path: Path) -> None:
    engine = saved(tmp_path)
    for folder in (tmp_path, tmp_path / "global_step3"):
        pipe(folder / "pipe")
        (folder / "model.safetensors").write_bytes(b"x")
        (folder / "closed").mkdir(mode=0)
        (folder / "mine").mkdir()
        pipe(folder / "mine" / "manifest.json")
    trained(engine, 1)
    engine.save_checkpoint(tmp_path)
    assert build(CASE).load_checkpoint(tmp_path)[0] == str(tmp_path / "global_step4")


@pytest.mark.parametrize("tag", ["a" * 256, "\u00e9" * 120])
def test_a_tag_that_is_too_long_for_a_name_is_refused_by_save_and_not_found_by_load(tag: str, tmp_path: Path) -> None:
    engine = saved(tmp_path)
    with pytest.raises(EngineError, match="is too long for a directory's name; expected at most 237 bytes"):
        engine.save_checkpoint(tmp_path, tag)
    with pytest.raises(EngineError, match=r"the tags in .* are global_step3"):
        engine.load_checkpoint(tmp_path, tag)


# -- beside a process that saves and removes -------------------------------------------------------------


def rotated_before_it_is_opened(monkeypatch: pytest.MonkeyPatch, writer: Any, folder: Path, tags: list[Any]) -> None:
    """Let another run save before each of the next looks into a checkpoint."""
    real = load.open_checkpoint

    def rotate(*args: Any, **options: Any) -> Any:
        if tags:
            trained(writer, 1)
            writer.save_checkpoint(folder, tags.pop(0))
        return real(*args, **options)

    monkeypatch.setattr(load, "open_checkpoint", rotate)


def test_a_checkpoint_that_is_removed_while_it_is_read_gives_way_to_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = build(CASE, redline={"checkpoint": {"keep_last": 1, "keep_every": 3}})
    trained(writer, 3, lambda: writer.save_checkpoint(tmp_path))
    trained(writer, 1)
    writer.save_checkpoint(tmp_path)
    rotated_before_it_is_opened(monkeypatch, writer, tmp_path, [None, "mine"])
    engine = build(CASE)
    assert engine.load_checkpoint(tmp_path) == (str(tmp_path / "mine"), {})  # not step 3, which was kept
    assert engine.global_steps == 6
    assert "loaded instead" not in caplog.text


def test_a_tag_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = saved(tmp_path, tag="best")
    real = load._Load.read

    def read(self: Any) -> str:
        if writer.global_steps == 3:
            trained(writer, 1)
            writer.save_checkpoint(tmp_path, "best")
        return real(self)

    monkeypatch.setattr(load._Load, "read", read)
    engine = build(CASE)
    engine.load_checkpoint(tmp_path, "best")
    assert engine.global_steps == 4
    assert same(weights(engine), weights(writer))


WRITER = """
import sys
from tests.resume import Case, build, trained
engine = build(Case({"optimizer": {"type": "Adam"}}), redline={"checkpoint": {"keep_last": 1}})
print("saved", flush=True)
while True:
    trained(engine, 1)
    engine.save_checkpoint(sys.argv[1])
"""


@pytest.mark.long
def test_a_reader_beside_a_run_that_keeps_one_checkpoint_always_finds_one(tmp_path: Path) -> None:
    saved(tmp_path, Case({"optimizer": {"type": "Adam"}}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env=environment, cwd=ROOT) as writer:
        try:
            engine = build(Case({"optimizer": {"type": "Adam"}}))
            loads = 0
            while loads < 300 or engine.global_steps <= 10:  # a busy machine may starve the writer for a while
                assert writer.poll() is None
                assert engine.load_checkpoint(tmp_path)[0] is not None
                loads += 1
        finally:
            writer.kill()


def test_a_tag_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(EngineError) as caught:
        build(CASE).load_checkpoint(tmp_path, "global_step4")
    assert str(caught.value) == (
        f"load_checkpoint: {tmp_path}/global_step4 does not exist; the tags in {tmp_path} are global_step3"
    )


def test_the_module_alone_leaves_all_else_as_it_is(tmp_path: Path) -> None:
    before = saved(tmp_path, client_state={"a": 1})
    engine = build(CASE)
    trained(engine, 1)
    rates, draws = engine.get_lr(), torch.get_rng_state()
    assert engine.load_checkpoint(tmp_path, load_module_only=True)[1] == {"a": 1}
    assert same(weights(engine), weights(before))
    assert (engine.global_steps, engine.micro_steps, engine.get_lr()) == (1, 1, rates)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(float(state["step"]) == 1 for state in engine.optimizer.state.values())


@pytest.mark.parametrize(
    ("left", "states", "position"), [("load_optimizer_states", 0, 2), ("load_lr_scheduler_states", 9, -1)]
)
def test_what_is_left_out_begins_anew_and_the_rest_goes_on(
    left: str, states: int, position: int, tmp_path: Path
) -> None:
    before, engine = saved(tmp_path), build(CASE)
    start = engine.get_lr()
    engine.load_checkpoint(tmp_path, **{left: False})
    assert (len(engine.optimizer.state), engine.global_steps) == (states, 3)
    assert engine.lr_scheduler.last_batch_iteration == position
    # Unlike DeepSpeed, whose schedule writes it with the next step only.
    assert engine.get_lr() == (before.get_lr() if position == 2 else start)


def test_client_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "plain": [1, 2.5, None, True, "text", float("inf")],
        "tuple": (1, (2, [3])),
        "keys": {1: "a", (2, 3): "b", "$float": "c"},
        "bytes": b"\x00\xff",
        "set": {1, 2},
        "complex": 1 + 2j,
        "tensor": torch.arange(3),
        "half": {"in": [torch.ones(2, dtype=torch.bfloat16)]},
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
    }
    saved(tmp_path, client_state=state)
    back = build(CASE).load_checkpoint(tmp_path)[1]
    assert back.keys() == state.keys()
    for key in ("plain", "tuple", "keys", "bytes", "set", "complex", "dtype", "size"):
        assert back[key] == state[key] and type(back[key]) is type(state[key])
    assert torch.equal(back["tensor"], torch.arange(3))
    assert torch.equal(back["half"]["in"][0], torch.ones(2, dtype=torch.bfloat16))
    assert (float(back["a.b"]), float(back["a"]["b"])) == (0.0, 1.0)


def test_what_would_have_to_be_unpickled_is_refused_by_name(tmp_path: Path) -> None:
    class Args:
        pass

    with pytest.raises(EngineError) as caught:
        build(CASE).save_checkpoint(tmp_path, client_state={"args": Args(), "paths": [1, tmp_path]})
    assert "client_state['args'] is of type " in str(
        caught.value
    ) and "Args; client_state['paths'][1] is of type" in str(caught.value)
    assert "save what it is made of, such as vars(x)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_numpys_numbers_become_pythons(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy", reason="needs NumPy")
    saved(tmp_path, client_state={"best": numpy.float64(0.5), "step": numpy.int32(3)})
    back = build(CASE).load_checkpoint(tmp_path)[1]
    assert back == {"best": 0.5, "step": 3} and type(back["best"]) is float and type(back["step"]) is int


# -- as other versions of Python write it --------------------------------------------------------------


def test_a_checkpoint_of_an_early_python_3_11_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as KIND

    with monkeypatch.context() as patched:  # how the enum module of 3.11.2 has it
        patched.setattr(KIND, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self._name_)))
        before = saved(tmp_path)
    assert b"getattr" in (tmp_path / "global_step3" / ".metadata").read_bytes()
    engine = build(CASE)
    engine.load_checkpoint(tmp_path)
    assert same(weights(engine), weights(before))
    consolidate(tmp_path, tmp_path / "model.safetensors", progress=False)


class Attribute:
    """Pickles as ``getattr(of, name)``."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> Any:
        return getattr, (self.of, self.name)


def test_only_members_of_an_enum_are_looked_up(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as KIND
    from torch.distributed.checkpoint.metadata import Metadata

    for of, name in (
        (KIND, "mro"),
        (KIND, "__class__"),
        (Metadata, "__init__"),
        (torch.float32, "to_real"),
        (1, "real"),
    ):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Attribute(of, name)))
        with pytest.raises(CorruptCheckpoint, match=rf"asks for getattr\(.*'{name}'\), not a member of an enum"):
            open_tensors(tmp_path)


# -- models that differ --------------------------------------------------------------------------------


def engine_of(module: nn.Module, **extra: Any) -> Any:
    return initialize(module, {"train_micro_batch_size_per_gpu": 2, **ADAM, **extra}, device="cpu")


def stepped(engine: Any) -> Any:
    engine.backward(engine(torch.ones(2, 4)).float().square().mean())
    engine.step()
    return engine


def test_other_names_are_refused_with_both_sides(tmp_path: Path) -> None:
    engine_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))).save_checkpoint(tmp_path)
    other = engine_of(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)))
    before = weights(other)
    with pytest.raises(EngineError) as caught:
        other.load_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"load_checkpoint: {tmp_path}/global_step0: it lacks 1.bias, which the model has; it has 0.bias, which the "
        "model lacks; build the model that was saved, or load what both have: load_module_strict=False"
    )
    assert same(weights(other), before)


def test_not_strict_loads_what_both_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = stepped(engine_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))))
    one.save_checkpoint(tmp_path)
    other = engine_of(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)))
    bias = other.module[1].bias.detach().clone()
    other.load_checkpoint(tmp_path, load_module_strict=False)
    assert "what both have is loaded" in caplog.text
    assert torch.equal(other.module[0].weight, one.module[0].weight)
    assert torch.equal(other.module[1].bias, bias)
    assert set(other.optimizer.state) == {other.module[0].weight, other.module[1].weight}


@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_is_refused_in_any_case(strict: bool, tmp_path: Path) -> None:
    engine_of(nn.Linear(4, 4)).save_checkpoint(tmp_path)
    with pytest.raises(EngineError, match=r"weight is \[4, 4\] in the checkpoint, \[2, 4\] in the model; bias is "):
        engine_of(nn.Linear(4, 2)).load_checkpoint(tmp_path, load_module_strict=strict)


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if tied:
            self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x))
        return out


@pytest.mark.parametrize("now", [True, False], ids=["tied", "untied"])
def test_tied_weights_load_where_they_are_tied_and_where_not(now: bool, tmp_path: Path) -> None:
    one = engine_of(Tied(True))
    one.save_checkpoint(tmp_path)
    other = engine_of(Tied(now))
    other.load_checkpoint(tmp_path, load_module_only=True)
    assert torch.equal(other.module.one.weight, one.module.one.weight)
    assert torch.equal(other.module.two.weight, one.module.one.weight)


def test_frozen_parameters_are_saved_unless_they_are_excluded(tmp_path: Path) -> None:
    def model() -> nn.Module:
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        return module[0].requires_grad_(False) and module

    engine = engine_of(model())
    engine.save_checkpoint(tmp_path, "all")
    engine.save_checkpoint(tmp_path, "some", exclude_frozen_parameters=True)
    other = engine_of(model())
    other.load_checkpoint(tmp_path, "all")
    assert same(weights(other), weights(engine))
    with pytest.raises(EngineError, match=r"it was saved with exclude_frozen_parameters, without 0.weight, 0.bias"):
        engine_of(model()).load_checkpoint(tmp_path, "some")
    third = engine_of(model())
    frozen = third.module[0].weight.clone()
    third.load_checkpoint(tmp_path, "some", load_module_strict=False)
    assert torch.equal(third.module[0].weight, frozen)
    assert torch.equal(third.module[1].weight, engine.module[1].weight)


def test_buffers_that_a_state_dict_has_are_saved_and_passing_ones_are_not(tmp_path: Path) -> None:
    def model() -> nn.Module:
        module = nn.Linear(4, 4)
        module.register_buffer("kept", torch.zeros(2))
        module.register_buffer("passing", torch.zeros(2), persistent=False)
        return module

    engine = engine_of(model())
    engine.module.kept.fill_(1)
    engine.module.passing.fill_(1)
    engine.save_checkpoint(tmp_path)
    other = engine_of(model())
    other.load_checkpoint(tmp_path)
    assert (other.module.kept.tolist(), other.module.passing.tolist()) == ([1, 1], [0, 0])


class Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.calls: list[int] = [1]

    def get_extra_state(self) -> Any:
        return {"calls": tuple(self.calls), "kept": torch.ones(2)}

    def set_extra_state(self, state: Any) -> None:
        self.calls = list(state["calls"])
        assert torch.equal(state["kept"], torch.ones(2))


def test_a_modules_extra_state_is_kept(tmp_path: Path) -> None:
    engine = engine_of(nn.Sequential(Counting()))
    engine.module[0].calls.append(5)
    engine.save_checkpoint(tmp_path)
    other = engine_of(nn.Sequential(Counting()))
    other.load_checkpoint(tmp_path)
    assert other.module[0].calls == [1, 5]


def test_a_function_of_the_scripts_may_load_the_model(tmp_path: Path) -> None:
    engine = stepped(engine_of(nn.Linear(4, 4)))
    engine.save_checkpoint(tmp_path)

    def load(src: dict[str, Tensor], dst: nn.Module) -> None:
        dst.load_state_dict({f"inner.{name}": value for name, value in src.items()})

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return out

    other = engine_of(Outer(), bf16={"enabled": True})
    other.load_checkpoint(tmp_path, custom_load_fn=load, load_module_only=True)
    assert torch.equal(other.module.inner.weight.float(), engine.module.weight.bfloat16().float())
    stepped(other)  # from there, and not from its own first weights
    assert torch.allclose(other.module.inner.weight.float(), engine.module.weight, atol=0.03)


@pytest.mark.parametrize("case", ["fp32 to bf16", "bf16 to fp32", "fp16 to bf16"])
def test_a_checkpoint_loads_in_another_precision(case: str, tmp_path: Path) -> None:
    was, now = ({} if name == "fp32" else {name: {"enabled": True}} for name in case.split(" to "))
    engine = stepped(engine_of(nn.Linear(4, 4), **was))
    engine.save_checkpoint(tmp_path)
    other = engine_of(nn.Linear(4, 4), **now)
    other.load_checkpoint(tmp_path)
    mine, theirs = (each.optimizer.param_groups[0]["params"] for each in (other, engine))
    assert same(mine, theirs)  # fp32 in each, bit for bit
    assert torch.equal(other.module.weight.float(), mine[0].to(other.module.weight.dtype).float())
    assert torch.equal(other.optimizer.state[mine[0]]["exp_avg"], engine.optimizer.state[theirs[0]]["exp_avg"])


# -- optimizers and schedules that differ --------------------------------------------------------------


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    engine_of(nn.Linear(4, 4)).save_checkpoint(tmp_path)
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    with pytest.raises(EngineError, match=r"optimizer: was AdamW, is SGD; .* load_optimizer_states=False"):
        engine_of(nn.Linear(4, 4), **sgd).load_checkpoint(tmp_path)
    engine_of(nn.Linear(4, 4), **sgd).load_checkpoint(tmp_path, load_optimizer_states=False)


class Counted(torch.optim.SGD):
    """An optimizer with state of its own making, as wrappers around others have it."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": (self.calls, torch.tensor(self.calls))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls, count = state_dict.pop("calls")
        assert int(count) == self.calls
        super().load_state_dict(state_dict)


def test_an_optimizer_with_a_state_dict_of_its_own_is_saved_by_it(tmp_path: Path) -> None:
    def engine() -> Any:
        module = nn.Linear(4, 4)
        given = Counted(module.parameters(), lr=0.1, momentum=0.9)
        return initialize(module, {"train_micro_batch_size_per_gpu": 2}, optimizer=given, device="cpu")

    one = stepped(engine())
    one.save_checkpoint(tmp_path)
    other = engine()
    other.load_checkpoint(tmp_path)
    assert other.optimizer.calls == 1
    assert same(weights(stepped(other)), weights(stepped(one)))


def test_other_groups_are_refused(tmp_path: Path) -> None:
    engine_of(nn.Linear(4, 4)).save_checkpoint(tmp_path)
    model = nn.Linear(4, 4)
    config = {"train_micro_batch_size_per_gpu": 2, **ADAM}
    two = initialize(
        model, config, model_parameters=[{"params": [model.weight]}, {"params": [model.bias]}], device="cpu"
    )
    with pytest.raises(EngineError, match=r"optimizer: had 1 parameter groups, has 2; make the same"):
        two.load_checkpoint(tmp_path)
    model = nn.Linear(4, 4)
    fewer = initialize(model, config, model_parameters=[model.weight], device="cpu")
    with pytest.raises(EngineError, match=r"group 0 of the checkpoint has 2 parameters; the engine's is without bias"):
        fewer.load_checkpoint(tmp_path)


def test_settings_that_the_config_has_changed_are_the_checkpoints_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine_of(nn.Linear(4, 4)).save_checkpoint(tmp_path)
    changed = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5, "weight_decay": 0.1}}}
    other = engine_of(nn.Linear(4, 4), **changed)
    other.load_checkpoint(tmp_path)
    assert other.get_lr() == [0.01]
    assert "optimizer: lr was 0.01, is 0.5; the checkpoint's values are in force" in caplog.text


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 0.03, "warmup_num_steps": 10}},
         "scheduler: warmup_max_lr was 0.02, is 0.03"),
        ({"type": "WarmupDecayLR", "params": {"total_num_steps": 20, "warmup_num_steps": 10}},
         "scheduler: type was WarmupLR, is WarmupDecayLR"),
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 10, "warmup_type": "linear"}},
         "scheduler: warmup_type was 'log', is 'linear'"),
        (None, "scheduler: type was WarmupLR, is none"),
    ],
    ids=["a parameter", "the type", "a parameter that was left out", "none"],
)  # fmt: skip
def test_a_changed_schedule_is_named_and_refused(now: Any, said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    other = build(Case({**ADAM, "scheduler": now} if now else ADAM))
    with pytest.raises(EngineError) as caught:
        other.load_checkpoint(tmp_path)
    assert said in str(caught.value) and '"override_schedule": true' in str(caught.value)
    assert (other.global_steps, len(other.optimizer.state)) == (0, 0)
    other.load_checkpoint(tmp_path, load_lr_scheduler_states=False)  # on purpose


def test_a_default_that_is_written_out_is_no_change(tmp_path: Path) -> None:
    saved(tmp_path)
    spelt = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 10, "warmup_type": "log"}}
    assert build(Case({**ADAM, "scheduler": spelt})).load_checkpoint(tmp_path)[0]


def test_a_changed_schedule_goes_on_at_the_step_reached_where_the_config_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path)
    decay = {"type": "WarmupDecayLR", "params": {"total_num_steps": 20, "warmup_num_steps": 2, "warmup_max_lr": 0.1}}
    case = Case({**ADAM, "scheduler": decay})
    other = build(case, redline={"checkpoint": {"override_schedule": True}})
    other.load_checkpoint(tmp_path)
    assert "scheduler: type was WarmupLR, is WarmupDecayLR; the new one continues at step 3" in caplog.text
    there = build(case)
    trained(there, 3)
    assert other.get_lr() == there.get_lr()
    assert other.lr_scheduler.last_batch_iteration == 2


def test_torchs_schedules_are_compared_and_overridden_too(tmp_path: Path) -> None:
    def step(gamma: float, **extra: Any) -> Any:
        schedule = {"type": "StepLR", "params": {"step_size": 1, "gamma": gamma}}
        return build(Case({**ADAM, "scheduler": schedule}), **extra)

    engine = step(0.5)
    trained(engine, 2)
    engine.save_checkpoint(tmp_path)
    with pytest.raises(EngineError, match=r"scheduler: gamma was 0.5, is 0.1"):
        step(0.1).load_checkpoint(tmp_path)
    other = step(0.1, redline={"checkpoint": {"override_schedule": True}})
    other.load_checkpoint(tmp_path)
    assert other.get_lr() == pytest.approx([0.01 * 0.1**2])
    trained(other, 1)
    assert other.get_lr() == pytest.approx([0.01 * 0.1**3])


class Picky(torch.optim.lr_scheduler.LambdaLR):
    """A script's schedule whose class has gained a setting since it was saved."""

    needs_floor = False

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, lambda step: 1 / (1 + step))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.needs_floor:
            self.floor = state_dict["floor"]
        super().load_state_dict(state_dict)


def test_code_of_the_script_that_fails_while_loading_leaves_the_engine_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def picky() -> Any:
        config = {"train_micro_batch_size_per_gpu": 2, **ADAM}
        return initialize(nn.Linear(4, 4), config, lr_scheduler=Picky, device="cpu")

    stepped(stepped(picky())).save_checkpoint(tmp_path)
    monkeypatch.setattr(Picky, "needs_floor", True)
    engine = stepped(picky())
    before, rates, draws = weights(engine), engine.get_lr(), torch.get_rng_state()
    with pytest.raises(EngineError, match="load_checkpoint: KeyError: 'floor'"):
        engine.load_checkpoint(tmp_path)
    assert same(weights(engine), before) and engine.get_lr() == rates and torch.equal(torch.get_rng_state(), draws)
    assert (engine.global_steps, engine.lr_scheduler.last_epoch) == (1, 1)
    assert all(float(state["step"]) == 1 for state in engine.optimizer.state.values())


def test_a_static_loss_scale_is_the_configs(tmp_path: Path) -> None:
    def scaled(scale: float) -> Any:
        return engine_of(nn.Linear(4, 4), fp16={"enabled": True, "loss_scale": scale})

    scaled(8.0).save_checkpoint(tmp_path)
    other = scaled(4.0)
    other.load_checkpoint(tmp_path)
    assert other.loss_scale == 4.0


# -- random numbers, data, and updates under way -------------------------------------------------------


def test_all_random_numbers_go_on(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy", reason="needs NumPy")

    def draws() -> tuple[float, float, float]:
        return random.random(), float(torch.rand(())), float(numpy.random.rand())

    engine = build(CASE)
    engine.save_checkpoint(tmp_path)
    expected = draws()
    assert draws() != expected
    build(CASE).load_checkpoint(tmp_path)
    assert draws() == expected


def test_an_engine_with_data_of_another_kind_is_refused(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from range(100)

    config = {"train_micro_batch_size_per_gpu": 2, **ADAM}
    initialize(nn.Linear(4, 4), config, training_data=Stream(), device="cpu").save_checkpoint(tmp_path)
    other = initialize(nn.Linear(4, 4), config, training_data=range(10), device="cpu")
    with pytest.raises(EngineError, match=r"its position in the data is of another kind of dataset: epoch, samples;"):
        other.load_checkpoint(tmp_path)


@pytest.mark.parametrize("done", [2, 6, 13])
def test_a_save_within_an_update_holds_the_one_before_and_says_so(
    done: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case({**ADAM, "gradient_accumulation_steps": 4}, noise=0, drops=0, norm=False, samples=22)
    engine = build(case)
    seen: list[int] = []
    while engine.micro_steps < done:  # 13 are more than an epoch, which no 4 divide
        for indices, x in engine.training_dataloader:
            engine.backward((engine(x) - x).square().mean())
            engine.step()
            seen += indices.tolist()
            if engine.micro_steps == done:
                break
    engine.save_checkpoint(tmp_path)
    updates, left = divmod(done, 4)
    assert f"within an accumulation, after {left} of its 4 micro-batches" in caplog.text
    other = build(case)
    other.load_checkpoint(tmp_path)
    assert (other.global_steps, other.micro_steps, other.global_samples) == (updates, 4 * updates, 8 * updates)
    again = next(iter(other.training_dataloader))[0]
    assert again.tolist() == seen[8 * updates : 8 * updates + 2]


def test_loading_within_an_update_drops_it(tmp_path: Path) -> None:
    case = Case({**ADAM, "gradient_accumulation_steps": 4}, noise=0, drops=0, norm=False)
    engine = build(case)
    engine.save_checkpoint(tmp_path)
    for _, x in engine.training_dataloader:
        engine.backward((engine(x) - x).square().mean())
        engine.step()
        break
    engine.load_checkpoint(tmp_path)
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    assert trained(engine, 2) == trained(build(case), 2)


def test_a_model_without_an_optimizer_saves_and_loads(tmp_path: Path) -> None:
    def bare() -> Any:
        return initialize(nn.Linear(4, 4), {"train_micro_batch_size_per_gpu": 2}, device="cpu")

    engine = bare()
    engine.save_checkpoint(tmp_path)
    other = bare()
    other.load_checkpoint(tmp_path)
    assert same(weights(other), weights(engine))
    saved(tmp_path / "trained")
    with pytest.raises(EngineError, match="it lacks weight, bias"):
        bare().load_checkpoint(tmp_path / "trained")
