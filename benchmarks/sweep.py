"""A sweep on one shared store: its time over the ideal, and the memory that each further trial adds.

    python benchmarks/sweep.py [--images 8192] [--epochs 6] [--trials 8] [--at-once CORES] [--parts time,memory]

The sweep is `tmkd search` on a store of noise: CIFAR's sizes, four variants, three views, float16 knowledge
of 256 and 512 numbers; a student learns cached TMKD on batches of 128 with one thread, and writes no checkpoint
but the last.

`sweep_over_ideal`: the time of all trials, over trials × the time of one ÷ trials at once. One is the same
training in a plain process with one thread, nothing beside it: the loop from its first step to its last
validation. The start of Ray is left out; that of Tune's own processes, with their imports, is not.

`sweep_memory`: what each further trial at once adds: the difference of the trials' proportional set sizes
(/proc/PID/smaps_rollup: what several share counts in parts) between one and several, over what it may add: its
model and optimiser, and 300 MB. Needs Linux. Prints a table, then a JSON object for each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from knowledge_memory import descendants
from measuring import NUM_CLASSES, hardware, num_cores, result, spread, synthetic_images, write_dataset

from tmkd_ray.augmentation import draw_parameters, sample_keys
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config_reading import dump_config, read_config
from tmkd_ray.datasets.base import IMAGENET_MEAN, IMAGENET_STD, SampleIndex
from tmkd_ray.knowledge import KnowledgeLayout, KnowledgeStore
from tmkd_ray.knowledge.compute import plan_shards
from tmkd_ray.knowledge.layout import encode_array
from tmkd_ray.models import build_model
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.types import TaskSpec

STUDENT = "resnet8"
VISUAL_TEACHER = "resnet8x4"
SHARD_ROWS = 256
ALLOWED_MB = 300
SAMPLE_PAUSE_S = 0.5
RATE = "training.learning_rate"


def configuration(arguments: argparse.Namespace, folder: Path, trials: int, at_once: int) -> ExperimentConfig:
    """Return the sweep's configuration; no two trials are alike."""
    section = {
        "parameters": {RATE: {"loguniform": [0.01, 0.05]}},
        "num_trials": trials,
        "max_concurrent_trials": at_once,
        "resources": {"workers": 1, "cpus": 1, "gpus": 0},
    }
    knowledge = {
        "num_variants": 4,
        "images": "raw",
        "shard_rows": SHARD_ROWS,
        "node_copies": str(folder / "copies"),
    }
    options = {
        "name": "sweep",
        "output": str(folder / "runs"),
        "dataset": {"name": "parquet", "path": str(folder / "images"), "image_size": 32},
        "knowledge": {**knowledge, "path": str(folder / "store")},
        "student": {"model": STUDENT},
        "training": {
            "epochs": arguments.epochs,
            "batch_size": 128,
            "checkpoint_every": arguments.epochs,
            "loggers": [],
        },
        "teacher": {
            "visual": {"model": VISUAL_TEACHER, "checkpoint": str(folder / "teacher.safetensors")},
            "text": {"model": str(folder / "clip")},
        },
        "search": section,
    }
    return read_config(None, [f"{name}={json.dumps(value)}" for name, value in options.items()])


