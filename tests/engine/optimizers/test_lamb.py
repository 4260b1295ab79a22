"""Lamb against what it comes to in closed form, and against Adam where the two are one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from redline.optimizers.lamb import Lamb
from tests.distributed import run_ranks


def weight() -> nn.Parameter:
    return nn.Parameter(torch.tensor([3.0, -4.0, 0.0, 12.0]))  # 13 long


def test_the_first_update_is_the_rate_times_the_tensors_length_over_the_updates() -> None:
    parameter = weight()
    parameter.grad = torch.tensor([1.0, -2.0, 5.0, 0.1])
    Lamb([parameter], lr=0.1, eps=0.0).step()
    # m / sqrt(v) is 0.1 / sqrt(0.001) by sign, 4 of them are twice that long; the rate is corrected by the inverse.
    moved = 0.1 * 13 / (2 * 0.1 / math.sqrt(0.001))
    expected = torch.tensor([3.0, -4.0, 0.0, 12.0]) - moved * torch.tensor([1.0, -1.0, 1.0, 1.0])
    torch.testing.assert_close(parameter.detach(), expected)


def test_without_bias_correction_the_rate_is_the_rate() -> None:
    parameter = weight()
    parameter.grad = torch.ones(4)
    Lamb([parameter], lr=0.1, eps=0.0, bias_correction=False).step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([3.0, -4.0, 0.0, 12.0]) - 0.1 * 13 / 2)


@pytest.mark.parametrize(("bounds", "coefficient"), [({"max_coeff": 0.5}, 0.5), ({"min_coeff": 4, "max_coeff": 9}, 4)])
def test_the_coefficient_stays_within_its_bounds(bounds: dict[str, float], coefficient: float) -> None:
    parameter = weight()
    parameter.grad = torch.ones(4)
    Lamb([parameter], lr=0.1, eps=0.0, **bounds).step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([3.0, -4.0, 0.0, 12.0]) - 0.1 * coefficient)


def test_weights_of_zeros_have_the_coefficient_one() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([2.0, -2.0])
    Lamb([parameter], lr=0.1, eps=0.0, max_coeff=10, min_coeff=5).step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.1, 0.1]))


def test_weight_decay_is_part_of_the_update_and_of_its_length() -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    parameter.grad = torch.zeros(1)
    Lamb([parameter], lr=0.1, weight_decay=0.25, bias_correction=False).step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([2.0 - 0.1 * 2.0 / 0.5 * 0.5]))


def test_eps_may_stand_under_the_root() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    parameter.grad = torch.tensor([1.0])
    Lamb(
        [parameter], lr=0.1, betas=(0.0, 0.0), eps=3.0, eps_inside_sqrt=True, max_coeff=1, bias_correction=False
    ).step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([1 - 0.1 / 2]))


def test_with_all_coefficients_one_it_is_adam() -> None:
    ours, theirs = weight(), weight()
    lamb = Lamb([ours], lr=0.1, eps=1e-30, max_coeff=1, min_coeff=1)
    adam = torch.optim.Adam([theirs], lr=0.1, eps=1e-30)
    for step in range(20):
        for parameter, optimizer in ((ours, lamb), (theirs, adam)):
            parameter.grad = torch.sin(torch.arange(4.0) + step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_it_goes_on_from_a_saved_state_bit_for_bit() -> None:
    def train(parameter: nn.Parameter, optimizer: Lamb, steps: range) -> None:
        for step in steps:
            parameter.grad = None if step == 1 else torch.cos(torch.arange(4.0) * step)
            optimizer.step()

    whole, halves = weight(), weight()
    train(whole, Lamb([whole], weight_decay=0.1), range(6))
    first = Lamb([halves], weight_decay=0.1)
    train(halves, first, range(3))
    second = Lamb([halves])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(halves, second, range(3, 6))
    assert torch.equal(whole, halves)


def test_a_closure_is_called_with_gradients_on() -> None:
    parameter = weight()
    optimizer = Lamb([parameter])

    def closure() -> float:
        (parameter * 2).sum().backward()  # type: ignore[no-untyped-call]
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert optimizer.state[parameter]["step"] == 1


def test_a_learning_rate_that_is_a_tensor_is_read_and_left_alone() -> None:
    ours, theirs = [weight(), weight()], [weight(), weight()]
    rate = torch.tensor(0.1)
    for parameters, optimizer in ((ours, Lamb(ours, lr=rate)), (theirs, Lamb(theirs, lr=0.1))):  # type: ignore[arg-type]
        for step in range(3):
            for parameter in parameters:
                parameter.grad = torch.sin(torch.arange(4.0) + step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    assert rate.item() == pytest.approx(0.1)


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    ours, theirs = nn.Parameter(torch.tensor([3.0 - 4.0j, 12.0j])), weight()
    theirs.data = torch.view_as_real(ours.detach()).flatten().clone()
    for parameter in (ours, theirs):
        optimizer = Lamb([parameter], lr=0.1)
        for step in range(2):
            grad = torch.sin(torch.arange(4.0) + step)
            parameter.grad = torch.view_as_complex(grad.reshape(2, 2)) if parameter is ours else grad
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(ours.detach()).flatten(), theirs.detach())


@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0), (1, 1)], ids=str)
def test_parameters_of_any_size_are_trained(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.ones(shape))
    parameter.grad = torch.ones(shape)
    Lamb([parameter], lr=0.1, eps=0.0, bias_correction=False).step()
    torch.testing.assert_close(parameter.detach(), torch.full(shape, 0.9))  # one tenth of its length


def step_sharded(steps: int) -> tuple[list[torch.Tensor], int]:
    """Full parameters after steps on shards, one of them full on every rank, and the number of all-reduces."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    calls = 0
    all_reduce = dist.all_reduce

    def count(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return all_reduce(*args, **kwargs)  # type: ignore[arg-type]

    def place(full: torch.Tensor) -> torch.Tensor:
        return full if full.ndim == 0 else distribute_tensor(full, mesh, [Shard(0)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", count)
        params = train_on(place, steps)
    return [param.full_tensor() if hasattr(param, "full_tensor") else param for param in params], calls


def train_on(place: Callable[[torch.Tensor], torch.Tensor], steps: int) -> list[torch.Tensor]:
    params = [nn.Parameter(place(torch.linspace(-1, 2, math.prod(shape)).view(shape))) for shape in SHAPES]
    optimizer = Lamb(params, lr=0.1, weight_decay=0.1)
    for step in range(steps):
        for param, shape in zip(params, SHAPES):
            param.grad = place(torch.cos(torch.arange(float(math.prod(shape))).view(shape) * (step + 1)))
        optimizer.step()
    return [param.detach() for param in params]


SHAPES: tuple[tuple[int, ...], ...] = ((5, 3), (1, 4), (2,), ())  # of (1, 4) the second rank has no row


def test_shards_are_updated_as_full_parameters_with_one_all_reduce_a_step() -> None:
    expected = train_on(lambda full: full, 3)
    for params, all_reduces in run_ranks(step_sharded, 2, 3):
        torch.testing.assert_close(params, expected)
        assert all_reduces == 3
