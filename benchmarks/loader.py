"""What the loaders of cached knowledge cost: their share of a training step on the CPU.

    python benchmarks/loader.py [--rounds 5] [--images 5120] [--threads CORES]

A student learns cached TMKD by the training loop itself (`training.loop.train`), an epoch a round with each
loader; then the same source is iterated alone, with nothing in between, over the same batches. The ratio is the
time of the second over that of the first: what the loader would cost if nothing hid it.

- `resident`: images and float16 knowledge in memory, gathered and augmented between the steps.
- `mapped`: the same arrays mapped from files, read by a thread while the step before runs. The files were
  written just before, so they come from the page cache: no disk has a part.

`data_share` is what the loop says by itself: the share of the epoch spent waiting for batches. For the
resident loader it is the same work, at caches that a step has used meanwhile; for the mapped one, what the
thread did not hide. `share_percent` is the ratio with more digits. An epoch of each that is not counted comes
first; a ratio is the median of the rounds' ratios.
Prints a table, then one JSON object a line.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from measuring import hardware, num_cores, result, spread
from students import AUGMENTATION, VIEWS, Sizes, build_task, draw_knowledge, mapped, training

from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loader import BatchSource
from tmkd_ray.training.loop import train
from tmkd_ray.training.mapped import MappedKnowledge, StoredRows
from tmkd_ray.training.student import StudentTask, resident_source

CPU = torch.device("cpu")
NAMES = {"resident": "loader_share", "mapped": "loader_share_mapped"}


def seconds_to_train(task: StudentTask, batch_size: int) -> tuple[float, float]:
    """Train an epoch; return the seconds of its steps, and the share of them spent waiting for batches."""
    with tempfile.TemporaryDirectory() as folder:
        context = PlainContext(Path(folder), quiet=True)
        (record,) = train(task, training(batch_size), context, key="epoch", label="epoch").history
    assert record.images_per_second is not None
    assert record.data_share is not None
    return task.num_samples // batch_size * batch_size / record.images_per_second, record.data_share


def seconds_to_iterate(source: BatchSource, batch_size: int) -> float:
    """Iterate the batches of the same epoch, and do nothing with them."""
    started = time.perf_counter()
    count = sum(len(batch.labels) for batch in source.batches(0, batch_size, 0, 0, 1))
    assert count == len(source) // batch_size * batch_size, count
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--variants", type=int, default=4, help="of each image's knowledge")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = arguments.batch_size
    if arguments.images < size:
        parser.error(f"--images {arguments.images} are less than a batch of {size}")

    sizes = Sizes(arguments.images, arguments.variants)
    config = training(size)
    machine = hardware()
    times: dict[str, list[tuple[float, float, float]]] = {loader: [] for loader in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        arrays = draw_knowledge(sizes)
        rows = StoredRows(mapped(arrays, Path(folder)), seed=0)
        sources: dict[str, BatchSource] = {
            "resident": resident_source(arrays, config, AUGMENTATION, CPU, with_teacher=True),
            "mapped": MappedKnowledge(rows, CPU),
        }
        del arrays
        tasks = {
            loader: build_task(arguments.student, sizes, source, "tmkd", config)
            for loader, source in sources.items()
        }
        for loader, task in tasks.items():  # memory is claimed and kernels are chosen at first
            seconds_to_train(task, size)
            seconds_to_iterate(sources[loader], size)
        print(
            f"{arguments.student}, batch {size}, {arguments.images} images, {arguments.threads} thread(s), "
            f"float32; {machine}"
        )
        print(f"{'':16}{'step ms':>10}{'loader ms':>11}{'share %':>9}{'waiting %':>11}")
        for round_number in range(arguments.rounds):
            for loader in list(NAMES) if round_number % 2 == 0 else list(NAMES)[::-1]:
                trained, data_share = seconds_to_train(tasks[loader], size)
                iterated = seconds_to_iterate(sources[loader], size)
                steps = arguments.images // size
                times[loader].append((1000 * trained / steps, 1000 * iterated / steps, data_share))
                step_ms, loader_ms, _ = times[loader][-1]
                print(
                    f"  {round_number + 1}. {loader:11}{step_ms:10.1f}{loader_ms:11.2f}"
                    f"{100 * loader_ms / step_ms:9.2f}{100 * data_share:11.2f}",
                    flush=True,
                )
    lines = []
    for loader, name in NAMES.items():
        shares = [loader_ms / step_ms for step_ms, loader_ms, _ in times[loader]]
        print(f"the {loader} loader: {100 * spread(shares, 5)['median']:.2f} % of a step")
        line = result(
            name,
            shares,
            "training step, cached TMKD",
            student=arguments.student,
            share_percent=spread(100 * share for share in shares),
            batch_size=size,
            images=arguments.images,
            image_size=sizes.image_size,
            views=len(VIEWS),
            variants=arguments.variants,
            feature_width=sizes.feature_width,
            clip_width=sizes.clip_width,
            knowledge=sizes.layout.dtype,
            threads=arguments.threads,
            step_ms=spread((step_ms for step_ms, _, _ in times[loader]), 1),
            loader_ms=spread((loader_ms for _, loader_ms, _ in times[loader]), 3),
            data_share=spread((data_share for _, _, data_share in times[loader]), 4),
            hardware=machine,
            torch=torch.__version__,
        )
        lines.append(line)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
