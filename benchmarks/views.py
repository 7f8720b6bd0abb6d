"""The view stage on Ray Data against the same functions in a multiprocessing pool of as many processes.

    python benchmarks/views.py [--sizes 224 32] [--seconds 60] [--rounds 3] [--processes CORES]
                               [--data PARQUET_FOLDER] [--photos PARQUET_FOLDER]

Both sides do the same work on the same shards, in the same order: read the images from Parquet on the local
disk, decode, augment, compute every view (`knowledge.compute.ViewStage`), and write the views into a Parquet
file. Ray Data runs it as the knowledge stage does: a pool of actors for the views, tasks for the writing. The
pool's processes (spawn) call the two one after the other.

A rate is that of steady work: start-up and the first tenth after it are left out, start-up is shown apart.
For Ray it is `ray.init`, the actors' creation and their first shard written, for the pool its creation and
the same. Rounds alternate which side goes first; a ratio is the median of the rounds' ratios.

Without `--data`, the images of 32 pixels are synthetic, as those of 224 are without `--photos`: files of 256
× 256 pixels that are decoded and shrunk. Prints a table, then one JSON object a line.
"""

import argparse
import io
import math
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measuring import (
    Finished,
    hardware,
    num_cores,
    open_dataset,
    result,
    spread,
    synthetic_images,
    write_dataset,
)

from tmkd_ray.augmentation import PARAMETERS, AugmentationConfig
from tmkd_ray.config import ViewPoolConfig
from tmkd_ray.knowledge import KnowledgeLayout
from tmkd_ray.knowledge.compute import ShardPlan, ViewStage, plan_shards, unpack
from tmkd_ray.knowledge.layout import encode_array
from tmkd_ray.stages.pipeline import plan_dataset, view_stage, write_stage
from tmkd_ray.stages.session import start_local_ray
from tmkd_ray.views import build_view

VIEWS = ("original", "edge", "high_frequency")
BASELINE = "multiprocessing pool"
SHARD_PIXELS = 64 * 2**20
"""Bytes of views in a shard at most, as in the knowledge stage."""


class TimedViewStage(ViewStage):
    """The view stage, which also notes when a shard was done."""

    def __call__(self, table: pa.Table) -> pa.Table:
        return super().__call__(table).append_column("viewed_at", pa.array([time.time()]))


class ViewWriter:
    """Write a shard's views as the store writes raw images: one Parquet file, binary columns, zstd.

    The file is deleted at once and not forced to the disk, else the disk's speed is what would be measured.
    """

    def __init__(self, folder: str, layout: KnowledgeLayout) -> None:
        self.folder = Path(folder)
        self.layout = layout

    def __call__(self, table: pa.Table) -> pa.Table:
        started = time.perf_counter()
        plan = ShardPlan.from_table(table)
        variants, size = len(plan.variants), self.layout.image_size
        shape = (variants, len(self.layout.views), size, size, 3)
        shard = pa.table(
            {
                "id": plan.index.ids.tolist(),
                "label": plan.index.labels,
                "augmentation": encode_array(
                    unpack(table, "augmentation", np.int16, variants, len(PARAMETERS))
                ),
                "views": encode_array(unpack(table, "pixels", np.uint8, *shape)),
            }
        )
        buffer = io.BytesIO()
        pq.write_table(shard, buffer, compression="zstd", use_dictionary=False, write_statistics=False)
        file = self.folder / f"{plan.number:06d}.parquet"
        file.write_bytes(buffer.getbuffer())
        file.unlink()
        return pa.table(
            {
                "images": [len(shard) * variants],
                "viewed_at": table.column("viewed_at"),
                "views_seconds": table.column("views_seconds"),
                "write_seconds": [time.perf_counter() - started],
            }
        )


@dataclass(frozen=True)
class Job:
    """What both sides do."""

    plans: list[ShardPlan]
    stage_options: tuple[Any, ...]
    writer: ViewWriter
    processes: int


@dataclass(frozen=True)
class Run:
    """One side's run: its rate, and the mean seconds of a shard in the view stage and in the writer."""

    startup_s: float
    rate: float
    seconds: float
    views_s: float
    write_s: float


def measured(started: float, rows: list[tuple[float, dict[str, Any]]], lead_in_s: float) -> Run:
    finished = Finished(started)
    for at, row in rows:
        finished.add(at, row["images"], row["viewed_at"])
    rate, seconds = finished.steady(lead_in_s)
    views_s, write_s = (
        statistics.fmean(row[name] for _, row in rows) for name in ("views_seconds", "write_seconds")
    )
    return Run(finished.startup_s, rate, seconds, views_s, write_s)


_of_this_process: tuple[TimedViewStage, ViewWriter]


def start_process(stage_options: tuple[Any, ...], writer: ViewWriter) -> None:
    global _of_this_process
    torch.set_num_threads(1)  # the pool is the parallelism; Ray tells its actors the same
    _of_this_process = TimedViewStage(*stage_options), writer


def compute_shard(table: pa.Table) -> dict[str, Any]:
    stage, writer = _of_this_process
    row: dict[str, Any] = writer(stage(table)).to_pylist()[0]
    return row


def run_pool(job: Job, lead_in_s: float) -> Run:
    tables = [plan.to_table() for plan in job.plans]
    started = time.time()
    context = multiprocessing.get_context("spawn")
    with context.Pool(job.processes, start_process, (job.stage_options, job.writer)) as pool:
        rows = [(time.time(), row) for row in pool.imap_unordered(compute_shard, tables)]
    return measured(started, rows, lead_in_s)


