"""One folder of image files per class."""

import concurrent.futures
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from pyarrow.fs import FileSelector, FileType
from pydantic import Field

from tmkd_ray.datasets import DATASETS
from tmkd_ray.datasets.base import DatasetConfig, ImageDataset, SampleIndex, Split, digest
from tmkd_ray.datasets.splits import stratified_part
from tmkd_ray.errors import UnreadableImageError, UserError
from tmkd_ray.settings import Location
from tmkd_ray.storage import is_outage, open_filesystem, read_file, reason

PARALLEL_READS = 16
"""From a store each file costs a round trip."""

TEST_FOLDERS = ("test", "val", "valid", "validation")


class ImageFolderConfig(DatasetConfig):
    """`path` is a folder, or a URI such as `s3://bucket/folder`.

    `class_names` gives the folders' names in the order of the labels (default: sorted), or, as a JSON
    object, a class name for each folder: `{"n01440764": "tench", …}`; every folder and no other.
    """

    name: str = "image_folder"
    path: Location
    test_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="of each class, set apart by split_seed when there is no train folder",
    )


@DATASETS.register("image_folder")
class ImageFolder(ImageDataset):
    """`path/train/<class>/**` and `path/test/<class>/**`; or `path/<class>/**`, of which a part becomes test.

    The test split is the first of test, val, valid, validation that has class folders. Every regular file
    that is not hidden counts as an image, whatever its extension: one that is none is set aside later, with its
    reason. Links to folders are refused; a link to a file outside of `path` is an unreadable image.
    """

    Config = ImageFolderConfig
    config: ImageFolderConfig

    def __init__(self, config: ImageFolderConfig) -> None:
        """Find the class folders.

        Raises:
            UserError: `path` or the test split is missing, or the splits' classes differ.
        """
        self._tree: _Tree = (
            _Store(config.path) if "://" in config.path else _Local(Path(config.path).expanduser().absolute())
        )
        if not self._tree.is_folder(""):
            raise UserError(f"dataset.path: no folder {config.path}")
        self._split_folders: dict[Split, str] = {}
        # A lone `train` folder of mere files is a class: CIFAR-100 has one of that name.
        if self._tree.subfolders("train") or (
            self._tree.is_folder("train") and any(self._tree.is_folder(name) for name in TEST_FOLDERS)
        ):
            test = next((name for name in TEST_FOLDERS if self._tree.subfolders(name)), None)
            if test is None:
                raise UserError(
                    f"dataset.path: {config.path} has a train folder, but no class folders in any of "
                    f"{', '.join(TEST_FOLDERS)}. Add one, or move the classes up, out of train, to have a test "
                    "split set apart"
                )
            self._split_folders = {"train": "train", "test": test}
        self._folders = self._tree.subfolders(self._split_folders.get("train", ""))
        unknown = set(self._tree.subfolders(self._split_folders.get("test", ""))) - set(self._folders)
        if unknown:
            raise UserError(
                f"dataset.path: {config.path}: classes in {self._split_folders['test']} that are not in train: "
                f"{', '.join(sorted(unknown))}"
            )
        super().__init__(config)

    def _own_class_names(self) -> Sequence[str]:
        return self._folders

    def _apply_class_file(self, names: list[str] | dict[str, str]) -> Sequence[str]:
        names = names if isinstance(names, dict) else {name: name for name in names}
        missing, unknown = set(self._folders) - set(names), set(names) - set(self._folders)
        if missing or unknown:
            raise UserError(
                f"dataset.class_names: {self.config.class_names} does not match the class folders in "
                f"{self.config.path}. Folders without a name: {', '.join(sorted(missing)) or 'none'}. "
                f"Names without a folder: {', '.join(sorted(unknown)) or 'none'}"
            )
        self._folders = list(names)
        return list(names.values())

    def _read_index(self, split: Split) -> SampleIndex:
        found = self._list(split)
        ids = np.array([name for name, _, _ in found], dtype=np.str_)
        labels = np.array([label for _, label, _ in found], dtype=np.int64)
        index = SampleIndex(
            ids, labels, np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), dtype=np.int64)
        )
        if self._split_folders or not len(ids):
            return index
        is_test = stratified_part(ids, labels, self.config.test_fraction, self.config.split_seed, "test")
        return index.take(np.flatnonzero(is_test == (split == "test")))

    def _list(self, split: Split) -> list[tuple[str, int, int]]:
        """Return (path below the root with forward slashes, label, bytes) of each file, sorted by path."""
        prefix = f"{self._split_folders[split]}/" if self._split_folders else ""
        found: list[tuple[str, int, int]] = []
        for label, folder in enumerate(self._folders):
            for name, size in self._tree.files(prefix + folder):
                try:
                    name.encode()
                except UnicodeEncodeError as error:
                    raise UserError(f"dataset.path: the file name {name!r} is not UTF-8; rename it") from error
                found.append((name, label, size))
        return sorted(found)

    def read(self, split: Split, index: SampleIndex) -> list[bytes | np.ndarray | UnreadableImageError]:
        """Return each file's content.

        Raises:
            UserError: the storage does not answer, or refuses; its images are not damaged.
        """
        return [*self._tree.read(index.ids.tolist())]

    def fingerprint(self, split: Split) -> str:
        test_part = None if self._split_folders else (split, self.config.test_fraction, self.config.split_seed)
        return digest([self._list(split), test_part])


