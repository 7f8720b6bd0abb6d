"""The digits of scikit-learn, and CIFAR through torchvision."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from dataset_samples import build, cifar_sample
from sklearn.datasets import load_digits
from torchvision import datasets

from tmkd_ray.datasets import DATASETS, build_dataset
from tmkd_ray.datasets.decode import load_images
from tmkd_ray.errors import UserError


def test_digits_split() -> None:
    dataset = build("digits")
    train, test = dataset.index("train"), dataset.index("test")
    ids = sorted([*train.ids, *test.ids])
    assert ids == [f"digits/{row:04d}" for row in range(1797)]
    per_class = np.bincount(load_digits().target)
    np.testing.assert_array_equal(np.bincount(test.labels), np.floor(per_class / 4 + 0.5))
    other = build("digits", split_seed=5, image_size=8)
    np.testing.assert_array_equal(other.index("test").ids, test.ids)
    assert dataset.class_names[0] == "zero"
    assert dataset.class_names[9] == "nine"


def test_digits_pixels() -> None:
    dataset = build("digits", image_size=8)
    source = load_digits()
    for split in ("train", "test"):
        index = dataset.index(split)
        images = load_images(dataset, split, index).images
        np.testing.assert_array_equal(index.labels, source.target[index.row])
        grey = source.images[index.row] * 255 / 16
        assert np.abs(images - grey[..., None]).max() <= 0.5
    assert images.min() == 0
    assert images.max() == 255


def test_digits_statistics() -> None:
    dataset = build("digits")
    images = load_images(dataset, "train", dataset.index("train")).images / 255
    np.testing.assert_allclose(images.mean((0, 1, 2)), dataset.config.mean, atol=1e-3)
    np.testing.assert_allclose(images.std((0, 1, 2)), dataset.config.std, atol=1e-3)


@pytest.mark.parametrize("version", [10, 100])
def test_cifar_content(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = build_dataset(cifar_sample(version)(tmp_path, monkeypatch))
    source = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[version]
    index = dataset.index("test")
    assert index.ids[3] == f"cifar{version}/test/00003"
    assert dataset.class_names == tuple(f"class {i}" for i in range(version))
    file = tmp_path / source.base_folder / source.test_list[0][0]
    planes = pickle.loads(file.read_bytes())["data"].reshape(-1, 3, 32, 32)
    images = load_images(dataset, "test", index).images
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2), planes)

    # what is there is not downloaded again
    monkeypatch.setattr(source, "url", "http://127.0.0.1:9/nothing.tar.gz")
    again = build_dataset(dataset.config.model_copy(update={"download": True}))
    np.testing.assert_array_equal(again.index("test").ids, index.ids)


def test_cifar_damaged_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cifar_sample(10)(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"dataset.path: .* does not hold cifar10, or its files are damaged"):
        build_dataset(config)


def test_cifar_failing_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the discard port of this machine, where nothing listens
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    with pytest.raises(
        UserError, match=r"cannot download .*Put cifar-100-python.tar.gz into .*cifar-100-python"
    ):
        build("cifar100", path=str(tmp_path))
    # an archive put there by hand that is not the archive
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match="cannot download"):
        build("cifar100", path=str(tmp_path))


def test_cifar_statistics_are_the_published_ones() -> None:
    config = DATASETS.get("cifar100").Config(path="somewhere")
    assert config.mean == (0.5071, 0.4865, 0.4409)
    assert config.std == (0.2673, 0.2564, 0.2762)
