"""Image datasets in the layout of the Hugging Face hub: Parquet shards of encoded images and labels."""

import fnmatch
import hashlib
import json
from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileType

from tmkd_ray.datasets import DATASETS
from tmkd_ray.datasets.base import DatasetConfig, ImageDataset, SampleIndex, Split, digest
from tmkd_ray.errors import UnreadableImageError, UserError
from tmkd_ray.settings import Location
from tmkd_ray.storage import absolute, is_outage, open_filesystem, reason, retried

PATTERNS: dict[Split, tuple[str, ...]] = {
    "train": ("train*.parquet",),
    "test": ("test*.parquet", "val*.parquet"),
}


class ParquetConfig(DatasetConfig):
    """`path` is a folder, or a URI such as `s3://bucket/folder`."""

    name: str = "parquet"
    path: Location
    image_column: str = "image"
    label_column: str = "label"


@DATASETS.register("parquet")
class Parquet(ImageDataset):
    """Shards `train*.parquet` and `test*.parquet` in `path`, or in `path/data`.

    Where there is no test shard, the validation shards (`val*`, `valid*`, `validation*`) ARE the test split:
    hubs often keep the test labels back. Choices are made on a part of train, never on them.

    The image column is struct(bytes, path) or binary; the label column an integer. Class names come from the
    ClassLabel in the schema's `huggingface` metadata, or from `class_names`.
    """

    Config = ParquetConfig
    config: ParquetConfig

    def __init__(self, config: ParquetConfig) -> None:
        """Find the shards.

        Raises:
            UserError: the folder, shards of a split, a column, or the class names are missing.
        """
        self.config = config
        self._path = absolute(config.path)
        self._files: dict[Split, list[str]] = self._find_files()
        super().__init__(config)

    def _find_files(self) -> dict[Split, list[str]]:
        filesystem, root = open_filesystem(self._path)
        try:
            if filesystem.get_file_info(root).type != FileType.Directory:
                raise UserError(f"dataset.path: no folder {self.config.path}")
            names = {
                folder: sorted(
                    info.base_name
                    for info in filesystem.get_file_info(
                        FileSelector(f"{root}/{folder}".rstrip("/"), allow_not_found=True)
                    )
                    if info.type == FileType.File
                )
                for folder in ("", "data/")
            }
        except OSError as error:
            raise UserError(
                f"dataset.path: cannot list {self.config.path}: {reason(error, self._path)}"
            ) from error
        files: dict[Split, list[str]] = {}
        for split, patterns in PATTERNS.items():
            candidates = (
                [folder + name for name in fnmatch.filter(names[folder], pattern)]
                for pattern in patterns
                for folder in names
            )
            files[split] = next(filter(None, candidates), [])
            if not files[split]:
                there = [folder + name for folder in names for name in names[folder]]
                raise UserError(
                    f"dataset.path: no {' or '.join(patterns)} in {self.config.path} or its data folder; "
                    f"there are: {', '.join(there[:10]) or 'no files'}{', …' if len(there) > 10 else ''}"
                )
        return files

    def _open(self, file: str) -> pq.ParquetFile:
        """Raises pa.ArrowException or OSError."""
        # Not kept in the object: pickled, a file system forgets its retries; a worker has its own environment.
        filesystem, root = open_filesystem(self._path)
        return retried(lambda: pq.ParquetFile(f"{root}/{file}", filesystem=filesystem))

    def _unreadable(self, file: str, error: Exception) -> UserError:
        return UserError(f"dataset.path: cannot read {self.config.path}/{file}: {reason(error, self._path)}")

    def _open_checked(self, file: str) -> pq.ParquetFile:
        """Open a shard.

        Raises:
            UserError: it is not Parquet, or has not the columns.
        """
        try:
            opened = self._open(file)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(file, error) from error
        for option, kind, matches in (
            ("image_column", "binary or struct(bytes)", _is_image_type),
            ("label_column", "integer", pa.types.is_integer),
        ):
            column = getattr(self.config, option)
            fitting = [field.name for field in opened.schema_arrow if matches(field.type)]
            if column not in fitting:
                found = (
                    opened.schema_arrow.field(column).type if column in opened.schema_arrow.names else "missing"
                )
                raise UserError(
                    f"dataset.{option}: column {column!r} of {self.config.path}/{file} is {found}, not {kind}; "
                    f"columns that fit: {', '.join(fitting) or 'none'}"
                )
        return opened

    def _own_class_names(self) -> Sequence[str]:
        with self._open_checked(self._files["train"][0]) as opened:
            metadata = opened.schema_arrow.metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        feature = features.get(self.config.label_column, {})
        if "names" not in feature:
            raise UserError(
                f"{self.config.path}/{self._files['train'][0]} does not name the classes of "
                f"{self.config.label_column!r} in its schema. Set dataset.class_names to a file of names"
            )
        return [str(name) for name in feature["names"]]

    def _read_index(self, split: Split) -> SampleIndex:
        labels, counts = [], []
        name = self.config.label_column
        for file in self._files[split]:
            with self._open_checked(file) as opened:
                try:
                    column = retried(partial(opened.read, [name]))[name]
                except (pa.ArrowException, OSError) as error:
                    raise self._unreadable(file, error) from error
            if column.null_count:
                raise UserError(
                    f"dataset.label_column: {column.null_count} rows of {self.config.path}/{file} have no label"
                )
            labels.append(column.to_numpy().astype(np.int64))
            counts.append(len(column))
        ids = [
            f"{file}:{row}"
            for file, count in zip(self._files[split], counts, strict=True)
            for row in range(count)
        ]
        return SampleIndex(
            np.array(ids, dtype=np.str_),
            np.concatenate(labels),
            np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            np.concatenate([np.arange(count, dtype=np.int64) for count in counts]),
        )

    def read(self, split: Split, index: SampleIndex) -> list[bytes | np.ndarray | UnreadableImageError]:
        """Return each image's encoded bytes; each row group that holds any is read once, its images only.

        Raises:
            UserError: the storage does not answer, or refuses; its images are not damaged.
        """
        contents: list[bytes | np.ndarray | UnreadableImageError] = [
            UnreadableImageError("the row holds no image")
        ] * len(index)
        for part in np.unique(index.part):
            positions = np.flatnonzero(index.part == part)
            try:
                retried(partial(self._read_part, self._files[split][part], index.row, positions, contents))
            except (pa.ArrowException, OSError) as error:
                if is_outage(error):
                    raise self._unreadable(self._files[split][part], error) from error
                for position in positions:
                    contents[position] = UnreadableImageError(
                        f"cannot read {self._files[split][part]}: {error}"
                    )
        return contents

    def _read_part(
        self,
        file: str,
        rows: np.ndarray,
        positions: np.ndarray,
        contents: list[bytes | np.ndarray | UnreadableImageError],
    ) -> None:
        """Fill in `contents` at the positions, whose rows are all in this file."""
        with self._open(file) as opened:
            name = self.config.image_column
            is_struct = pa.types.is_struct(opened.schema_arrow.field(name).type)
            metadata = opened.metadata
            ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
            groups = np.searchsorted(ends, rows[positions], side="right")
            for group in np.unique(groups):
                table = opened.read_row_group(
                    int(group), [f"{name}.bytes" if is_struct else name], use_threads=False
                )
                column = table[name].combine_chunks()
                column = column.field("bytes") if is_struct else column
                wanted = positions[groups == group]
                first = ends[group] - len(column)
                for position, content in zip(
                    wanted, column.take(rows[wanted] - first).to_pylist(), strict=True
                ):
                    if content is not None:
                        contents[position] = content

    def fingerprint(self, split: Split) -> str:
        """Hash names, sizes and footers: these hold each column block's place, size, least and largest value.

        Raises:
            UserError: a shard cannot be read.
        """
        shards = []
        for file in self._files[split]:
            try:
                size, footer = retried(partial(self._read_footer, file))
            except (pa.ArrowException, OSError) as error:
                raise self._unreadable(file, error) from error
            shards.append([file, size, hashlib.sha256(footer).hexdigest()])
        return digest([shards, self.config.image_column, self.config.label_column])

    def _read_footer(self, file: str) -> tuple[int, bytes]:
        """Return a shard's size and footer. Raises pa.ArrowException or OSError."""
        filesystem, root = open_filesystem(self._path)
        with filesystem.open_input_file(f"{root}/{file}") as opened:
            size = opened.size()
            footer_bytes = int.from_bytes(opened.read_at(4, size - 8), "little")
            return size, opened.read_at(footer_bytes, size - 8 - footer_bytes)


def _is_image_type(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image_type(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
