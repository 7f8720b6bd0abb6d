"""OFD against its formula: margin ReLU, connectors, partial L2; the margins are measured."""

import pickle

import numpy as np
import pytest
import torch
from map_formulas import Maps, alike, batch_norm, convolution, map_gradients
from pydantic import ValidationError
from reference_formulas import Array, central_difference
from teaching_samples import BATCH, LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.ofd import OFD, OFDConfig, partial_l2
from tmkd_ray.errors import UserError
from tmkd_ray.types import TeacherOutput


def strategy_of(weight: float = 1e-3) -> OFD:
    torch.manual_seed(0)
    strategy = OFD(OFDConfig(weight=weight), SPEC)
    for connector in strategy.connectors:
        torch.nn.init.uniform_(connector[1].weight, 0.5, 1.5)
        torch.nn.init.uniform_(connector[1].bias, -0.5, 0.5)
    return strategy


def teacher_maps(teacher: TeacherOutput) -> Maps:
    assert teacher.preactivation_maps is not None
    return [f64(value) for value in teacher.preactivation_maps]


def mean_negative(maps_BCHW: Array) -> Array:
    """E[x | x < 0] of each channel."""
    return np.array([x[x < 0].mean() if (x < 0).any() else 0.0 for x in maps_BCHW.swapaxes(0, 1)])


def reference_partial(student_BCHW: Array, teacher_BCHW: Array, margin_C: Array) -> float:
    """Eq. 3 and 4 of the paper, element by element."""
    total = 0.0
    for b, c, y, x in np.ndindex(student_BCHW.shape):
        target = max(teacher_BCHW[b, c, y, x], margin_C[c])
        found = student_BCHW[b, c, y, x]
        if not found <= target <= 0:
            total += (target - found) ** 2
    return total / len(student_BCHW)


def reference(
    strategy: OFD, students: Maps, teachers: Maps, margins: list[Array], first_weight: Array | None = None
) -> float:
    total = 0.0
    for index, (student_BCHW, teacher_BDHW) in enumerate(zip(students, teachers, strict=True)):
        convolve, normalize = strategy.connectors[index]
        weight = first_weight if index == 0 and first_weight is not None else f64(convolve.weight)
        student_BCHW, teacher_BDHW = alike(student_BCHW, teacher_BDHW)
        regressed_BDHW = batch_norm(
            convolution(student_BCHW, weight), f64(normalize.weight), f64(normalize.bias)
        )
        total += 0.5 ** (1 - index) * reference_partial(regressed_BDHW, teacher_BDHW, margins[index])
    return strategy.weight * total


def test_ofd_is_the_formula() -> None:
    strategy = strategy_of(weight=0.1)
    student, teacher = student_output(), teacher_output()
    loss = strategy(student, teacher, LABELS).loss
    loss.backward()
    teachers = teacher_maps(teacher)
    margins = [mean_negative(value) for value in teachers]
    compared = student.preactivation_maps[1:]
    given = [f64(value) for value in compared]

    assert loss.item() == pytest.approx(reference(strategy, given, teachers, margins), rel=1e-5)
    expected = map_gradients(lambda maps: reference(strategy, maps, teachers, margins), given)
    for value, gradient in zip(compared, expected, strict=True):
        np.testing.assert_allclose(f64(value.grad), gradient, rtol=2e-3, atol=1e-5)
    weight = strategy.connectors[0][0].weight
    gradient = central_difference(lambda w: reference(strategy, given, teachers, margins, w), f64(weight))
    np.testing.assert_allclose(f64(weight.grad), gradient, rtol=2e-3, atol=1e-5)
    assert student.preactivation_maps[0].grad is None
    assert all(value.grad is None for value in student.feature_maps)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (2.0, 3.0, 1.0),  # a positive target is met from both sides
        (4.0, 3.0, 1.0),
        (-5.0, 1.0, 36.0),
        (-3.0, -1.0, 0.0),  # below a negative target: already off
        (-1.0, -1.0, 0.0),
        (0.5, -1.0, 2.25),
        (-4.0, -9.0, 0.0),  # the margin, -2, takes the place of what lies below
        (-1.5, -9.0, 0.25),
        (1.0, -9.0, 9.0),
    ],
)
def test_the_partial_distance_by_hand(student: float, teacher: float, expected: float) -> None:
    one = [torch.full((1, 1, 1, 1), value) for value in (student, teacher)]
    assert partial_l2(*one, torch.tensor([-2.0])).item() == pytest.approx(expected)


def test_margins_are_those_of_all_batches_so_far() -> None:
    """The mean over all negative responses, not the mean of the batches' means."""
    strategy = strategy_of()
    batches = [teacher_output(seed=seed) for seed in (11, 12, 13)]
    assert batches[1].preactivation_maps is not None
    batches[1].preactivation_maps = tuple(value - 1.0 for value in batches[1].preactivation_maps)
    for batch in batches[:-1]:
        strategy(student_output(), batch, LABELS)
        strategy.after_step(torch.arange(BATCH))
    student = student_output()
    loss = strategy(student, batches[-1], LABELS).loss.item()
    each = [teacher_maps(batch) for batch in batches]
    margins = [mean_negative(np.concatenate([maps[stage] for maps in each])) for stage in (0, 1)]
    given = [f64(value) for value in student.preactivation_maps[1:]]
    assert loss == pytest.approx(reference(strategy, given, each[-1], margins), rel=1e-5)
    alone = [mean_negative(maps) for maps in each[-1]]
    assert loss != pytest.approx(reference(strategy, given, each[-1], alone), rel=1e-4)


def test_forward_alone_changes_no_measure() -> None:
    strategy = strategy_of()
    strategy(student_output(), teacher_output(), LABELS)
    assert torch.equal(strategy.responses, torch.zeros_like(strategy.responses))
    assert strategy.step == 0
    with pytest.raises(AssertionError, match="forward comes first"):
        strategy_of().after_step(torch.arange(BATCH))


def test_the_measure_is_in_the_checkpoint() -> None:
    strategy = strategy_of()
    strategy(student_output(), teacher_output(seed=11), LABELS)
    strategy.after_step(torch.arange(BATCH))
    other = strategy_of()
    other.load_state_dict(strategy.state_dict())
    assert other.step == 1
    copy = pickle.loads(pickle.dumps(strategy))
    losses = [one(student_output(), teacher_output(), LABELS).loss for one in (strategy, other, copy)]
    assert torch.equal(losses[1], losses[0])
    assert torch.equal(losses[2], losses[0])


def test_a_channel_that_is_never_negative_has_no_margin() -> None:
    strategy, student, teacher = strategy_of(), student_output(), teacher_output()
    assert teacher.preactivation_maps is not None
    teacher.preactivation_maps = tuple(value.abs() for value in teacher.preactivation_maps)
    loss = strategy(student, teacher, LABELS).loss
    assert loss.isfinite()
    margins = [np.zeros(value.shape[1]) for value in teacher.preactivation_maps]
    given = [f64(value) for value in student.preactivation_maps[1:]]
    assert loss.item() == pytest.approx(reference(strategy, given, teacher_maps(teacher), margins), rel=1e-5)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_does_not_tell_is_named(who: str) -> None:
    strategy, student, teacher = strategy_of(), student_output(), teacher_output()
    (student if who == "student" else teacher).preactivation_maps = ()
    with pytest.raises(UserError, match=f"strategy=ofd .*before its stages' last activation, and the {who} "):
        strategy(student, teacher, LABELS)


def test_options_out_of_range() -> None:
    with pytest.raises(ValidationError, match="weight"):
        OFDConfig(weight=0)