def run_ray(job: Job, lead_in_s: float) -> Run:
    import ray  # after tmkd_ray.stages, which sets its environment

    tables = [plan.to_table() for plan in job.plans]
    started = time.time()
    start_local_ray(max(4, 2 * num_cores()))
    try:
        pool = ViewPoolConfig(min_size=job.processes, max_size=job.processes)
        dataset = view_stage(plan_dataset(tables), TimedViewStage, job.stage_options, pool)
        dataset = write_stage(dataset, job.writer, job.processes)
        rows = [(time.time(), row) for row in dataset.iter_rows()]
    finally:
        ray.shutdown()
    return measured(started, rows, lead_in_s)


def make_job(folder: str, size: int, scratch: str, arguments: argparse.Namespace) -> Job:
    """Plan as many shards as take the processes `--seconds`; the images come round in new variants."""
    dataset = open_dataset(folder, size)
    views = {name: build_view(name, {}) for name in VIEWS}
    layout = KnowledgeLayout(VIEWS, arguments.variants, size, 1, None, image_format="reference")
    recipe = AugmentationConfig(recipe="cifar" if size < 64 else "imagenet")
    options = (dataset, views, {"train": layout}, recipe, 0)
    writer = ViewWriter(scratch, layout)
    rows = min(arguments.shard_rows, max(1, SHARD_PIXELS // (arguments.variants * len(VIEWS) * size**2 * 3)))
    index = dataset.index("train")
    once = plan_shards("train", index, min(rows, len(index)), arguments.variants)
    once = [plan for plan in once if len(plan.index) == len(once[0].index)]

    start_process(options, writer)
    shard_s = []
    for plan in once[:1] * 4:
        started = time.perf_counter()
        compute_shard(plan.to_table())
        shard_s.append(time.perf_counter() - started)
    count = math.ceil(1.2 * arguments.seconds * arguments.processes / min(shard_s))
    plans = []
    for number in range(max(count, 4 * arguments.processes)):
        turn, position = divmod(number, len(once))
        variants = np.arange(arguments.variants) + turn * arguments.variants
        plans.append(ShardPlan("train", number, once[position].index, variants))
    return Job(plans, options, writer, arguments.processes)


def measure(name: str, folder: str, images: str, size: int, arguments: argparse.Namespace) -> str:
    """Measure one size; print its table and return its JSON line."""
    sides = {"ray": run_ray, "pool": run_pool}
    runs: dict[str, list[Run]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        job = make_job(folder, size, scratch, arguments)
        per_shard = len(job.plans[0].index) * arguments.variants
        print(
            f"{name}: {len(job.plans)} shards of {per_shard} images ({images}), {size} px, {len(VIEWS)} views, "
            f"{job.processes} processes; {hardware()}",
            flush=True,
        )
        columns = f"{'images/s':>10}{'steady s':>10}{'start-up s':>12}"
        print(f"{'':16}{columns}{'views s/shard':>14}{'write s/shard':>14}")
        for round_number in range(arguments.rounds):
            order = list(sides) if round_number % 2 else list(reversed(sides))
            for side in order:
                run = sides[side](job, arguments.seconds / 10)
                runs[side].append(run)
                print(
                    f"  {round_number + 1}. {side:11}{run.rate:10,.1f}{run.seconds:10.1f}{run.startup_s:12.1f}"
                    f"{run.views_s:14.4f}{run.write_s:14.4f}",
                    flush=True,
                )
    ratios = [mine.rate / theirs.rate for mine, theirs in zip(runs["ray"], runs["pool"], strict=True)]
    facts: dict[str, Any] = {}
    for side, of_side in runs.items():
        facts |= {
            f"{side}_images_per_s": spread((run.rate for run in of_side), 1),
            f"{side}_startup_s": spread((run.startup_s for run in of_side), 1),
            f"{side}_steady_s": spread((run.seconds for run in of_side), 1),
        }
    print(
        f"{name}: {statistics.median(ratios):.3f} of the pool's rate ({', '.join(f'{r:.3f}' for r in ratios)})"
    )
    return result(
        name,
        ratios,
        BASELINE,
        image_size=size,
        views=len(VIEWS),
        variants=arguments.variants,
        images=images,
        images_per_shard=per_shard,
        shards=len(job.plans),
        processes=job.processes,
        **facts,
        hardware=hardware(),
        ray=version("ray"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 32], help="height = width, in pixels")
    parser.add_argument("--seconds", type=float, default=60, help="of steady work, about, on each side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=num_cores())
    parser.add_argument("--variants", type=int, default=1, help="crops of each image; each counts as an image")
    parser.add_argument("--shard-rows", type=int, default=1024, help="images of a shard, at most")
    parser.add_argument("--images", type=int, help="synthetic ones; else 512, or 8192 below 64 pixels")
    parser.add_argument("--data", help="Parquet dataset for sizes below 64 pixels, e.g. CIFAR-100")
    parser.add_argument("--photos", help="Parquet dataset for larger sizes")
    arguments = parser.parse_args()

    lines = []
    for size in arguments.sizes:
        given = arguments.data if size < 64 else arguments.photos
        with tempfile.TemporaryDirectory() as made:
            if given is None:
                stored, file_format = (size, "PNG") if size < 64 else (size * 8 // 7, "JPEG")
                images = synthetic_images(arguments.images or (8192 if size < 64 else 512), stored)
                write_dataset(Path(made), images, file_format)
            kind = Path(given).name if given else f"synthetic {file_format}"
            lines.append(measure(f"views_{size}", given or made, kind, size, arguments))
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