class _Tree(Protocol):
    """Folders and files by their paths below the dataset's, with forward slashes; the hidden ones left out."""

    def is_folder(self, path: str) -> bool: ...

    def subfolders(self, path: str) -> list[str]:
        """Return the sorted names of the folders in a folder; none if it does not exist."""

    def files(self, path: str) -> Iterator[tuple[str, int]]:
        """Yield path and size of each file in a folder and below; none if it does not exist."""

    def read(self, paths: list[str]) -> list[bytes | UnreadableImageError]: ...


class _Local:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def is_folder(self, path: str) -> bool:
        return (self._root / path).is_dir()

    def subfolders(self, path: str) -> list[str]:
        if not self.is_folder(path):
            return []
        with os.scandir(self._root / path) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))

    def files(self, path: str) -> Iterator[tuple[str, int]]:
        """Regular files and links to files; links to folders are refused."""
        folder = self._root / path
        if folder.is_symlink():
            raise UserError(
                f"dataset.path: {folder} is a link to a folder, which is not followed. Put a folder there"
            )
        if not folder.is_dir():
            return  # a class of train that test has no folder for
        with os.scandir(folder) as entries:
            for entry in entries:
                below = f"{path}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from self.files(below)
                elif entry.is_file() or entry.is_symlink():
                    yield below, entry.stat(follow_symlinks=False).st_size

    def read(self, paths: list[str]) -> list[bytes | UnreadableImageError]:
        root = os.path.realpath(self._root)
        return [self._read_file(root, path) for path in paths]

    def _read_file(self, root: str, name: str) -> bytes | UnreadableImageError:
        path = os.path.realpath(self._root / name)
        if not path.startswith(root + os.sep):
            return UnreadableImageError(f"it leads out of the dataset's folder, to {path}")
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            if is_outage(error):
                raise UserError(f"dataset.path: cannot read {path}: {reason(error, path)}") from error
            return UnreadableImageError(f"cannot read the file: {error.strerror}")


class _Store:
    """A folder by its URI, connected for each call: once pickled, by the environment of where it then is."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def is_folder(self, path: str) -> bool:
        filesystem, root = open_filesystem(self._uri)
        try:
            return bool(filesystem.get_file_info(_below(root, path)).type == FileType.Directory)
        except OSError as error:
            raise UserError(f"dataset.path: cannot list {self._uri}: {reason(error, self._uri)}") from error

    def subfolders(self, path: str) -> list[str]:
        return sorted(name for name, kind, _ in self._list(path, False) if kind == FileType.Directory)

    def files(self, path: str) -> Iterator[tuple[str, int]]:
        for name, kind, size in self._list(path, True):
            if kind == FileType.File:
                yield f"{path}/{name}", size

    def _list(self, path: str, recursive: bool) -> Iterator[tuple[str, FileType, int]]:
        """Yield path below `path`, type and size of what is not hidden."""
        filesystem, root = open_filesystem(self._uri)
        folder = _below(root, path)
        try:
            infos = filesystem.get_file_info(FileSelector(folder, allow_not_found=True, recursive=recursive))
        except OSError as error:
            raise UserError(f"dataset.path: cannot list {self._uri}: {reason(error, self._uri)}") from error
        for info in infos:
            name = info.path.removeprefix(folder).strip("/")
            if not any(part.startswith(".") for part in name.split("/")):
                yield name, info.type, info.size

    def read(self, paths: list[str]) -> list[bytes | UnreadableImageError]:
        with concurrent.futures.ThreadPoolExecutor(PARALLEL_READS) as pool:
            return list(pool.map(self._read_file, paths))

    def _read_file(self, path: str) -> bytes | UnreadableImageError:
        filesystem, root = open_filesystem(self._uri)
        try:
            return read_file(filesystem, _below(root, path))
        except OSError as error:
            if is_outage(error):
                text = f"dataset.path: cannot read {self._uri.rstrip('/')}/{path}: {reason(error, self._uri)}"
                raise UserError(text) from error
            return UnreadableImageError(f"cannot read the file: {reason(error, self._uri)}")


def _below(root: str, path: str) -> str:
    return f"{root.rstrip('/')}/{path}".rstrip("/")
