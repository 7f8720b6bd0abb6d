"""What holds for every registered dataset."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from dataset_samples import ANIMALS, SAMPLES, build, parquet_sample
from pydantic import ValidationError

from tmkd_ray.datasets import DATASETS, ImageDataset, build_dataset
from tmkd_ray.datasets.decode import decode_batch, load_images, resize_to_square, to_rgb
from tmkd_ray.errors import UnreadableImageError, UserError

SPLITS = ("train", "test")


def test_every_dataset_has_a_sample() -> None:
    assert set(DATASETS) == set(SAMPLES), "add a writer of a small sample to dataset_samples.SAMPLES"


@pytest.fixture(params=sorted(SAMPLES))
def dataset(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    return build_dataset(SAMPLES[request.param](tmp_path, monkeypatch))


def test_index(dataset: ImageDataset) -> None:
    num_classes = len(dataset.class_names)
    indices = [dataset.index(split) for split in SPLITS]
    ids = np.concatenate([index.ids for index in indices])
    assert len(np.unique(ids)) == len(ids)
    assert not any("\\" in i or i.startswith("/") for i in ids)
    for index in indices:
        assert set(index.labels) == set(range(num_classes))
        places = np.stack([index.part, index.row])
        assert np.unique(places, axis=1).shape == places.shape


def test_reads_and_decodes(dataset: ImageDataset) -> None:
    size = dataset.config.image_size
    for split in SPLITS:
        index = dataset.index(split)
        loaded = load_images(dataset, split, index, num_threads=2)
        assert loaded.images.shape == (len(index), size, size, 3)
        assert loaded.images.dtype == np.uint8
        assert loaded.images.std() > 10
        assert loaded.set_aside == []
        np.testing.assert_array_equal(loaded.ids, index.ids)
        np.testing.assert_array_equal(loaded.labels, index.labels)


def test_rows_read_in_any_order(dataset: ImageDataset) -> None:
    index = dataset.index("train")
    images, errors = decode_batch(dataset, "train", index)
    assert errors == [None] * len(index)
    positions = np.random.default_rng(1).permutation(len(index))[: len(index) // 2]
    some, _ = decode_batch(dataset, "train", index.take(positions))
    np.testing.assert_array_equal(some, images[positions])
    assert dataset.read("train", index.take(np.array([], dtype=np.int64))) == []


def test_pickles_small_and_works_after(dataset: ImageDataset) -> None:
    index = dataset.index("test")
    dataset.read("test", index)
    content = pickle.dumps(dataset)
    assert len(content) < 5000
    copy = pickle.loads(content)
    assert copy.class_names == dataset.class_names
    assert copy.fingerprint("test") == dataset.fingerprint("test")
    np.testing.assert_array_equal(copy.index("test").ids, index.ids)
    np.testing.assert_array_equal(decode_batch(copy, "test", index)[0], decode_batch(dataset, "test", index)[0])


def test_deterministic(dataset: ImageDataset) -> None:
    again = build_dataset(dataset.config)
    for split in SPLITS:
        assert again.fingerprint(split) == dataset.fingerprint(split)
        np.testing.assert_array_equal(again.index(split).ids, dataset.index(split).ids)
    assert dataset.fingerprint("train") != dataset.fingerprint("test")


def test_limit_is_for_train_alone(dataset: ImageDataset) -> None:
    num_classes = len(dataset.class_names)
    limited = build_dataset(dataset.config.model_copy(update={"limit": num_classes}))
    assert sorted(limited.index("train").labels) == list(range(num_classes))
    assert set(limited.index("train").ids) <= set(dataset.index("train").ids)
    np.testing.assert_array_equal(limited.index("test").ids, dataset.index("test").ids)
    assert limited.fingerprint("train") == dataset.fingerprint("train")


def test_class_names_of_a_file(dataset: ImageDataset, tmp_path: Path) -> None:
    names = [*dataset.class_names]
    file = tmp_path / "names.txt"
    file.write_text("\n".join(names) + "\n\n")
    named = build_dataset(dataset.config.model_copy(update={"class_names": str(file)}))
    assert named.class_names == tuple(names)
    for content, message in (
        ("same\nsame\n", "more than once: same" if dataset.config.name != "image_folder" else "does not match"),
        ("", "at least two" if dataset.config.name != "image_folder" else "does not match"),
        ("[1, 2]", "must be a JSON string"),
        ('["a", ', "not valid JSON"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            build_dataset(named.config)
    file.unlink()
    with pytest.raises(UserError, match=r"dataset.class_names: cannot read .*names.txt"):
        build_dataset(named.config)


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - {"digits"}))
def test_missing_path(name: str, tmp_path: Path) -> None:
    options = {"download": False} if name.startswith("cifar") else {}
    with pytest.raises(UserError, match=r"dataset.path: .*nowhere"):
        build(name, path=str(tmp_path / "nowhere"), **options)


def test_labels_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "names.json"
    file.write_text('["ant", "bee"]')
    config = parquet_sample(tmp_path, monkeypatch).model_copy(update={"class_names": str(file)})
    with pytest.raises(UserError, match=r"labels run 0\.\.2 but 2 class names are given"):
        build_dataset(config).index("train")


def test_names_by_folder_are_for_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "names.json"
    file.write_text('{"ant": "Ant", "bee": "Bee", "cat": "Cat"}')
    config = parquet_sample(tmp_path, monkeypatch).model_copy(update={"class_names": str(file)})
    with pytest.raises(UserError, match="only image_folder"):
        build_dataset(config)


def test_config_rejects_what_cannot_be() -> None:
    config_class = DATASETS.get("digits").Config
    for options in (
        {"image_size": 7},
        {"limit": 0},
        {"validation_fraction": 1.0},
        {"std": (1, 0, 1)},
        {"sise": 8},
    ):
        with pytest.raises(ValidationError):
            config_class(**options)


def test_bad_images_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SAMPLES["image_folder"](tmp_path, monkeypatch)
    bad = {
        "bee/broken.jpg": b"\xff\xd8\xff\xe0 nothing",
        "bee/empty.png": b"",
        "cat/notes.txt": b"these are notes",
    }
    (tmp_path / "dog").mkdir()
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for i in range(3):
        (tmp_path / "dog" / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    bad |= {f"dog/{i}.png": b"" for i in range(3)}
    dataset = build_dataset(config)
    assert dataset.class_names == (*ANIMALS, "dog")
    seen = []
    for split in SPLITS:
        index = dataset.index(split)
        loaded = load_images(dataset, split, index, num_threads=3)
        assert len(loaded.images) + len(loaded.set_aside) == len(index)
        assert set(loaded.ids) | {item.id for item in loaded.set_aside} == set(index.ids)
        seen += [item.id for item in loaded.set_aside]
        assert all(item.reason for item in loaded.set_aside)
        for name, image in zip(loaded.ids, loaded.images, strict=True):
            pixels = to_rgb((tmp_path / name).read_bytes())
            np.testing.assert_array_equal(image, resize_to_square(pixels, config.image_size))
        images, errors = decode_batch(dataset, split, index)
        assert [i for i, e in zip(index.ids, errors, strict=True) if e] == [
            item.id for item in loaded.set_aside
        ]
        assert not images[[e is not None for e in errors]].any()
    assert sorted(seen) == sorted(bad)
    dogs = np.flatnonzero(index.labels == 3)
    with pytest.raises(UserError, match="none of the 1 images can be decoded; the first, dog/"):
        load_images(dataset, split, index.take(dogs))


def test_an_empty_selection_loads_as_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = build_dataset(SAMPLES["digits"](tmp_path, monkeypatch))
    nothing = dataset.index("train").take(np.array([], dtype=np.int64))
    assert load_images(dataset, "train", nothing).images.shape == (0, 16, 16, 3)


def test_a_file_that_vanished_is_an_unreadable_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("image_folder", "parquet"):
        folder = tmp_path / name
        folder.mkdir()
        dataset = build_dataset(SAMPLES[name](folder, monkeypatch))
        index = dataset.index("train")
        gone = index.ids[0].split(":")[0]
        (folder / gone).unlink()
        contents = dataset.read("train", index)
        for i, content in zip(index.ids, contents, strict=True):
            assert isinstance(content, UnreadableImageError) == i.startswith(gone)
        assert "cannot read" in str(contents[0])
