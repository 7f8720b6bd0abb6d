"""Augmentation that is drawn once, stored as numbers, and replayed to the pixel.

A teacher's output teaches an image only if both networks saw the same pixels (Beyer et al. 2022,
"Knowledge distillation: a good teacher is patient and consistent"). So the parameters of each of K
variants of an image are a pure function of (seed, sample id, variant), and `augment` turns them into
pixels by integer arithmetic alone: the same bytes on every device, in a batch of any make-up.

Parameters are int16 [..., 12], in the order of `PARAMETERS`:

| name | |
|---|---|
| `top`, `left`, `height`, `width` | crop, in pixels of the stored image; it may reach outside it: black |
| `flip` | 0, or 1: mirrored |
| `brightness`, `contrast`, `saturation` | factors, in 1/256 |
| `hue` | shift, in 1/1536 turns |
| `order` | 0: no colour jitter; else its operations in the order `JITTER_ORDERS[order]` |
| `grey` | 0, or 1: without colour |
| `blur` | standard deviation, in 1/256 pixels; 0: none |
"""

import hashlib
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from tmkd_ray.settings import Settings

PARAMETERS = (
    "top",
    "left",
    "height",
    "width",
    "flip",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "order",
    "grey",
    "blur",
)
TOP, LEFT, HEIGHT, WIDTH, FLIP = range(5)
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, BLUR = range(5, len(PARAMETERS))

JITTER_ORDERS = np.array([[-1] * 4, *itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))])
"""[25, 4]: by `order`, the columns of the parameters in the order in which they apply; -1: nothing does."""

VERSION = 1
"""Raised whenever the same configuration gives other pixels; enters the store's fingerprint."""

ASPECT_RATIO = 4 / 3
"""Widest shape of a random resized crop; the tallest is its reciprocal (Szegedy et al. 2015, §6)."""

BLUR_SIGMAS = (0.1, 2.0)
"""Pixels, between which the blur's standard deviation is uniform (SimCLR, arXiv 2002.05709, appendix A)."""

_HUE_TURN = 6 * 256


class ColorJitterConfig(Settings, allow_inf_nan=False):
    """Random brightness, contrast, saturation and hue, in random order; the default is MoCo v2's.

    A factor is uniform in 1 ± its strength, the hue's shift uniform in ± `hue` turns.
    """

    brightness: float = Field(default=0.4, ge=0, le=1)
    contrast: float = Field(default=0.4, ge=0, le=1)
    saturation: float = Field(default=0.4, ge=0, le=1)
    hue: float = Field(default=0.1, ge=0, le=0.5)
    probability: float = Field(default=0.8, ge=0, le=1, description="of jittering an image at all")


_DEFAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "cifar": {"padding": 4, "flip": True},
    "imagenet": {"flip": True, "min_scale": 0.08, "color_jitter": None},
    "moco_v2": {
        "flip": True,
        "min_scale": 0.2,
        "color_jitter": ColorJitterConfig(),
        "grayscale_probability": 0.2,
        "blur_probability": 0.5,
    },
}
"""The fields that each recipe uses, and their values where none is given."""


