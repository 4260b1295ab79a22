"""Model, data and loss in the forms people have them; a task file and what can be wrong with it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from redline.data import Loader
from redline.distributed.process_group import World
from redline.errors import RangeTestError
from redline.range_test.task import Task, batches, load_task, loader_of, loss_of, repeated
from tests.tasks import task_folder

CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU)

TASK = """
import torch
from torch import nn
from neighbour import SIZE

def task():
    data = torch.utils.data.TensorDataset(torch.ones(SIZE, 2), torch.ones(SIZE, 1))
    return nn.Linear(2, 1), data, nn.MSELoss()

def with_validation():
    return [*task(), (torch.ones(2, 2), torch.ones(2, 1))]

def as_dict():
    model, data, loss = task()
    return {"model": model, "data": data, "loss": loss}

def typo():
    model, data, loss = task()
    return {"model": model, "dat": data, "loss": loss}

def no_model():
    return "model", None, nn.MSELoss()

def no_loss():
    return nn.Linear(1, 1), None, 3

def without_loss():
    return nn.Linear(1, 1), None

def one():
    return (nn.Linear(1, 1),)

def with_metric():
    return {"model": nn.Linear(1, 1), "data": None, "validation": lambda model: 0.5, "mode": "max"}

def nothing():
    pass

number = 3

def broken():
    raise ZeroDivisionError("mine")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A task file with a neighbour that it imports."""
    (tmp_path / "neighbour.py").write_text("SIZE = 8\n")
    with task_folder(tmp_path, monkeypatch, TASK, "task_of_mine.py"):
        yield tmp_path


# -- task files ----------------------------------------------------------------------------------------------


def test_a_task_is_what_a_function_in_a_file_returns(folder: Path) -> None:
    task = load_task("task_of_mine.py:task")
    assert isinstance(task.model, nn.Linear) and isinstance(task.loss, nn.MSELoss)
    assert (len(task.data), task.validation) == (8, None)
    assert len(load_task("task_of_mine.py:with_validation").validation) == 2
    assert isinstance(load_task(f"{folder}/task_of_mine.py:as_dict"), Task)
    assert load_task("task_of_mine.py:without_loss").loss is None
    assert load_task("task_of_mine.py:with_metric").mode == "max"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("task_of_mine.py", 'TASK: got "task_of_mine.py"; expected file.py:function, such as task.py:digits'),
        ("task_of_mine.py:", "expected file.py:function"),
        ("task_of_mine.py:not a name", "expected file.py:function"),
        ("nowhere.py:task", "TASK: there is no file nowhere.py"),
        (".:task", "TASK: there is no file ."),
        ("task_of_mine.py:tusk", "TASK: task_of_mine.py has no function tusk"),
        ("task_of_mine.py:number", "TASK: task_of_mine.py has no function number"),
        ("task_of_mine.py:typo", r"returned dict of model: Linear, dat: Tensor.*; expected model, data\[, loss"),
        ("task_of_mine.py:one", r"returned tuple of 1 \(Linear\); expected model, data"),
        ("task_of_mine.py:nothing", "returned NoneType; expected model, data"),
        ("task_of_mine.py:no_model", "the model is str; expected a torch.nn.Module"),
        ("task_of_mine.py:no_loss", "the loss is int; expected a function"),
    ],
)
def test_what_is_no_task_is_refused_with_its_name(address: str, message: str, folder: Path) -> None:
    with pytest.raises(RangeTestError, match=message):
        load_task(address)


def test_a_file_that_is_not_python_is_refused_and_the_users_own_errors_stay_their_own(folder: Path) -> None:
    (folder / "notes.txt").write_text("")
    with pytest.raises(RangeTestError, match=r"TASK: notes\.txt is not a Python file"):
        load_task("notes.txt:task")
    with pytest.raises(ZeroDivisionError, match="mine"):
        load_task("task_of_mine.py:broken")


def test_a_task_file_named_as_a_module_that_is_there_does_not_replace_it(folder: Path) -> None:
    (folder / "json.py").write_text(TASK)
    import json

    load_task("json.py:task")
    assert sys.modules["json"] is json


# -- losses --------------------------------------------------------------------------------------------------


class Criterion(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ((logits - labels) ** 2).mean()


class OfModelAndBatch(nn.Module):
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return ((model(batch[0]) - batch[1]) ** 2).mean()


def of_model_and_batch(model: nn.Module, batch: Any) -> Tensor:
    return ((model(batch[0]) - batch[1]) ** 2).mean()


LOSSES = {
    "nn.MSELoss": nn.MSELoss(),
    "functional": nn.functional.mse_loss,
    "module": Criterion(),
    "partial": functools.partial(nn.functional.mse_loss, reduction="mean"),
    "function": of_model_and_batch,
    "module of model and batch": OfModelAndBatch(),
    "lambda": lambda model, batch: of_model_and_batch(model, batch),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_form_of_a_loss_becomes_one_of_model_and_batch(loss: Any) -> None:
    model = nn.Linear(2, 1)
    batch = [torch.ones(4, 2), torch.zeros(4, 1)]
    torch.testing.assert_close(loss_of(loss)(model, batch), of_model_and_batch(model, batch))


def test_a_criterion_finds_the_targets_of_a_batch_that_is_a_dict() -> None:
    model, x, y = nn.Bilinear(2, 2, 1), torch.ones(4, 2), torch.zeros(4, 1)
    loss = loss_of(nn.MSELoss())
    torch.testing.assert_close(loss(model, {"input1": x, "labels": y, "input2": x}), model(x, x).square().mean())
    single = nn.Linear(2, 1)
    torch.testing.assert_close(loss(single, {"y": y, "x": x}), single(x).square().mean())
    with pytest.raises(RangeTestError, match=r"a batch is dict of x: Tensor; .* or a dict with one of label, labels"):
        loss(single, {"x": x})


class OwnLoss(nn.Module):
    """Returns its loss where it gets labels, as Hugging Face's models do."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return SimpleNamespace(loss=None if labels is None else (input_ids.float() - labels).square().mean())


