"""Augmentation that is drawn once, stored as numbers, and replayed to the pixel.

A teacher's output teaches an image only if both networks saw the same pixels (Beyer et al. 2022,
"Knowledge distillation: a good teacher is patient and consistent"). So the parameters of each of K
variants of an image are a pure function of (seed, sample id, variant), and both the teacher's and
the student's pixels come from `apply_crop` / `apply_crop_torch`.

Parameters are int16 [..., 5]: top, left, height, width of the crop box, in pixels of the stored
image (the box may reach outside it: black), and flip (0 or 1).
"""

import hashlib
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from tmkd_ray.settings import Settings

PARAMETERS = ("top", "left", "height", "width", "flip")
VERSION = 1
"""Raised whenever the same configuration gives other pixels; enters the store's fingerprint."""


class AugmentationConfig(Settings):
    """How training images are augmented.

    `cifar` is the field's CIFAR recipe: zero-pad by `padding`, crop at random, mirror with probability
    one half. `none` keeps the image.
    """

    recipe: Literal["none", "cifar"] = "cifar"
    padding: int = Field(default=4, ge=0, le=32)
    flip: bool = True


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 values (the finaliser of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def sample_keys(ids: np.ndarray, seed: int) -> np.ndarray:
    """Return one uint64 [N] key per sample id: equal on every machine, independent of the order."""
    hashes = b"".join(hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(hashes, dtype="<u8")


def _uniform(keys_N: np.ndarray, variants_K: np.ndarray, draw: int) -> np.ndarray:
    """Return float64 [N, K] in [0, 1): draw number `draw` of each variant."""
    counters_K = variants_K.astype(np.uint64) * np.uint64(16) + np.uint64(draw + 1)
    mixed = _mix(keys_N[:, None] + counters_K * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_parameters(
    config: AugmentationConfig, keys_N: np.ndarray, variants_K: np.ndarray, image_size: int
) -> np.ndarray:
    """Draw the crop parameters of some variants of each image.

    Args:
        keys_N: from `sample_keys`.
        variants_K: numbers of the variants; there is no end to them, so fresh ones can always be had.

    Returns:
        int16 [N, K, 5].
    """
    parameters_NKP = np.zeros((len(keys_N), len(variants_K), len(PARAMETERS)), dtype=np.int16)
    parameters_NKP[..., 2:4] = image_size
    if config.recipe == "none":
        return parameters_NKP
    offsets = 2 * config.padding + 1
    parameters_NKP[..., 0] = np.floor(_uniform(keys_N, variants_K, 0) * offsets) - config.padding
    parameters_NKP[..., 1] = np.floor(_uniform(keys_N, variants_K, 1) * offsets) - config.padding
    if config.flip:
        parameters_NKP[..., 4] = _uniform(keys_N, variants_K, 2) < 0.5
    return parameters_NKP


def variant_offsets(keys_N: np.ndarray, num_variants: int) -> np.ndarray:
    """Return int64 [N]: epoch `t` shows variant `(t + offset) mod K` of an image."""
    return (_mix(keys_N) % np.uint64(num_variants)).astype(np.int64)


def apply_crop(images_BHWC: np.ndarray, parameters_BP: np.ndarray) -> np.ndarray:
    """Crop and mirror each image by its parameters.

    Args:
        images_BHWC: uint8 [B, H, W, 3], H = W.
        parameters_BP: int16 [B, 5]; height and width equal the image's.

    Returns:
        uint8 [B, H, W, 3], newly allocated.
    """
    batch, height, width, _ = images_BHWC.shape
    box = parameters_BP.astype(np.int64)
    rows_BH = box[:, :1] + np.arange(height)
    columns_BW = box[:, 1:2] + np.where(
        box[:, 4:] == 1, np.arange(width - 1, -1, -1)[None], np.arange(width)[None]
    )
    inside_BHW = ((rows_BH >= 0) & (rows_BH < height))[:, :, None] & ((columns_BW >= 0) & (columns_BW < width))[
        :, None, :
    ]
    crops: np.ndarray = images_BHWC[
        np.arange(batch)[:, None, None],
        rows_BH.clip(0, height - 1)[:, :, None],
        columns_BW.clip(0, width - 1)[:, None, :],
    ]
    crops *= inside_BHW[..., None]
    return crops


def apply_crop_torch(images_BHWC: torch.Tensor, parameters_BP: torch.Tensor) -> torch.Tensor:
    """`apply_crop` on the training device: the same pixels, as a strided [B, 3, H, W] view of them."""
    batch, height, width, _ = images_BHWC.shape
    device = images_BHWC.device
    box = parameters_BP.long()
    rows_BH = box[:, :1] + torch.arange(height, device=device)
    forward_W = torch.arange(width, device=device)
    columns_BW = box[:, 1:2] + torch.where(box[:, 4:] == 1, forward_W.flip(0), forward_W)
    inside_BHW = ((rows_BH >= 0) & (rows_BH < height))[:, :, None] & ((columns_BW >= 0) & (columns_BW < width))[
        :, None, :
    ]
    crops = images_BHWC[
        torch.arange(batch, device=device)[:, None, None],
        rows_BH.clamp(0, height - 1)[:, :, None],
        columns_BW.clamp(0, width - 1)[:, None, :],
    ]
    return (crops * inside_BHW[..., None]).permute(0, 3, 1, 2)
