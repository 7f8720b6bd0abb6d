"""Find a trained student, and build its network from its weights, others', or none."""

from dataclasses import dataclass

import safetensors
import torch

from tmkd_ray import storage
from tmkd_ray.config_reading import read_config
from tmkd_ray.errors import UserError
from tmkd_ray.models import ImageClassifier, build_model, check_model_name
from tmkd_ray.models.checkpoint import bare_names, load_weights, read_weights
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.types import TaskSpec

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class StudentSource:
    """A trained student, and what its run says of it (None: there is no run beside it).

    Attributes:
        checkpoint: path or URI of its weights. model: its architecture's name.
        image_size: what it was trained on, in pixels. mean, std: its normalisation.
    """

    checkpoint: str
    model: str
    image_size: int | None = None
    mean: ImageStatistics | None = None
    std: ImageStatistics | None = None


def find_student(path: str, model: str | None) -> StudentSource:
    """Find a student by its folder, its checkpoint, or the folder of a run that trained one student.

    Args:
        model: its architecture; None: as its run's configuration or its checkpoint's metadata (`model`) says.

    Raises:
        UserError: there is none, there are several, or nothing says what architecture it has.
    """
    checkpoint = _checkpoint(storage.absolute(path))
    parts = checkpoint.rsplit("/", 3)  # RUN/students/STUDENT/model.safetensors
    config_path = storage.join(parts[0], "config.yaml")
    if len(parts) == 4 and parts[1] == "students" and storage.exists(config_path):
        with storage.local_copy(config_path) as local:
            config = read_config(local)
        data = config.dataset
        return StudentSource(checkpoint, model or config.student.model, data.image_size, data.mean, data.std)
    model = model or _metadata(checkpoint).get("model")
    if model is None:
        raise UserError(f"student {path}: nothing says what architecture it has; give it, as --model resnet8")
    check_model_name(model)
    return StudentSource(checkpoint, model)


def _checkpoint(path: str) -> str:
    if not storage.is_folder(path):
        if not storage.exists(path):
            raise UserError(f"student: there is no file or folder {path}")
        return path
    if storage.exists(storage.join(path, WEIGHTS_FILE)):
        return storage.join(path, WEIGHTS_FILE)
    students = storage.join(path, "students")
    found = [
        storage.join(students, name, WEIGHTS_FILE)
        for name in storage.list_names(students)
        if storage.exists(storage.join(students, name, WEIGHTS_FILE))
    ]
    if not found:
        raise UserError(f"student: {path} holds neither {WEIGHTS_FILE} nor students/NAME/{WEIGHTS_FILE}")
    if len(found) > 1:
        listing = "\n".join(f"  {name}" for name in found)
        raise UserError(f"student: {path} holds {len(found)} students; give one of\n{listing}")
    return found[0]


def _metadata(checkpoint: str) -> dict[str, str]:
    if not checkpoint.endswith(".safetensors"):
        return {}
    with storage.local_copy(checkpoint) as local:
        try:
            with safetensors.safe_open(local, "pt") as file:
                return dict(file.metadata() or {})
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot read the student's checkpoint {checkpoint}: {error}") from error


def build_student(model: str, image_size: int, checkpoint: str | None, seed: int = 0) -> ImageClassifier:
    """Build a network with the weights in a file, for however many classes it was trained, or random ones.

    A file without a classifier will do: the classifier is not used downstream.

    Args:
        checkpoint: None: random weights, a function of `seed` alone; torch's own generator is not drawn from.

    Raises:
        UserError: the model cannot be had, cannot take images of this size, or the weights do not fit it.
    """
    pretrained_alone = model.startswith("transformers/")
    if checkpoint is None:
        if pretrained_alone:
            raise UserError(f"{model} comes with trained weights alone; set random_baseline=false")
        return _build(model, image_size, 2, seed)
    if pretrained_alone:
        network = _build(model, image_size, _num_labels(model), seed)
        load_weights(network, read_weights(checkpoint), checkpoint)
        return network
    loaded = read_weights(checkpoint)
    network = _build(model, image_size, 2, seed)
    own = network.inner.state_dict()
    classifier = next(reversed(own)).rpartition(".")[0]  # the layer that is registered last
    bare = bare_names(loaded)
    given = [name for name in own if name.rpartition(".")[0] == classifier and name in bare]
    if given:
        network = _build(model, image_size, len(bare[given[-1]]), seed)
    else:
        loaded = bare | {name: own[name] for name in own if name.rpartition(".")[0] == classifier}
    load_weights(network, loaded, checkpoint)
    return network


def _build(model: str, image_size: int, num_classes: int, seed: int) -> ImageClassifier:
    names = tuple(f"class {index}" for index in range(num_classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(model, TaskSpec(names, image_size))


def _num_labels(model: str) -> int:
    from transformers import AutoConfig  # seconds to import

    name = model.partition("/")[2]
    with storage.local_copy(name) as path:
        number: int = AutoConfig.from_pretrained(path, trust_remote_code=False).num_labels
    return number