class AugmentationConfig(Settings, allow_inf_nan=False):
    """How training images are augmented.

    - `none` keeps the image.
    - `cifar`: zero-pad by `padding`, crop at random, mirror with probability one half (He et al. 2016, §4.2).
    - `imagenet`: crop a part of random area and shape, resize it to the image's size (Szegedy et al. 2015, §6),
      mirror; colour jitter too where asked for.
    - `moco_v2`: the same with colour jitter, grey and blur (MoCo v2, arXiv 2003.04297).

    A field left null takes the recipe's value; one that the recipe does not use must be left null.
    """

    recipe: Literal["none", "cifar", "imagenet", "moco_v2"] = "cifar"
    padding: int | None = Field(default=None, ge=0, le=32, description="null: 4 (cifar)")
    flip: bool | None = Field(default=None, description="null: true")
    min_scale: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="smallest part of the image's area that a crop keeps; null: 0.08 (imagenet), 0.2 (moco_v2)",
    )
    color_jitter: ColorJitterConfig | None = Field(
        default=None, description="null: none (imagenet), MoCo v2's (moco_v2); `{}`: MoCo v2's"
    )
    grayscale_probability: float | None = Field(default=None, ge=0, le=1, description="null: 0.2 (moco_v2)")
    blur_probability: float | None = Field(default=None, ge=0, le=1, description="null: 0.5 (moco_v2)")

    @field_validator(
        "padding", "flip", "min_scale", "color_jitter", "grayscale_probability", "blur_probability"
    )
    @classmethod
    def _of_the_recipe(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        recipe = info.data.get("recipe")
        if recipe is None:  # wrong, and reported as such
            return value
        defaults = _DEFAULTS[recipe]
        if value is None:
            return defaults.get(info.field_name)
        if info.field_name not in defaults:
            uses = f"it uses {', '.join(defaults)}" if defaults else "it has no options"
            raise ValueError(f"the recipe {recipe!r} does not use it; leave it out ({uses})")
        return value


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


def _uniform(keys: np.ndarray, variants: np.ndarray, draw: int) -> np.ndarray:
    """Return float64 in [0, 1): draw number `draw` of each variant; keys and variants broadcast.

    The counter has room for 16 draws of a variant; every further 16 count from a key of their own.
    """
    stream, number = divmod(draw, 16)
    if stream:
        keys = _mix(keys + np.uint64(stream * 0xD1B54A32D192ED03 % 2**64))
    counters = variants.astype(np.uint64) * np.uint64(16) + np.uint64(number + 1)
    mixed = _mix(keys + counters * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_parameters(
    config: AugmentationConfig, keys_N: np.ndarray, variants_K: np.ndarray, image_size: int
) -> np.ndarray:
    """Draw the parameters of some variants of each image.

    Args:
        keys_N: from `sample_keys`.
        variants_K: numbers of the variants; there is no end to them, so fresh ones can always be had.
        image_size: height = width of the stored images, in pixels.

    Returns:
        int16 [N, K, P], P as in `PARAMETERS`.
    """

    def uniform(draw: int) -> np.ndarray:
        return _uniform(keys_N[:, None], variants_K, draw)

    parameters_NKP = np.zeros((len(keys_N), len(variants_K), len(PARAMETERS)), dtype=np.int16)
    if config.recipe in ("imagenet", "moco_v2"):
        assert config.min_scale is not None
        parameters_NKP[..., TOP : WIDTH + 1] = _random_resized_crops(
            keys_N, variants_K, image_size, config.min_scale
        )
    else:
        parameters_NKP[..., [HEIGHT, WIDTH]] = image_size
    if config.recipe == "cifar":
        assert config.padding is not None
        offsets = 2 * config.padding + 1
        parameters_NKP[..., TOP] = np.floor(uniform(0) * offsets) - config.padding
        parameters_NKP[..., LEFT] = np.floor(uniform(1) * offsets) - config.padding
    if config.flip:
        parameters_NKP[..., FLIP] = uniform(2) < 0.5
    if config.color_jitter is not None:
        parameters_NKP[..., BRIGHTNESS : ORDER + 1] = _color_jitter(config.color_jitter, uniform)
    if config.grayscale_probability is not None:
        parameters_NKP[..., GREY] = uniform(9) < config.grayscale_probability
    if config.blur_probability is not None:
        smallest, largest = BLUR_SIGMAS
        sigma_NK = np.rint(256 * (smallest + (largest - smallest) * uniform(11)))
        parameters_NKP[..., BLUR] = np.where(uniform(10) < config.blur_probability, sigma_NK, 0)
    return parameters_NKP


def _random_resized_crops(
    keys_N: np.ndarray, variants_K: np.ndarray, image_size: int, min_scale: float
) -> np.ndarray:
    """Return int16 [N, K, 4]: top, left, height and width of crops within the image.

    The area is uniform, the logarithm of the shape too; a crop that does not fit is drawn again, up to ten
    times, after which the whole image is taken.
    """
    keys_M = np.repeat(keys_N, len(variants_K))
    variants_M = np.tile(variants_K, len(keys_N))
    crops_M4 = np.zeros((len(keys_M), 4), dtype=np.int16)
    crops_M4[:, 2:] = image_size
    open_M = np.arange(len(keys_M))
    for attempt in range(10):
        keys, variants = keys_M[open_M], variants_M[open_M]
        area = image_size**2 * (min_scale + (1 - min_scale) * _uniform(keys, variants, 16 + attempt))
        shape = ASPECT_RATIO ** (2 * _uniform(keys, variants, 32 + attempt) - 1)
        height, width = np.rint(np.sqrt(area / shape)), np.rint(np.sqrt(area * shape))
        fits = (np.minimum(height, width) >= 1) & (np.maximum(height, width) <= image_size)
        top = np.floor(_uniform(keys, variants, 0) * (image_size - height + 1))
        left = np.floor(_uniform(keys, variants, 1) * (image_size - width + 1))
        crops_M4[open_M[fits]] = np.stack([top, left, height, width], axis=1)[fits]
        open_M = open_M[~fits]
    return crops_M4.reshape(len(keys_N), len(variants_K), 4)


def _color_jitter(jitter: ColorJitterConfig, uniform: Callable[[int], np.ndarray]) -> np.ndarray:
    """Return int16 [N, K, 5], brightness to order; zeros where there is no jitter."""
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation)
    drawn = [np.rint(256 * (1 + (2 * uniform(4 + i) - 1) * strength)) for i, strength in enumerate(strengths)]
    drawn.append(np.rint(_HUE_TURN * (2 * uniform(7) - 1) * jitter.hue))
    drawn.append(1 + np.floor(uniform(8) * (len(JITTER_ORDERS) - 1)))
    applies_NK = uniform(3) < jitter.probability
    return np.where(applies_NK[..., None], np.stack(drawn, axis=-1), 0).astype(np.int16)


def variant_offsets(keys_N: np.ndarray, num_variants: int) -> np.ndarray:
    """Return int64 [N]: epoch `t` shows variant `(t + offset) mod K` of an image."""
    return (_mix(keys_N) % np.uint64(num_variants)).astype(np.int64)


_PIXELS_AT_ONCE = 2**16
"""On a CPU as many as stay in its cache from one operation to the next; a GPU takes the whole batch at once."""


def augment(images_BHWC: Tensor, parameters_BP: Tensor) -> Tensor:
    """Apply to each image its parameters: crop and resize, colour jitter, grey, blur, mirror.

    Every operation is exact integer arithmetic on the rounded result of the one before.

    Args:
        images_BHWC: uint8 [B, H, W, 3], on any device.
        parameters_BP: int16 [B, P], on any device. The host decides by them what is to be done: on a GPU they
            cost one synchronisation, on the CPU none.

    Returns:
        uint8 [B, H, W, 3], newly allocated, on the images' device.
    """
    batch, height, width, _ = images_BHWC.shape
    assert images_BHWC.dtype == torch.uint8
    assert parameters_BP.shape == (batch, len(PARAMETERS))
    known_BP = parameters_BP.cpu().numpy()
    parameters_BP = parameters_BP.to(images_BHWC.device, non_blocking=True)
    rows = _Taps.of(known_BP, parameters_BP, TOP, HEIGHT, height)
    columns = _Taps.of(known_BP, parameters_BP, LEFT, WIDTH, width)
    if known_BP[:, FLIP].any():
        # Done here, where it is free: mirroring commutes with all that follows.
        columns = columns.mirrored(parameters_BP[:, FLIP])
    augmented_BHWC = torch.empty_like(images_BHWC, memory_format=torch.contiguous_format)
    at_once = max(1, _PIXELS_AT_ONCE // (height * width)) if images_BHWC.device.type == "cpu" else max(1, batch)
    for start in range(0, batch, at_once):
        some = slice(start, start + at_once)
        crops_BWCH = _crop(images_BHWC[some], rows.of_images(some), columns.of_images(some))
        if known_BP[some, ORDER:].any():
            crops_BWCH = _recolour(crops_BWCH, known_BP[some], parameters_BP[some].int())
        augmented_BHWC[some] = crops_BWCH.permute(0, 3, 1, 2)
    return augmented_BHWC


class _Taps(NamedTuple):
    """The two lines of an image that make each line of its crop, along one axis.

    Attributes:
        first, second: int64 [B, O], positions in the image; may lie outside.
        weight: int16 [B, O], of `second`, in 1/256.
        resizes: whether any weight is not zero.
        leaves: whether any position lies outside.
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    resizes: bool
    leaves: bool

    @classmethod
    def of(cls, known_BP: np.ndarray, parameters_BP: Tensor, start: int, length: int, size: int) -> "_Taps":
        """Map the middles of `size` pixels onto the crop (half-pixel centres), in 1/256 pixels.

        Args:
            start, length: columns of the parameters.
        """
        start_B1, length_B1 = (parameters_BP[:, column, None].long() for column in (start, length))
        middle_O = 2 * torch.arange(size, device=parameters_BP.device) + 1
        position_BO = ((middle_O * length_B1 * 256 + size) // (2 * size) - 128).clamp_(min=0)
        first_BO = position_BO >> 8
        last_B = known_BP[:, start].astype(int) + known_BP[:, length]
        return cls(
            first=start_B1 + first_BO,
            second=start_B1 + torch.minimum(first_BO + 1, length_B1 - 1),
            weight=(position_BO & 255).short(),
            resizes=bool((known_BP[:, length] != size).any()),
            leaves=bool((known_BP[:, start] < 0).any() or (last_B > size).any()),
        )

    def mirrored(self, flip_B: Tensor) -> "_Taps":
        """Return the taps in reverse order where `flip` is 1."""
        flip_B1 = flip_B[:, None] == 1
        first, second, weight = (torch.where(flip_B1, taps.flip(1), taps) for taps in self[:3])
        return _Taps(first, second, weight, self.resizes, self.leaves)

    def of_images(self, some: slice) -> "_Taps":
        return _Taps(self.first[some], self.second[some], self.weight[some], self.resizes, self.leaves)

    def blend(self, lines_BLX: Tensor) -> Tensor:
        """Return uint8 [B, O, X]: the lines of the crop, from the uint8 lines of the images."""
        first = self._take(lines_BLX, self.first)
        if not self.resizes:
            return first
        second = self._take(lines_BLX, self.second)
        weight_BO1 = self.weight[..., None]
        # Less 128, the sum of the products lies within ±2^15: int16 is enough, and twice as fast as int32.
        total = (first.short() - 128).mul_(256 - weight_BO1)
        total += (second.short() - 128).mul_(weight_BO1)
        return total.add_(128).bitwise_right_shift_(8).add_(128).to(torch.uint8)

    def _take(self, lines_BLX: Tensor, index_BO: Tensor) -> Tensor:
        batch, length, width = lines_BLX.shape
        first_line_B1 = torch.arange(batch, device=index_BO.device)[:, None] * length
        index = (index_BO.clamp(0, length - 1) + first_line_B1).flatten()
        taken = lines_BLX.reshape(-1, width).index_select(0, index).view(batch, -1, width)
        if self.leaves:
            taken *= ((index_BO >= 0) & (index_BO < length))[..., None]
        return taken


def _crop(images_BHWC: Tensor, rows: _Taps, columns: _Taps) -> Tensor:
    """Return uint8 [B, W, 3, H], transposed: whole lines are gathered many times faster than single pixels."""
    batch, height, width, channels = images_BHWC.shape
    lines = rows.blend(images_BHWC.reshape(batch, height, width * channels))
    lines = lines.view(batch, height, width, channels).permute(0, 2, 3, 1)
    return columns.blend(lines.reshape(batch, width, channels * height)).view(batch, width, channels, height)


def _recolour(crops_BWCH: Tensor, known_BP: np.ndarray, parameters_BP: Tensor) -> Tensor:
    """Apply colour jitter, grey and blur to uint8 [B, W, 3, H]; the parameters on its device are int32."""
    pixels = crops_BWCH.transpose(1, 2).contiguous().int()
    operations_B4 = JITTER_ORDERS[known_BP[:, ORDER]]
    for step in range(4):
        for column, (operation, identity) in _JITTER.items():
            images = (operations_B4[:, step] == column) & (known_BP[:, column] != identity)
            pixels = _apply(operation, pixels, images, parameters_BP[:, column])
    pixels = _apply(_remove_colour, pixels, known_BP[:, GREY] == 1)
    blurred_B = known_BP[:, BLUR] > 0
    if blurred_B.any():
        kernels = [_half_gaussian(int(sigma)) for sigma in known_BP[:, BLUR]]
        kernels_BR = np.zeros((len(kernels), max(map(len, kernels))), dtype=np.int16)
        for kernel_R, half in zip(kernels_BR, kernels, strict=True):
            kernel_R[: len(half)] = half
        pixels = _apply(_blur, pixels, blurred_B, _to_device(kernels_BR, pixels.device))
    return pixels.transpose(1, 2).to(torch.uint8)


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _apply(operation: Callable[..., Tensor], pixels: Tensor, images_B: np.ndarray, *amounts: Tensor) -> Tensor:
    """Apply an operation to those images of the batch that want it; may change `pixels`.

    Args:
        images_B: bool.
        amounts: of the operation, [B, ...].
    """
    if images_B.all():
        return operation(pixels, *amounts)
    if images_B.any():
        index = _to_device(np.flatnonzero(images_B), pixels.device)
        pixels.index_copy_(0, index, operation(pixels[index], *(amount[index] for amount in amounts)))
    return pixels


# In what follows pixels are int32 [B, 3, W, H] in 0..255, factors and shifts int32 [B].


def _luma(pixels: Tensor) -> Tensor:
    """Return [B, 1, W, H]: ITU-R BT.601's weights, in 1/256."""
    red, green, blue = pixels[:, 0:1], pixels[:, 1:2], pixels[:, 2:3]
    return (77 * red).add_(green, alpha=150).add_(blue, alpha=29).add_(128).bitwise_right_shift_(8)


def _blend(pixels: Tensor, other: Tensor | int, factors: Tensor) -> Tensor:
    """Return factor·pixels + (1 − factor)·other, within 0..255."""
    factors = factors[:, None, None, None]
    blended = (pixels * factors).add_(other * (256 - factors) + 128)
    return blended.bitwise_right_shift_(8).clamp_(0, 255)


def _adjust_brightness(pixels: Tensor, factors: Tensor) -> Tensor:
    return _blend(pixels, 0, factors)


def _adjust_contrast(pixels: Tensor, factors: Tensor) -> Tensor:
    luma = _luma(pixels)
    count = luma[0].numel()
    mean = (2 * luma.sum(dim=(1, 2, 3), keepdim=True) + count) // (2 * count)
    return _blend(pixels, mean.int(), factors)


def _adjust_saturation(pixels: Tensor, factors: Tensor) -> Tensor:
    return _blend(pixels, _luma(pixels), factors)


def _shift_hue(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue of the HSV hexcone (Smith 1978).

    All is kept times the chroma, max − min, so that nothing is divided until the last rounding.
    """
    red, green, blue = pixels.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest - smallest
    # The hue in sixths of a turn: about 0 where red is largest, 2 where green is, 4 where blue is.
    hue = (red - green).add_(chroma, alpha=4)
    hue += (blue - red).add_(chroma, alpha=2).sub_(hue).mul_(largest == green)
    hue += (green - blue).sub_(hue).mul_(largest == red)
    # From −1..5 sixths by 1..7 on: then one turn at most is too much.
    shifts = (shifts - 256) % _HUE_TURN + 256
    hue.mul_(256).add_(chroma * shifts[:, None, None])
    chroma.mul_(256)
    hue -= (6 * chroma).mul_(hue >= 6 * chroma)
    smallest.mul_(256).add_(128)
    shifted = torch.empty_like(pixels)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        # How far the channel is above the smallest: red |hue − 3| − 1, green 2 − |hue − 2|, blue 2 − |hue − 4|.
        above = torch.add(hue, chroma, alpha=-centre).abs_().mul_(sign).add_(chroma, alpha=offset)
        above = torch.minimum(above.clamp_(min=0), chroma)
        shifted[:, channel] = above.add_(smallest).bitwise_right_shift_(8)
    return shifted


_JITTER: dict[int, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    BRIGHTNESS: (_adjust_brightness, 256),
    CONTRAST: (_adjust_contrast, 256),
    SATURATION: (_adjust_saturation, 256),
    HUE: (_shift_hue, 0),
}
"""Each operation of colour jitter, and the amount that changes nothing."""


def _remove_colour(pixels: Tensor) -> Tensor:
    return _luma(pixels).repeat(1, 3, 1, 1)


@cache
def _half_gaussian(sigma: int) -> np.ndarray:
    """Return int16 [R + 1]: a Gaussian from its middle outwards, in 1/256; with its other half it sums to 256.

    Not the weights are rounded but the sums from each of them outwards: so the blur of an edge, which is such
    a sum, is nowhere off by more than half a level.

    Args:
        sigma: in 1/256 pixels; 0: no blur.
    """
    distance = np.arange(2 + 6 * sigma // 256)
    density = np.exp(-0.5 * (distance * 256 / max(sigma, 1)) ** 2)
    outwards = np.cumsum(density[::-1])[::-1] / (2 * density.sum() - 1)
    sums = np.rint(256 * outwards).astype(np.int16)
    sums = np.append(sums[sums > 0], 0)
    half: np.ndarray = sums[:-1] - sums[1:]
    half[0] = 256 - 2 * sums[1]
    return half


def _blur(pixels: Tensor, kernels_BR: Tensor) -> Tensor:
    """Blur down, then across; the image is mirrored about its outermost pixels."""
    # Less 128, every sum lies within ±2^15.
    blurred = (pixels - 128).short()
    for axis in (3, 2):
        radius, size = kernels_BR.shape[1] - 1, blurred.shape[axis]
        before, after = np.arange(-radius, 0), np.arange(size, size + radius)
        period = max(1, 2 * (size - 1))
        mirrored = [_to_device(np.minimum(i % period, -i % period), pixels.device) for i in (before, after)]
        head, tail = (blurred.index_select(axis, index) for index in mirrored)
        padded = torch.cat([head, blurred, tail], dim=axis)
        weights = kernels_BR[:, :, None, None, None].unbind(1)
        total = (blurred * weights[0]).add_(128)
        for distance in range(1, radius + 1):
            pair = padded.narrow(axis, radius - distance, size) + padded.narrow(axis, radius + distance, size)
            total += pair.mul_(weights[distance])
        blurred = total.bitwise_right_shift_(8)
    return blurred.int().add_(128)
