"""The batch triple: DeepSpeed's inference, and what is said where nothing fits."""

from __future__ import annotations

import pytest

from engine.config.batch import Batch, World, find_world, resolve_batch

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
        ({TRAIN: 1, STEPS: 1}, 1, (1, 1, 1)),
    ],
)
def test_what_is_left_out_is_inferred_as_in_deepspeed(
    given: dict[str, int], world: int, batch: tuple[int, ...]
) -> None:
    assert resolve_batch(given, World(world, "from WORLD_SIZE")) == Batch(*batch)


@pytest.mark.parametrize(
    ("given", "world", "message"),
    [
        (
            {TRAIN: 256, MICRO: 2, STEPS: 18},
            7,
            "got 256; expected 252 = 2 (train_micro_batch_size_per_gpu, given) x 18 (gradient_accumulation_steps, "
            "given) x 7 (world size, from WORLD_SIZE); with world size 7: 252 (gradient_accumulation_steps 18) or "
            "266 (gradient_accumulation_steps 19)",
        ),
        (
            {TRAIN: 32, MICRO: 4, STEPS: 2},
            1,
            "got 32; expected 8 = 4 (train_micro_batch_size_per_gpu, given) x 2 (gradient_accumulation_steps, given) "
            "x 1 (world size, from WORLD_SIZE); with world size 1: 8 (gradient_accumulation_steps 2) or "
            "32 (gradient_accumulation_steps 8)",
        ),
        (
            {TRAIN: 10, MICRO: 4},
            1,
            "got 10; expected a multiple of 4 = 4 (train_micro_batch_size_per_gpu, given) x 1 (world size, from "
            "WORLD_SIZE); with world size 1: 8 (gradient_accumulation_steps 2) or 12 (gradient_accumulation_steps 3)",
        ),
        (
            {TRAIN: 10, STEPS: 3},
            2,
            "got 10; expected a multiple of 6 = 3 (gradient_accumulation_steps, given) x 2 (world size, from "
            "WORLD_SIZE); with world size 2: 6 (train_micro_batch_size_per_gpu 1) or "
            "12 (train_micro_batch_size_per_gpu 2)",
        ),
        (
            {TRAIN: 3},
            4,
            "got 3; expected a multiple of 4 = 4 (world size, from WORLD_SIZE); with world size 4: "
            "4 (train_micro_batch_size_per_gpu 1)",
        ),
        ({}, 1, "missing; give train_batch_size or train_micro_batch_size_per_gpu"),
        (
            {STEPS: 2},
            1,
            "missing; give train_batch_size or train_micro_batch_size_per_gpu; "
            "gradient_accumulation_steps alone does not tell it",
        ),
    ],
)
def test_a_contradiction_names_every_number_and_the_nearest_that_work(
    given: dict[str, int], world: int, message: str
) -> None:
    assert resolve_batch(given, World(world, "from WORLD_SIZE")) == message


def test_every_triple_proposed_works() -> None:
    for train in range(1, 40):
        for micro in (None, 1, 2, 5):
            for steps in (None, 1, 3):
                for size in (1, 2, 7):
                    given = {key: value for key, value in ((TRAIN, train), (MICRO, micro), (STEPS, steps)) if value}
                    answer = resolve_batch(given, World(size, ""))
                    if isinstance(answer, Batch):
                        assert answer[0] == answer[1] * answer[2] * size
                        continue
                    for choice in answer.split(f"with world size {size}: ")[1].split(" or "):
                        proposed, key, value = choice.strip(")").replace("(", "").split()
                        assert isinstance(
                            resolve_batch({**given, TRAIN: int(proposed), key: int(value)}, World(size, "")), Batch
                        )


def test_a_config_for_more_processes_says_how_many_if_nobody_did() -> None:
    answer = resolve_batch({TRAIN: 32, MICRO: 4, STEPS: 2}, find_world())  # type: ignore[arg-type]
    assert isinstance(answer, str)
    assert answer.endswith("or 32 (gradient_accumulation_steps 8); as it is, it fits world size 4")


def test_the_world_size_is_asked_for_or_torchruns_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_world() == World(1, "the default: WORLD_SIZE is not set")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert find_world() == World(8, "from WORLD_SIZE")
    assert find_world(3) == World(3, "from the argument")


def test_a_world_size_that_is_none_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_world(0) == "world size: got 0; expected a whole number >= 1"
    assert find_world("2") == "world size: got '2'; expected a whole number >= 1"
    for text in ("0", "-1", "two", "", "1.0", "9" * 5000):
        monkeypatch.setenv("WORLD_SIZE", text)
        answer = find_world()
        assert isinstance(answer, str)
        assert answer.startswith("environment variable WORLD_SIZE: got ")
