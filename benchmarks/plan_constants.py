"""Measure on this machine the numbers that `tmkd plan` reckons with.

    python benchmarks/plan_constants.py --output constants.json [--rounds 3] [--shards 300] [--images 192]
    tmkd plan --constants constants.json --config … --nodes …

One core: seconds of its own time (not of the clock, so that other work beside it costs little) of the view
stage on synthetic images of 32 and 224 pixels, with one and with four variants; bytes of Parquet a second;
operations a second of a convolutional network. Ray: seconds of the clock, of a pipeline of three pools whose
actors do nothing. Each is the best of the rounds. What cannot be measured here, the GPUs' part and the prices,
is taken over from the packaged file and stays an estimate, or an example. The last line is the JSON.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measuring import hardware, open_dataset, synthetic_images, write_dataset

from tmkd_ray.augmentation import AugmentationConfig
from tmkd_ray.config import ViewPoolConfig
from tmkd_ray.knowledge import KnowledgeLayout
from tmkd_ray.knowledge.compute import ViewStage, plan_shards
from tmkd_ray.planning import Constants, network_flops, unmeasured
from tmkd_ray.types import TaskSpec

VIEWS = ("original", "edge", "high_frequency")


def own_seconds(work: Callable[[], object], rounds: int) -> float:
    """Return the least seconds of this process's own time that the work took."""
    work()
    times = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def measure_views(folder: Path, size: int, count: int, rounds: int) -> tuple[float, float]:
    """Return seconds of an image, and of each of its variants."""
    from tmkd_ray.views import build_view
    from tmkd_ray.views.base import VIEWS as REGISTERED

    images = synthetic_images(count, size)
    write_dataset(folder, images, "PNG" if size < 64 else "JPEG")
    dataset = open_dataset(folder, size)
    views = {name: build_view(name, REGISTERED.get(name).Config()) for name in VIEWS}
    augmentation = AugmentationConfig(recipe="cifar" if size < 64 else "imagenet")
    seconds = {}
    for variants in (1, 4):
        layout = KnowledgeLayout(VIEWS, variants, size, 512, 512, image_format="lossless")
        stage = ViewStage(dataset, views, {"train": layout}, augmentation, 0)
        (plan,) = plan_shards("train", dataset.index("train"), count, variants)
        table = plan.to_table()
        seconds[variants] = own_seconds(lambda stage=stage, table=table: stage(table), rounds) / count
    variant = (seconds[4] - seconds[1]) / 3
    return seconds[1] - variant, variant


def measure_writing(rounds: int) -> float:
    """Return bytes of features and embeddings a second, as Parquet in memory."""
    values = np.random.default_rng(0).standard_normal((512, 4 * 3 * 1024)).astype(np.float16)
    table = pa.table({"feature": pa.array([row.tobytes() for row in values], pa.binary(values.shape[1] * 2))})

    def write() -> None:
        pq.write_table(table, io.BytesIO(), compression="zstd", use_dictionary=False, write_statistics=False)

    return values.nbytes / own_seconds(write, rounds)


def measure_flops(rounds: int) -> float:
    """Return float32 operations a second of ResNet-18 at 224 pixels on one core."""
    from tmkd_ray.models import build_model

    torch.set_num_threads(1)
    model = build_model("torchvision/resnet18", TaskSpec(("a", "b"), 224)).eval()
    batch = torch.randn(8, 3, 224, 224)
    flops, _ = network_flops("torchvision/resnet18", 224, 2)
    with torch.inference_mode():
        return 8 * flops / own_seconds(lambda: model(batch), rounds)


class Nothing:
    """An actor that hands on what it gets."""

    def __call__(self, table: pa.Table) -> pa.Table:
        return table


def measure_ray(shards: int, rounds: int) -> tuple[float, float]:
    """Return seconds until the first shard has passed three pools, and of each after it."""
    import ray

    from tmkd_ray.stages.pipeline import plan_dataset, view_stage
    from tmkd_ray.stages.session import start_local_ray

    start_local_ray(num_cpus=4)
    starts, each = [], []
    for _ in range(rounds):
        started = time.monotonic()
        dataset = plan_dataset([pa.table({"number": [number]}) for number in range(shards)])
        for _ in range(3):
            dataset = view_stage(dataset, Nothing, (), ViewPoolConfig(max_size=1))
        times = [time.monotonic() for _ in dataset.iter_rows()]
        starts.append(times[0] - started)
        each.append((times[-1] - times[0]) / (len(times) - 1))
    ray.shutdown()
    return min(starts), min(each)


def measure(rounds: int, shards: int, images: int) -> Constants:
    """Measure all that this machine can tell; the rest is the packaged file's."""
    with tempfile.TemporaryDirectory() as folder:
        small = measure_views(Path(folder) / "32", 32, 4 * images, rounds)
        large = measure_views(Path(folder) / "224", 224, images, rounds)
    start, shard = measure_ray(shards, rounds)
    return Constants.model_validate(
        unmeasured()
        | {
            "note": f"measured {date.today().isoformat()} on {hardware()}, best of {rounds}; no GPU was",
            "core": {
                "decode_s": {"at_32": _rounded(small[0]), "at_224": _rounded(large[0])},
                "variant_s": {"at_32": _rounded(small[1]), "at_224": _rounded(large[1])},
                "write_bytes_per_s": _rounded(measure_writing(rounds)),
                "flops": _rounded(measure_flops(rounds)),
            },
            "ray": {"start_s": _rounded(start), "shard_s": _rounded(shard)},
        }
    )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for `tmkd plan --constants`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=300)
    parser.add_argument("--images", type=int, default=192, help="of 224 pixels; of 32 four times as many")
    arguments = parser.parse_args()
    constants = measure(arguments.rounds, arguments.shards, arguments.images)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(constants.model_dump(), indent=1, ensure_ascii=False) + "\n")
    core, ray = constants.core, constants.ray
    micros = {
        name: (1e6 * cost.at_32, 1e6 * cost.at_224)
        for name, cost in (("read, decode, store", core.decode_s), ("augment, three views", core.variant_s))
    }
    print(f"{'one core':32} {'32 pixels':>12} {'224 pixels':>12}")
    for name, (small, large) in micros.items():
        print(f"{name + ': µs':32} {small:12.1f} {large:12.1f}")
    print(f"Parquet {core.write_bytes_per_s / 1e6:.0f} MB/s; network {core.flops / 1e9:.0f} GFLOP/s a core")
    print(f"Ray: {ray.start_s:.1f} s to start three pools, {ray.shard_s * 1e3:.1f} ms a shard")
    print(
        json.dumps(
            {"name": "plan_constants", "hardware": hardware(), **constants.model_dump(include={"core", "ray"})}
        )
    )


if __name__ == "__main__":
    main()
