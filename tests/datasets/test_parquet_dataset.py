"""Parquet shards in the Hugging Face layout."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_samples import ANIMALS, build, encode, random_pixels, write_shard
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from tmkd_ray.datasets import parquet
from tmkd_ray.errors import UnreadableImageError, UserError

IMAGES = [encode(random_pixels(i)) for i in range(10)]
LABELS = [2, 0, 1, 1, 0, 2, 0, 0, 1, 2]


def write_both(folder: Path, **options: object) -> None:
    write_shard(folder / "train-00000-of-00002.parquet", IMAGES[:6], LABELS[:6], **options)
    write_shard(folder / "train-00001-of-00002.parquet", IMAGES[6:], LABELS[6:], **options)
    write_shard(folder / "test-00000-of-00001.parquet", IMAGES[:3], LABELS[:3], **options)


@pytest.mark.parametrize("as_struct", [True, False])
def test_content_is_as_written(tmp_path: Path, as_struct: bool) -> None:
    write_both(tmp_path, as_struct=as_struct)
    dataset = build("parquet", path=str(tmp_path))
    assert dataset.class_names == ANIMALS
    index = dataset.index("train")
    assert index.labels.tolist() == LABELS
    assert index.part.tolist() == [0] * 6 + [1] * 4
    assert index.row.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert index.ids[7] == "train-00001-of-00002.parquet:1"
    assert dataset.read("train", index) == IMAGES
    positions = np.array([9, 0, 5, 4, 0, 7])
    assert dataset.read("train", index.take(positions)) == [IMAGES[i] for i in positions]
    assert dataset.read("test", dataset.index("test")) == IMAGES[:3]


def test_data_folder_and_validation_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "data" / "train-00000.parquet", IMAGES, LABELS)
    write_shard(tmp_path / "data" / "validation-00000.parquet", IMAGES[:4], LABELS[:4])
    dataset = build("parquet", path=str(tmp_path))
    assert dataset.index("train").ids[0] == "data/train-00000.parquet:0"
    assert dataset.index("test").ids.tolist() == [f"data/validation-00000.parquet:{i}" for i in range(4)]
    write_shard(tmp_path / "data" / "test-00000.parquet", IMAGES[:2], LABELS[:2])
    assert build("parquet", path=str(tmp_path)).index("test").ids[0] == "data/test-00000.parquet:0"


def test_reads_each_row_group_once_and_no_other_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_both(tmp_path, row_group_size=2)
    dataset = build("parquet", path=str(tmp_path))
    index = dataset.index("train")
    reads = []
    original = pq.ParquetFile.read_row_group

    def recorded(self: pq.ParquetFile, group: int, columns: list[str], **options: object) -> pa.Table:
        reads.append((group, tuple(columns)))
        return original(self, group, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    dataset.read("train", index.take(np.array([9, 5, 0, 4, 1])))
    assert sorted(reads) == [(0, ("image.bytes",)), (1, ("image.bytes",)), (2, ("image.bytes",))]


def test_index_reads_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_both(tmp_path)
    dataset = build("parquet", path=str(tmp_path))
    columns = []
    original = pq.ParquetFile.read
    monkeypatch.setattr(
        pq.ParquetFile, "read", lambda self, names: columns.append(names) or original(self, names)
    )
    dataset.index("train")
    assert columns == [["label"], ["label"]]


def test_other_columns(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_shard(
            tmp_path / f"{split}.parquet", IMAGES, LABELS, label_column="fine_label", image_column="img"
        )
    with pytest.raises(
        UserError, match=r"image_column: column 'image' of .*train.parquet is missing.*fit: img"
    ):
        build("parquet", path=str(tmp_path))
    with pytest.raises(UserError, match=r"label_column: column 'label' of .* is missing.*fit: fine_label"):
        build("parquet", path=str(tmp_path), image_column="img")
    with pytest.raises(UserError, match=r"label_column: column 'img' of .* is struct"):
        build("parquet", path=str(tmp_path), image_column="img", label_column="img")
    dataset = build("parquet", path=str(tmp_path), image_column="img", label_column="fine_label")
    assert dataset.index("train").labels.tolist() == LABELS
    assert dataset.read("test", dataset.index("test")) == IMAGES

    for split in ("train", "test"):
        table = pq.read_table(tmp_path / f"{split}.parquet")
        coarse = pa.array([label // 2 for label in LABELS])
        pq.write_table(table.append_column("coarse_label", coarse), tmp_path / f"{split}.parquet")
    (tmp_path / "coarse.txt").write_text("small\nlarge\n")
    fine, coarse = (
        build("parquet", path=str(tmp_path), image_column="img", label_column=column, class_names=names)
        for column, names in (("fine_label", None), ("coarse_label", str(tmp_path / "coarse.txt")))
    )
    assert coarse.index("train").labels.tolist() == [label // 2 for label in LABELS]
    assert coarse.fingerprint("train") != fine.fingerprint("train")


def test_class_names_from_a_file_or_an_error(tmp_path: Path) -> None:
    write_both(tmp_path, names=None)
    with pytest.raises(UserError, match=r"does not name the classes of 'label'.*dataset.class_names"):
        build("parquet", path=str(tmp_path))
    file = tmp_path / "names.txt"
    file.write_text("\ufeffAmeise\n Biene \n\nKatze\n", encoding="utf-8")
    assert build("parquet", path=str(tmp_path), class_names=str(file)).class_names == (
        "Ameise",
        "Biene",
        "Katze",
    )
    file.write_text('["Ameise", "Biene", "Kätzchen"]', encoding="utf-8")
    named = build("parquet", path=str(tmp_path), class_names=str(file))
    assert named.class_names == ("Ameise", "Biene", "Kätzchen")
    assert named.index("train").labels.tolist() == LABELS


@pytest.mark.parametrize(
    ("names", "message"),
    [(("ant",), "at least two"), (("ant", "bee", "ant"), "more than once: ant"), ((), "at least")],
)
def test_class_names_that_cannot_be(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    write_both(tmp_path, names=names)
    with pytest.raises(UserError, match=message):
        build("parquet", path=str(tmp_path))


def test_labels_that_cannot_be(tmp_path: Path) -> None:
    write_both(tmp_path)
    shard = tmp_path / "test-00000-of-00001.parquet"
    write_shard(shard, IMAGES[:2], [-1, -1])
    with pytest.raises(UserError, match=r"test split: labels run -1\.\.-1 but 3 class names"):
        build("parquet", path=str(tmp_path)).index("test")
    write_shard(shard, IMAGES[:2], [0, None])
    with pytest.raises(UserError, match=r"1 rows of .* have no label"):
        build("parquet", path=str(tmp_path)).index("test")
    write_shard(shard, [], [])
    with pytest.raises(UserError, match="test split: no images"):
        build("parquet", path=str(tmp_path)).index("test")


def test_missing_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no train\*.parquet in .* there are: no files"):
        build("parquet", path=str(tmp_path))
    write_shard(tmp_path / "train.parquet", IMAGES, LABELS)
    with pytest.raises(UserError, match=r"no test\*.parquet or val\*.parquet in .* there are: train.parquet"):
        build("parquet", path=str(tmp_path))
    with pytest.raises(UserError, match=r"dataset\.path: no folder"):
        build("parquet", path=str(tmp_path / "train.parquet"))


def test_damaged_shards(tmp_path: Path) -> None:
    write_both(tmp_path, row_group_size=2)
    shard = tmp_path / "train-00000-of-00002.parquet"
    dataset = build("parquet", path=str(tmp_path))
    index = dataset.index("train")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    contents = dataset.read("train", index)
    assert all(isinstance(content, UnreadableImageError) for content in contents[:6])
    assert contents[6:] == IMAGES[6:]
    for fails in (lambda: dataset.index("train"), lambda: build("parquet", path=str(tmp_path))):
        with pytest.raises(UserError, match=r"dataset.path: cannot read .*train-00000"):
            fails()
    shard.write_bytes(b"")
    with pytest.raises(UserError, match=r"dataset.path: cannot read .*train-00000"):
        dataset.fingerprint("train")


def test_a_row_without_an_image(tmp_path: Path) -> None:
    write_both(tmp_path)
    write_shard(tmp_path / "test-00000-of-00001.parquet", [IMAGES[0], None, IMAGES[2]], [0, 1, 2])
    dataset = build("parquet", path=str(tmp_path))
    first, second, third = dataset.read("test", dataset.index("test"))
    assert (first, third) == (IMAGES[0], IMAGES[2])
    assert str(second) == "the row holds no image"


def test_fingerprint_names_the_content(tmp_path: Path) -> None:
    write_both(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def fingerprint(split: str = "train", **options: object) -> str:
        return build("parquet", path=str(tmp_path / "b"), **options).fingerprint(split)

    original = build("parquet", path=str(tmp_path / "a")).fingerprint("train")
    assert fingerprint() == original, "wherever it lies"
    assert len(original) == 64
    write_shard(tmp_path / "b" / "test-00000-of-00001.parquet", IMAGES[:2], LABELS[:2])
    assert fingerprint() == original
    changed = bytearray(IMAGES[3])
    changed[-1] ^= 1
    shard = tmp_path / "b" / "train-00000-of-00002.parquet"
    write_shard(shard, [*IMAGES[:3], bytes(changed), *IMAGES[4:6]], LABELS[:6], row_group_size=1)
    another = fingerprint()
    write_shard(shard, IMAGES[:6], LABELS[:6], row_group_size=1)
    assert len({original, another, fingerprint()}) == 3
    shard.rename(shard.with_name("train-00000-of-00003.parquet"))
    assert fingerprint() != original


def test_reads_through_the_file_system_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from an object store: no path of this machine is ever opened."""
    write_both(tmp_path / "bucket" / "folder")
    store = SubTreeFileSystem(str(tmp_path / "bucket"), LocalFileSystem())
    monkeypatch.setattr(parquet, "open_filesystem", lambda path: (store, path.removeprefix("s3://bucket/")))
    dataset = build("parquet", path="s3://bucket/folder")
    assert dataset.read("train", dataset.index("train")) == IMAGES
    assert dataset.fingerprint("train") == build_local(tmp_path, monkeypatch)


def build_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.undo()
    return build("parquet", path=f"file://{tmp_path}/bucket/folder/").fingerprint("train")


def test_a_relative_path_is_found_from_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_both(tmp_path / "data here")
    monkeypatch.chdir(tmp_path)
    dataset = build("parquet", path="data here")
    monkeypatch.chdir("/")
    assert dataset.read("test", dataset.index("test")) == IMAGES[:3]
