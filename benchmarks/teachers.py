"""The visual teacher's actor pool on Ray Data against a plain PyTorch loop over batches in memory.

    python benchmarks/teachers.py [--model resnet56] [--seconds 60] [--rounds 3] [--threads CORES]
                                  [--batch-size 256] [--device cpu]

Both sides have the same model, weights, threads, batch size, precision and memory format. The plain loop
calls the model on batches that lie in memory as tensors, one after the other. Ray Data feeds one actor of the
knowledge stage's pool (`knowledge.compute.VisualStage`) with shards from the object store, and hands on what
it says.

A rate is that of steady work, in images (each view is one): start-up and the first tenth after it are left
out, start-up is shown apart. For Ray it is `ray.init`, the actor's creation and its first shard, for the loop
its first shard. Rounds alternate which side goes first; a ratio is the median of the rounds' ratios. Prints a
table, then one JSON object.
"""

import argparse
import math
import statistics
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from measuring import NUM_CLASSES, Finished, hardware, num_cores, result, spread
from torch import Tensor

from tmkd_ray.config import KnowledgeConfig, TeacherPoolConfig
from tmkd_ray.datasets.base import SampleIndex
from tmkd_ray.knowledge import KnowledgeLayout
from tmkd_ray.knowledge.compute import ShardPlan, pack
from tmkd_ray.models import build_model
from tmkd_ray.precision import autocast
from tmkd_ray.stages.pipeline import plan_dataset, teachers_of_views
from tmkd_ray.stages.session import start_local_ray
from tmkd_ray.teachers import VisualTeacher
from tmkd_ray.types import TaskSpec

VIEWS = ("original", "edge", "high_frequency")
BASELINE = "plain PyTorch loop"
IMAGE_SIZE = 32
DISTINCT_SHARDS = 4
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def build_teacher(name: str) -> VisualTeacher:
    torch.manual_seed(0)
    task = TaskSpec(tuple(f"class {label}" for label in range(NUM_CLASSES)), IMAGE_SIZE)
    return VisualTeacher(build_model(name, task), MEAN, STD)


def draw_views(images: int, variants: int) -> list[np.ndarray]:
    """Return the pixels of some shards, uint8 [N, K, V, H, W, 3]: noise, at which a teacher is as fast."""
    generator = np.random.default_rng(0)
    shape = (images, variants, len(VIEWS), IMAGE_SIZE, IMAGE_SIZE, 3)
    return [generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(DISTINCT_SHARDS)]


def shard_table(number: int, pixels: np.ndarray) -> pa.Table:
    """Return a shard as the view stage hands it on."""
    count, variants = pixels.shape[:2]
    index = SampleIndex(
        ids=np.array([f"{number}/{row}" for row in range(count)]),
        labels=np.zeros(count, dtype=np.int64),
        part=np.zeros(count, dtype=np.int32),
        row=np.arange(count, dtype=np.int64),
    )
    table = ShardPlan("train", number, index, np.arange(variants)).to_table()
    return table.append_column("pixels", pack(pixels))


def run_loop(
    teacher: VisualTeacher, shards: list[list[Tensor]], count: int, pool: TeacherPoolConfig, device: str
) -> Finished:
    """Run the teacher over so many shards, each a list of batches on the host."""
    finished = Finished(time.time())
    memory_format = torch.channels_last if pool.channels_last else torch.contiguous_format
    teacher = teacher.to(device).to(memory_format=memory_format)
    with torch.inference_mode():
        for number in range(count):
            batches = shards[number % len(shards)]
            outputs = []
            for batch in batches:
                with autocast(device, pool.precision):
                    outputs.append(teacher(batch.to(device)))
            torch.cat(outputs).cpu()
            finished.add(time.time(), sum(len(batch) for batch in batches))
    return finished


