"""A tensor is written as torch.save writes it, byte for byte, whether its frame is known already or not."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.serialization import get_crc32_options, set_crc32_options

from redline.checkpoint import tensors as tensor_io
from redline.checkpoint.tensors import write_tensor

TENSORS: dict[str, Callable[[], Tensor]] = {
    "fp32": lambda: torch.randn(5, 7),
    "a scalar": lambda: torch.rand(()),
    "zero, which looks like padding": lambda: torch.zeros(()),
    "bf16": lambda: torch.randn(64, 3).bfloat16(),
    "int64": lambda: torch.randint(9, (1000,)),
    "bool": lambda: torch.rand(3) > 0.5,
    "complex": lambda: torch.randn(4, dtype=torch.complex64),
    "empty": lambda: torch.empty(0, 3),
    "a parameter": lambda: nn.Parameter(torch.randn(6)),
}


def written(tensor: Tensor) -> bytes:
    file = io.BytesIO()
    write_tensor(tensor, file)
    return file.getvalue()


def torchs(tensor: Tensor) -> bytes:
    buffer, computes = io.BytesIO(), get_crc32_options()
    set_crc32_options(False)
    torch.save(tensor, buffer)
    set_crc32_options(computes)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_is_written_as_torch_writes_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_io._frame.cache_clear()
    for _ in range(3):  # the frame is made with the first, and used with the others
        tensor = TENSORS[kind]()
        data = written(tensor)
        assert data == torchs(tensor.detach())
        assert torch.equal(torch.load(io.BytesIO(data), weights_only=True), tensor)


def test_the_frame_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_io._frame.cache_clear()
    written(torch.randn(5, 7))
    monkeypatch.setattr(torch, "save", None)
    written(torch.randn(5, 7))


@pytest.mark.parametrize("first", [True, False], ids=["first of its shape", "not the first"])
@pytest.mark.parametrize(
    "view",
    [lambda whole: whole[2:4], lambda whole: whole.t(), lambda whole: whole[:, 3], lambda whole: whole[::2]],
    ids=["rows", "transposed", "a column", "every other row"],
)
def test_of_a_view_its_own_values_are_written(view: Callable[[Tensor], Tensor], first: bool) -> None:
    part = view(torch.randn(10, 10))
    if not first:
        written(torch.randn(part.shape))
    data = written(part)
    assert torch.equal(torch.load(io.BytesIO(data), weights_only=True), part)
    assert len(data) < part.nbytes + 3000


def test_torchs_own_checksums_are_back_on_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_io._frame.cache_clear()
    assert get_crc32_options()
    written(torch.randn(3))
    assert get_crc32_options()