def write_teachers(folder: Path) -> None:
    """Write an untrained visual teacher and an untrained CLIP of CIFAR's usual widths."""
    torch.manual_seed(0)
    names = tuple(f"class {label}" for label in range(NUM_CLASSES))
    model = build_model(VISUAL_TEACHER, TaskSpec(names, 32))
    safetensors.torch.save_file(model.state_dict(), folder / "teacher.safetensors")
    clip = ClipTeacher.new(
        [f"a photo of a {name}." for name in names],
        image_size=32,
        patch_size=8,
        embedding_width=512,
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


def write_store(config: ExperimentConfig) -> int:
    """Write a store of noise that is, for all who look, the configuration's; return the bytes it maps to."""
    from tmkd_ray.stages.experiment import open_experiment
    from tmkd_ray.stages.fitting import found_teacher, load_teacher
    from tmkd_ray.stages.knowledge import fingerprint, num_shards, text_bank_key
    from tmkd_ray.stages.pipeline import knowledge_layouts

    experiment = open_experiment(config)
    teacher = found_teacher(experiment)
    assert teacher is not None
    assert config.teacher.text is not None
    assert config.teacher.text.model is not None
    visual, clip = load_teacher(experiment, teacher), ClipTeacher.load(config.teacher.text.model)
    layouts = knowledge_layouts(config, visual, clip)
    store = KnowledgeStore(experiment.store_path)
    store.begin(fingerprint(experiment, visual, clip))
    generator = np.random.default_rng(0)
    size = 0
    for split, index, variants in (("train", experiment.train, 4), ("validation", experiment.validation, 1)):
        for plan in plan_shards(split, index, SHARD_ROWS, variants):
            table = _noise(plan.index, layouts[split], config, generator)
            store.write_shard(split, plan.number, table, [])
            size += sum(column.nbytes for column in table.columns)
    store.write_head(visual.head_weight, visual.head_bias)
    prompts = experiment.prompts()
    key = text_bank_key(prompts, experiment.task.class_names, clip.text_fingerprint())
    bank = clip.text_bank(list(prompts.values()), experiment.task.class_names)
    store.write_text_bank(key, bank, clip.temperature)
    store.finish(experiment.task.class_names, layouts, num_shards(experiment))
    return size


def _noise(
    index: SampleIndex, layout: KnowledgeLayout, config: ExperimentConfig, generator: np.random.Generator
) -> pa.Table:
    columns = {
        "id": pa.array(index.ids.tolist(), pa.string()),
        "label": pa.array(index.labels, pa.int64()),
    }
    for name, (dtype, shape) in layout.arrays().items():
        if name == "augmentation":
            keys = sample_keys(index.ids, config.knowledge.seed)
            values = draw_parameters(config.augmentation, keys, np.arange(layout.num_variants), 32).astype(
                dtype
            )
        elif dtype == np.uint8:
            values = generator.integers(0, 256, (len(index), *shape), dtype=np.uint8)
        else:
            values = generator.standard_normal((len(index), *shape), dtype=np.float32).astype(dtype)
        columns[name] = encode_array(values)
    schema = layout.schema()
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def train_alone(config: ExperimentConfig, folder: Path) -> None:
    """Be the plain process: one trial's training, timed."""
    from tmkd_ray.search.space import check_space, trial_config
    from tmkd_ray.stages.distillation import student_jobs
    from tmkd_ray.stages.experiment import open_experiment
    from tmkd_ray.training.context import PlainContext
    from tmkd_ray.training.loop import train

    trial = trial_config(check_space(config).config, {RATE: 0.02, "knowledge.loader": "mapped"})
    ((_, _, job),) = student_jobs(open_experiment(trial))
    context = PlainContext(folder / "alone", quiet=True)
    task = job.build(context.device)
    assert torch.get_num_threads() == 1
    started = time.perf_counter()
    train(task, job.training, context, "alone", "alone")
    seconds = time.perf_counter() - started
    parameters = task.module.state_dict()
    size = sum(value.numel() * value.element_size() for value in parameters.values())
    print(json.dumps({"seconds": seconds, "module_bytes": size}))


def run_sweeps(config: ExperimentConfig, folder: Path) -> None:
    """Be the other side's command: the sweep, timed from when Ray is there; its memory is watched."""
    from tmkd_ray.search.space import check_space
    from tmkd_ray.stages.search import open_stores, search
    from tmkd_ray.stages.session import ray_session

    space = check_space(config)
    experiments = open_stores(space)
    samples: list[tuple[int, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_PAUSE_S):
            samples.append(trials_memory(os.getpid()))

    watching = threading.Thread(target=watch)
    with ray_session(config):
        watching.start()
        started, started_at = time.perf_counter(), time.time()
        sweep = search(space, experiments)
        seconds = time.perf_counter() - started
        over.set()
        watching.join()
    assert sweep.teacher_passes == 0, "a teacher looked at something"
    assert all(trial.status == "finished" for trial in sweep.trials), sweep.trials
    facts = {
        "seconds": seconds,
        "first_trial_s": min(trial.started for trial in sweep.trials) - started_at,
        "training_s": [trial.seconds for trial in sweep.trials],
        "samples": samples,
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def trials_memory(root: int) -> tuple[int, int]:
    """Return how many trials run below a process, and the sum of their proportional set sizes, in bytes."""
    count = total = 0
    for process in descendants(root):
        try:
            if "ImplicitFunc" not in Path(f"/proc/{process}/cmdline").read_text():
                continue
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue  # it has ended
        total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        count += 1
    return count, total


def call(side: str, config: ExperimentConfig, folder: Path, name: str) -> str:
    """Run a side in a process of its own, one thread a worker; return what it printed."""
    place = folder / name
    place.mkdir()
    (place / "config.yaml").write_text(dump_config(config))
    command = [sys.executable, __file__, "--side", side, "--folder", str(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if process.returncode != 0:
        sys.exit(f"{name} failed with {process.returncode}:\n{process.stdout}{process.stderr}")
    return process.stdout


def sweep_facts(arguments: argparse.Namespace, folder: Path, name: str, trials: int, at_once: int) -> Any:
    config = configuration(arguments, folder, trials, at_once).model_copy(update={"name": name})
    call("sweep", config, folder, name)
    return json.loads((folder / name / "facts.json").read_text())


def peak_mb(samples: list[tuple[int, int]], count: int) -> float:
    """Return the greatest memory, in MB, of the moments when so many trials were there."""
    return max(total for found, total in samples if found == count) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=num_cores())
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--parts", default="time,memory")
    parser.add_argument("--side", choices=("alone", "sweep"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        config = read_config(arguments.folder / "config.yaml")
        {"alone": train_alone, "sweep": run_sweeps}[arguments.side](config, arguments.folder)
        return
    parts = arguments.parts.split(",")
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_teachers(folder)
        write_dataset(folder / "images", synthetic_images(arguments.images, 32), "PNG")
        config = configuration(arguments, folder, arguments.trials, arguments.at_once)
        store_bytes = write_store(config)
        print(
            f"{arguments.images} images, knowledge of {store_bytes / 1e6:.0f} MB, {STUDENT}, "
            f"{arguments.epochs} epochs; {hardware()}"
        )
        facts = {
            "trials": arguments.trials,
            "at_once": arguments.at_once,
            "images": arguments.images,
            "epochs": arguments.epochs,
            "student": STUDENT,
            "knowledge_mb": round(store_bytes / 1e6, 1),
            "hardware": hardware(),
            "ray": version("ray"),
        }
        call(
            "alone", configuration(arguments, folder, 1, 1), folder, "warm"
        )  # the machine's copy, the disk's cache
        sweeps = []
        if "time" in parts:
            lines.append(_time(arguments, folder, config, facts, sweeps))
        if "memory" in parts:
            lines.append(_memory(arguments, folder, config, facts, sweeps))
    for line in lines:
        print(line)


def _time(
    arguments: argparse.Namespace,
    folder: Path,
    config: ExperimentConfig,
    facts: dict[str, Any],
    sweeps: list[Any],
) -> str:
    ratios, alone, whole, first, training = [], [], [], [], []
    for number in range(arguments.rounds):
        before = json.loads(call("alone", config, folder, f"alone-{number}"))["seconds"]
        found = sweep_facts(arguments, folder, f"sweep-{number}", arguments.trials, arguments.at_once)
        after = json.loads(call("alone", config, folder, f"alone-again-{number}"))["seconds"]
        sweeps.append(found)
        alone.append((before + after) / 2)
        whole.append(found["seconds"])
        first.append(found["first_trial_s"])
        training += found["training_s"]
        ratios.append(found["seconds"] / (arguments.trials * alone[-1] / arguments.at_once))
        print(
            f"one alone {before:.1f}, {after:.1f} s   {arguments.trials} trials {whole[-1]:.1f} s   "
            f"of ideal {ratios[-1]:.3f}",
            flush=True,
        )
    overhead = [
        (total - arguments.trials * one / arguments.at_once) * arguments.at_once / arguments.trials
        for total, one in zip(whole, alone, strict=True)
    ]
    return result(
        "sweep_over_ideal",
        ratios,
        f"{arguments.trials} × one trial alone ÷ {arguments.at_once} at once",
        alone_s=spread(alone, 2),
        sweep_s=spread(whole, 2),
        overhead_per_trial_s=spread(overhead, 2),
        until_first_trial_s=spread(first, 2),
        training_in_sweep_s=spread(training, 2),
        teacher_passes=0,
        **facts,
    )


def _memory(
    arguments: argparse.Namespace,
    folder: Path,
    config: ExperimentConfig,
    facts: dict[str, Any],
    sweeps: list[Any],
) -> str:
    at_once = arguments.at_once
    assert at_once > 1, "more than one at once"
    one = sweep_facts(arguments, folder, "one", 1, 1)
    several = sweeps[0] if sweeps else sweep_facts(arguments, folder, "several", at_once, at_once)
    module = json.loads(call("alone", config.model_copy(update={"name": "size"}), folder, "size"))[
        "module_bytes"
    ]
    model_mb = 3 * module / 1e6  # weights, gradients, momentum
    single, together = peak_mb(one["samples"], 1), peak_mb(several["samples"], at_once)
    added = (together - single) / (at_once - 1)
    allowed = model_mb + ALLOWED_MB
    print(f"one trial {single:.0f} MB, {at_once} at once {together:.0f} MB: each further adds {added:.0f} MB")
    return result(
        "sweep_memory",
        [added / allowed],
        f"model and optimiser + {ALLOWED_MB} MB",
        added_mb=round(added, 1),
        allowed_mb=round(allowed, 1),
        one_mb=round(single, 1),
        together_mb=round(together, 1),
        **facts,
    )


if __name__ == "__main__":
    main()
