"""What every strategy on feature maps does alike: pairing, pooling, models without maps."""

import dataclasses

import numpy as np
import pytest
import torch
from map_formulas import alike
from teaching_samples import LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers import STRATEGIES, build_strategy
from tmkd_ray.distillers.base import MapStrategy, pool_to_smaller
from tmkd_ray.errors import UserError
from tmkd_ray.objective import DistillerConfig

NAMES = [name for name in STRATEGIES if issubclass(STRATEGIES.get(name), MapStrategy)]


def test_these_are_on_maps() -> None:
    assert NAMES == ["at", "fitnet", "kdsvd", "nst", "ofd", "reviewkd"]


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_only_these_need_the_teacher_online(name: str) -> None:
    config = DistillerConfig.model_validate({"name": "kd", "strategy": name})
    assert config.needs_online == (name in NAMES)
    unused = DistillerConfig.model_validate({"name": "kd", "strategy": name, "kd_weight": 0})
    assert not unused.needs_online


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_maps_is_named(name: str, who: str) -> None:
    spec = dataclasses.replace(SPEC, **{f"{who}_maps": (), f"{who}_name": "torchvision/vit_b_16"})
    with pytest.raises(UserError, match=f"strategy={name} compares feature maps, and torchvision/vit_b_16 "):
        build_strategy(STRATEGIES.get(name).Config(), spec)


@pytest.mark.parametrize("name", NAMES)
def test_stages_are_paired_from_the_last(name: str) -> None:
    """The earliest map of the one that has more is not read, whoever that is."""
    torch.manual_seed(0)
    strategy = build_strategy(STRATEGIES.get(name).Config(), SPEC)
    assert isinstance(strategy, MapStrategy)
    assert strategy.pairs == [((3, 4, 4), (5, 6, 6)), ((4, 3, 3), (7, 2, 2))]
    student, teacher = student_output(), teacher_output()
    loss = strategy(student, teacher, LABELS).loss
    for field in ("feature_maps", "preactivation_maps"):
        _, *rest = getattr(student, field)
        setattr(student, field, (torch.full((4, 2, 7, 7), torch.nan), *rest))
    assert torch.equal(strategy(student, teacher, LABELS).loss, loss)

    assert SPEC.teacher_maps is not None
    torch.manual_seed(0)
    longer = dataclasses.replace(SPEC, teacher_maps=((9, 9, 9), (8, 8, 8), *SPEC.teacher_maps))
    strategy = build_strategy(STRATEGIES.get(name).Config(), longer)
    assert isinstance(strategy, MapStrategy)
    assert strategy.pairs[1:] == [((3, 4, 4), (5, 6, 6)), ((4, 3, 3), (7, 2, 2))]


@pytest.mark.parametrize(
    ("one", "other"), [((5, 3), (4, 6)), ((7, 7), (3, 3)), ((2, 2), (5, 5)), ((4, 4), (4, 4))]
)
def test_maps_are_pooled_to_the_smaller_of_each_axis(one: tuple[int, int], other: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    maps = [torch.randn(2, 3, *size, generator=generator) for size in (one, other)]
    found = pool_to_smaller(maps[0], maps[1])
    for actual, expected in zip(found, alike(f64(maps[0]), f64(maps[1])), strict=True):
        np.testing.assert_allclose(f64(actual), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_format_does_not_matter(name: str) -> None:
    """Teachers run with channels last."""
    strategies = []
    for _ in range(2):
        torch.manual_seed(0)
        strategies.append(build_strategy(STRATEGIES.get(name).Config(), SPEC))
    plain, turned = teacher_output(), teacher_output()
    for field in ("feature_maps", "preactivation_maps"):
        maps = (value.to(memory_format=torch.channels_last) for value in getattr(turned, field))
        setattr(turned, field, tuple(maps))
    losses = [s(student_output(), t, LABELS).loss for s, t in zip(strategies, (plain, turned), strict=True)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-7)
