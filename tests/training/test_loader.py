"""Batches: which images, which variants of them, which pixels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_samples import CIFAR, SIZE, knowledge

from tmkd_ray.augmentation import augment, draw_parameters, sample_keys, variant_offsets
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.quantization import quantize
from tmkd_ray.knowledge.store import KnowledgeArrays
from tmkd_ray.training.loader import ResidentImages, ResidentKnowledge, epoch_order, worker_batches

CPU = torch.device("cpu")
N, K, SEED = 30, 3, 4


def test_order_is_a_permutation_that_seed_and_epoch_decide() -> None:
    orders = {(seed, epoch): epoch_order(100, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    for key, order in orders.items():
        assert sorted(order.tolist()) == list(range(100))
        torch.manual_seed(sum(key))
        assert torch.equal(epoch_order(100, *key), order), "the global generator has no part in it"
    assert len({tuple(order.tolist()) for order in orders.values()}) == len(orders)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_samples", [48, 50, 63, 8])
def test_workers_share_every_batch(num_samples: int, world_size: int) -> None:
    order = epoch_order(num_samples, 0, 0)
    whole = [batch.tolist() for batch in worker_batches(order, 8, 0, 1)]
    assert [len(batch) for batch in whole] == [8] * (num_samples // 8), "the last, incomplete one is left out"
    assert [row for batch in whole for row in batch] == order[: 8 * len(whole)].tolist()
    parts = [list(worker_batches(order, 8, rank, world_size)) for rank in range(world_size)]
    for number, batch in enumerate(whole):
        assert [len(part[number]) for part in parts] == [8 // world_size] * world_size
        assert torch.cat([part[number] for part in parts]).tolist() == batch
    assert {len(part) for part in parts} == {len(whole)}


@pytest.mark.parametrize(
    ("num_samples", "world_size", "local"), [(5, 1, 5), (5, 2, 2), (7, 3, 2), (63, 1, 63), (2, 2, 1)]
)
def test_data_smaller_than_a_batch(num_samples: int, world_size: int, local: int) -> None:
    """One batch an epoch, of as many as divide among the workers."""
    order = epoch_order(num_samples, 0, 0)
    parts = [list(worker_batches(order, 64, rank, world_size)) for rank in range(world_size)]
    assert [len(part) for part in parts] == [1] * world_size
    rows = torch.cat([part[0] for part in parts]).tolist()
    assert len(rows) == len(set(rows)) == local * world_size


def test_fewer_images_than_workers() -> None:
    with pytest.raises(UserError, match=r"3 training images.*4 workers"):
        list(worker_batches(epoch_order(3, 0, 0), 64, 0, 4))


def numbered() -> KnowledgeArrays:
    """Return arrays whose features tell row and variant, whose CLIP embeddings tell them negated."""
    arrays = knowledge(0, N, num_variants=K)
    assert arrays.clip_embedding is not None
    number = (np.arange(N)[:, None] * 10 + np.arange(K)).astype(np.float16)[:, :, None, None]
    return replace(
        arrays,
        feature=np.broadcast_to(number, arrays.feature.shape).copy(),
        clip_embedding=np.broadcast_to(-number, arrays.clip_embedding.shape).copy(),
    )


def resident(positions: np.ndarray | None = None) -> ResidentKnowledge:
    return ResidentKnowledge(numbered(), CPU, CIFAR, SEED, positions)


def images_alone(positions: np.ndarray | None = None, seed: int = SEED) -> ResidentImages:
    arrays = numbered()
    rows = slice(None) if positions is None else positions
    assert arrays.images is not None
    return ResidentImages(arrays.images[rows], arrays.labels[rows], arrays.ids[rows], CPU, CIFAR, seed)


def crop(images: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    return augment(torch.from_numpy(images), torch.from_numpy(parameters)).numpy()


@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 100])
def test_variant_of_the_epoch(epoch: int) -> None:
    """Epoch t shows variant (t + offset) mod K of an image, in pixels, features and embeddings."""
    arrays, data = numbered(), resident()
    offsets = variant_offsets(sample_keys(arrays.ids, SEED), K)
    assert set(offsets) == {0, 1, 2}
    order = epoch_order(N, SEED, epoch)
    seen = 0
    for batch in data.batches(epoch, 7, SEED, 0, 1):
        assert batch.knowledge is not None
        assert batch.knowledge.clip_embedding is not None
        for position in range(len(batch.labels)):
            row = int(order[seen])
            variant = int((epoch + offsets[row]) % K)
            assert (batch.knowledge.feature[position] == row * 10 + variant).all()
            assert (batch.knowledge.clip_embedding[position] == -(row * 10 + variant)).all()
            assert batch.labels[position] == arrays.labels[row]
            pixels = crop(arrays.images[row][None], arrays.augmentation[row, variant][None])[0]
            np.testing.assert_array_equal(batch.images[position].permute(1, 2, 0), pixels)
            seen += 1
    assert seen == 28


def test_every_variant_is_shown_once_in_k_epochs() -> None:
    data = resident()
    shown = [
        int(value)
        for epoch in range(5, 5 + K)
        for batch in data.batches(epoch, N, SEED, 0, 1)
        for value in batch.knowledge.feature[:, 0, 0]
    ]
    assert sorted(shown) == sorted(row * 10 + variant for row in range(N) for variant in range(K))


def test_types_and_shapes() -> None:
    batch = next(resident().batches(0, 8, SEED, 0, 2))
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, SIZE, SIZE), torch.uint8)
    assert (batch.labels.shape, batch.labels.dtype) == ((4,), torch.int64)
    assert batch.knowledge is not None
    assert (batch.knowledge.feature.shape, batch.knowledge.feature.dtype) == ((4, 2, 12), torch.float16)


def test_without_a_teacher_augmentation_is_fresh() -> None:
    """No stored output has to fit the pixels, so no epoch's are those of another, or of the store."""
    arrays, data = numbered(), images_alone()
    keys = sample_keys(arrays.ids, SEED)
    drawn = []
    for epoch in (0, 1, 7):
        order = epoch_order(N, SEED, epoch).numpy()
        parameters = draw_parameters(CIFAR, keys, np.array([epoch]), SIZE)[:, 0]
        drawn.append(parameters)
        (batch,) = data.batches(epoch, N, SEED, 0, 1)
        assert batch.knowledge is None
        expected = crop(arrays.images[order], parameters[order])
        np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1), expected)
        np.testing.assert_array_equal(batch.labels, arrays.labels[order])
    assert (drawn[0] != drawn[1]).any()
    assert (drawn[0] != drawn[2]).any()


