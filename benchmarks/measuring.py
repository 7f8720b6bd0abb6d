"""What the benchmarks of the knowledge's road share: images to work on, steady rates, results."""

import io
import json
import os
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from tmkd_ray.datasets import ImageDataset, build_dataset
from tmkd_ray.datasets.parquet import ParquetConfig

NUM_CLASSES = 100
_ROW_GROUP = 1000
"""Images; the row groups of the CIFAR-100 that Hugging Face's hub holds."""


def hardware(device: str = "cpu") -> str:
    """Return the processor, how many cores this process may use, and the GPU if it is to be used."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    cpu = f"{processor}, {num_cores()} cores"
    return cpu if device == "cpu" else f"{torch.cuda.get_device_name(device)}; {cpu}"


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synthetic_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Return uint8 [N, size, size, 3] with the spectrum of photographs.

    Amplitudes fall as 1 / frequency (Field 1987, J. Opt. Soc. Am. A 4, 2379), phases are random; three quarters
    of each channel's power are common to all three.
    """
    generator = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(size)[:, None, None], np.fft.rfftfreq(size)[None, :, None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / size)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for image in images:
        noise = generator.standard_normal((size, size, 4))
        waves = np.fft.irfft2(np.fft.rfft2(noise, axes=(0, 1)) * amplitude, s=(size, size), axes=(0, 1))
        waves /= waves.std(axis=(0, 1))
        channels = np.sqrt(0.75) * waves[..., :1] + np.sqrt(0.25) * waves[..., 1:]
        image[:] = np.clip(np.rint(118 + 60 * channels), 0, 255)
    return images


def write_dataset(folder: Path, images: np.ndarray, file_format: str) -> None:
    """Write images with made labels as a dataset of Parquet shards, in the layout of Hugging Face's hub."""
    classes = [f"class {label}" for label in range(NUM_CLASSES)]
    features = {"label": {"_type": "ClassLabel", "names": classes}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary())])), ("label", pa.int64())], metadata=metadata
    )
    options: dict[str, Any] = {"quality": 90} if file_format == "JPEG" else {}
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, file_format, **options)
        files.append({"bytes": buffer.getvalue()})
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", len(images)), ("test", NUM_CLASSES)):
        labels = np.arange(min(rows, len(images))) % NUM_CLASSES
        table = pa.Table.from_pylist(
            [{"image": file, "label": int(label)} for file, label in zip(files, labels, strict=False)],
            schema=schema,
        )
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=_ROW_GROUP, compression="none")


def open_dataset(folder: str | Path, image_size: int, limit: int | None = None) -> ImageDataset:
    """Return a dataset of Parquet shards."""
    return build_dataset(ParquetConfig(path=str(folder), image_size=image_size, limit=limit))


class Finished:
    """When pieces of work were finished, each so many images; by `time.time`, which all processes share.

    Args:
        started: when the run began, before any process was started.
    """

    def __init__(self, started: float) -> None:
        self.started = started
        self.times: list[float] = []
        self.begun: list[float] = []
        self.images: list[int] = []

    def add(self, time: float, images: int, first_stage: float | None = None) -> None:
        """Note a piece that is finished.

        Args:
            first_stage: when its first stage was done; None where there is but one.
        """
        self.times.append(time)
        self.begun.append(time if first_stage is None else first_stage)
        self.images.append(images)

    @property
    def startup_s(self) -> float:
        """From the start to the first finished piece."""
        return self.times[0] - self.started

    def steady(self, lead_in_s: float) -> tuple[float, float]:
        """Return (images a second, seconds) of the steady work: from `lead_in_s` after the first finished piece
        to the last.

        Pieces that had passed their first stage before are not counted, though their later stages fall into
        these seconds: what piled up while a later stage started is no speed.
        """
        assert len(self.times) > 2, "too few pieces to tell a rate"
        # In a short run a later stage may start when the first is done with all; half of them still count then.
        start = min(self.times[0] + lead_in_s, sorted(self.begun)[(len(self.begun) - 1) // 2])
        seconds = self.times[-1] - start
        images = sum(count for begun, count in zip(self.begun, self.images, strict=True) if begun > start)
        return images / seconds, seconds


def spread(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """Return median, least and most."""
    values = list(values)
    numbers = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(number, digits) for name, number in numbers.items()}


def result(name: str, ratios: list[float], baseline: str, **facts: Any) -> str:
    """Return the JSON line of a benchmark: the median of the rounds' ratios, and what was measured."""
    numbers = spread(ratios)
    return json.dumps(
        {
            "name": name,
            "ratio": numbers["median"],
            "ratio_least": numbers["least"],
            "ratio_most": numbers["most"],
            "baseline": baseline,
            "n": len(ratios),
            **facts,
        },
        ensure_ascii=False,
    )
