"""Peak memory of a whole knowledge run, on N images and on ten times as many.

    python benchmarks/knowledge_memory.py [--images 2000] [--factor 10] [--rounds 3] [--data FOLDER]
                                          [path=value ...]

Each run is `tmkd knowledge` in a process of its own, which starts its own Ray: views, visual teacher, CLIP,
writing. Its memory, and that of all processes it starts, is read several times a second until it ends: the
sum of their proportional set sizes (what several share counts once), with the object store counted once by
what of it is allocated. The teachers are tiny and untrained, so the views outrun them and wait in the object
store. The ratio is the median of the rounds': the larger run's peak over the smaller's. Needs Linux. Prints a
table, then one JSON object.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
from measuring import NUM_CLASSES, hardware, result, spread, synthetic_images, write_dataset

from tmkd_ray.datasets.base import IMAGENET_MEAN, IMAGENET_STD
from tmkd_ray.models import build_model
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.types import TaskSpec

IMAGE_SIZE = 32
VISUAL_TEACHER = "resnet8"
SAMPLE_PAUSE_S = 0.5


@dataclass
class Memory:
    """Bytes at one moment; `peak` is that of the moment when the sum was largest."""

    processes: int = 0
    private: int = 0
    object_store: int = 0
    moments: int = field(default=1, compare=False)

    @property
    def total(self) -> int:
        return self.private + self.object_store


def descendants(root: int) -> list[int]:
    """Return a process and all that it, or they, have started."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue  # it has ended
            parent = int(stat.rpartition(")")[2].split()[1])  # the name before may hold blanks
            children.setdefault(parent, []).append(int(entry))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def memory_of(root: int) -> Memory:
    """Read the memory of a process and its descendants now."""
    memory = Memory()
    stores: dict[tuple[int, int], int] = {}
    for process in descendants(root):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
            sizes = {line.split()[0]: 1024 * int(line.split()[1]) for line in lines}
            # Without shared memory, which is Ray's object store.
            memory.private += sizes["Pss_Anon:"] + sizes["Pss_File:"]
            memory.processes += 1
            if Path(f"/proc/{process}/comm").read_text().strip() == "raylet":
                stores |= _object_stores(process)
        except (OSError, KeyError):
            continue  # it has ended, and has no memory any more
    memory.object_store = sum(stores.values())
    return memory


def _object_stores(raylet: int) -> dict[tuple[int, int], int]:
    """Return the allocated bytes of the files that a raylet's object store lies in."""
    stores = {}
    for name in os.listdir(f"/proc/{raylet}/fd"):
        file = f"/proc/{raylet}/fd/{name}"
        if "plasma" in os.path.basename(os.readlink(file)):
            status = os.stat(file)
            stores[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return stores


def peak_of(command: list[str], log: Path) -> tuple[Memory, float]:
    """Run a command; return the memory at its peak and the seconds it took."""
    started = time.perf_counter()
    peak, moments = Memory(), 0
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            memory = memory_of(process.pid)
            moments += 1
            if memory.total > peak.total:
                peak = memory
            time.sleep(SAMPLE_PAUSE_S)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with {process.returncode}:\n{log.read_text()}")
    peak.moments = moments
    return peak, time.perf_counter() - started


def write_teachers(folder: Path) -> None:
    """Write an untrained visual teacher and an untrained CLIP."""
    torch.manual_seed(0)
    names = tuple(f"class {label}" for label in range(NUM_CLASSES))
    model = build_model(VISUAL_TEACHER, TaskSpec(names, IMAGE_SIZE))
    safetensors.torch.save_file(model.state_dict(), folder / "teacher.safetensors")
    clip = ClipTeacher.new(
        [f"a photo of a {name}." for name in names],
        image_size=IMAGE_SIZE,
        patch_size=8,
        embedding_width=64,
        vision_width=32,
        vision_layers=1,
        text_width=32,
        text_layers=1,
        head_width=16,
        vocabulary_size=600,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    clip.save(str(folder / "clip"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="of the smaller run")
    parser.add_argument("--factor", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", type=int, default=4)
    parser.add_argument("--shard-rows", type=int, default=64, help="images of a shard")
    parser.add_argument("--data", help="Parquet dataset, e.g. CIFAR-100")
    parser.add_argument("overrides", nargs="*", help="of the configuration, e.g. knowledge.views.max_size=1")
    arguments = parser.parse_args()

    sizes = (arguments.images, arguments.factor * arguments.images)
    peaks: dict[int, list[Memory]] = {size: [] for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_teachers(folder)
        if arguments.data is None:
            write_dataset(folder / "images", synthetic_images(max(sizes), IMAGE_SIZE), "PNG")
        print(
            f"{IMAGE_SIZE} px, {arguments.variants} variants, shards of {arguments.shard_rows} images; "
            f"{hardware()}"
        )
        print(f"{'images':>10}{'peak MB':>10}{'object store':>14}{'processes':>11}{'seconds':>9}{'moments':>9}")
        for round_number in range(arguments.rounds):
            for size in sizes if round_number % 2 == 0 else reversed(sizes):
                command = [sys.executable, "-m", "tmkd_ray", "knowledge", "dataset=parquet"]
                command += [f"dataset.path={arguments.data or folder / 'images'}", f"dataset.limit={size}"]
                command += [f"name=run-{round_number}-{size}", f"output={folder}"]
                command += [f"teacher.visual.model={VISUAL_TEACHER}"]
                command += [f"teacher.visual.checkpoint={folder / 'teacher.safetensors'}"]
                command += [f"teacher.text.model={folder / 'clip'}"]
                command += [f"knowledge.num_variants={arguments.variants}"]
                command += [f"knowledge.shard_rows={arguments.shard_rows}", *arguments.overrides]
                peak, took = peak_of(command, folder / f"{size}.log")
                peaks[size].append(peak)
                seconds[size].append(took)
                total_mb, store_mb = peak.total / 2**20, peak.object_store / 2**20
                print(
                    f"{size:10,}{total_mb:10,.0f}{store_mb:14,.0f}{peak.processes:11}{took:9.1f}{peak.moments:9}",
                    flush=True,
                )
    small, large = sizes
    ratios = [more.total / less.total for less, more in zip(peaks[small], peaks[large], strict=True)]
    ratio = spread(ratios)["median"]
    print(f"knowledge_memory: {ratio:.3f} times the peak for {arguments.factor} times the images")
    line = result(
        "knowledge_memory",
        ratios,
        f"the same run on {small} images",
        images=list(sizes),
        image_size=IMAGE_SIZE,
        variants=arguments.variants,
        shard_rows=arguments.shard_rows,
        peak_mb={size: spread((peak.total / 2**20 for peak in peaks[size]), 1) for size in sizes},
        object_store_mb={
            size: spread((peak.object_store / 2**20 for peak in peaks[size]), 1) for size in sizes
        },
        processes={size: spread((peak.processes for peak in peaks[size]), 0) for size in sizes},
        seconds={size: spread(seconds[size], 1) for size in sizes},
        hardware=hardware(),
        ray=version("ray"),
    )
    print(line)


if __name__ == "__main__":
    main()