def test_fresh_augmentation_depends_on_the_seed() -> None:
    first, second = (images_alone(seed=seed).batches(0, N, 0, 0, 1) for seed in (0, 1))
    assert not torch.equal(next(first).images, next(second).images)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_chosen_rows_alone(with_teacher: bool) -> None:
    """The chosen rows keep their pixels and variants; the others are never seen."""
    positions = np.array([3, 4, 11, 25])
    arrays, data = numbered(), resident(positions) if with_teacher else images_alone(positions)
    assert len(data) == 4
    keys = sample_keys(arrays.ids, SEED)
    for epoch in range(K):
        (batch,) = data.batches(epoch, 64, SEED, 0, 1)
        rows = positions[epoch_order(4, SEED, epoch).numpy()]
        variants = (epoch + variant_offsets(keys, K)[rows]) % K
        if with_teacher:
            assert batch.knowledge is not None
            np.testing.assert_array_equal(batch.knowledge.feature[:, 0, 0], rows * 10 + variants)
            parameters = arrays.augmentation[rows, variants]
        else:
            parameters = draw_parameters(CIFAR, keys[rows], np.array([epoch]), SIZE)[:, 0]
        np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1), crop(arrays.images[rows], parameters))
        np.testing.assert_array_equal(batch.labels, arrays.labels[rows])


def test_the_store_is_not_written_to() -> None:
    """Resident tensors are copies: several trials may share one store in memory."""
    arrays = numbered()
    before = arrays.images.copy()
    data = ResidentKnowledge(arrays, CPU, CIFAR, SEED)
    data.images.zero_()
    data.labels.zero_()
    np.testing.assert_array_equal(arrays.images, before)
    assert arrays.labels.any()


def test_without_clip() -> None:
    data = ResidentKnowledge(replace(numbered(), clip_embedding=None), CPU, CIFAR, SEED)
    batch = next(data.batches(0, 8, SEED, 0, 1))
    assert batch.knowledge is not None
    assert batch.knowledge.clip_embedding is None


@pytest.mark.parametrize("first_step", [0, 1, 3, 4])
def test_skipped_steps_are_those_of_an_epoch_from_its_start(first_step: int) -> None:
    for data in (resident(), images_alone()):
        whole = list(data.batches(2, 7, SEED, 1, 1 + 1))[first_step:]
        rest = list(data.batches(2, 7, SEED, 1, 1 + 1, first_step))
        assert len(rest) == len(whole) == max(0, N // 6 - first_step)
        for left, right in zip(rest, whole, strict=True):
            assert torch.equal(left.indices, right.indices)
            assert torch.equal(left.images, right.images)


def test_vectors_of_eight_bits_come_back_by_their_scales() -> None:
    arrays = knowledge(0, N, num_variants=K)
    assert arrays.feature is not None
    assert arrays.clip_embedding is not None
    feature, feature_scale = quantize(arrays.feature.astype(np.float32))
    embedding, embedding_scale = quantize(arrays.clip_embedding.astype(np.float32))
    packed = replace(
        arrays,
        feature=feature,
        feature_scale=feature_scale,
        clip_embedding=embedding,
        clip_embedding_scale=embedding_scale,
    )
    (batch,) = ResidentKnowledge(packed, CPU, CIFAR, SEED).batches(1, N, SEED, 0, 1)
    (exact,) = ResidentKnowledge(arrays, CPU, CIFAR, SEED).batches(1, N, SEED, 0, 1)
    assert batch.knowledge is not None
    assert exact.knowledge is not None
    for name in ("feature", "clip_embedding"):
        got, wanted = getattr(batch.knowledge, name), getattr(exact.knowledge, name).float()
        assert got.dtype == torch.float32
        bound = wanted.abs().amax(-1, keepdim=True) / 127 / 2
        assert ((got - wanted).abs() <= bound * 1.0001 + 1e-7).all()
        assert not torch.equal(got, wanted)
