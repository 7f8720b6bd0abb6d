"""Measure on this machine the numbers that `tmkd plan` reckons with.

    python benchmarks/plan_constants.py --output constants.json [--rounds 3] [--shards 300] [--images 192]
    tmkd plan --constants constants.json --config … --nodes …

One core: seconds of its own time (not of the clock, so that other work beside it costs little) of the view
stage on synthetic images of 32 and 224 pixels, with one and with four variants; bytes of Parquet a second;
operations a second of a large matrix product and of a convolutional network, and what a training step of it
takes. Ray: seconds of the clock, of a pipeline of three pools whose actors do nothing, and of a value that
passes the object store. The driver: seconds and peak memory of the lists of images and of shards, by processes
of their own, with the store on a local disk. Times are the best of the rounds, but for the driver's, which is
measured once. What cannot be measured here, the GPUs' part and the prices, is taken over from the packaged file
and stays an assumption, or an example. The last line is the JSON.

For the package itself, from the repository's root, on a machine that does nothing else:

    python benchmarks/plan_constants.py --output tmkd_ray/plan_constants.json --page docs/scaling.md
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import pickle
import platform
import re
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
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
from tmkd_ray.knowledge.compute import ViewStage, pack, plan_shards, unpack
from tmkd_ray.planning import (
    Constants,
    Measured,
    assumptions,
    format_assumed,
    format_measured,
    network_flops,
    packaged_constants,
)
from tmkd_ray.types import TaskSpec

VIEWS = ("original", "edge", "high_frequency")

_OBJECT_BYTES = 64 * 2**20
"""As many as a shard of views has."""


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


def measure_flops(rounds: int) -> tuple[float, float, float]:
    """Return float32 operations a second, on one core, of a matrix product and of ResNet-18 at 224 pixels; and
    the time of a training step of the latter, over that of a forward pass."""
    from tmkd_ray.models import build_model

    torch.set_num_threads(1)
    matrix = torch.randn(2048, 2048)
    model = build_model("torchvision/resnet18", TaskSpec(("a", "b"), 224)).eval()
    batch = torch.randn(8, 3, 224, 224)
    flops, _ = network_flops("torchvision/resnet18", 224, 2)
    with torch.inference_mode():
        product_s = own_seconds(lambda: matrix @ matrix, rounds)
        forward_s = own_seconds(lambda: model(batch), rounds)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).logits.square().mean().backward()
        optimizer.step()

    return 2 * 2048**3 / product_s, 8 * flops / forward_s, own_seconds(step, rounds) / forward_s


def peak_bytes() -> int:
    """Return the most memory that this process has had; needs Linux.

    Not `getrusage`, which begins with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measure_lists(folder: Path, images: int) -> tuple[float, float, float]:
    """Return seconds and bytes at most of each image that a run lists, splits and hashes; and bytes of it that
    go to each process."""
    from tmkd_ray.config_reading import read_config
    from tmkd_ray.stages.experiment import open_experiment

    write_labels(folder / "lists", images)
    config = read_config(None, ["name=lists", "dataset=parquet", f"dataset.path={folder / 'lists'}"])
    before, started = peak_bytes(), time.monotonic()
    experiment = open_experiment(config)
    experiment.data_identity()
    seconds, peak = time.monotonic() - started, peak_bytes() - before
    kept = len(pickle.dumps((experiment.train, experiment.validation)))
    return seconds / images, peak / images, kept / images


