"""What the knowledge of an image takes on disk, and what each type of number does to the fused logits.

    python benchmarks/knowledge_size.py [--images 512] [--data FOLDER] [--checkpoint FILE --model resnet56]

Stores are written as the knowledge stage writes them, of the same images, for each type of number, number of
variants and form in which the images are kept. Counted are the shards' files, everything in them (ids,
labels, augmentation, Parquet's own), by image and variant; the classifier and the text bank, once a store,
are not. 1 KB = 1024 bytes.

The effect is that on the fused teacher's logits (`fusion.TeachingSignal`, weighting `label`, temperature
0.1), what is read from the store against the features before they were rounded: greatest and mean absolute
difference of a logit, how often the best class is the same, and the mean Kullback-Leibler divergence of the
softmax (nats).

The features are those of a network of the zoo on every view of every variant: `resnet8x4` (D = 256),
untrained but with batch-norm statistics of these images and a classifier fitted to them; with `--checkpoint`
those of `--model` with these weights, on a line of their own. There is no CLIP image encoder here, so its
embeddings (E = 512) are drawn like those of CLIP ViT-B/32, whose text features (of CIFAR-100's names) have
two dimensions that outgrow all others, 0.55 each, and cosines of 0.78 between classes; cosines of image and
text are 0.22, and 0.05 more for its class. int8 compresses, the more so where a dimension outgrows the
others: `kb_without_images_uncompressed` says what it is without. Prints tables, then one JSON object a line;
`ratio` is the size by that of float32.
"""

import argparse
import itertools
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from measuring import hardware, open_dataset, synthetic_images, write_dataset

from tmkd_ray.augmentation import PARAMETERS, AugmentationConfig
from tmkd_ray.datasets import ImageDataset
from tmkd_ray.fusion import TeacherConstants, TeachingSignal
from tmkd_ray.knowledge import KnowledgeArrays, KnowledgeLayout, KnowledgeStore
from tmkd_ray.knowledge.compute import ViewStage, plan_shards, unpack
from tmkd_ray.knowledge.layout import ImageFormat, encode_array, encode_images
from tmkd_ray.knowledge.quantization import quantize
from tmkd_ray.models import build_model, load_checkpoint
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers import VisualTeacher
from tmkd_ray.types import TaskSpec
from tmkd_ray.views import build_view

VIEWS = ("original", "edge", "high_frequency")
IMAGE_SIZE = 32
CLIP_WIDTH = 512
DTYPES = ("float32", "float16", "int8")
FORMATS: tuple[ImageFormat, ...] = ("raw", "lossless", "jpeg", "reference")
VARIANTS = (1, 4, 8)
TARGET_KB = {"float16": 5.0, "int8": 2.6}
MEAN: ImageStatistics = (0.5071, 0.4867, 0.4408)
STD: ImageStatistics = (0.2675, 0.2565, 0.2761)
"""Of CIFAR-100, which the checkpoints of the field were trained with."""


@dataclass(frozen=True)
class Said:
    """What the teachers say of N images, K variants, V views, before it is rounded; K the most.

    Attributes:
        feature: float32 [N, K, V, D]. clip_embedding: float32 [N, K, V, E].
    """

    ids: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    augmentation: np.ndarray
    feature: np.ndarray
    clip_embedding: np.ndarray
    constants: TeacherConstants


def see_views(dataset: ImageDataset, variants: int) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Return the index, the images, their augmentation and uint8 [N, K, V, H, W, 3], by the view stage."""
    views = {name: build_view(name, {}) for name in VIEWS}
    layout = KnowledgeLayout(VIEWS, variants, IMAGE_SIZE, 1, None)
    index = dataset.index("train")
    (plan,) = plan_shards("train", index, len(index), variants)
    stage = ViewStage(dataset, views, {"train": layout}, AugmentationConfig(recipe="cifar"), seed=0)
    table = stage(plan.to_table())
    square = (IMAGE_SIZE, IMAGE_SIZE, 3)
    return (
        index,
        unpack(table, "image", np.uint8, *square),
        unpack(table, "augmentation", np.int16, variants, len(PARAMETERS)),
        unpack(table, "pixels", np.uint8, variants, len(VIEWS), *square),
    )


def untrained_teacher(name: str, task: TaskSpec, pixels: np.ndarray) -> VisualTeacher:
    """Return a network whose batch-norm statistics are those of the pixels, uint8 [M, H, W, 3]."""
    torch.manual_seed(0)
    teacher = VisualTeacher(build_model(name, task), MEAN, STD)
    norms = [module for module in teacher.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
        norm.train()
    features_of(teacher, pixels)
    teacher.eval()
    return teacher


@torch.no_grad()
def features_of(teacher: VisualTeacher, pixels: np.ndarray) -> np.ndarray:
    """Return float32 [M, D] of uint8 [M, H, W, 3]."""
    return torch.cat([teacher(part) for part in torch.from_numpy(pixels.copy()).split(256)]).numpy()


def fit_classifier(
    feature: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight [C, D] and bias [C] of a logistic regression."""
    torch.manual_seed(0)
    feature_MD, labels_M = torch.from_numpy(feature), torch.from_numpy(labels)
    head = torch.nn.Linear(feature.shape[1], num_classes)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(head(feature_MD), labels_M).backward()
        optimizer.step()
    return head.weight.detach(), head.bias.detach()


