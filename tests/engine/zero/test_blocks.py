"""Which parts of a model are gathered as one, and which parameters stay whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.errors import EngineError
from engine.zero.blocks import find_blocks, stays_whole


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)


class Stack(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(4, 7)


def test_the_members_of_a_list_are_blocks() -> None:
    assert list(find_blocks(Stack())) == ["blocks.0", "blocks.1", "blocks.2"]


def test_what_is_there_once_is_no_block() -> None:
    assert find_blocks(Stack(blocks=1)) == {}


def test_lists_of_lists_are_looked_through() -> None:
    stages = nn.Sequential(nn.Sequential(Block(), Block()), nn.ReLU(), nn.Sequential(Block(), Block(), nn.ReLU()))
    assert list(find_blocks(stages)) == ["0.0", "0.1", "2.0", "2.1"]


def test_sequences_that_repeat_nothing_themselves_are_repeated() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)), nn.Linear(4, 2))
    assert list(find_blocks(model)) == ["0", "1", "2"]


def test_a_block_within_a_block_belongs_to_it() -> None:
    outer = nn.ModuleList([Stack(), Stack()])
    assert list(find_blocks(outer)) == ["0", "1"]


def test_small_blocks_are_left_to_the_model() -> None:
    model = nn.ModuleList([Block(4), Block(4), Block(40)])
    assert list(find_blocks(model, smallest=1000)) == ["2"]


def test_a_block_that_shares_a_parameter_with_the_rest_is_left_to_the_model() -> None:
    model = Stack()
    model.blocks[1].first.weight = model.blocks[0].first.weight
    assert list(find_blocks(model)) == ["blocks.2"]


def test_a_module_that_is_there_twice_is_one_block() -> None:
    shared = Block()
    model = nn.ModuleList([shared, Block(), shared])
    assert list(find_blocks(model)) == ["0", "1"]


def test_hugging_faces_word_counts() -> None:
    model = Stack()
    model._no_split_modules = ["Embedding"]
    assert list(find_blocks(model)) == ["embedding"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["Block"], ["blocks.0", "blocks.1", "blocks.2"]),
        (["blocks.[01]", "head"], ["blocks.0", "blocks.1", "head"]),
        (["blocks.*.first"], ["blocks.0.first", "blocks.1.first", "blocks.2.first"]),
        (["Block", "Linear"], ["blocks.0", "blocks.1", "blocks.2", "head"]),
        ([], []),
    ],
)
def test_names_are_classes_or_places(names: list[str], found: list[str]) -> None:
    assert list(find_blocks(Stack(), names, smallest=10**9)) == found


def test_a_name_that_nothing_has_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(EngineError, match=r"redline\.zero\.blocks: 'Blok' is neither .* Embedding, ModuleList, Block"):
        find_blocks(Stack(), ["Block", "Blok"])


def test_scalars_integers_and_sparse_embeddings_stay_whole() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(1.0))
    model.codes = nn.Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False)
    model.table = nn.Embedding(5, 2, sparse=True)
    model.linear, model.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
    assert stays_whole(model, low=False) == {model.scale, model.codes, model.table.weight}
    assert stays_whole(model, low=True) == {model.scale, model.codes, model.table.weight, *model.norm.parameters()}
