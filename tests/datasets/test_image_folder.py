"""Folders of image files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from dataset_samples import build, encode, random_pixels

from tmkd_ray.errors import UnreadableImageError, UserError


def write_images(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(random_pixels(i)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "animals"
    write_images(folder / "train", ["cat/b.png", "cat/a.png", "bee/deep/er/x.webp", "bee/y", "ant/1.txt"])
    write_images(folder / "test", ["cat/a.png", "bee/q.jpeg"])
    return folder


def test_train_and_test_folders(root: Path) -> None:
    dataset = build("image_folder", path=str(root))
    assert dataset.class_names == ("ant", "bee", "cat")
    train, test = dataset.index("train"), dataset.index("test")
    assert dict(zip(train.ids.tolist(), train.labels.tolist(), strict=True)) == {
        "train/ant/1.txt": 0,
        "train/bee/deep/er/x.webp": 1,
        "train/bee/y": 1,
        "train/cat/a.png": 2,
        "train/cat/b.png": 2,
    }
    assert test.ids.tolist() == ["test/bee/q.jpeg", "test/cat/a.png"]
    assert test.labels.tolist() == [1, 2]
    assert dataset.read("train", train) == [(root / name).read_bytes() for name in train.ids]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_names_of_the_test_folder(root: Path, name: str) -> None:
    (root / "test").rename(root / name)
    (root / "test").mkdir()
    (root / "test" / "unlabelled.png").write_bytes(encode(random_pixels(0)))
    dataset = build("image_folder", path=str(root))
    assert dataset.index("test").ids.tolist() == [f"{name}/bee/q.jpeg", f"{name}/cat/a.png"]


def test_train_without_test(root: Path) -> None:
    (root / "test").rename(root / "held out")
    with pytest.raises(UserError, match="has a train folder, but no class folders in any of test, val"):
        build("image_folder", path=str(root))


def test_a_class_called_train(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{name}/{i}.png" for name in ("bus", "train") for i in range(5)])
    dataset = build("image_folder", path=str(tmp_path))
    assert dataset.class_names == ("bus", "train")
    assert np.bincount(dataset.index("train").labels).tolist() == [4, 4]


def test_splits_without_classes(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/1.png", "test/1.png"])
    with pytest.raises(UserError, match="no class folders in any of test"):
        build("image_folder", path=str(tmp_path))
    write_images(tmp_path, ["test/cat/1.png"])
    with pytest.raises(UserError, match="classes in test that are not in train: cat"):
        build("image_folder", path=str(tmp_path))


def test_unknown_class_in_test(root: Path) -> None:
    write_images(root / "test", ["dog/1.png"])
    with pytest.raises(UserError, match="classes in test that are not in train: dog"):
        build("image_folder", path=str(root))


def test_test_part_is_set_apart(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(10)])
    dataset = build("image_folder", path=str(tmp_path), test_fraction=0.3)
    train, test = dataset.index("train"), dataset.index("test")
    assert np.bincount(test.labels).tolist() == [3, 3]
    assert np.bincount(train.labels).tolist() == [7, 7]
    assert len({*train.ids, *test.ids}) == 20
    other = build("image_folder", path=str(tmp_path), test_fraction=0.3, split_seed=1)
    assert set(other.index("test").ids) != set(test.ids)
    assert other.fingerprint("test") != dataset.fingerprint("test")
    # a file more moves no other file to another split of its neighbours' class
    write_images(tmp_path, ["ant/10.png"])
    again = dataset.index("test")
    assert set(again.ids[again.labels == 1]) == set(test.ids[test.labels == 1])


def test_hidden_files_are_no_images(root: Path) -> None:
    write_images(root / "train", ["cat/.DS_Store", "cat/.cache/x.png", ".git/x.png"])
    dataset = build("image_folder", path=str(root))
    assert dataset.class_names == ("ant", "bee", "cat")
    assert len(dataset.index("train")) == 5


def test_only_regular_files_are_images(root: Path) -> None:
    os.mkfifo(root / "train" / "cat" / "pipe")
    assert len(build("image_folder", path=str(root)).index("train")) == 5


def test_links(root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode(random_pixels(0)))
    cats = root / "train" / "cat"
    (cats / "inside.png").symlink_to(cats / "a.png")
    (cats / "outside.png").symlink_to(secret)
    (cats / "up.png").symlink_to("../../../secret.png")
    (cats / "broken.png").symlink_to("nothing")
    dataset = build("image_folder", path=str(root))
    index = dataset.index("train")
    contents = dict(zip(index.ids.tolist(), dataset.read("train", index), strict=True))
    assert contents["train/cat/inside.png"] == (cats / "a.png").read_bytes()
    for name, reason in (("outside", "leads out"), ("up", "leads out"), ("broken", "No such file")):
        content = contents[f"train/cat/{name}.png"]
        assert isinstance(content, UnreadableImageError)
        assert reason in str(content)
    assert sum(isinstance(content, bytes) for content in contents.values()) == 6

    (cats / "more").symlink_to(root / "train" / "ant")
    with pytest.raises(UserError, match=r"cat/more is a link to a folder, which is not followed"):
        dataset.index("train")
    (cats / "more").unlink()
    (root / "train" / "dog").symlink_to(tmp_path)
    with pytest.raises(UserError, match="dog is a link to a folder"):
        build("image_folder", path=str(root)).index("train")


def test_ids_cannot_lead_out(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "animals2").mkdir()
    (tmp_path / "animals2" / "x").write_bytes(b"secret")
    dataset = build("image_folder", path=str(root))
    index = dataset.index("test")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "../animals2/x", "train/../../secret.png"):
        index.ids[:] = name[: index.ids.dtype.itemsize // 4]
        crafted = type(index)(np.array([name, name]), index.labels, index.part, index.row)
        for content in dataset.read("test", crafted):
            assert isinstance(content, UnreadableImageError), name
            assert "leads out" in str(content)


def test_a_root_that_is_a_link_is_fine(root: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(root)
    dataset = build("image_folder", path=str(tmp_path / "linked"))
    assert all(isinstance(content, bytes) for content in dataset.read("train", dataset.index("train")))


def test_class_file_gives_order_or_new_names(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("cat\nant\nbee\n")
    dataset = build("image_folder", path=str(root), class_names=str(file))
    assert dataset.class_names == ("cat", "ant", "bee")
    index = dataset.index("train")
    assert index.labels[index.ids == "train/cat/a.png"] == 0
    assert index.labels[index.ids == "train/ant/1.txt"] == 1

    file.write_text(json.dumps({"bee": "honey bee", "cat": "house cat", "ant": "red ant"}))
    renamed = build("image_folder", path=str(root), class_names=str(file))
    assert renamed.class_names == ("honey bee", "house cat", "red ant")
    index = renamed.index("test")
    assert index.labels.tolist() == [0, 1]
    assert index.ids.tolist() == ["test/bee/q.jpeg", "test/cat/a.png"]
    assert renamed.fingerprint("train") != dataset.fingerprint("train"), "other labels"


def test_class_file_must_cover_the_folders(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("cat\nbee\ndog\n")
    with pytest.raises(UserError, match=r"Folders without a name: ant\. Names without a folder: dog"):
        build("image_folder", path=str(root), class_names=str(file))
    file.write_text('{"ant": "insect", "bee": "insect", "cat": "cat"}')
    with pytest.raises(UserError, match="more than once: insect"):
        build("image_folder", path=str(root), class_names=str(file))


def test_too_few_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 class names"):
        build("image_folder", path=str(tmp_path))
    write_images(tmp_path, ["cat/1.png"])
    with pytest.raises(UserError, match=r"1 class names \(cat\); at least two"):
        build("image_folder", path=str(tmp_path))


def test_no_images(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="train split: no images"):
        build("image_folder", path=str(tmp_path)).index("train")


def test_unusual_names(tmp_path: Path) -> None:
    names = ["ant/Bild 1.png", "ant/ä#?%.png", "bee/3.04\u202fPM.png", "bee/line\nbreak.png"]
    write_images(tmp_path / "train", names)
    write_images(tmp_path / "test", names[1:3])
    dataset = build("image_folder", path=str(tmp_path))
    index = dataset.index("train")
    assert set(index.ids) == {f"train/{name}" for name in names}
    assert all(isinstance(content, bytes) for content in dataset.read("train", index))
    (tmp_path / "train" / "ant" / os.fsdecode(b"latin-\xe4.png")).write_bytes(b"")
    with pytest.raises(UserError, match=r"latin-.*is not UTF-8; rename it"):
        dataset.index("train")


def test_fingerprint_sees_names_and_sizes(root: Path) -> None:
    def fingerprint() -> str:
        return build("image_folder", path=str(root)).fingerprint("train")

    seen = [fingerprint()]
    file = root / "train" / "cat" / "a.png"
    file.write_bytes(file.read_bytes() + b"\0")
    seen.append(fingerprint())
    file.rename(file.with_name("c.png"))
    seen.append(fingerprint())
    (root / "test" / "cat" / "a.png").unlink()
    assert fingerprint() == seen[-1]
    assert len(set(seen)) == 3
    root.rename(root.with_name("moved"))
    assert build("image_folder", path=str(root.with_name("moved"))).fingerprint("train") == seen[-1]
