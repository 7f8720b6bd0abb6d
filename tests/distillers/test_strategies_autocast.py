"""Under autocast the strategies compute what they compute without: nothing of theirs runs in half precision."""

import pytest
import torch
from teaching_samples import LABELS, SPEC, leaves, mapped, student_output, teacher_output

from tmkd_ray.distillers import STRATEGIES, build_strategy
from tmkd_ray.types import ModelOutput

# Their heads are layers like the network's own: they run in the network's precision.
IN_FLOAT32 = [name for name in STRATEGIES if name not in ("feature_mse", "ofd", "reviewkd")]


@pytest.mark.parametrize("name", IN_FLOAT32)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    strategy = build_strategy(STRATEGIES.get(name).Config(), SPEC)
    plain, under = student_output(), student_output()
    expected = strategy(plain, teacher_output(), LABELS).loss
    with torch.autocast("cpu", dtype=dtype):
        loss = strategy(under, teacher_output(), LABELS).loss
    expected.backward()
    loss.backward()
    assert torch.equal(loss, expected)
    for name, leaf in leaves(under).items():
        gradient, same = leaf.grad, leaves(plain)[name].grad
        assert (gradient is None) == (same is None)
        assert gradient is None or torch.equal(gradient, same)


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_half_precision_outputs_are_widened_first(name: str) -> None:
    """The student's outputs come in half precision from autocast; the loss is that of the same numbers."""
    torch.manual_seed(0)
    strategy = build_strategy(STRATEGIES.get(name).Config(), SPEC)
    half = ModelOutput(**mapped(student_output(), lambda value: value.detach().bfloat16()))
    wide = ModelOutput(**mapped(half, lambda value: value.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = strategy(half, teacher_output(), LABELS).loss
    assert torch.equal(loss, strategy(wide, teacher_output(), LABELS).loss)
