"""One folder of image files per class."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from tmkd_ray.datasets import DATASETS
from tmkd_ray.datasets.base import DatasetConfig, ImageDataset, SampleIndex, Split, digest
from tmkd_ray.datasets.splits import stratified_part
from tmkd_ray.errors import UnreadableImageError, UserError

TEST_FOLDERS = ("test", "val", "valid", "validation")


class ImageFolderConfig(DatasetConfig):
    """`class_names` gives the folders' names in the order of the labels (default: sorted), or, as a JSON
    object, a class name for each folder: `{"n01440764": "tench", …}`; every folder and no other.
    """

    name: str = "image_folder"
    path: str
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
        self._root = Path(config.path).expanduser().absolute()
        if not self._root.is_dir():
            raise UserError(f"dataset.path: no folder {config.path}")
        self._split_folders: dict[Split, str] = {}
        # A lone `train` folder of mere files is a class: CIFAR-100 has one of that name.
        if _subfolders(self._root / "train") or (
            (self._root / "train").is_dir() and any((self._root / name).is_dir() for name in TEST_FOLDERS)
        ):
            test = next((name for name in TEST_FOLDERS if _subfolders(self._root / name)), None)
            if test is None:
                raise UserError(
                    f"dataset.path: {config.path} has a train folder, but no class folders in any of "
                    f"{', '.join(TEST_FOLDERS)}. Add one, or move the classes up, out of train, to have a test "
                    "split set apart"
                )
            self._split_folders = {"train": "train", "test": test}
        self._folders = _subfolders(self._root / self._split_folders.get("train", ""))
        unknown = set(_subfolders(self._root / self._split_folders.get("test", ""))) - set(self._folders)
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
            for entry in _files(self._root / prefix / folder):
                name = Path(entry.path).relative_to(self._root).as_posix()
                try:
                    name.encode()
                except UnicodeEncodeError as error:
                    raise UserError(f"dataset.path: the file name {name!r} is not UTF-8; rename it") from error
                found.append((name, label, entry.stat(follow_symlinks=False).st_size))
        return sorted(found)

    def read(self, split: Split, index: SampleIndex) -> list[bytes | np.ndarray | UnreadableImageError]:
        """Return each file's content."""
        root = os.path.realpath(self._root)
        return [self._read_file(root, name) for name in index.ids.tolist()]

    def _read_file(self, root: str, name: str) -> bytes | UnreadableImageError:
        path = os.path.realpath(self._root / name)
        if not path.startswith(root + os.sep):
            return UnreadableImageError(f"it leads out of the dataset's folder, to {path}")
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            return UnreadableImageError(f"cannot read the file: {error.strerror}")

    def fingerprint(self, split: Split) -> str:
        test_part = None if self._split_folders else (split, self.config.test_fraction, self.config.split_seed)
        return digest([self._list(split), test_part])


def _subfolders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder` that are not hidden; none if it does not exist."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the regular files and the links to files in `folder` and below, hidden ones left out."""
    if folder.is_symlink():
        raise UserError(
            f"dataset.path: {folder} is a link to a folder, which is not followed. Put a folder there"
        )
    if not folder.is_dir():
        return  # a class of train that test has no folder for
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(Path(entry.path))
            elif entry.is_file() or entry.is_symlink():
                yield entry