def test_without_a_loss_the_model_returns_it_and_gets_the_columns_that_it_knows() -> None:
    batch = {"input_ids": torch.tensor([1, 2]), "label": torch.tensor([0, 0]), "text": ["a", "b"], "idx": torch.ones(2)}
    assert loss_of(None)(OwnLoss(), batch).item() == 2.5
    with pytest.raises(RangeTestError, match=r"loss: none is given, .* SimpleNamespace, has none for a batch of input"):
        loss_of(None)(OwnLoss(), {"input_ids": torch.ones(2)})
    with pytest.raises(
        RangeTestError, match=r"a batch, tuple of 2 .*, is what the model is called with: too many .*give"
    ):
        loss_of(None)(nn.Linear(2, 1), (torch.ones(4, 2), torch.ones(4, 1)))
    with pytest.raises(RangeTestError, match=r"the model's output, a tensor of shape \(4, 1\), has none"):
        loss_of(None)(nn.Linear(2, 1), torch.ones(4, 2))


# -- data ----------------------------------------------------------------------------------------------------


class Counting(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


def numbers(source: Any) -> list[int]:
    return [int(x) for batch in source for x in (batch[0] if isinstance(batch, (list, tuple)) else batch)]


def test_tensors_and_datasets_are_shuffled_and_dealt_out() -> None:
    data = torch.arange(8)
    for given in ((data, data), TensorDataset(data), data, data.numpy()):
        shares = [numbers(loader_of(given, World(rank, rank, 2, CPU), micro_batch=2)) for rank in (0, 1)]
        assert sorted(shares[0] + shares[1]) == list(range(8))
        assert shares[0] + shares[1] != list(range(8))


def test_tensors_and_arrays_by_name_are_one_dataset() -> None:
    data = {"x": numpy.linspace(0, 1, 8), "y": torch.arange(8)}
    found = list(loader_of(data, ALONE, micro_batch=4, for_validation=True))
    assert [batch["y"].tolist() for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found[0]["x"].dtype == torch.float32
    with pytest.raises(RangeTestError, match=r"data: got tensors of shapes x: \(8,\), y: \(7,\); expected one length"):
        loader_of({"x": torch.ones(8), "y": torch.ones(7)}, ALONE, micro_batch=4)
    with pytest.raises(RangeTestError, match=r"got dict of train: list, test: list; .* of several splits give one"):
        loader_of({"train": [1], "test": [2]}, ALONE, micro_batch=4)


class HuggingFace:
    """Like `datasets.Dataset`: lists of numbers, unless it is asked for tensors."""

    format: ClassVar = {"type": None}

    def with_format(self, kind: str) -> list[Any]:
        assert kind == "torch"
        return TensorDataset(torch.arange(8))  # type: ignore[return-value]


def test_a_hugging_face_dataset_is_asked_for_tensors() -> None:
    assert sorted(numbers(loader_of(HuggingFace(), ALONE, micro_batch=2))) == list(range(8))


def test_loaders_are_taken_as_they_are() -> None:
    for loader in (DataLoader(TensorDataset(torch.arange(8)), batch_size=4), [[torch.arange(3)]]):
        assert loader_of(loader, ALONE, micro_batch=2) is loader


def test_validation_data_is_dealt_out_in_order_each_sample_once() -> None:
    data = TensorDataset(torch.arange(9))
    shares = [loader_of(data, World(rank, rank, 2, CPU), micro_batch=2, for_validation=True) for rank in (0, 1)]
    assert [numbers(share) for share in shares] == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
    assert numbers(loader_of(Counting(), ALONE, micro_batch=2, for_validation=True)) == list(range(9))


class Augmented(Dataset[Tensor]):
    """Sample number and a random number."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), float(torch.rand(()))])


def take(source: Any, count: int, number: int) -> list[Tensor]:
    """Copies of that many batches of a part."""
    return [batch.clone() for batch in islice(repeated(source, count, CPU), number)]


@pytest.mark.parametrize("start", [0, 36], ids=["from the beginning", "from near the end of an epoch"])
def test_a_part_of_a_dataset_is_read_again_with_other_augmentation(start: int) -> None:
    loader = loader_of(Augmented(), ALONE, micro_batch=4, seed=3)
    assert isinstance(loader, Loader)
    loader.load_state_dict({**loader.state_dict(), "samples": start})
    found = torch.stack(take(loader, 3, 9))
    numbers, augmented = found[:, :, 0], found[:, :, 1]
    assert torch.equal(numbers[:3], numbers[3:6]) and torch.equal(numbers[:3], numbers[6:])
    assert len(numbers[:3].unique()) == 12 or start
    assert not (augmented[:3] == augmented[3:6]).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_of_another_loader_is_kept_as_it_was_given(workers: int) -> None:
    data = torch.arange(40.0)
    loader = DataLoader(data, 4, shuffle=True, num_workers=workers)
    found = []
    for batch in islice(repeated(loader, 3, CPU), 9):
        found.append(batch.clone())
        batch.mul_(2)  # as a loss may do
    assert all(torch.equal(one, other) for one, other in zip(found, found[3:]))
    assert len(torch.cat(found[:3]).unique()) == 12 and torch.equal(data, torch.arange(40.0))
    assert [len(each) for each in take([torch.ones(2), torch.ones(3)], 3, 4)] == [2, 3, 2, 2], "and from the beginning"


def test_batches_begin_again_when_they_end_and_there_must_be_one() -> None:
    found = batches(DataLoader(TensorDataset(torch.arange(4)), batch_size=2), CPU)
    assert [next(found)[0].tolist() for _ in range(5)] == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]
    with pytest.raises(RangeTestError, match="data: it yields no batch; is it empty"):
        next(batches([], CPU))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([1]), "got list_iterator, which can be read only once; give a dataset or a loader"),
        ((x for x in [1]), "got generator, which can be read only once"),
        (zip([1]), "got zip, which can be read only once"),
        (TensorDataset(torch.ones(0, 1)), "the dataset is empty"),
        (3, "got int; expected a dataset"),
    ],
)
def test_data_that_cannot_be_used_are_called_by_their_name(data: Any, message: str) -> None:
    for name in ("data", "validation"):
        with pytest.raises(RangeTestError, match=f"{name}: {message}"):
            loader_of(data, ALONE, micro_batch=1, for_validation=name == "validation")