def write_labels(folder: Path, images: int) -> None:
    """Write a dataset as hubs name and cut them, whose images are empty."""
    write_dataset(folder, synthetic_images(1, 32), "PNG")
    schema = pq.read_schema(folder / "train.parquet")
    (folder / "train.parquet").unlink()
    for number in range(10):
        labels = np.arange(images // 10) % 1000 % 100
        image = pa.array([{"bytes": b""}] * len(labels), schema.field("image").type)
        table = pa.Table.from_arrays([image, pa.array(labels)], schema=schema)
        pq.write_table(table, folder / f"train-{number:05d}-of-00010.parquet")


def measure_shards(folder: Path, shards: int) -> tuple[float, float, float]:
    """Return seconds and bytes at most of each shard that a driver plans, finds done, checks and lists in the
    manifest; and bytes of it there."""
    from tmkd_ray.datasets.base import SampleIndex
    from tmkd_ray.knowledge.store import KnowledgeStore, ShardRecord, record_files

    rows = 32
    count = shards * rows
    index = SampleIndex(
        np.array([f"data/train-00000-of-00010.parquet:{row}" for row in range(count)]),
        np.zeros(count, np.int64),
        np.zeros(count, np.int32),
        np.arange(count),
    )
    store = KnowledgeStore(str(folder / "store"))
    store.begin({"version": 0})
    (folder / "store" / "train").mkdir()
    for number in range(shards):
        sha256 = f"{number:064x}"
        record = ShardRecord("train", number, f"{number:05d}-{sha256[:12]}.parquet", rows, 0, sha256, [])
        for name, content in zip(record_files(record), ("", json.dumps(asdict(record), indent=1)), strict=True):
            (folder / "store" / "train" / name).write_text(content)
    before, started = peak_bytes(), time.monotonic()
    tables = [plan.to_table() for plan in plan_shards("train", index, rows, 4)]
    store.committed()
    store.finish(("a", "b"), {"train": KnowledgeLayout(VIEWS, 4, 32, 512, 512)}, {"train": len(tables)})
    assert len(store.manifest().shards) == shards
    seconds, peak = time.monotonic() - started, peak_bytes() - before
    return seconds / shards, peak / shards, (folder / "store" / "manifest.json").stat().st_size / shards


def in_process(measurement: Callable[[Path, int], tuple[float, float, float]], count: int) -> tuple[float, ...]:
    """Return what a measurement says in a process of its own, whose peak of memory is its own too."""
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        return pool.apply(measurement, (Path(folder), count))


_RECIPE = """tmkd plan --config pipelines/configs/imagenet_resnet34_resnet18.yaml \\
    --nodes {nodes} --images {images} --classes 1000 \\
    dataset=parquet dataset.path=s3://BUCKET/images dataset.image_size=224 \\
    teacher.visual.checkpoint=s3://BUCKET/resnet34.pth knowledge.visual.precision=bfloat16 \\
    knowledge.text.precision=bfloat16 training.precision=bfloat16"""

PAGE_PLANS = {
    "imagenet": _RECIPE.format(nodes="views=8,teacher=8,train=2", images=1_281_167),
    "hundred_million": _RECIPE.format(nodes="views=16,teacher=24,train=16", images=100_000_000)
    + """ \\
    methods={} knowledge.num_variants=1 knowledge.dtype=int8 \\
    training.epochs=10 training.batch_size=4096 training.num_workers=64""",
}
"""The worked plans of docs/scaling.md, by the name of their section."""

_ABSENT = """Not measured yet. To put the figures here, on a machine that does nothing else:
`python benchmarks/plan_constants.py --output tmkd_ray/plan_constants.json --page docs/scaling.md`."""


def page_sections(packaged: Constants | None) -> dict[str, str]:
    """Return the sections of docs/scaling.md that follow from the package's constants, by name."""
    from tmkd_ray.cli import main as tmkd

    measured = _ABSENT
    if packaged is not None:
        sizes = ", ".join(
            f"{name.replace('_', ' ')} {count:,}" for name, count in packaged.measured.sizes.items()
        )
        measured = f"{format_measured(packaged)}\n\nSizes: {sizes}."
    sections = {"measured": measured, "assumed": format_assumed(packaged or assumptions())}
    for name, command in PAGE_PLANS.items():
        said = io.StringIO()
        if packaged is None:
            said.write(_ABSENT)
        else:
            with contextlib.redirect_stdout(said):
                assert tmkd(shlex.split(command.replace("\\\n", " "))[1:]) == 0, command
        sections[name] = f"```sh\n{command}\n```\n\n{said.getvalue().strip()}"
    return sections


def fill_page(page: str, sections: dict[str, str]) -> str:
    """Return the page with its marked sections replaced."""
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- {found[1]} -->\n{sections[found[1]]}\n<!-- end -->",
        page,
        flags=re.DOTALL,
    )


class Nothing:
    """An actor that hands on what it gets."""

    def __call__(self, table: pa.Table) -> pa.Table:
        return table


