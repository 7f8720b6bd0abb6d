"""The real CIFAR-100 in Parquet shards, where it is present."""

import time
from pathlib import Path

import numpy as np
import pytest
from dataset_samples import build

from tmkd_ray.datasets import ImageDataset
from tmkd_ray.datasets.decode import load_images
from tmkd_ray.datasets.splits import split_train

FOLDER = Path(__file__).parents[2].parent / "shared" / "data" / "cifar100"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/data/cifar100"),
]


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    return build("parquet", path=str(FOLDER))


def test_index_and_split(dataset: ImageDataset) -> None:
    start = time.perf_counter()
    train = dataset.index("train")
    assert time.perf_counter() - start < 5
    assert np.bincount(train.labels).tolist() == [500] * 100
    assert np.bincount(dataset.index("test").labels).tolist() == [100] * 100
    assert len(dataset.class_names) == 100
    assert (dataset.class_names[0], dataset.class_names[99]) == ("apple", "worm")
    rest, validation = split_train(train, 0.1, seed=0)
    assert np.bincount(validation.labels).tolist() == [50] * 100
    assert np.bincount(rest.labels).tolist() == [450] * 100


def test_pixels_have_the_known_statistics(dataset: ImageDataset) -> None:
    """Of the whole train split: mean .5071 .4865 .4409, std .2673 .2564 .2762 (to four places)."""
    loaded = load_images(dataset, "train", dataset.index("train"))
    assert loaded.images.shape == (50000, 32, 32, 3)
    assert loaded.set_aside == []
    counts = np.stack([np.bincount(loaded.images[..., channel].ravel(), minlength=256) for channel in range(3)])
    levels = np.arange(256) / 255
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt(counts @ levels**2 / counts.sum(1) - mean**2)
    np.testing.assert_allclose(mean, (0.5071, 0.4865, 0.4409), atol=6e-5)
    np.testing.assert_allclose(std, (0.2673, 0.2564, 0.2762), atol=6e-5)


def test_images_belong_to_their_labels(dataset: ImageDataset) -> None:
    """Images of one class are alike: their mean colours tell plain from sea from apple."""
    test = dataset.index("test")
    chosen = test.take(
        np.flatnonzero(np.isin(test.labels, [dataset.class_names.index(n) for n in ("sea", "apple")]))
    )
    loaded = load_images(dataset, "test", chosen)
    blueness = loaded.images[..., 2].mean((1, 2)) - loaded.images[..., 0].mean((1, 2))
    is_sea = loaded.labels == dataset.class_names.index("sea")
    assert ((blueness > 0) == is_sea).mean() > 0.85
