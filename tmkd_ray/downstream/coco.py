"""Object detection data in COCO's JSON format, checked, and COCO's average precision."""

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tmkd_ray import storage
from tmkd_ray.datasets.base import digest
from tmkd_ray.downstream.annotated import check_files, checked_relative, read_image
from tmkd_ray.errors import UserError

_BEYOND = 1.0
"""Pixels by which a box may stick out of its image, by rounding; it is clipped."""


@dataclass(frozen=True)
class CocoImage:
    """An image of a data set, and what is on it.

    Attributes:
        id: COCO's. path: of its file. width, height: in pixels.
        boxes: float32 [M, 4], x1 y1 x2 y2 in pixels. labels: int64 [M], positions in the class names.
        areas: float64 [M], of the objects. crowd: bool [M], whether a box is around a crowd.
    """

    id: int
    path: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True)
class CocoData:
    """The images of an annotation file, in its order.

    Attributes:
        class_names: by label. num_dropped: boxes left out.
        fingerprint: changes with the annotations.
    """

    source: str
    images: tuple[CocoImage, ...]
    class_names: tuple[str, ...]
    num_dropped: int
    fingerprint: str

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the images."""
        return tuple(image.path for image in self.images)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, positions: np.ndarray) -> "CocoData":
        """Return the images at these positions."""
        images = tuple(self.images[int(position)] for position in positions)
        chosen = digest([self.fingerprint, [image.id for image in images]])
        return CocoData(self.source, images, self.class_names, self.num_dropped, chosen)

    def read(self, position: int) -> np.ndarray:
        """Return an image, uint8 [H, W, 3].

        Raises:
            UserError: it cannot be read, or has not the size that the annotations say; names the file.
        """
        image = self.images[position]
        pixels = read_image(image.path)
        if pixels.shape[:2] != (image.height, image.width):
            raise UserError(
                f"{image.path} is {pixels.shape[1]}×{pixels.shape[0]} pixels, but {self.source} says "
                f"{image.width}×{image.height}: its boxes are of another image"
            )
        return pixels


def read_coco(path: str, folder: str, bad_boxes: Literal["error", "drop"] = "error") -> CocoData:
    """Read an annotation file and check all of it; the images must be in `folder`.

    Labels follow the categories' ids. Boxes that stick out of the image by rounding are clipped.

    Args:
        bad_boxes: what to do with boxes that have no area or leave the image: refuse the file, or drop them.

    Raises:
        UserError: it is missing or not COCO's format, a box is bad, an image is missing or outside of `folder`.
    """
    content = storage.read_bytes(path)
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    lists: dict[str, Any] = {
        name: tree.get(name) if isinstance(tree, dict) else None
        for name in ("images", "annotations", "categories")
    }
    for name, entries in lists.items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: COCO's format has a list of objects {name!r} at the top")
    images = _by_id(lists["images"], path, "images", {"file_name": str, "width": int, "height": int})
    categories = _by_id(lists["categories"], path, "categories", {"name": str})
    if not images or not categories:
        raise UserError(f"{path} has {len(images)} images and {len(categories)} categories")
    for entry in images.values():
        if entry["width"] < 1 or entry["height"] < 1:
            raise UserError(
                f"{path}: the image {entry['file_name']} is {entry['width']}×{entry['height']} pixels"
            )
    paths = {key: checked_relative(folder, entry["file_name"], path) for key, entry in images.items()}
    twice = [name for name, n in Counter(entry["file_name"] for entry in images.values()).items() if n > 1]
    if twice:
        raise UserError(f"{path}: {twice[0]} is listed twice")
    check_files(folder, [entry["file_name"] for entry in images.values()], path)

    label_of = {key: label for label, key in enumerate(sorted(categories))}
    found: dict[int, list[tuple[list[float], int, float, bool]]] = {key: [] for key in images}
    num_dropped = 0
    for entry in lists["annotations"]:
        where = f"{path}: annotation {entry.get('id')}"
        for name, known in (("image_id", images), ("category_id", categories)):
            if entry.get(name) not in known:
                raise UserError(f"{where}: there is no {name} {entry.get(name)}")
        image = images[entry["image_id"]]
        box, problem = _checked_box(entry.get("bbox"), image["width"], image["height"])
        if problem is not None and (bad_boxes == "error" or box is None):
            raise UserError(
                f"{where} of {image['file_name']}: the box {entry.get('bbox')} {problem}"
                + ("; mend it, or leave such boxes out with bad_boxes=drop" if box is not None else "")
            )
        if problem is not None:
            num_dropped += 1
            continue
        assert box is not None
        area = entry.get("area", (box[2] - box[0]) * (box[3] - box[1]))
        if not _is_number(area):
            raise UserError(f"{where} of {image['file_name']}: the area {area!r} is no number")
        crowd = bool(entry.get("iscrowd", 0))
        found[entry["image_id"]].append((box, label_of[entry["category_id"]], float(area), crowd))
    names = tuple(categories[key]["name"] for key in sorted(categories))
    data = tuple(
        CocoImage(
            id=key,
            path=paths[key],
            width=entry["width"],
            height=entry["height"],
            boxes=np.array([box for box, *_ in found[key]], np.float32).reshape(-1, 4),
            labels=np.array([label for _, label, _, _ in found[key]], np.int64),
            areas=np.array([area for _, _, area, _ in found[key]], np.float64),
            crowd=np.array([crowd for *_, crowd in found[key]], bool),
        )
        for key, entry in images.items()
    )
    return CocoData(path, data, names, num_dropped, digest(content.hex()))


def _by_id(entries: Any, path: str, kind: str, fields: dict[str, type]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        for name, wanted in ({"id": int} | fields).items():
            if not isinstance(entry.get(name), wanted) or isinstance(entry.get(name), bool):
                raise UserError(
                    f"{path}: {kind}: {json.dumps(entry)[:200]} has no {name!r} ({wanted.__name__})"
                )
        if entry["id"] in found:
            raise UserError(f"{path}: {kind}: the id {entry['id']} is given twice")
        found[entry["id"]] = entry
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked_box(box: Any, width: int, height: int) -> tuple[list[float] | None, str | None]:
    """Return x1 y1 x2 y2, clipped to the image (None: it is no box), and what is wrong with it, if anything."""
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        return None, "is not four numbers, x y width height"
    x, y, w, h = box
    clipped = [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]
    if w <= 0 or h <= 0:
        return clipped, "has no area"
    if min(x, y) < -_BEYOND or x + w > width + _BEYOND or y + h > height + _BEYOND:
        return clipped, f"leaves its image of {width}×{height} pixels"
    if clipped[2] - clipped[0] <= 0 or clipped[3] - clipped[1] <= 0:
        return clipped, "has no area within its image"
    return clipped, None


@dataclass(frozen=True)
class Detections:
    """What a detector found on one image.

    Attributes:
        image_id: COCO's. boxes: float [M, 4], x1 y1 x2 y2 in the image's own pixels.
        labels: int64 [M], positions in the class names. scores: float [M].
    """

    image_id: int
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


METRICS = ("mAP", "AP50", "AP75", "AP small", "AP medium", "AP large")


def require_pycocotools() -> None:
    """Check that pycocotools is installed.

    Raises:
        UserError: it is not.
    """
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise UserError(
            "detection needs pycocotools, which is not installed: pip install 'tmkd-ray[detection]'"
        ) from error


def average_precision(data: CocoData, detections: Sequence[Detections]) -> dict[str, float | None]:
    """Return COCO's average precisions, 0 to 1, by `METRICS`; None where there is no object of the size.

    Args:
        detections: of every image, each once.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    assert sorted(entry.image_id for entry in detections) == sorted(image.id for image in data.images)
    annotations: list[dict[str, Any]] = []
    for image in data.images:
        for box, label, area, crowd in zip(image.boxes, image.labels, image.areas, image.crowd, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,  # COCOeval takes a match with the id 0 for none
                    "image_id": image.id,
                    "category_id": int(label) + 1,
                    "bbox": _xywh(box),
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    found = [
        {"image_id": entry.image_id, "category_id": int(label) + 1, "bbox": _xywh(box), "score": float(score)}
        for entry in detections
        for box, label, score in zip(entry.boxes, entry.labels, entry.scores, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # both classes print as they go
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image.id, "width": image.width, "height": image.height} for image in data.images],
            "annotations": annotations,
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(data.class_names)],
        }
        truth.createIndex()
        results = COCO()
        results.dataset = {**truth.dataset, "annotations": []}
        results.createIndex()
        # `loadRes` takes no empty list.
        evaluation = COCOeval(truth, truth.loadRes(found) if found else results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: None if value < 0 else float(value)
        for name, value in zip(METRICS, evaluation.stats[:6], strict=True)
    }


def _xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1, y2 - y1]