def draw_clip(labels: np.ndarray, variants: int, num_classes: int) -> tuple[np.ndarray, torch.Tensor]:
    """Return embeddings, float32 [N, K, V, E], and a text bank [V, C, E], like CLIP's: see the module."""
    generator = np.random.default_rng(0)

    def unit(values: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = values / np.linalg.norm(values, axis=-1, keepdims=True)
        return scaled

    def directions(*shape: int) -> np.ndarray:
        drawn = generator.standard_normal((*shape, CLIP_WIDTH))
        drawn[..., :2] = 0
        return unit(drawn)

    outgrown = np.zeros(CLIP_WIDTH)
    outgrown[:2] = 0.55  # together 0.605 of the squared length
    common, of_class = directions(), directions(num_classes)
    own = unit(of_class + 0.3 * directions(len(VIEWS), num_classes))
    text_bank = outgrown + np.sqrt(0.175) * common + np.sqrt(0.22) * own
    image_common = np.zeros(CLIP_WIDTH)
    image_common[0] = 0.4
    shape = (len(labels), variants, len(VIEWS))
    noise = unit(directions(len(labels))[:, None, None] + 0.5 * directions(*shape))
    of_image = 0.11 * of_class[labels][:, None, None] * generator.uniform(0.7, 1.3, shape)[..., None]
    embedding = unit(image_common + of_image + np.sqrt(1 - 0.16 - 0.0121) * noise)
    return embedding.astype(np.float32), torch.from_numpy(unit(text_bank)).float()


def write_store(folder: Path, said: Said, layout: KnowledgeLayout) -> KnowledgeStore:
    """Write a store of one shard, its first `num_variants`."""
    variants = layout.num_variants
    columns: dict[str, pa.Array] = {
        "id": pa.array(said.ids.tolist(), pa.string()),
        "label": pa.array(said.labels, pa.int64()),
        "augmentation": encode_array(said.augmentation[:, :variants]),
    }
    if layout.image_format != "reference":
        columns["image"] = encode_images(said.images, layout.image_format)
    for name in ("feature", "clip_embedding"):
        values = getattr(said, name)[:, :variants]
        if layout.dtype == "int8":
            values, scale = quantize(values)
            columns[f"{name}_scale"] = encode_array(scale)
        columns[name] = encode_array(values.astype(layout.dtype))
    schema = layout.schema()
    store = KnowledgeStore(str(folder))
    store.begin({})
    table = pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
    store.write_shard("train", 0, table, [])
    store.finish(
        tuple(f"class {label}" for label in range(said.labels.max() + 1)), {"train": layout}, {"train": 1}
    )
    return store


def logits_of(arrays: KnowledgeArrays, said: Said) -> np.ndarray:
    """Return the fused logits of every variant, float32 [K, N, C]."""
    signal = TeachingSignal(said.constants, VIEWS, weighting="label", fusion_temperature=0.1)
    labels = torch.from_numpy(said.labels)
    count = len(arrays)
    return np.stack(
        [
            signal(arrays.knowledge(slice(None), np.full(count, variant)), labels).logits.numpy()
            for variant in range(arrays.layout.num_variants)
        ]
    )


def effect(logits: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return how logits [..., C] differ from the exact ones."""
    stored, exact = logits.astype(np.float64), exact.astype(np.float64)
    log_p, log_q = (torch.log_softmax(torch.from_numpy(values), dim=-1).numpy() for values in (exact, stored))
    return {
        "max_difference": float(np.abs(stored - exact).max()),
        "mean_difference": float(np.abs(stored - exact).mean()),
        "top1_agreement": float((stored.argmax(-1) == exact.argmax(-1)).mean()),
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        "logits_std": float(exact.std()),
    }


def measure(model: str, said: Said, scratch: Path, facts: dict[str, Any], suffix: str) -> list[str]:
    """Write the stores of one teacher; print its tables and return its JSON lines."""
    count, width = len(said.labels), said.feature.shape[-1]
    sizes: dict[str, dict[str, dict[int, float]]] = {dtype: {} for dtype in DTYPES}
    effects: dict[str, dict[str, float]] = {}
    uncompressed: dict[str, float] = {}
    print(f"\n{model}: D {width}, E {CLIP_WIDTH}, V {len(VIEWS)}; KB an image and variant, {count} images")
    print(f"{'':22}" + "".join(f"{f'K = {variants}':>9}" for variants in VARIANTS))
    for dtype, image_format in itertools.product(DTYPES, FORMATS):
        kb = sizes[dtype][image_format] = {}
        for variants in VARIANTS:
            layout = KnowledgeLayout(VIEWS, variants, IMAGE_SIZE, width, CLIP_WIDTH, dtype, image_format)
            store = write_store(scratch / f"{model}-{dtype}-{image_format}-{variants}", said, layout)
            kb[variants] = round(store.manifest().total_bytes() / (count * variants) / 1024, 3)
            if image_format == "reference" and variants == max(VARIANTS):
                arrays = store.read("train")
                exact = replace(arrays, feature=said.feature, clip_embedding=said.clip_embedding)
                exact = replace(exact, feature_scale=None, clip_embedding_scale=None)
                effects[dtype] = effect(logits_of(arrays, said), logits_of(exact, said))
                uncompressed[dtype] = layout.bytes_per_image() / variants
        print(f"  {dtype:9}{image_format:11}" + "".join(f"{kb[variants]:9.3f}" for variants in VARIANTS))
    print(f"{'fused logits':14}{'greatest Δ':>12}{'mean Δ':>12}{'same class':>12}{'KL':>12}{'std':>9}")
    lines = []
    for dtype in DTYPES:
        changed = effects[dtype]
        print(
            f"  {dtype:12}{changed['max_difference']:12.2e}{changed['mean_difference']:12.2e}"
            f"{changed['top1_agreement']:12.4%}{changed['kl']:12.2e}{changed['logits_std']:9.3f}"
        )
        line = {
            "name": f"knowledge_size_{dtype}{suffix}",
            "ratio": round(sizes[dtype]["raw"][4] / sizes["float32"]["raw"][4], 3),
            "baseline": "float32, K = 4, raw images",
            "n": count,
            "target_kb": TARGET_KB.get(dtype),
            "kb_without_images": sizes[dtype]["reference"][4],
            "kb_without_images_uncompressed": round(uncompressed[dtype] / 1024, 3),
            "kb": sizes[dtype],
            "fused_logits": {name: float(f"{value:.4g}") for name, value in changed.items()},
            "model": model,
            "feature_width": width,
            "clip_width": CLIP_WIDTH,
            "views": len(VIEWS),
            **facts,
        }
        lines.append(json.dumps(line))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--data", help="Parquet dataset, e.g. CIFAR-100; else synthetic images")
    parser.add_argument("--checkpoint", help="trained weights, for a second line; give --data too")
    parser.add_argument("--model", default="resnet56", help="of the checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if arguments.data is None:
            write_dataset(scratch / "images", synthetic_images(arguments.images, IMAGE_SIZE), "PNG")
        dataset = open_dataset(arguments.data or scratch / "images", IMAGE_SIZE, arguments.images)
        task = TaskSpec(dataset.class_names, IMAGE_SIZE)
        index, images, augmentation, pixels = see_views(dataset, max(VARIANTS))
        embedding, text_bank = draw_clip(index.labels, max(VARIANTS), task.num_classes)
        facts = {
            "images": Path(arguments.data).name if arguments.data else "synthetic",
            "image_size": IMAGE_SIZE,
            "hardware": hardware(),
        }

        def say(teacher: VisualTeacher, fit: bool) -> Said:
            """Run the teacher over all pixels."""
            feature = features_of(teacher, pixels.reshape(-1, *pixels.shape[3:]))
            feature = feature.reshape(*pixels.shape[:3], -1)
            weight, bias = teacher.head_weight, teacher.head_bias
            if fit:
                # On the images as they are in the first view of one variant; the others are as test images.
                weight, bias = fit_classifier(feature[:, 0, 0], index.labels, task.num_classes)
            constants = TeacherConstants(VIEWS, weight, bias, text_bank, clip_temperature=0.01)
            return Said(index.ids, index.labels, images, augmentation, feature, embedding, constants)

        teacher = untrained_teacher("resnet8x4", task, pixels[:, 0, 0])
        lines += measure("resnet8x4", say(teacher, fit=True), scratch, {**facts, "trained": False}, "")
        if arguments.checkpoint is not None:
            model = build_model(arguments.model, task)
            load_checkpoint(model, arguments.checkpoint)
            said = say(VisualTeacher(model, MEAN, STD), fit=False)
            lines += measure(arguments.model, said, scratch, {**facts, "trained": True}, f"_{arguments.model}")
    print()
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
