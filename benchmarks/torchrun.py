"""The training loop under Ray Train against the same loop under `torchrun`.

    python benchmarks/torchrun.py [--rounds 5] [--images 2560] [--epochs 4] [--workers 2]

Both sides are commands of their own, started cold, that train the same student on cached TMKD by the same loop
(`training.loop.train`): one by `stages.training.run_jobs` on a Ray of its own, as `tmkd distill` does, the
other by `torchrun --nproc-per-node` with `PlainContext`. DDP over gloo, one thread a worker, everything in
memory.

The first worker notes when each step ends. The rate is that of steady work: steps within epochs, without the
first epoch, and without what lies between two epochs (validation, and the checkpoint that ends each). A second
ratio, `ratio_with_checkpoints`, counts that in too: an epoch is short here, so it says more of checkpoints
than a real run would. `first_step_s` is the time from the command until the first step is done, and
`ray_first_step_parts_s` where it went: the command's imports, the start of Ray, of Ray Train's workers, the
data and the network, the step. Rounds alternate which side goes first; a ratio is the median of the rounds'
ratios. Prints a table, then one JSON object.
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from measuring import hardware, num_cores, result, spread
from students import STEPS_FILE, VIEWS, Sizes, timed_task, training

from tmkd_ray.config import TrainingConfig
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import train

DRIVER_FILE = "driver.json"


def train_on_ray(student: str, sizes: Sizes, config: TrainingConfig, folder: Path) -> None:
    """Be the command of the Ray side."""
    from tmkd_ray.stages.training import TrainingJob, run_jobs  # before ray, whose environment it sets

    import ray  # isort: skip

    from tmkd_ray.stages.session import start_local_ray

    imported = time.time()
    start_local_ray(max(4, 2 * num_cores()))
    try:
        (folder / DRIVER_FILE).write_text(json.dumps({"imports": imported, "ray": time.time()}))
        build = functools.partial(timed_task, student, sizes, config)
        job = TrainingJob("key", "student", str(folder), config, build)
        run_jobs([job], str(folder / "ray"))
    finally:
        ray.shutdown()


def train_on_torchrun(student: str, sizes: Sizes, config: TrainingConfig, folder: Path) -> None:
    """Be a worker of the other side."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    context = PlainContext(folder / "checkpoints", quiet=True)
    torch.manual_seed(config.seed)
    task = timed_task(student, sizes, config, context.device)
    outcome = train(task, config, context, "key", "student", str(folder))
    if context.rank == 0:
        task.save(str(folder), outcome.weights)
    context.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class Run:
    """Steps a second within epochs, and of all after the first; seconds to the first step, and of the whole.

    Attributes:
        parts_s: what the seconds to the first step consist of.
    """

    steps_per_s: float
    with_checkpoints: float
    first_step_s: float
    whole_s: float
    parts_s: dict[str, float]


