"""Shards are plain Parquet: pandas, DuckDB and Hugging Face read the same values without this package."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from knowledge_chain import Chain

from tmkd_ray.knowledge.store import KnowledgeArrays

Rows = dict[str, list[Any]]


def by_pandas(pattern: str, folder: Path) -> Rows:
    frame = pd.concat(pd.read_parquet(file) for file in sorted(Path(pattern).parent.glob("*.parquet")))
    return {str(name): frame[name].tolist() for name in frame.columns}


def by_duckdb(pattern: str, folder: Path) -> Rows:
    with duckdb.connect() as database:
        relation = database.sql(f"select * from read_parquet('{pattern}') order by filename, file_row_number")
        return dict(zip(relation.columns, map(list, zip(*relation.fetchall(), strict=True)), strict=True))


def by_hugging_face(pattern: str, folder: Path) -> Rows:
    files = sorted(map(str, Path(pattern).parent.glob("*.parquet")))
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    return {name: list(loaded[name]) for name in loaded.column_names}


@pytest.fixture(scope="module", params=["float16", "int8"])
def written(
    request: pytest.FixtureRequest, chain: Chain, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, KnowledgeArrays]:
    folder = tmp_path_factory.mktemp("readers") / "store"
    layouts = {split: replace(layout, dtype=request.param) for split, layout in chain.layouts.items()}
    store = replace(chain, layouts=layouts).write(folder)
    return folder, store.read("train")


@pytest.mark.parametrize("read", [by_pandas, by_duckdb, by_hugging_face])
def test_equal_values(
    read: Callable[[str, Path], Rows],
    written: tuple[Path, KnowledgeArrays],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder, arrays = written
    rows = read(f"{folder}/train/*.parquet", tmp_path)
    facts = json.loads(pq.read_schema(next((folder / "train").glob("*.parquet"))).metadata[b"tmkd"])
    size, per_view = facts["image_size"], (facts["num_variants"], len(facts["views"]))
    numbers = {"float16": "<f2", "int8": "|i1"}[facts["dtype"]]
    documented: dict[str, tuple[str, tuple[int, ...]]] = {
        "image": ("|u1", (size, size, 3)),
        "augmentation": ("<i2", (facts["num_variants"], len(facts["augmentation_parameters"]))),
        "feature": (numbers, (*per_view, facts["feature_width"])),
        "clip_embedding": (numbers, (*per_view, facts["clip_width"])),
    }
    if facts["dtype"] == "int8":
        documented |= {f"{name}_scale": ("<f4", per_view) for name in ("feature", "clip_embedding")}
    assert set(rows) == {"id", "label", *documented}
    assert rows["id"] == arrays.ids.tolist()
    assert rows["label"] == arrays.labels.tolist()
    columns = {
        name: np.stack([np.frombuffer(value, dtype).reshape(shape) for value in rows[name]])
        for name, (dtype, shape) in documented.items()
    }
    expected = {"image": arrays.images} | {
        name: getattr(arrays, name) for name in documented if name != "image"
    }
    for name, values in columns.items():
        assert values.std() > 0
        np.testing.assert_array_equal(values, expected[name])
    if facts["dtype"] == "int8":
        feature = columns["feature"] * columns["feature_scale"][..., None]
        np.testing.assert_array_equal(feature[:, 0], arrays.knowledge(slice(None)).feature.numpy())
