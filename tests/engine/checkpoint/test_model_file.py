"""The safetensors writer: against the format by hand, and against the package of that name where it is installed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import EngineError
from redline.checkpoint.model_file import Entry, sorted_entries, write_safetensors

TENSORS = {
    "half": torch.arange(3, dtype=torch.float16),
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "low": torch.tensor([[1.5], [-2.0]], dtype=torch.bfloat16),
    "count": torch.tensor(2**40),
    "mask": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
    "double": torch.tensor(0.1, dtype=torch.float64),
    "small": torch.tensor([-3], dtype=torch.int8),
    "transposed": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
}


def written(tensors: dict[str, Tensor], aliases: dict[str, str] | None = None) -> bytes:
    entries = sorted_entries(Entry(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
    file = io.BytesIO()
    write_safetensors(file, entries, aliases or {}, ([tensors[entry.name]] for entry in entries))
    return file.getvalue()


def read(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_a_file_is_a_length_a_header_and_the_tensors_bytes() -> None:
    data = written({"b": torch.tensor([1, 2], dtype=torch.int16), "a": torch.tensor([[0.5]])})
    header, values = read(data)
    assert header == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
        "b": {"dtype": "I16", "shape": [2], "data_offsets": [4, 8]},
    }
    assert values == b"\x00\x00\x00\x3f\x01\x00\x02\x00"


def test_every_tensor_begins_at_a_multiple_of_its_formats_width_and_none_is_left_out() -> None:
    data = written(TENSORS)
    header, values = read(data)
    assert (len(data) - len(values)) % 8 == 0
    del header["__metadata__"]
    assert header.keys() == TENSORS.keys()
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        assert begin == end and begin % TENSORS[name].dtype.itemsize == 0
        end = stop
    assert end == len(values)


def test_a_number_format_without_a_name_is_refused_by_tensor() -> None:
    with pytest.raises(EngineError, match=r"no name for the dtype of z \(torch\.complex128\); write \.pt"):
        written({"x": torch.zeros(1), "z": torch.zeros(1, dtype=torch.complex128)})


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.torch", reason="needs safetensors, which is no dependency")
    path = tmp_path / "model.safetensors"
    path.write_bytes(written(TENSORS, {"tied": "weight"}))
    found = package.load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(found[name].dtype == each.dtype and torch.equal(found[name], each) for name, each in TENSORS.items())
    # As that package writes them itself, header and all, but for the order within one width.
    own, _ = read(package.save(TENSORS | {"transposed": TENSORS["transposed"].contiguous()}))
    ours, _ = read(path.read_bytes())
    assert {name: (each["dtype"], each["shape"]) for name, each in own.items()} == {
        name: (each["dtype"], each["shape"]) for name, each in ours.items() if name != "__metadata__"
    }


def test_a_tied_weight_is_found_again_by_the_packages_load_model(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.torch", reason="needs safetensors, which is no dependency")
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    path = tmp_path / "model.safetensors"
    path.write_bytes(written({"0.weight": model[0].weight}, {"1.weight": "0.weight"}))
    package.save_model(model, str(tmp_path / "theirs.safetensors"))
    assert read((tmp_path / "theirs.safetensors").read_bytes())[0]["__metadata__"] == {"1.weight": "0.weight"}
    other = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    other[1].weight = other[0].weight
    assert package.load_model(other, str(path)) == (set(), [])
    assert torch.equal(other[1].weight, model[0].weight)
