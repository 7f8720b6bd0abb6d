"""An epoch of cached TMKD against one of the student alone, and against TMKD with the teachers online.

    python benchmarks/epoch.py [--rounds 5] [--images 5120] [--online-images 512] [--threads CORES]

All sides are the training loop itself (`training.loop.train`), with the same student, batch size, precision and
images that lie in memory:

- `cached`: all five terms of TMKD; the teachers' float16 features of three views lie in memory too.
- `alone`: cross-entropy, no teacher.
- `online`: the loss of `cached`; a visual teacher and a small CLIP look at the three views of every batch,
  which a thread prepares meanwhile. Of fewer images, for it is slow.

Weights and images are random: they say nothing of accuracy, and cost what real ones do. A rate is that of the
epoch's steps, as the loop itself tells it, without validation and checkpoint. Rounds go through the sides
forwards and backwards in turn, after an epoch of each that is not counted; a ratio is the median of the rounds'
ratios. Prints a table, then one JSON object a line.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import NUM_CLASSES, hardware, num_cores, result, spread
from students import (
    AUGMENTATION,
    CLASS_NAMES,
    MEAN,
    STD,
    VIEWS,
    Sizes,
    build_task,
    draw_knowledge,
    training,
)

from tmkd_ray.fusion import TeacherConstants
from tmkd_ray.knowledge import KnowledgeArrays
from tmkd_ray.models import build_model
from tmkd_ray.teachers import ClipTeacher, FrozenTeachers, VisualTeacher
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import TrainTask, train
from tmkd_ray.training.online import OnlineKnowledge
from tmkd_ray.training.student import resident_source
from tmkd_ray.views import build_view

CPU = torch.device("cpu")
PROMPT = "a photo of a {}."


@dataclass(frozen=True)
class Epoch:
    """Images a second, and the share of the time spent waiting for batches."""

    images_per_s: float
    data_share: float


def run_epoch(task: TrainTask, batch_size: int) -> Epoch:
    """Train an epoch, further from the weights that the task has."""
    with tempfile.TemporaryDirectory() as folder:
        context = PlainContext(Path(folder), quiet=True)
        outcome = train(task, training(batch_size), context, key="epoch", label="epoch")
    (record,) = outcome.history
    assert record.images_per_second is not None
    assert record.data_share is not None
    return Epoch(record.images_per_second, record.data_share)


def build_teachers(model: str, sizes: Sizes, clip_layers: int, batch: int) -> FrozenTeachers:
    """Return an untrained visual teacher and an untrained CLIP, a ViT of width 128 on patches of 4 pixels."""
    torch.manual_seed(0)
    visual = VisualTeacher(build_model(model, sizes.task), MEAN, STD)
    clip = ClipTeacher.new(
        [PROMPT.format(name) for name in CLASS_NAMES],
        image_size=sizes.image_size,
        patch_size=4,
        embedding_width=sizes.clip_width,
        vision_width=128,
        vision_layers=clip_layers,
        text_width=64,
        text_layers=1,
        head_width=32,
        vocabulary_size=600,
        mean=MEAN,
        std=STD,
    )
    return FrozenTeachers(visual, clip.eval().requires_grad_(False), CPU, batch, batch)


def online_source(arrays: KnowledgeArrays, count: int, teachers: FrozenTeachers) -> OnlineKnowledge:
    """Return the first images, looked at by the teachers."""
    assert arrays.images is not None
    views = {name: build_view(name, {}) for name in VIEWS}
    images, labels, ids = arrays.images[:count], arrays.labels[:count], arrays.ids[:count]
    return OnlineKnowledge(images, labels, ids, views, teachers, CPU, AUGMENTATION, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--online-images", type=int, default=512, help="of an epoch with the teachers online")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--variants", type=int, default=4, help="of each image's knowledge")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--clip-layers", type=int, default=4)
    parser.add_argument("--clip-width", type=int, default=512, help="of CLIP's embeddings, E")
    parser.add_argument("--teacher-batch", type=int, default=256, help="views per forward pass")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    width = build_model(arguments.teacher, Sizes(1).task).feature_width
    sizes = Sizes(arguments.images, arguments.variants, width, arguments.clip_width)
    arrays = draw_knowledge(sizes)
    teachers = build_teachers(arguments.teacher, sizes, arguments.clip_layers, arguments.teacher_batch)
    assert teachers.clip is not None
    constants = TeacherConstants(
        VIEWS,
        teachers.visual.head_weight,
        teachers.visual.head_bias,
        teachers.clip.text_bank([(PROMPT,)] * len(VIEWS), CLASS_NAMES),
        teachers.clip.temperature,
    )
    config = training(arguments.batch_size)

    def resident(with_teacher: bool) -> Any:
        return resident_source(arrays, config, AUGMENTATION, CPU, with_teacher)

    sources: dict[str, tuple[str, Any]] = {
        "cached": ("tmkd", resident(True)),
        "alone": ("alone", resident(False)),
        "online": ("tmkd", online_source(arrays, arguments.online_images, teachers)),
    }
    tasks = {
        side: build_task(arguments.student, sizes, source, preset, config, constants)
        for side, (preset, source) in sources.items()
    }
    for task in tasks.values():  # memory is claimed and kernels are chosen at first
        run_epoch(task, arguments.batch_size)

    machine = hardware()
    print(
        f"{arguments.student}, batch {arguments.batch_size}, {arguments.images} images (online "
        f"{arguments.online_images}), {arguments.threads} thread(s), float32; {machine}"
    )
    print(f"{'':14}{'images/s':>10}{'ms a step':>11}{'waiting %':>11}")
    epochs: dict[str, list[Epoch]] = {side: [] for side in tasks}
    for round_number in range(arguments.rounds):
        for side in list(tasks) if round_number % 2 == 0 else list(tasks)[::-1]:
            epoch = run_epoch(tasks[side], arguments.batch_size)
            epochs[side].append(epoch)
            step_ms = 1000 * arguments.batch_size / epoch.images_per_s
            print(
                f"  {round_number + 1}. {side:9}{epoch.images_per_s:10,.1f}{step_ms:11.1f}"
                f"{100 * epoch.data_share:11.2f}",
                flush=True,
            )

    def speeds(of: str, over: str) -> list[float]:
        pairs = zip(epochs[of], epochs[over], strict=True)
        return [one.images_per_s / other.images_per_s for one, other in pairs]

    facts = {
        "student": arguments.student,
        "batch_size": arguments.batch_size,
        "images": arguments.images,
        "image_size": sizes.image_size,
        "num_classes": NUM_CLASSES,
        "views": len(VIEWS),
        "variants": arguments.variants,
        "feature_width": sizes.feature_width,
        "clip_width": sizes.clip_width,
        "knowledge": sizes.layout.dtype,
        "precision": config.precision,
        "threads": arguments.threads,
    }
    rates = {
        side: {
            f"{side}_images_per_s": spread((epoch.images_per_s for epoch in found), 1),
            f"{side}_data_share": spread((epoch.data_share for epoch in found), 4),
        }
        for side, found in epochs.items()
    }
    end = {"hardware": machine, "torch": torch.__version__}
    over_alone = speeds("alone", "cached")  # as many images: times
    over_online = speeds("cached", "online")
    print(f"an epoch of cached TMKD takes {spread(over_alone)['median']:.3f} of one with the student alone")
    print(f"cached TMKD is {spread(over_online)['median']:.2f} times as fast as with the teachers online")
    name = "cached_over_student_only"
    baseline = "the student alone, cross-entropy"
    print(result(name, over_alone, baseline, **facts, **rates["cached"], **rates["alone"], **end))
    online_facts = {
        "online_images": arguments.online_images,
        "teacher": arguments.teacher,
        "clip": f"ViT of width 128, {arguments.clip_layers} layers, patches of 4 pixels",
        "teacher_batch": arguments.teacher_batch,
    }
    baseline = "the same loss with the teachers online"
    rates_of_both = {**rates["cached"], **rates["online"]}
    print(result("online_over_cached", over_online, baseline, **facts, **online_facts, **rates_of_both, **end))


if __name__ == "__main__":
    main()
