"""The batch sizes: DeepSpeed's inference, and what is said where nothing fits."""

from __future__ import annotations

from itertools import product

import pytest

from redline.config.root import Batch, World, find_world, resolve_batch

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@pytest.mark.parametrize(
    ("given", "world", "batch"),
    [  # recorded from DeepSpeed 0.19.8's DeepSpeedConfig
        ({TRAIN: 32}, 1, (32, 32, 1)),
        ({TRAIN: 32}, 4, (32, 8, 1)),
        ({MICRO: 4}, 2, (8, 4, 1)),
        ({TRAIN: 32, MICRO: 4}, 2, (32, 4, 4)),
        ({TRAIN: 32, STEPS: 4}, 2, (32, 4, 4)),
        ({MICRO: 4, STEPS: 3}, 2, (24, 4, 3)),
        ({TRAIN: 24, MICRO: 4, STEPS: 3}, 2, (24, 4, 3)),
    ],
)
def test_what_is_left_out_is_inferred_as_in_deepspeed(given: dict[str, int], world: int, batch: tuple[int]) -> None:
    assert resolve_batch(given, World(world, "from WORLD_SIZE")) == batch


@pytest.mark.parametrize(
    ("given", "world", "numbers", "working"),
    [
        ({TRAIN: 256, MICRO: 2, STEPS: 18}, 7, ["256", "252 = 2 ", "18 "], f"252 ({STEPS} 18) or 266 ({STEPS} 19)"),
        ({TRAIN: 32, MICRO: 4, STEPS: 2}, 1, ["32", "8 = 4 ", "2 "], f"8 ({STEPS} 2) or 32 ({STEPS} 8)"),
        ({TRAIN: 10, MICRO: 4}, 1, ["10", "a multiple of 4 = 4 "], f"8 ({STEPS} 2) or 12 ({STEPS} 3)"),
        ({TRAIN: 10, STEPS: 3}, 2, ["10", "a multiple of 6 = 3 "], f"6 ({MICRO} 1) or 12 ({MICRO} 2)"),
        ({TRAIN: 3}, 4, ["3", "a multiple of 4 = 4 (world size"], f"4 ({MICRO} 1)"),
    ],
)
def test_a_contradiction_names_every_number_and_the_nearest_that_work(
    given: dict[str, int], world: int, numbers: list[str], working: str
) -> None:
    message = resolve_batch(given, World(world, "from WORLD_SIZE"))
    assert isinstance(message, str) and "(world size, from WORLD_SIZE)" in message
    assert all(number in message for number in numbers)
    assert message.endswith(f"; with world size {world}: {working}")


def test_every_triple_proposed_works() -> None:
    for train, micro, steps, size in product(range(1, 40), (None, 1, 2, 5), (None, 1, 3), (1, 2, 7)):
        given = {key: value for key, value in ((TRAIN, train), (MICRO, micro), (STEPS, steps)) if value}
        answer = resolve_batch(given, World(size, ""))
        if isinstance(answer, Batch):
            assert answer[0] == answer[1] * answer[2] * size
            continue
        for choice in answer.split(f"with world size {size}: ")[1].split(" or "):
            proposed, key, value = choice.strip(")").replace("(", "").split()
            assert isinstance(resolve_batch({**given, TRAIN: int(proposed), key: int(value)}, World(size, "")), Batch)


def test_what_nothing_tells_is_asked_for_and_a_config_for_more_ranks_says_how_many() -> None:
    for given in ({}, {STEPS: 2}):
        assert str(resolve_batch(given, World(1, ""))).startswith(f"missing; give {TRAIN} or {MICRO}")
    world = find_world()
    assert isinstance(world, World)
    answer = str(resolve_batch({TRAIN: 32, MICRO: 4, STEPS: 2}, world))
    assert answer.endswith("or 32 (gradient_accumulation_steps 8); as it is, it fits world size 4")


def test_the_world_size_is_asked_for_or_torchruns_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_world() == World(1, "the default: WORLD_SIZE is not set")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert find_world() == World(8, "from WORLD_SIZE")
    assert find_world(3) == World(3, "from the argument")
    for asked in (0, "2"):
        assert find_world(asked) == f"world size: got {asked!r}; expected a whole number >= 1"
    for text in ("0", "-1", "two", "", "1.0", "9" * 5000):
        monkeypatch.setenv("WORLD_SIZE", text)
        assert str(find_world()).startswith("environment variable WORLD_SIZE: got ")
