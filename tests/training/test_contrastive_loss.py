import math

import numpy as np
import pytest
import reference_formulas as reference
import torch
from teaching_samples import f64, normal

from tmkd_ray.training.clip import contrastive_loss


def similarities(images: int, captions: int) -> torch.Tensor:
    return (5 * normal(torch.Generator().manual_seed(images), images, captions)).requires_grad_()


def positives(caption_of_image: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(caption_of_image)).bool()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_unique_captions_give_clips_loss(size: int) -> None:
    similarity = similarities(size, size)
    loss = contrastive_loss(similarity, positives(list(range(size))))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(reference.clip_loss(f64(similarity)), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("captions", [[0, 1, 0, 2, 0], [1, 0, 1, 1], [0, 0, 0], [2, 1, 0, 3]], ids=str)
def test_shared_captions_give_the_formula(captions: list[int]) -> None:
    similarity, caption_B = similarities(len(captions), max(captions) + 1), np.array(captions)
    loss = contrastive_loss(similarity, positives(captions))
    loss.backward()

    def formula(values: reference.Array) -> float:
        return reference.contrastive_loss(values, caption_B)

    assert loss.item() == pytest.approx(formula(f64(similarity)), rel=1e-5)
    np.testing.assert_allclose(
        f64(similarity.grad),
        reference.central_difference(formula, f64(similarity)),
        rtol=1e-3,
        atol=1e-5,
    )


def test_by_hand() -> None:
    """Three images, two captions, the first shared; all similarities equal."""
    loss = contrastive_loss(torch.zeros(3, 2), positives([0, 0, 1]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(3)) / 2, rel=1e-6)


def test_perfect_images_reach_the_entropy_of_the_shared_caption() -> None:
    """Nothing below: a caption of two images cannot tell them apart (log 2 for it, none for the other)."""
    positive = positives([0, 0, 1])
    loss = contrastive_loss(100.0 * positive.float(), positive)
    assert loss.item() == pytest.approx(math.log(2) / 2 / 2, rel=1e-5)


def test_the_order_of_images_and_captions_does_not_matter() -> None:
    similarity, positive = similarities(4, 3).detach(), positives([0, 1, 0, 2])
    rows, columns = torch.tensor([3, 1, 0, 2]), torch.tensor([2, 0, 1])
    moved = contrastive_loss(similarity[rows][:, columns], positive[rows][:, columns])
    assert moved.item() == pytest.approx(contrastive_loss(similarity, positive).item(), rel=1e-6)
