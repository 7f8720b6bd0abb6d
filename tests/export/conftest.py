"""A finished run, fabricated: students whose last layer is fitted to real digits in closed form."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tmkd_ray.config_reading import dump_config, read_config
from tmkd_ray.datasets.decode import LoadedImages
from tmkd_ray.export.images import dataset_images
from tmkd_ray.models import ImageClassifier, build_model, count_parameters
from tmkd_ray.results import DatasetRecord, MethodRecord, RunResults, TeacherRecord, TrainingRecord
from tmkd_ray.stages.training import Outcome
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.types import TaskSpec

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def fitted(name: str, images: LoadedImages, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageClassifier:
    """A random network with these images' statistics; its last layer by ridge regression onto their labels."""
    model = build_model(name, TaskSpec(DIGITS, images.images.shape[1]))
    inputs = Normalize(mean, std)(torch.from_numpy(images.images)).contiguous()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # a plain mean over the batches
        model.train()
        for batch in inputs.split(200):
            model(batch)
        feature_NS = model.eval()(inputs).feature.double()
        centred_NS = feature_NS - feature_NS.mean(0)
        targets_NC = torch.nn.functional.one_hot(torch.from_numpy(images.labels), len(DIGITS)).double() - 0.1
        gram_SS = centred_NS.T @ centred_NS + 1e-2 * torch.eye(centred_NS.shape[1])
        weight_SC = torch.linalg.solve(gram_SS, centred_NS.T @ targets_NC) * 10
        model.head.weight.copy_(weight_SC.T)
        model.head.bias.copy_(-(feature_NS.mean(0) @ weight_SC))
    return model.eval()


def write_run(folder: Path, student: str, seeds: tuple[int, ...] = (0,), size: int = 32) -> Path:
    """Write what a run leaves: configuration, students, a teacher, results."""
    config = read_config(
        None,
        [
            f"name={folder.name}",
            f"output={folder.parent}",
            f"dataset={{name: digits, image_size: {size}}}",
            f"student.model={student}",
            "teacher.visual.model=resnet14",
        ],
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    images = dataset_images(config, "train", 600)
    runs = []

    def save(name: str, model: str, key: str) -> Outcome:
        network = fitted(model, images, config.dataset.mean, config.dataset.std)
        validation = dataset_images(config, "validation")
        with torch.no_grad():
            inputs = Normalize(config.dataset.mean, config.dataset.std)(torch.from_numpy(validation.images))
            accuracy = float((network(inputs).logits.argmax(1).numpy() == validation.labels).mean())
        (folder / name).mkdir(parents=True)
        safetensors.torch.save_file(network.inner.state_dict(), folder / name / "model.safetensors")
        outcome = Outcome(
            key=key,
            best_epoch=3,
            validation_accuracy=accuracy,
            parameters=count_parameters(network),
            seconds=1.5,
            num_workers=1,
            device="cpu",
            history=[],
        )
        (folder / name / "outcome.json").write_text(outcome.model_dump_json())
        return outcome

    for seed in seeds:
        torch.manual_seed(seed)
        key = f"{seed:012x}"
        outcome = save(f"students/tmkd-seed{seed}-{key}", student, key)
        runs.append(
            TrainingRecord(
                seed=seed,
                parameters=outcome.parameters,
                best_epoch=outcome.best_epoch,
                validation_accuracy=outcome.validation_accuracy,
                test_accuracy=0.8125,
                test_top5_accuracy=0.96875,
                seconds=outcome.seconds,
                num_workers=1,
                device="cpu",
            )
        )
    torch.manual_seed(100)
    teacher = save("teacher-0123456789ab", "resnet14", "0123456789ab")
    RunResults(
        name=folder.name,
        created="2026-01-31T12:00:00Z",
        dataset=DatasetRecord(
            name="digits",
            class_names=list(DIGITS),
            num_train=1000,
            num_validation=136,
            num_test=451,
            image_size=size,
        ),
        teacher=TeacherRecord(
            model="resnet14",
            parameters=teacher.parameters,
            source="fitted here",
            validation_accuracy=teacher.validation_accuracy,
            test_accuracy=0.9375,
        ),
        methods=[MethodRecord(name="tmkd", label="TMKD", student=student, runs=runs)],
    ).save(folder / "results.json")
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A run with resnet8 students of two seeds."""
    return write_run(tmp_path_factory.mktemp("runs") / "digits-run", "resnet8", (0, 1))


@pytest.fixture(scope="session")
def torchvision_run(tmp_path_factory) -> Path:
    """A run with a torchvision student."""
    return write_run(tmp_path_factory.mktemp("runs") / "vision-run", "torchvision/resnet18")


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory) -> Path:
    """Twelve real digits as PNG files of 48×40 pixels, so that they are cropped and scaled."""
    folder = tmp_path_factory.mktemp("files")
    config = read_config(None, ["dataset=digits"])
    for number, image in enumerate(dataset_images(config, "validation", 12).images):
        picture = Image.fromarray(image).resize((48, 40))
        picture.save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def digit_images() -> np.ndarray:
    """uint8 [20, 32, 32, 3], real digits."""
    return dataset_images(read_config(None, ["dataset=digits"]), "validation", 20).images