def measure_ray(shards: int, rounds: int) -> tuple[float, float, float, float]:
    """Return seconds until the first shard has passed three pools, and of each after it; of the driver, to hand
    a shard to Ray; and bytes a second of a value that is put into the object store and copied out."""
    import ray

    from tmkd_ray.stages.pipeline import plan_dataset, view_stage
    from tmkd_ray.stages.session import start_local_ray

    start_local_ray(num_cpus=4)
    starts, each, given, moved = [], [], [], []
    value = np.zeros(_OBJECT_BYTES, np.uint8)
    for _ in range(rounds):
        started = time.monotonic()
        copy = unpack(ray.get(ray.put(pa.table({"value": pack(value)}))), "value", np.uint8).copy()
        moved.append(copy.nbytes / (time.monotonic() - started))
    for _ in range(rounds):
        tables = [pa.table({"number": [number]}) for number in range(shards)]
        started = time.monotonic()
        dataset = plan_dataset(tables)
        given.append((time.monotonic() - started) / shards)
        started = time.monotonic()
        for _ in range(3):
            dataset = view_stage(dataset, Nothing, (), ViewPoolConfig(max_size=1))
        times = [time.monotonic() for _ in dataset.iter_rows()]
        starts.append(times[0] - started)
        each.append((times[-1] - times[0]) / (len(times) - 1))
    ray.shutdown()
    return min(starts), min(each), min(given), max(moved)


def measure(rounds: int, shards: int, images: int, listed: int) -> Constants:
    """Measure all that this machine can tell; the rest is the packaged file's."""
    import ray

    with tempfile.TemporaryDirectory() as folder:
        small = measure_views(Path(folder) / "32", 32, 4 * images, rounds)
        large = measure_views(Path(folder) / "224", 224, images, rounds)
    product, network, step_over_forward = measure_flops(rounds)
    image_s, image_bytes, image_kept_bytes = in_process(measure_lists, listed)
    planned_s, shard_bytes, manifest_bytes = in_process(measure_shards, listed // 50)
    start_s, passing_s, given_s, object_bytes_per_s = measure_ray(shards, rounds)
    measured = Measured(
        hardware=hardware(),
        date=date.today().isoformat(),
        software=f"Python {platform.python_version()}, torch {torch.__version__}, Ray {ray.__version__}",
        sizes={
            "rounds": rounds,
            "images_of_224_pixels": images,
            "images_of_32_pixels": 4 * images,
            "shards_through_ray": shards,
            "images_listed": listed,
            "shards_listed": listed // 50,
        },
    )
    return Constants.model_validate(
        assumptions().model_dump()
        | {
            "measured": measured.model_dump(),
            "core": {
                "decode_s": {"at_32": _rounded(small[0]), "at_224": _rounded(large[0])},
                "variant_s": {"at_32": _rounded(small[1]), "at_224": _rounded(large[1])},
                "write_bytes_per_s": _rounded(measure_writing(rounds)),
                "flops": _rounded(network),
                "matmul_flops": _rounded(product),
                "step_over_forward": _rounded(step_over_forward),
            },
            "ray": {
                "start_s": _rounded(start_s),
                "shard_s": _rounded(passing_s),
                "object_bytes_per_s": _rounded(object_bytes_per_s),
            },
            "driver": {
                "image_s": _rounded(image_s),
                "image_bytes": _rounded(image_bytes),
                "image_kept_bytes": _rounded(image_kept_bytes),
                "shard_s": _rounded(planned_s + given_s),
                "shard_bytes": _rounded(shard_bytes),
                "manifest_bytes": _rounded(manifest_bytes),
            },
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
    parser.add_argument("--listed", type=int, default=1_000_000, help="images; and a fiftieth as many shards")
    parser.add_argument(
        "--page", type=Path, help="docs/scaling.md, to be written anew by the packaged constants"
    )
    arguments = parser.parse_args()
    constants = measure(arguments.rounds, arguments.shards, arguments.images, arguments.listed)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(constants.model_dump(), indent=1, ensure_ascii=False) + "\n")
    if arguments.page is not None:
        page = fill_page(arguments.page.read_text(), page_sections(packaged_constants()))
        arguments.page.write_text(page)
    print(format_measured(constants))
    print(
        json.dumps(
            {"name": "plan_constants", **constants.model_dump(include={"measured", "core", "ray", "driver"})}
        )
    )


if __name__ == "__main__":
    main()
