"""What `tmkd knowledge show` says of a store, finished or not."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from knowledge_chain import FINGERPRINT, Chain, digits_chain, shard_file, write_with_bank

from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.quality import measure_quality
from tmkd_ray.knowledge.store import KnowledgeStore
from tmkd_ray.knowledge.summary import describe_store, format_summary

VIEWS = ("original", "edge", "high_frequency")

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


def test_summary(chain: Chain, sound_store: Callable[[str], KnowledgeStore]) -> None:
    store = rich(sound_store("plain"), chain)
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


def test_the_newest_text_bank_unless_one_is_named(sound_store: Callable[[str], KnowledgeStore]) -> None:
    store = sound_store("plain")
    store.write_text_bank("another", F.normalize(torch.ones(3, 10, 24), dim=-1), 0.5)
    os.utime(store.at("text_banks", "another.safetensors"), (1, 1))
    assert describe_store(store).text_bank == "bank"
    assert describe_store(store, "another").text_bank == "another"
    assert describe_store(store, "another").clip_temperature == 0.5
    os.utime(store.at("text_banks", "bank.safetensors"), (0, 0))
    assert describe_store(store).text_bank == "another"
    with pytest.raises(UserError, match="no text bank"):
        describe_store(store, "a third")
    Path(store.at("text_banks", "bank.safetensors")).unlink()
    Path(store.at("text_banks", "another.safetensors")).unlink()
    quality = describe_store(store).quality
    assert quality is not None
    assert quality.zero_shot == {}


def test_summary_without_clip_and_with_images_set_aside(tmp_path: Path) -> None:
    chain = digits_chain(None)
    store = write_with_bank(chain, tmp_path, image_format="reference", dtype="int8")
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
