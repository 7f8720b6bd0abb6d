"""`evaluate` against NumPy (over two processes: test_distributed_losses)."""

import math
from pathlib import Path

import numpy as np
import pytest
import reference_formulas as reference
import torch
from torch import Tensor

from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.metrics import evaluate

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NUM_IMAGES = 37


def images_of(count: int) -> Tensor:
    """Every image is its own number, in its first pixel."""
    images = torch.zeros(count, 2, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count)
    return images


class Table:
    """Looks an image's logits up by the number in it, and remembers the batches."""

    def __init__(self, logits_NC: Tensor) -> None:
        self.logits_NC = logits_NC
        self.batches: list[Tensor] = []

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        self.batches.append(images_BHWC)
        return self.logits_NC.to(images_BHWC.device)[images_BHWC[:, 0, 0, 0].long()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch_size", [1, 5, 36, NUM_IMAGES, 1000])
@pytest.mark.parametrize("num_classes", [3, 5, 9])
def test_evaluate_is_the_formula(tmp_path: Path, device: str, batch_size: int, num_classes: int) -> None:
    rng = np.random.default_rng(num_classes)
    logits = 2 * rng.normal(size=(NUM_IMAGES, num_classes)).astype(np.float32)
    labels = rng.integers(num_classes, size=NUM_IMAGES)
    table = Table(torch.from_numpy(logits))

    result = evaluate(
        table, images_of(NUM_IMAGES), torch.from_numpy(labels), PlainContext(tmp_path, device), batch_size
    )

    above = (logits > logits[np.arange(NUM_IMAGES), labels][:, None]).sum(axis=1)
    assert 0 < (above == 0).mean() < 1
    assert result.keys() == {"accuracy", "top5_accuracy", "loss"}
    assert result["accuracy"] == pytest.approx((above == 0).mean(), abs=1e-12)
    assert result["top5_accuracy"] == pytest.approx((above < 5).mean(), abs=1e-12)
    assert result["loss"] == pytest.approx(reference.cross_entropy(logits.astype(np.float64), labels), rel=1e-6)
    assert [len(batch) for batch in table.batches[:-1]] == [batch_size] * ((NUM_IMAGES - 1) // batch_size)
    seen = torch.cat(table.batches)
    assert seen.dtype == torch.uint8
    assert seen.device.type == device
    assert torch.equal(seen.cpu(), images_of(NUM_IMAGES))


def test_by_hand(tmp_path: Path) -> None:
    """Three images in six classes: the label first, third, and last."""
    logits = torch.zeros(3, 6)
    logits[0, 2], logits[1, [0, 1]], logits[2, :5] = 5.0, 1.0, 1.0
    logits[1, 4] = 0.5
    result = evaluate(
        Table(logits), images_of(3), torch.tensor([2, 4, 5]), PlainContext(tmp_path), batch_size=2
    )
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert result["top5_accuracy"] == pytest.approx(2 / 3)
    losses = [
        math.log(math.exp(5) + 5) - 5,
        math.log(2 * math.e + math.exp(0.5) + 3) - 0.5,
        math.log(5 * math.e + 1),
    ]
    assert result["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """200 losses of about 11.5 each: in float16 the sum would carry an error of one."""
    logits = torch.full((200, 2), 0.0)
    logits[:, 0] = 11.5
    labels = torch.ones(200, dtype=torch.int64)
    result = evaluate(Table(logits.to(dtype)), images_of(200), labels, PlainContext(tmp_path), batch_size=200)
    assert result["loss"] == pytest.approx(11.5 + math.log1p(math.exp(-11.5)), rel=1e-6)
    assert result["accuracy"] == 0.0
    assert result["top5_accuracy"] == 1.0


def test_no_graph_is_kept(tmp_path: Path) -> None:
    modes = []

    def predict(images_BHWC: Tensor) -> Tensor:
        modes.append(torch.is_inference_mode_enabled())
        return torch.zeros(len(images_BHWC), 3)

    evaluate(predict, images_of(4), torch.zeros(4, dtype=torch.int64), PlainContext(tmp_path), batch_size=2)
    assert modes == [True, True]
