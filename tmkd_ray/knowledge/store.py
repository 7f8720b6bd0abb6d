"""The knowledge store: a folder of Parquet shards and a manifest.

    fingerprint.json        what the content depends on; written first, so that nothing else is mixed in
    head.safetensors        the visual teacher's classifier: weight [C, D], bias [C]
    text_banks/HASH.safetensors   text bank [V, C, E] of one set of prompts, and CLIP's temperature
    train/00000.parquet …   shards (`layout` documents the columns); train/00000.json commits one
    validation/…            the validation split of train, without augmentation
    manifest.json           written last: layout, class names, shards with rows and checksums, images set aside

A shard is written under a temporary name, renamed, then committed by its record; a reader of the
manifest never sees a part of one. What is committed is never computed again.
"""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.fusion import TeacherConstants
from tmkd_ray.knowledge.fingerprint import Fingerprint, check_match
from tmkd_ray.knowledge.layout import KnowledgeLayout, decode_array

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ShardRecord:
    """What commits a shard. `sha256` is of the file; `set_aside` lists id and reason of unreadable images."""

    split: str
    number: int
    rows: int
    bytes: int
    sha256: str
    set_aside: list[dict[str, str]]


@dataclass(frozen=True)
class Manifest:
    """What a finished store holds."""

    class_names: tuple[str, ...]
    layouts: dict[str, KnowledgeLayout]
    shards: list[ShardRecord]
    fingerprint: Fingerprint

    @property
    def set_aside(self) -> list[dict[str, str]]:
        return [entry for shard in self.shards for entry in shard.set_aside]

    def rows(self, split: str) -> int:
        return sum(shard.rows for shard in self.shards if shard.split == split)

    def total_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class KnowledgeArrays:
    """A split of a store in memory: N images, K variants, V views.

    Attributes:
        ids: [N]. labels: int64 [N]. images: uint8 [N, H, W, 3].
        augmentation: int16 [N, K, 5].
        feature: [N, K, V, D]. clip_embedding: [N, K, V, E], or None.
    """

    layout: KnowledgeLayout
    ids: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    augmentation: np.ndarray
    feature: np.ndarray
    clip_embedding: np.ndarray | None

    def __len__(self) -> int:
        return len(self.labels)


