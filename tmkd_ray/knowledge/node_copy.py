"""One copy of a store per machine, on its disk, which all processes map into memory and none loads.

The shards of a store are packed for storage: hashed, compressed, cut in pieces. The copy holds the same arrays
as plain `.npy` files, so that any rows can be read at once by any number of trainings, which share the pages.
It lies below `root`, named by the store's content; a copy of another content is another folder. Copies that
nobody opened for two weeks are removed when another is made, and any but the one in the making when the disk is
full: what a process has mapped stays readable to it, and who comes later makes the copy again.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.store import KnowledgeArrays, KnowledgeStore

UNUSED_S = 14 * 24 * 3600.0
"""A copy is kept for so long after it was last opened."""

_NAMES = (
    "ids",
    "labels",
    "images",
    "augmentation",
    "feature",
    "clip_embedding",
    "feature_scale",
    "clip_embedding_scale",
)


ReadImages = Callable[[KnowledgeArrays], np.ndarray]
"""Images of the samples of some arrays, uint8 [N, H, W, 3]."""


def default_root() -> str:
    """Return `$TMKD_CACHE`, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("TMKD_CACHE") or os.path.join(home, "tmkd_ray")


def map_store(
    store: KnowledgeStore, split: str, root: str | None = None, read_images: "ReadImages | None" = None
) -> KnowledgeArrays:
    """Return a split of a store as read-only arrays mapped from this machine's copy, made on first use.

    Processes that want the same copy at once wait for the one that makes it.

    Args:
        root: folder for copies on a local disk; None for `default_root`.
        read_images: gives those of a store that only refers to them, for the copy to hold.

    Raises:
        UserError: the store is missing or damaged; the disk is full (names the folder).
    """
    manifest = store.manifest()
    content = json.dumps([asdict(shard) for shard in manifest.shards if shard.split == split])
    key = hashlib.sha256(content.encode()).hexdigest()[:24]
    folder = Path(root or default_root()) / "knowledge" / f"{key}-{split}"
    if manifest.layouts[split].image_format != "reference":
        read_images = None
    if read_images is not None:
        folder = folder.with_name(f"{folder.name}-images")
    arrays: dict[str, Any] = dict.fromkeys(_NAMES)
    try:
        with _locked(folder):
            if not folder.is_dir():
                _remove_others(folder, time.time() - UNUSED_S)
                _make_or_make_room(store, split, folder, read_images)
            os.utime(folder)
            for name in _NAMES:
                file = folder / f"{name}.npy"
                if file.exists():
                    arrays[name] = np.load(file, mmap_mode="r")
    except OSError as error:
        raise UserError(
            f"cannot make this machine's copy of the knowledge store in {folder}: {error}; give another disk "
            "by knowledge.node_copies or $TMKD_CACHE, or set knowledge.loader=resident"
        ) from error
    arrays["ids"] = np.asarray(arrays["ids"])
    return KnowledgeArrays(manifest.layouts[split], **arrays)


def _make_or_make_room(
    store: KnowledgeStore, split: str, folder: Path, read_images: "ReadImages | None"
) -> None:
    try:
        _make(store, split, folder, read_images)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if not _remove_others(folder, math.inf):
            raise
        _make(store, split, folder, read_images)


def _remove_others(folder: Path, opened_before_s: float) -> bool:
    """Remove the copies beside `folder` that were last opened before; return whether there were any."""
    removed = False
    for other in folder.parent.iterdir():
        if other == folder or not other.is_dir() or other.suffix:  # a suffix: it is being made
            continue
        with _locked(other, wait=False) as free:
            if free and other.is_dir() and other.stat().st_mtime < opened_before_s:
                shutil.rmtree(other)
                removed = True
    return removed


def _make(store: KnowledgeStore, split: str, folder: Path, read_images: "ReadImages | None") -> None:
    """Write a copy whole: under another name first."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    columns = {"image": "images"}

    def allocate(column: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        path = unfinished / f"{columns.get(column, column)}.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        with open(path, "r+b") as file:  # a full disk is told here; at a write into the mapping it would kill
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return array

    arrays = store.read(split, allocate=allocate)
    np.save(unfinished / "ids.npy", arrays.ids)
    np.save(unfinished / "labels.npy", arrays.labels)
    if read_images is not None:
        np.save(unfinished / "images.npy", read_images(arrays))
    for name in _NAMES:
        values = getattr(arrays, name)
        if isinstance(values, np.memmap):
            values.flush()
    unfinished.rename(folder)


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a copy; without waiting, yield whether it is held."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
