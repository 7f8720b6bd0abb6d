"""A sound store has no problems; each kind of damage is found, with the file's name and the sample's."""

import hashlib
import json
import os
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
from knowledge_chain import FINGERPRINT, Chain, contents, digits_chain

from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.layout import KnowledgeLayout, decode_array, encode_array
from tmkd_ray.knowledge.quality import measure_quality
from tmkd_ray.knowledge.store import KnowledgeStore
from tmkd_ray.knowledge.verification import describe_store, format_summary, verify_store

VIEWS = ("original", "edge", "high_frequency")


def write(chain: Chain, folder: Path, **changes: Any) -> KnowledgeStore:
    layouts = {split: replace(layout, **changes) for split, layout in chain.layouts.items()}
    store = replace(chain, layouts=layouts).write(folder)
    if chain.clip is not None:
        bank = chain.clip.text_bank([["a photo of a {}."]] * 3, chain.dataset.class_names)
        store.write_text_bank("bank", bank, chain.clip.temperature)
    return store


@pytest.fixture(scope="module")
def originals(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Files of a sound store of each kind; copied for every test that spoils one."""
    folder = tmp_path_factory.mktemp("sound")
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "float32": {"dtype": "float32", "image_format": "lossless"},
        "int8": {"dtype": "int8", "image_format": "jpeg"},
    }
    for kind, changes in kinds.items():
        write(chain, folder / kind, **changes)
    return {kind: contents(folder / kind) for kind in kinds}


@pytest.fixture
def copied(originals: dict[str, dict[str, bytes]], tmp_path: Path) -> Callable[[str], KnowledgeStore]:
    def copy(kind: str) -> KnowledgeStore:
        for name, content in originals[kind].items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return KnowledgeStore(str(tmp_path))

    return copy


def shard_file(store: KnowledgeStore, split: str, number: int) -> Path:
    return Path(store.path) / split / store.committed()[split, number].file


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
def test_a_sound_store(kind: str, copied: Callable[[str], KnowledgeStore]) -> None:
    store = copied(kind)
    before, told = contents(Path(store.path)), []
    assert verify_store(store, lambda done, total: told.append((done, total))) == []
    assert told == [(done, 6) for done in range(1, 7)]
    assert contents(Path(store.path)) == before


def test_sound_without_clip_without_images_without_training_images(tmp_path: Path) -> None:
    chain = digits_chain(None)
    validation = replace(chain, train=chain.train.take(np.arange(0)))
    assert verify_store(write(validation, tmp_path, image_format="reference")) == []


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
    damage: Callable[[bytes], bytes] | None, says: str, copied: Callable[[str], KnowledgeStore]
) -> None:
    store = copied("plain")
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
    kind: str, edit: Any, says: str, copied: Callable[[str], KnowledgeStore]
) -> None:
    store = copied(kind)
    ids = [repr(sample) for sample in store.read("train").ids[8:16].tolist()]
    file = rewrite(store, "train", 1, edit)
    assert verify_store(store) == [f"{file}: {says.format(*ids)}"]


def test_the_same_id_twice(copied: Callable[[str], KnowledgeStore]) -> None:
    store = copied("plain")
    first = str(store.read("train").ids[3])
    file = rewrite(store, "train", 1, replace_values("id", lambda ids: [ids[0], first, *ids[2:7], ids[0]]))
    other = store.committed()["train", 0].file
    own = store.committed()["train", 1].file
    ids = pq.read_table(file).column("id").to_pylist()
    assert verify_store(store) == [
        f"{file}: the id {first!r} is there twice, also in {other}",
        f"{file}: the id {ids[0]!r} is there twice, also in {own}",
    ]


def test_columns_that_the_layout_does_not_have(copied: Callable[[str], KnowledgeStore]) -> None:
    store = copied("plain")
    file = rewrite(store, "validation", 0, lambda table, layout: table.drop_columns(["clip_embedding"]))
    assert verify_store(store) == [f"{file}: its columns or metadata are not those of the manifest's layout"]
    store = copied("plain")

    def other_metadata(table: pa.Table, layout: KnowledgeLayout) -> pa.Table:
        views = layout.views[::-1]
        return table.replace_schema_metadata(replace(layout, views=views).schema().metadata)

    file = rewrite(store, "validation", 0, other_metadata)
    assert verify_store(store) == [f"{file}: its columns or metadata are not those of the manifest's layout"]


def test_a_manifest_that_counts_wrong(copied: Callable[[str], KnowledgeStore]) -> None:
    store = copied("plain")
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


def test_a_shard_that_is_not_parquet(copied: Callable[[str], KnowledgeStore]) -> None:
    """With a manifest that vouches for it."""
    store = copied("plain")
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
def test_files_that_nothing_names(name: str, says: str, copied: Callable[[str], KnowledgeStore]) -> None:
    store = copied("plain")
    Path(store.at(name)).write_bytes(b"{}")
    assert verify_store(store) == [f"{store.path}/{name}: {says}"]


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"version": 2}'])
@pytest.mark.parametrize("name", ["train/00003.json", "fingerprint.json"])
def test_small_files_that_disagree(
    content: bytes | None, name: str, copied: Callable[[str], KnowledgeStore]
) -> None:
    store = copied("plain")
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
    damage: Callable[[KnowledgeStore], None], name: str, says: str, copied: Callable[[str], KnowledgeStore]
) -> None:
    store = copied("plain")
    damage(store)
    (problem,) = verify_store(store)
    assert store.at(name) in problem
    assert says in problem


def test_without_a_usable_manifest(copied: Callable[[str], KnowledgeStore], tmp_path: Path) -> None:
    store = copied("plain")
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


RICH = FINGERPRINT | {
    "dataset": {"name": "digits", "num_train": 32},
    "visual_teacher": {"model": "resnet8", "weights": "ab" * 32, "batch_size": 7},
    "text_teacher": {"weights": "cd" * 32, "batch_size": 50},
}


def rich(store: KnowledgeStore, chain: Chain) -> KnowledgeStore:
    """Give a store the fingerprint that a run writes."""
    Path(store.at("fingerprint.json")).write_text(json.dumps(RICH))
    chain.finish(store)
    return store


def test_summary(chain: Chain, copied: Callable[[str], KnowledgeStore]) -> None:
    store = rich(copied("plain"), chain)
    manifest = store.manifest()
    summary = describe_store(store, weighting="confidence", fusion_temperature=0.2)
    quality = measure_quality(store.read("validation"), store.constants("bank"), "confidence", 0.2, None)
    assert summary.quality == quality
    assert (summary.text_bank, summary.weighting, summary.fusion_temperature) == ("bank", "confidence", 0.2)
    assert chain.clip is not None
    assert summary.clip_temperature == pytest.approx(chain.clip.temperature)
    train, validation = len(chain.train), len(chain.validation)
    assert summary.splits["train"].rows == train
    assert summary.splits["train"].num_shards == 4
    on_disk = {
        split: sum(f.stat().st_size for f in Path(store.at(split)).glob("*.parquet"))
        for split in summary.splits
    }
    assert {name: split.num_bytes for name, split in summary.splits.items()} == on_disk
    assert summary.bytes_per_image_and_variant == pytest.approx(
        sum(on_disk.values()) / (train * 3 + validation)
    )
    assert summary.class_names == manifest.class_names

    lines = format_summary(summary).splitlines()
    assert lines[0] == f"knowledge store {store.path}: finished"
    said = {line[2:22].strip(): line[22:] for line in lines}
    assert said["dataset"] == "digits"
    assert said["classes"].startswith("10: ")
    assert said["views"] == "original, edge, high_frequency"
    assert said["images"] == "16×16 pixels, raw"
    assert said["numbers"] == "float16"
    assert said["feature width"] == "64"
    assert said["embedding width"] == "24"
    assert said["train"].startswith(f"{train} images, variants of each: 3; 4 shards, ")
    assert said["validation"].startswith(f"{validation} images, variants of each: 1; 2 shards, ")
    assert said["visual teacher"] == "resnet8, weights abababababab…"
    assert said["text teacher"] == "CLIP, weights cdcdcdcdcdcd…"
    for view in VIEWS:
        assert f"{view} {100 * quality.views[view]:.1f} %" in said["each view"]
        assert f"{view} {100 * quality.zero_shot[view]:.1f} %" in said["CLIP zero-shot"]
    for name in ("uniform", "semantic", "oracle"):
        assert f"{name} {100 * quality.fused[name]:.1f} %" in said["fused"]
    text = "\n".join(lines)
    assert "weighting confidence; fusion temperature 0.2" in text
    assert "text bank bank" in text
    assert "  views.edge.strength = 0.5" in lines
    assert "  visual_teacher.batch_size = 7" in lines
    assert "  view_order = original, edge" in lines
    assert "looks at the label" in format_summary(describe_store(store))


def test_the_newest_text_bank_unless_one_is_named(copied: Callable[[str], KnowledgeStore]) -> None:
    store = copied("plain")
    store.write_text_bank("another", UNIT, 0.5)
    os.utime(store.at("text_banks", "another.safetensors"), (1, 1))
    assert describe_store(store).text_bank == "bank"
    assert describe_store(store, "another").text_bank == "another"
    assert describe_store(store, "another").clip_temperature == 0.5
    os.utime(store.at(BANK), (0, 0))
    assert describe_store(store).text_bank == "another"
    with pytest.raises(UserError, match="no text bank"):
        describe_store(store, "a third")
    Path(store.at(BANK)).unlink()
    Path(store.at("text_banks", "another.safetensors")).unlink()
    quality = describe_store(store).quality
    assert quality is not None
    assert quality.zero_shot == {}


def test_summary_without_clip_and_with_images_set_aside(tmp_path: Path) -> None:
    chain = digits_chain(None)
    store = write(chain, tmp_path, image_format="reference", dtype="int8")
    table = pq.read_table(shard_file(store, "train", 0))
    aside = [{"id": f"bad/{number}", "reason": "truncated"} for number in range(12)]
    store.write_shard("train", 0, table, aside)
    layouts = store.manifest().layouts
    store.finish(chain.dataset.class_names, layouts, {"train": 4, "validation": 2})
    text = format_summary(describe_store(store))
    assert "12 unreadable images" in text
    assert "    bad/9: truncated\n    … and 2 more\n" in text
    assert "no text teacher" in text
    assert "CLIP zero-shot" not in text
    assert "16×16 pixels, reference" in text


def test_summary_of_what_is_not_finished(chain: Chain, tmp_path: Path) -> None:
    store = KnowledgeStore(str(tmp_path))
    with pytest.raises(UserError, match=f"no knowledge store at {tmp_path}"):
        describe_store(store)
    store.begin(FINGERPRINT)
    assert "not finished, 0 shards so far" in format_summary(describe_store(store))
    chain.compute(chain.plans()[:2], store)
    summary = describe_store(store)
    assert not summary.finished
    assert summary.quality is None
    assert summary.splits["train"].rows == 16
    assert summary.splits["train"].layout == chain.layouts["train"]
    text = format_summary(summary)
    assert text.startswith(f"knowledge store {tmp_path}: not finished, 2 shards so far\n")
    assert "16 images, variants of each: 3; 2 shards" in text
