"""Under autocast the strategies compute what they compute without: nothing of theirs runs in half precision."""

import pytest
import torch
from teaching_samples import LABELS, SPEC, student_output, teacher_output

from tmkd_ray.distillers import STRATEGIES, build_strategy

# Its projection is a layer like the network's own: it runs in the network's precision.
IN_FLOAT32 = [name for name in STRATEGIES if name != "feature_mse"]


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
    for field in ("logits", "feature"):
        gradient, same = getattr(under, field).grad, getattr(plain, field).grad
        assert (gradient is None) == (same is None)
        assert gradient is None or torch.equal(gradient, same)


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_half_precision_outputs_are_widened_first(name: str) -> None:
    """The student's outputs come in half precision from autocast; the loss is that of the same numbers."""
    torch.manual_seed(0)
    strategy = build_strategy(STRATEGIES.get(name).Config(), SPEC)
    half, wide = student_output(), student_output()
    for field in ("logits", "feature"):
        setattr(half, field, getattr(half, field).detach().bfloat16())
        setattr(wide, field, getattr(half, field).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = strategy(half, teacher_output(), LABELS).loss
    assert torch.equal(loss, strategy(wide, teacher_output(), LABELS).loss)
