"""Sharding on a large mesh, and what guards the optimiser's steps."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from fusedmm.train.augment import uniform_hash
from fusedmm.train.config import ModelConfig, TrainConfig
from fusedmm.train.model import Forecaster, Sizes
from fusedmm.train.optim import MIN_WINDOW, SpikeGuard, WeightAverage, build_optimizer, learning_rate
from fusedmm.train.parallel import full, join_world, open_world, shard_model
from fusedmm.train.start import is_frozen

CPU = torch.device("cpu")
CONFIG = TrainConfig(lr=0.1, warmup=4, steps=20)


@pytest.fixture
def many_ranks() -> Iterator[None]:
    """Rank 5 of 64; collectives return at once and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=64)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("many_ranks")
def test_one_step_on_a_mesh_of_8_by_8() -> None:
    world = join_world("cpu", shard=8)
    assert (world.rank, world.size, tuple(world.mesh.shape)) == (5, 64, (8, 8))
    model = Forecaster(Sizes({"a": 3, "b": 2}, 2, 1), ModelConfig(), "gated")
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    shard_model(model, list(model.blocks), world, torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.to_local().numel() <= -(-whole[name] // 8) * 8
    assert sum(p.to_local().numel() for p in model.parameters()) < 0.3 * sum(whole.values())
    before = {name: parameter.to_local().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, CONFIG)
    masks = {"a": torch.ones(4, 5, dtype=torch.bool), "b": torch.ones(4, 6, dtype=torch.bool)}
    tokens = {"a": torch.randn(4, 5, 3), "b": torch.randn(4, 6, 2)}
    times = {name: torch.zeros_like(mask, dtype=torch.int64) for name, mask in masks.items()}
    output = model(tokens, masks, times, torch.full((4,), 10), torch.randn(4, 2))
    (output.prediction - 1).square().sum().backward()
    norm = full(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    assert norm.shape == ()
    optimizer.step()
    decays = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    held = [name for name, parameter in model.named_parameters() if id(parameter) in decays and before[name].numel()]
    assert len(held) > 10
    for name in held:  # by their decay at least: what ranks that are not there add to gradients is nothing
        assert not torch.equal(model.get_parameter(name).to_local(), before[name]), name


@pytest.mark.usefixtures("many_ranks")
def test_frozen_parameters_are_sharded_and_left_alone() -> None:
    """A frozen block beside a trained one, and frozen encoders in the group of the trained head."""
    world, config = join_world("cpu", shard=8), replace(CONFIG, freeze=("encoders.*", "blocks.0.*", "latents"))
    model = Forecaster(Sizes({"a": 3}, 2, 1), ModelConfig(), "gated")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name, config))
    shard_model(model, list(model.blocks), world, torch.bfloat16)
    optimizer = build_optimizer(model, config)
    masks, times = {"a": torch.ones(4, 5, dtype=torch.bool)}, {"a": torch.zeros(4, 5, dtype=torch.int64)}
    output = model({"a": torch.randn(4, 5, 3)}, masks, times, torch.full((4,), 10), torch.randn(4, 2))
    (output.prediction - 1).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert not (is_frozen(name, config) and parameter.grad is not None)
    assert model.head.weight.grad is not None
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_each_pattern_has_its_rate_and_the_last_one_counts() -> None:
    model = Forecaster(Sizes({"a": 3}, 2, 1), ModelConfig(), "gated")
    scales = {"blocks.*": 0.5, "blocks.1.*": 0.1, "*.bias": 2.0}
    rates = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in build_optimizer(model, replace(CONFIG, lr_scale=scales)).param_groups
        for parameter in group["params"]
    }
    names = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    decay = CONFIG.weight_decay
    assert names["blocks.0.fusion.attention.out_proj.weight"] == (0.5, decay)
    assert names["blocks.1.fusion.attention.out_proj.weight"] == (0.1, decay)
    assert names["blocks.1.fusion.attention.out_proj.bias"] == (2.0, 0.0)
    assert names["head.weight"] == (1.0, decay)


def test_a_step_left_out_changes_nothing_and_the_next_one_does() -> None:
    with open_world("cpu") as world:
        model = nn.Linear(3, 2)
        shard_model(model, [], world, torch.float32)
        optimizer = build_optimizer(model, CONFIG)
        before = model.weight.detach().clone()
        for skip in (1.0, 0.0):
            model(torch.full((4, 3), float("nan") if skip else 1.0)).sum().backward()
            optimizer.found_inf = torch.tensor(skip)
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(model.weight, before) == bool(skip)
        assert model.weight.isfinite().all()


def judge(guard: SpikeGuard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)))


def test_spike_guard_skips_spikes_and_what_is_not_finite() -> None:
    guard = SpikeGuard(sigma=6.0, window=32, device=CPU)
    assert judge(guard, float("nan"))
    assert judge(guard, 1.0, float("inf"))
    assert int(guard.state["streak"]) == 2
    assert int(guard.state["accepted"]) == 0
    for number in range(MIN_WINDOW):
        assert not judge(guard, 1.0 + 0.1 * (number % 3)), "too early to judge"
    assert int(guard.state["streak"]) == 0
    assert judge(guard, 3.0)
    assert judge(guard, 1.1, norm=2.0)
    assert not judge(guard, 1.3), "within six deviations"
    assert not judge(guard, 0.1), "a lower loss is no spike"


def test_spike_guard_forgets_after_its_window() -> None:
    guard = SpikeGuard(sigma=6.0, window=8, device=CPU)
    for loss in [9.0, 1.0] * 4 + [1.0, 1.01] * 4:
        judge(guard, loss)
    assert judge(guard, 9.0)


def test_weight_average_follows() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, decay=0.5)
    nn.init.ones_(model.weight)
    for expected in (0.9, 0.98, 0.995):  # the first decays are 1/10, 2/11, 3/12, then 1/2
        average.update(model, step=0 if expected == 0.9 else 1000)
        if expected == 0.9:
            assert average.state["weight"].item() == pytest.approx(0.9)
    assert average.state["weight"].item() == pytest.approx(0.975)


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(step, CONFIG) for step in range(CONFIG.steps + 1)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert max(rates) == 0.1
    assert rates[-1] == pytest.approx(0.005)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))


def test_uniform_hash_is_uniform_and_depends_on_everything() -> None:
    sample = torch.arange(4000)
    drawn = uniform_hash(sample, seed=1, step=2, number=3)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, bins=10, min=0, max=1)
    assert counts.min() > 330
    assert counts.max() < 470
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        correlation = torch.corrcoef(torch.stack([drawn, uniform_hash(sample, *other)]))[0, 1]
        assert abs(correlation) < 0.06
    assert torch.equal(uniform_hash(sample.flip(0), 1, 2, 3).flip(0), drawn)
