"""A sound store has no problems; each kind of damage is found, with the file's name and the sample's."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from knowledge_chain import contents, digits_chain, shard_file, write_with_bank

from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.layout import KnowledgeLayout, decode_array, encode_array
from tmkd_ray.knowledge.store import KnowledgeStore
from tmkd_ray.knowledge.verification import verify_store


def rewrite(
    store: KnowledgeStore, split: str, number: int, edit: Callable[[pa.Table, KnowledgeLayout], pa.Table]
) -> str:
    """Edit a shard as a program with a mistake in it would have written it; return its file's path."""
    manifest = store.manifest()
    table = edit(pq.read_table(shard_file(store, split, number)), manifest.layouts[split])
    record = store.write_shard(split, number, table, [])
    counts = {name: sum(shard.split == name for shard in manifest.shards) for name in manifest.layouts}
    store.finish(manifest.class_names, manifest.layouts, counts)
    return store.at(split, record.file)


def set_values(column: str, change: Callable[[np.ndarray], None]) -> Any:
    """Return an edit of one array column."""

    def edit(table: pa.Table, layout: KnowledgeLayout) -> pa.Table:
        values = decode_array(table.column(column), *layout.arrays()[column]).copy()
        change(values)
        position = table.schema.get_field_index(column)
        return table.set_column(position, table.schema.field(column), encode_array(values))

    return edit


def replace_values(column: str, change: Callable[[list[Any]], list[Any]]) -> Any:
    """Return an edit of one column as Python values."""

    def edit(table: pa.Table, layout: KnowledgeLayout) -> pa.Table:
        field = table.schema.field(column)
        values = pa.array(change(table.column(column).to_pylist()), field.type)
        return table.set_column(table.schema.get_field_index(column), field, values)

    return edit


@pytest.mark.parametrize("kind", ["plain", "float32", "int8"])
def test_a_sound_store(kind: str, sound_store: Callable[[str], KnowledgeStore]) -> None:
    store = sound_store(kind)
    before, told = contents(Path(store.path)), []
    assert verify_store(store, lambda done, total: told.append((done, total))) == []
    assert told == [(done, 6) for done in range(1, 7)]
    assert contents(Path(store.path)) == before


def test_sound_without_clip_without_images_without_training_images(tmp_path: Path) -> None:
    chain = digits_chain(None)
    validation = replace(chain, train=chain.train.take(np.arange(0)))
    assert verify_store(write_with_bank(validation, tmp_path, image_format="reference")) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: content[:1000] + bytes([content[1000] ^ 4]) + content[1001:], "is damaged"),
        (lambda content: content[:-7], "is damaged"),
        (lambda content: b"", "is damaged"),
        (None, "is missing"),
    ],
)
def test_a_damaged_shard(
    damage: Callable[[bytes], bytes] | None, says: str, sound_store: Callable[[str], KnowledgeStore]
) -> None:
    store = sound_store("plain")
    file = shard_file(store, "train", 2)
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    (problem,) = verify_store(store)
    assert problem.startswith(f"{file} {says}")