def run_ray(
    teacher: VisualTeacher,
    shards: list[np.ndarray],
    count: int,
    pool: TeacherPoolConfig,
    layout: KnowledgeLayout,
) -> Finished:
    """Run the teacher's pool over so many shards from the object store."""
    import ray  # after tmkd_ray.stages, which sets its environment

    finished = Finished(time.time())
    start_local_ray(max(4, 2 * num_cores()))
    try:
        dataset = plan_dataset([shard_table(number, shards[number % len(shards)]) for number in range(count)])
        pools = KnowledgeConfig(visual=pool)
        dataset = teachers_of_views(dataset, pools, teacher.cpu(), None, {"train": layout})
        # As tables, for nothing is to be made of the features here.
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            values = sum(len(value.as_buffer()) for value in table.column("feature"))
            width = len(layout.views) * layout.feature_width * np.dtype(layout.dtype).itemsize
            assert values % width == 0, (values, width)
            finished.add(time.time(), values // width * len(layout.views))
    finally:
        ray.shutdown()
    return finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--seconds", type=float, default=60, help="of steady work, about, on each side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=num_cores(), help="of PyTorch on the CPU")
    parser.add_argument("--batch-size", type=int, default=256, help="views per forward pass")
    parser.add_argument("--shard-images", type=int, default=128)
    parser.add_argument("--variants", type=int, default=1)
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    pool = TeacherPoolConfig(
        min_size=1,
        max_size=1,
        num_cpus=arguments.threads,  # Ray gives an actor as many threads
        num_gpus=1.0 if arguments.device == "cuda" else 0.0,
        batch_size=arguments.batch_size,
        precision=arguments.precision,
    )
    teacher = build_teacher(arguments.model)
    width = teacher.feature_width
    layout = KnowledgeLayout(VIEWS, arguments.variants, IMAGE_SIZE, width, None, image_format="reference")
    shards = draw_views(arguments.shard_images, arguments.variants)
    batches = [
        list(torch.from_numpy(pixels.reshape(-1, *pixels.shape[3:])).split(arguments.batch_size))
        for pixels in shards
    ]
    trial = run_loop(teacher, batches, DISTINCT_SHARDS, pool, arguments.device)
    shard_s = min(after - before for before, after in zip(trial.times, trial.times[1:], strict=False))
    count = max(8, math.ceil(1.2 * arguments.seconds / shard_s))

    per_shard = trial.images[0]
    machine = hardware(arguments.device)
    print(
        f"{arguments.model}, {count} shards of {per_shard} views of {IMAGE_SIZE} px, batch "
        f"{arguments.batch_size}, {arguments.threads} thread(s), {arguments.precision}; {machine}"
    )
    print(f"{'':16}{'images/s':>10}{'steady s':>10}{'start-up s':>12}")
    rates: dict[str, list[float]] = {"ray": [], "loop": []}
    startup: dict[str, list[float]] = {"ray": [], "loop": []}
    for round_number in range(arguments.rounds):
        order = ["ray", "loop"] if round_number % 2 else ["loop", "ray"]
        for side in order:
            if side == "ray":
                finished = run_ray(teacher, shards, count, pool, layout)
            else:
                finished = run_loop(teacher, batches, count, pool, arguments.device)
            rate, seconds = finished.steady(arguments.seconds / 10)
            rates[side].append(rate)
            startup[side].append(finished.startup_s)
            print(
                f"  {round_number + 1}. {side:11}{rate:10,.1f}{seconds:10.1f}{finished.startup_s:12.1f}",
                flush=True,
            )
    ratios = [mine / theirs for mine, theirs in zip(rates["ray"], rates["loop"], strict=True)]
    facts: dict[str, Any] = {}
    for side in rates:
        facts[f"{side}_images_per_s"] = spread(rates[side], 1)
        facts[f"{side}_startup_s"] = spread(startup[side], 2)
    print(f"teachers: {statistics.median(ratios):.3f} of the loop's rate")
    line = result(
        "teachers",
        ratios,
        BASELINE,
        model=arguments.model,
        image_size=IMAGE_SIZE,
        batch_size=arguments.batch_size,
        images_per_shard=per_shard,
        shards=count,
        threads=arguments.threads,
        precision=arguments.precision,
        **facts,
        hardware=machine,
        torch=torch.__version__,
        ray=version("ray"),
    )
    print(line)


if __name__ == "__main__":
    main()
