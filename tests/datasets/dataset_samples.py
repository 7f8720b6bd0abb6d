"""Small generated data sets on disk, one per kind of dataset."""

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tmkd_ray.datasets import DATASETS, DatasetConfig, ImageDataset, build_dataset

ANIMALS = ("ant", "bee", "cat")


def random_pixels(seed: int, height: int = 12, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def build(name: str, **options: object) -> ImageDataset:
    return build_dataset(DATASETS.get(name).Config(**options))


def write_shard(
    path: Path,
    images: list[bytes | None],
    labels: list[int | None],
    *,
    names: tuple[str, ...] | None = ANIMALS,
    label_column: str = "label",
    image_column: str = "image",
    as_struct: bool = True,
    row_group_size: int = 4,
) -> None:
    """Write a Parquet file as the Hugging Face hub does."""
    content = pa.array(images, pa.binary())
    if as_struct:
        paths = pa.array([f"{i}.png" for i in range(len(images))])
        content = pa.StructArray.from_arrays([content, paths], ["bytes", "path"])
    table = pa.table({image_column: content, label_column: pa.array(labels, pa.int64())})
    if names is not None:
        feature = {"names": list(names), "_type": "ClassLabel"}
        info = {"info": {"features": {image_column: {"_type": "Image"}, label_column: feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)


def parquet_sample(folder: Path, _: pytest.MonkeyPatch) -> DatasetConfig:
    for shard in range(2):
        write_shard(
            folder / f"train-0000{shard}-of-00002.parquet",
            [encode(random_pixels(10 * shard + i)) for i in range(9)],
            [i % 3 for i in range(9)],
        )
    write_shard(
        folder / "test-00000-of-00001.parquet", [encode(random_pixels(90 + i)) for i in range(3)], [0, 1, 2]
    )
    return DATASETS.get("parquet").Config(path=str(folder), image_size=8)


def image_folder_sample(folder: Path, _: pytest.MonkeyPatch) -> DatasetConfig:
    for label, name in enumerate(ANIMALS):
        for i in range(5):
            file = folder / name / ("" if i % 2 else "deeper") / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(random_pixels(10 * label + i, 14, 11)))
    return DATASETS.get("image_folder").Config(path=str(folder), image_size=8)


def _write_pickle(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar_sample(version: int) -> Callable[[Path, pytest.MonkeyPatch], DatasetConfig]:
    """Write the original's files with a few random images, and have torchvision expect their checksums."""

    def write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetConfig:
        from torchvision import datasets

        source = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[version]
        names = [f"class {i}" for i in range(version)]
        labels_key = {10: "labels", 100: "fine_labels"}[version]
        rng = np.random.default_rng(0)

        def batch(file: str, count: int) -> tuple[str, str]:
            content = {
                "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
                labels_key: [i % version for i in range(count)],
            }
            return file, _write_pickle(folder / source.base_folder / file, content)

        train = [list(batch(file, 2 * version)) for file, _ in source.train_list]
        test = [list(batch(file, version)) for file, _ in source.test_list]
        meta = source.meta["filename"]
        checksum = _write_pickle(folder / source.base_folder / meta, {source.meta["key"]: names})
        monkeypatch.setattr(source, "train_list", train)
        monkeypatch.setattr(source, "test_list", test)
        monkeypatch.setattr(source, "meta", {**source.meta, "md5": checksum})
        return DATASETS.get(f"cifar{version}").Config(path=str(folder), download=False)

    return write


def digits_sample(_: Path, __: pytest.MonkeyPatch) -> DatasetConfig:
    return DATASETS.get("digits").Config(image_size=16)


SAMPLES: dict[str, Callable[[Path, pytest.MonkeyPatch], DatasetConfig]] = {
    "parquet": parquet_sample,
    "image_folder": image_folder_sample,
    "cifar10": cifar_sample(10),
    "cifar100": cifar_sample(100),
    "digits": digits_sample,
}
"""What writes a small sample of each registered dataset and returns its config."""
