"""Semantic segmentation data: images and masks of class indices, checked."""

import io
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from tmkd_ray import storage
from tmkd_ray.datasets.base import digest
from tmkd_ray.datasets.decode import MAX_PIXELS
from tmkd_ray.downstream.annotated import files_digest, read_image, resized
from tmkd_ray.errors import UserError

UNLABELLED = 255
"""The value of pixels that count neither in training nor in evaluation."""

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class MaskData:
    """Images and their masks, of the same stem, sorted by name.

    Attributes:
        paths, mask_paths: of images and masks, one each.
        class_names: by the masks' values.
        fingerprint: changes with the files' names and sizes.
    """

    paths: tuple[str, ...]
    mask_paths: tuple[str, ...]
    class_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, positions: np.ndarray) -> "MaskData":
        """Return the images at these positions."""
        images = tuple(self.paths[int(position)] for position in positions)
        masks = tuple(self.mask_paths[int(position)] for position in positions)
        return MaskData(images, masks, self.class_names, digest([self.fingerprint, images]))

    def read(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an image, uint8 [H, W, 3], and its mask, uint8 [H, W].

        Raises:
            UserError: one cannot be decoded, their sizes differ, or the mask has a value that is no class;
                names the file.
        """
        path = self.mask_paths[position]
        image, mask = read_image(self.paths[position]), read_mask(path)
        if image.shape[:2] != mask.shape:
            raise UserError(
                f"{path} is {mask.shape[1]}×{mask.shape[0]} pixels, its image "
                f"{self.paths[position]} {image.shape[1]}×{image.shape[0]}"
            )
        number = len(self.class_names)
        wrong = mask[(mask >= number) & (mask != UNLABELLED)]
        if wrong.size:
            raise UserError(
                f"{path} has values that are no class, {wrong[0]} for one, in {wrong.size:,} pixels; there are "
                f"{number} classes: values are 0 to {number - 1}, and {UNLABELLED} for what is not labelled"
            )
        return image, mask


def read_mask(path: str) -> np.ndarray:
    """Return a mask's values, uint8 [H, W]: of a paletted image its indices.

    Raises:
        UserError: it cannot be read, or has more than one channel or more than 8 bits; names the file.
    """
    try:
        with Image.open(io.BytesIO(storage.read_bytes(path)), formats=("PNG", "BMP", "TIFF", "GIF")) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise UserError(
                    f"{path}: {opened.width}×{opened.height} pixels; at most {MAX_PIXELS:,} are read"
                )
            mode, values = opened.mode, np.array(opened)
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path} is no PNG, BMP, TIFF or GIF image; a mask must be stored without loss"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if mode not in ("L", "P"):
        raise UserError(
            f"{path} is a {mode} image; a mask has one channel of 8 bits, the class's index in each pixel"
        )
    return values


def read_class_list(path: str) -> tuple[str, ...]:
    """Return the class names in a file, one a line.

    Raises:
        UserError: there is no such file, or it has fewer than two names, or more than masks can tell apart.
    """
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not 2 <= len(names) <= UNLABELLED:
        raise UserError(f"{path}: {len(names)} class names; expected 2 to {UNLABELLED}, one a line")
    return names


def read_masks(image_folder: str, mask_folder: str, class_names: tuple[str, ...]) -> MaskData:
    """Pair the images in a folder with the masks of the same stem in another; pixels are checked when read.

    Raises:
        UserError: there is no image, or one without a mask, or a mask without an image; names the files.
    """
    images, masks = _by_stem(image_folder), _by_stem(mask_folder)
    if not images:
        raise UserError(f"no images ({', '.join(_EXTENSIONS)}) in {image_folder}")
    for there, here, what in ((images, masks, "mask"), (masks, images, "image")):
        lacking = sorted(there.keys() - here.keys())
        if lacking:
            folder = mask_folder if what == "mask" else image_folder
            raise UserError(
                f"{len(lacking)} of {len(there)} files have no {what} of the same name in {folder}; "
                f"the first is {there[lacking[0]]}"
            )
    stems = sorted(images)
    return MaskData(
        tuple(images[stem] for stem in stems),
        tuple(masks[stem] for stem in stems),
        class_names,
        digest([files_digest(image_folder), files_digest(mask_folder), class_names]),
    )


def _by_stem(folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in storage.sizes(folder):
        stem, dot, extension = name.rpartition(".")
        if not stem or f"{dot}{extension}".lower() not in _EXTENSIONS:
            continue
        if stem in found:
            raise UserError(f"{folder} has two files {stem}.*: which one is meant?")
        found[stem] = storage.join(folder, name)
    return found


def scaled_pair(image: np.ndarray, mask: np.ndarray, shorter: float) -> tuple[np.ndarray, np.ndarray]:
    """Return image and mask with the shorter side scaled to so many pixels, rounded; masks by nearest pixel."""
    height, width = mask.shape
    scale = shorter / min(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    scaled = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return resized(image, *size), np.asarray(scaled)


def random_crop(
    image: np.ndarray, mask: np.ndarray, size: int, generator: np.random.Generator, fill: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a random square of image and mask; what is smaller is filled up on the right and below.

    Args:
        fill: uint8 [3], the colour to fill up with; its mask is unlabelled.
    """
    height, width = mask.shape
    top = int(generator.integers(0, max(height - size, 0) + 1))
    left = int(generator.integers(0, max(width - size, 0) + 1))
    image, mask = image[top : top + size, left : left + size], mask[top : top + size, left : left + size]
    cropped = np.empty((size, size, 3), np.uint8)
    cropped[:] = fill
    cropped[: mask.shape[0], : mask.shape[1]] = image
    labels = np.full((size, size), UNLABELLED, np.uint8)
    labels[: mask.shape[0], : mask.shape[1]] = mask
    return cropped, labels