def spoil(position: tuple[Any, ...], value: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[position] = value

    return change


@pytest.mark.parametrize(
    ("kind", "edit", "says"),
    [
        ("plain", set_values("feature", spoil((2, 1, 2, 5), np.nan)), "feature is not finite: {2}"),
        ("float32", set_values("feature", spoil((7, 2, 0, 63), np.inf)), "feature is not finite: {7}"),
        ("int8", set_values("feature_scale", spoil((0, 0, 1), np.nan)), "feature is not finite: {0}"),
        ("int8", set_values("feature_scale", spoil((3, 0, 1), -1)), "feature is not finite: {3}"),
        (
            "plain",
            set_values("clip_embedding", spoil((4, 0, 0, 0), -np.inf)),
            "clip_embedding is not finite: {4}",
        ),
        (
            "int8",
            set_values("clip_embedding_scale", spoil((1, 2, 0), np.inf)),
            "clip_embedding is not finite: {1}",
        ),
        (
            "plain",
            set_values("clip_embedding", spoil((1, 2, 0), 0)),
            "clip_embedding is not of unit length: {1}",
        ),
        (
            "int8",
            set_values("clip_embedding_scale", spoil((5, 2, 1), 0.1)),
            "clip_embedding is not of unit length: {5}",
        ),
        (
            "float32",
            set_values("clip_embedding", lambda values: np.multiply(values, 1.00005, out=values, where=[True])),
            "clip_embedding is not of unit length: {0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}",
        ),
        ("plain", set_values("augmentation", spoil((6, 1, 2), 0)), "crops that show nothing of the image: {6}"),
        (
            "plain",
            set_values("augmentation", spoil((6, 0, 3), 17)),
            "crops that show nothing of the image: {6}",
        ),
        (
            "plain",
            set_values("augmentation", spoil((0, 2, 0), 16)),
            "crops that show nothing of the image: {0}",
        ),
        (
            "plain",
            set_values("augmentation", spoil((0, 2, 1), -16)),
            "crops that show nothing of the image: {0}",
        ),
        (
            "plain",
            replace_values("label", lambda labels: [*labels[:3], 10, *labels[4:]]),
            "labels outside 0 … 9: {3}",
        ),
        ("plain", replace_values("label", lambda labels: [-1, *labels[1:]]), "labels outside 0 … 9: {0}"),
        (
            "int8",
            replace_values("image", lambda images: [images[0], images[1][:9], b"", *images[3:]]),
            "images that cannot be decoded: {1}, {2}",
        ),
        ("plain", replace_values("feature", lambda values: [None, *values[1:]]), "null values in feature"),
    ],
)
def test_wrong_values_are_named_with_their_sample(
    kind: str, edit: Any, says: str, sound_store: Callable[[str], KnowledgeStore]
) -> None:
    store = sound_store(kind)
    ids = [repr(sample) for sample in store.read("train").ids[8:16].tolist()]
    file = rewrite(store, "train", 1, edit)
    assert verify_store(store) == [f"{file}: {says.format(*ids)}"]


def test_the_same_id_twice(sound_store: Callable[[str], KnowledgeStore]) -> None:
    store = sound_store("plain")
    first = str(store.read("train").ids[3])
    file = rewrite(store, "train", 1, replace_values("id", lambda ids: [ids[0], first, *ids[2:7], ids[0]]))
    other = store.committed()["train", 0].file
    own = store.committed()["train", 1].file
    ids = pq.read_table(file).column("id").to_pylist()
    assert verify_store(store) == [
        f"{file}: the id {first!r} is there twice, also in {other}",
        f"{file}: the id {ids[0]!r} is there twice, also in {own}",
    ]


def test_columns_that_the_layout_does_not_have(sound_store: Callable[[str], KnowledgeStore]) -> None:
    store = sound_store("plain")
    file = rewrite(store, "validation", 0, lambda table, layout: table.drop_columns(["clip_embedding"]))
    assert verify_store(store) == [f"{file}: its columns or metadata are not those of the manifest's layout"]
    store = sound_store("plain")

    def other_metadata(table: pa.Table, layout: KnowledgeLayout) -> pa.Table:
        views = layout.views[::-1]
        return table.replace_schema_metadata(replace(layout, views=views).schema().metadata)

    file = rewrite(store, "validation", 0, other_metadata)
    assert verify_store(store) == [f"{file}: its columns or metadata are not those of the manifest's layout"]


def test_a_manifest_that_counts_wrong(sound_store: Callable[[str], KnowledgeStore]) -> None:
    store = sound_store("plain")
    file = Path(store.at("manifest.json"))
    content = json.loads(file.read_text())
    content["shards"][0]["rows"] += 1
    content["shards"][0]["bytes"] += 2
    file.write_text(json.dumps(content))
    shard = shard_file(store, "train", 0)
    assert verify_store(store) == [
        f"{store.path}/train/00000.json: missing, damaged, or another than in the manifest",
        f"{shard}: {shard.stat().st_size} bytes; its record says {shard.stat().st_size + 2}",
        f"{shard}: 8 rows; its record says 9",
    ]


def test_a_shard_that_is_not_parquet(sound_store: Callable[[str], KnowledgeStore]) -> None:
    """With a manifest that vouches for it."""
    store = sound_store("plain")
    text = Path(store.at("manifest.json")).read_text()
    record = store.committed()["validation", 0]
    content = b"PAR1 but nothing else"
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"00000-{sha256[:12]}.parquet"
    text = text.replace(record.sha256, sha256).replace(record.file, name)
    Path(store.at("manifest.json")).write_text(text)
    Path(store.at("validation", name)).write_bytes(content)
    problems = verify_store(store)
    assert f"{store.path}/validation/{name}: cannot be read as Parquet" in "\n".join(problems)
    assert f"{store.at('validation', record.file)}: no record of the manifest names this file" in problems


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("train/00000-0123456789ab.parquet", "no record of the manifest names this file"),
        ("validation/notes.txt", "no record of the manifest names this file"),
        ("train/00004.json", "no record of the manifest names this file"),
        ("notes.txt", "not a file of a knowledge store"),
        ("text_banks/notes.txt", "not a text bank"),
    ],
)
def test_files_that_nothing_names(name: str, says: str, sound_store: Callable[[str], KnowledgeStore]) -> None:
    store = sound_store("plain")
    Path(store.at(name)).write_bytes(b"{}")
    assert verify_store(store) == [f"{store.path}/{name}: {says}"]


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"version": 2}'])
@pytest.mark.parametrize("name", ["train/00003.json", "fingerprint.json"])
def test_small_files_that_disagree(
    content: bytes | None, name: str, sound_store: Callable[[str], KnowledgeStore]
) -> None:
    store = sound_store("plain")
    file = Path(store.at(name))
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    (problem,) = verify_store(store)
    assert problem.startswith(str(file))
    assert "another than" in problem or "is damaged" in problem