def command(side: str, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Return what a user would type."""
    options = [
        *("--side", side, "--folder", str(folder), "--student", arguments.student),
        *("--images", str(arguments.images), "--epochs", str(arguments.epochs)),
        *("--batch-size", str(arguments.batch_size), "--workers", str(arguments.workers)),
    ]
    if side == "ray":
        return [sys.executable, __file__, *options]
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    return [torchrun, *rendezvous, "--nproc-per-node", str(arguments.workers), __file__, *options]


def run(side: str, arguments: argparse.Namespace, folder: Path) -> Run:
    """Run a side's command, and read what its first worker noted."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a worker, as torchrun and Ray set it by themselves
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    started = time.time()
    with (folder / "log").open("wb") as log:
        process = subprocess.run(
            command(side, arguments, folder), stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        )
    whole_s = time.time() - started
    if process.returncode != 0:
        sys.exit(f"{side} failed with {process.returncode}:\n{(folder / 'log').read_text()}")
    facts = json.loads((folder / STEPS_FILE).read_text())
    assert facts["threads"] == 1, facts["threads"]
    ended, per_epoch = facts["ended"], arguments.images // arguments.batch_size
    assert len(ended) == arguments.epochs * per_epoch, len(ended)
    marks = {"started": started}
    if side == "ray":
        marks |= json.loads((folder / DRIVER_FILE).read_text())
    marks |= {"workers": facts["asked"], "data_and_network": facts["built"], "step": ended[0]}
    parts = {name: marks[name] - marks[before] for before, name in itertools.pairwise(marks)}
    shutil.rmtree(folder)
    return Run(*rates(ended, per_epoch), ended[0] - started, whole_s, parts)


def rates(ended: list[float], per_epoch: int) -> tuple[float, float]:
    """Return the steps a second after the first epoch: those within epochs, and all of them.

    What lies between two epochs falls to the first step of the second, which is not within it.

    Args:
        ended: when each step ended, of at least two epochs.
        per_epoch: steps, at least two.
    """
    epochs = [ended[first : first + per_epoch] for first in range(per_epoch, len(ended), per_epoch)]
    within = sum(times[-1] - times[0] for times in epochs)
    return len(epochs) * (per_epoch - 1) / within, (len(ended) - per_epoch) / (ended[-1] - ended[per_epoch - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--epochs", type=int, default=4, help="the first is not counted")
    parser.add_argument("--batch-size", type=int, default=128, help="global")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--side", choices=["ray", "torchrun"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.epochs < 2 or arguments.images < 2 * arguments.batch_size:
        parser.error("at least two epochs of two batches are needed")
    sizes = Sizes(arguments.images)
    config = training(arguments.batch_size, arguments.epochs, arguments.workers).model_copy(
        update={"checkpoint_every": 1}
    )
    if arguments.side is not None:
        side = train_on_ray if arguments.side == "ray" else train_on_torchrun
        side(arguments.student, sizes, config, arguments.folder)
        return

    machine = hardware()
    print(
        f"{arguments.student}, {arguments.workers} workers of 1 thread, global batch {arguments.batch_size}, "
        f"{arguments.epochs} epochs of {arguments.images} images; {machine}"
    )
    print(f"{'':16}{'steps/s':>9}{'with checkpoints':>18}{'first step s':>14}{'whole s':>9}")
    runs: dict[str, list[Run]] = {"ray": [], "torchrun": []}
    with tempfile.TemporaryDirectory() as scratch:
        for round_number in range(arguments.rounds):
            for name in list(runs) if round_number % 2 else list(runs)[::-1]:
                found = run(name, arguments, Path(scratch) / f"{round_number}-{name}")
                runs[name].append(found)
                print(
                    f"  {round_number + 1}. {name:11}{found.steps_per_s:9.3f}{found.with_checkpoints:18.3f}"
                    f"{found.first_step_s:14.1f}{found.whole_s:9.1f}",
                    flush=True,
                )
    pairs = list(zip(runs["ray"], runs["torchrun"], strict=True))
    ratios = [mine.steps_per_s / theirs.steps_per_s for mine, theirs in pairs]
    with_checkpoints = (mine.with_checkpoints / theirs.with_checkpoints for mine, theirs in pairs)
    first = {name: spread((one.first_step_s for one in found), 1) for name, found in runs.items()}
    parts = {
        name: spread((one.parts_s[name] for one in runs["ray"]), 1)["median"] for name in runs["ray"][0].parts_s
    }
    print(
        f"Ray Train: {statistics.median(ratios):.3f} of torchrun's steps/s; from the command to the first step "
        f"{first['ray']['median']} s (torchrun: {first['torchrun']['median']} s)"
    )
    print(f"  of which {', '.join(f'{part} {seconds} s' for part, seconds in parts.items())}")
    line = result(
        "ray_train_over_torchrun",
        ratios,
        f"torchrun, {arguments.workers} workers",
        ratio_with_checkpoints=spread(with_checkpoints),
        first_step_s=first,
        ray_first_step_parts_s=parts,
        steps_per_s={name: spread(one.steps_per_s for one in found) for name, found in runs.items()},
        student=arguments.student,
        batch_size=arguments.batch_size,
        images=arguments.images,
        epochs=arguments.epochs,
        image_size=sizes.image_size,
        views=len(VIEWS),
        feature_width=sizes.feature_width,
        clip_width=sizes.clip_width,
        workers=arguments.workers,
        threads=1,
        backend="gloo",
        hardware=machine,
        torch=torch.__version__,
        ray=version("ray"),
    )
    print(line)


if __name__ == "__main__":
    main()