class KnowledgeStore:
    """A store at a path; opening one reads nothing."""

    def __init__(self, path: str) -> None:
        self.path = path

    def _at(self, *parts: str) -> str:
        return storage.join(self.path, *parts)

    def _shard(self, split: str, number: int, suffix: str) -> str:
        return self._at(split, f"{number:05d}.{suffix}")

    def begin(self, fingerprint: Fingerprint) -> None:
        """Claim the folder for this fingerprint, or go on with what lies there.

        Raises:
            KnowledgeMismatchError: it holds another configuration's knowledge.
        """
        stored = self.fingerprint()
        if stored is None or not self.committed():
            storage.write_bytes(self._at("fingerprint.json"), _json(fingerprint))
        else:
            check_match(stored, fingerprint, self.path)

    def fingerprint(self) -> Fingerprint | None:
        """Return what the content depends on; None where there is no store yet."""
        name = self._at("fingerprint.json")
        if not storage.exists(name):
            return None
        stored: Fingerprint = json.loads(storage.read_bytes(name))
        return stored

    def committed(self) -> dict[tuple[str, int], ShardRecord]:
        """Return the records of the shards that are done and there, by split and number."""
        records = {}
        for split in ("train", "validation"):
            names = set(storage.list_names(self._at(split)))
            for name in names:
                if name.endswith(".json") and name.removesuffix("json") + "parquet" in names:
                    record = ShardRecord(**json.loads(storage.read_bytes(self._at(split, name))))
                    records[split, record.number] = record
        return records

    def write_shard(
        self, split: str, number: int, table: pa.Table, set_aside: list[dict[str, str]]
    ) -> ShardRecord:
        """Write and commit one shard."""
        buffer = io.BytesIO()
        # Embeddings are noise to a compressor; images and strings are not.
        packed = {"id": "zstd", "label": "zstd", "image": "zstd", "augmentation": "zstd"}
        compression = {name: packed.get(name, "none") for name in table.schema.names}
        pq.write_table(table, buffer, compression=compression, use_dictionary=False, write_statistics=False)
        content = buffer.getvalue()
        record = ShardRecord(
            split, number, len(table), len(content), hashlib.sha256(content).hexdigest(), set_aside
        )
        storage.write_bytes(self._shard(split, number, "parquet"), content)
        storage.write_bytes(self._shard(split, number, "json"), _json(asdict(record)))
        return record

    def write_head(self, weight_CD: torch.Tensor, bias_C: torch.Tensor) -> None:
        """Keep the visual teacher's classifier."""
        tensors = {"weight": weight_CD.float().contiguous(), "bias": bias_C.float().contiguous()}
        storage.write_bytes(self._at("head.safetensors"), safetensors.torch.save(tensors))

    def has_text_bank(self, key: str) -> bool:
        return storage.exists(self._at("text_banks", f"{key}.safetensors"))

    def write_text_bank(self, key: str, bank_VCE: torch.Tensor, temperature: float) -> None:
        """Keep the text bank of one set of prompts, see `text_bank_key`."""
        tensors = {"bank": bank_VCE.float().contiguous(), "temperature": torch.tensor(temperature)}
        storage.write_bytes(self._at("text_banks", f"{key}.safetensors"), safetensors.torch.save(tensors))

    def finish(self, class_names: tuple[str, ...], layouts: dict[str, KnowledgeLayout]) -> Manifest:
        """Write the manifest over all committed shards."""
        records = [record for _, record in sorted(self.committed().items())]
        fingerprint = self.fingerprint()
        assert fingerprint is not None, "a store is begun before it is finished"
        manifest = Manifest(class_names, layouts, records, fingerprint)
        content = {"schema_version": SCHEMA_VERSION, **asdict(manifest)}
        storage.write_bytes(self._at("manifest.json"), _json(content))
        return manifest

    def is_finished(self) -> bool:
        return storage.exists(self._at("manifest.json"))

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            UserError: there is no finished store at this path.
        """
        if not self.is_finished():
            raise UserError(f"no finished knowledge store at {self.path}; run `tmkd knowledge` first")
        content = json.loads(storage.read_bytes(self._at("manifest.json")))
        if content["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{self.path} is a knowledge store of schema version {content['schema_version']}, "
                f"this program reads {SCHEMA_VERSION}; compute it anew"
            )
        layouts = {
            split: KnowledgeLayout(**{**fields, "views": tuple(fields["views"])})
            for split, fields in content["layouts"].items()
        }
        shards = [ShardRecord(**fields) for fields in content["shards"]]
        return Manifest(tuple(content["class_names"]), layouts, shards, content["fingerprint"])

    def read(self, split: str) -> KnowledgeArrays:
        """Read a split into memory, in shard order.

        Raises:
            UserError: a shard is missing or is not what was committed (names the file).
        """
        manifest = self.manifest()
        layout = manifest.layouts[split]
        tables = []
        for record in manifest.shards:
            if record.split == split:
                tables.append(self._read_shard(record))
        table = pa.concat_tables(tables) if tables else layout.schema().empty_table()
        columns = {
            name: decode_array(table.column(name), dtype, shape)
            for name, (dtype, shape) in layout.arrays().items()
        }
        return KnowledgeArrays(
            layout,
            ids=np.array(table.column("id").to_pylist(), dtype=np.str_),
            labels=table.column("label").to_numpy(),
            images=columns["image"],
            augmentation=columns["augmentation"],
            feature=columns["feature"],
            clip_embedding=columns.get("clip_embedding"),
        )

    def _read_shard(self, record: ShardRecord) -> pa.Table:
        name = self._shard(record.split, record.number, "parquet")
        if not storage.exists(name):
            raise UserError(f"{name} is missing from the knowledge store; run `tmkd knowledge` again")
        content = storage.read_bytes(name)
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise UserError(
                f"{name} is damaged: {len(content)} bytes that are not those committed ({record.bytes}); "
                "delete it and run `tmkd knowledge` again"
            )
        return pq.read_table(pa.BufferReader(content))

    def constants(self, text_bank_key: str | None) -> TeacherConstants:
        """Read the classifier and, if asked for, a text bank.

        Raises:
            UserError: the text bank of these prompts is not there.
        """
        head = safetensors.torch.load(storage.read_bytes(self._at("head.safetensors")))
        views = self.manifest().layouts["train"].views
        if text_bank_key is None:
            return TeacherConstants(views, head["weight"], head["bias"])
        if not self.has_text_bank(text_bank_key):
            raise UserError(
                f"the knowledge store at {self.path} has no text bank for these prompts; run `tmkd knowledge`"
            )
        bank = safetensors.torch.load(
            storage.read_bytes(self._at("text_banks", f"{text_bank_key}.safetensors"))
        )
        return TeacherConstants(views, head["weight"], head["bias"], bank["bank"], bank["temperature"].item())


def text_bank_key(prompts: dict[str, tuple[str, ...]], class_names: tuple[str, ...], clip: str) -> str:
    """Name the text bank of these prompts per view, class names and CLIP text tower (its fingerprint)."""
    return hashlib.sha256(_json([prompts, class_names, clip])).hexdigest()[:16]


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