def tensors(name: str, **changes: torch.Tensor | None) -> Callable[[KnowledgeStore], None]:
    """Return a damage that replaces tensors of a file, or leaves them out."""

    def damage(store: KnowledgeStore) -> None:
        file = Path(store.at(name))
        content = safetensors.torch.load(file.read_bytes()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        file.write_bytes(safetensors.torch.save(kept))

    return damage


BANK = "text_banks/bank.safetensors"
UNIT = torch.nn.functional.normalize(torch.ones(3, 10, 24), dim=-1)


@pytest.mark.parametrize(
    ("damage", "name", "says"),
    [
        (tensors("head.safetensors", weight=torch.ones(10, 63)), "head.safetensors", r"(10, 63)"),
        (tensors("head.safetensors", bias=torch.ones(9)), "head.safetensors", r"(9,)"),
        (tensors("head.safetensors", bias=torch.full((10,), torch.nan)), "head.safetensors", "not finite"),
        (tensors("head.safetensors", bias=None), "head.safetensors", "has no tensor 'bias'"),
        (lambda store: Path(store.at("head.safetensors")).unlink(), "head.safetensors", "cannot read"),
        (lambda store: Path(store.at("head.safetensors")).write_bytes(b"x"), "head.safetensors", "is damaged"),
        (tensors(BANK, bank=UNIT[:2]), BANK, "the bank is (2, 10, 24); expected (3, 10, 24)"),
        (
            tensors(BANK, bank=UNIT[..., :23].contiguous()),
            BANK,
            "the bank is (3, 10, 23); expected (3, 10, 24)",
        ),
        (tensors(BANK, bank=UNIT * 1.001), BANK, "not of unit length"),
        (tensors(BANK, bank=UNIT * torch.nan), BANK, "not of unit length"),
        (tensors(BANK, temperature=torch.tensor(0.0)), BANK, "the temperature is 0.0"),
        (tensors(BANK, temperature=None), BANK, "has no tensor 'temperature'"),
        (lambda store: Path(store.at(BANK)).write_bytes(b"x"), BANK, "is damaged"),
    ],
)
def test_head_and_text_banks(
    damage: Callable[[KnowledgeStore], None], name: str, says: str, sound_store: Callable[[str], KnowledgeStore]
) -> None:
    store = sound_store("plain")
    damage(store)
    (problem,) = verify_store(store)
    assert store.at(name) in problem
    assert says in problem


def test_without_a_usable_manifest(sound_store: Callable[[str], KnowledgeStore], tmp_path: Path) -> None:
    store = sound_store("plain")
    file = Path(store.at("manifest.json"))
    text = file.read_text()
    file.write_text(text[:-50])
    (problem,) = verify_store(store)
    assert problem.startswith(f"{file} is damaged")
    file.write_text(text.replace('"schema_version": 2', '"schema_version": 1'))
    (problem,) = verify_store(store)
    assert "schema version 1" in problem
    file.unlink()
    with pytest.raises(UserError, match="no finished knowledge store"):
        verify_store(store)
