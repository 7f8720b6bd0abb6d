"""What a pre-training needs of the text teacher: banks of other classes, and where its embedding comes from."""

from dataclasses import dataclass

import safetensors.torch
from torch import Tensor

from tmkd_ray import storage
from tmkd_ray.knowledge.store import KnowledgeStore, text_bank_key
from tmkd_ray.models import ImageClassifier
from tmkd_ray.pretraining import EmbeddingStudent, PretrainingConfig, ZeroShotStudent, read_projector
from tmkd_ray.pretraining.lgd import LGDConfig, read_bank_classes
from tmkd_ray.stages.experiment import Experiment
from tmkd_ray.stages.progress import say
from tmkd_ray.teachers import ClipTeacher


class TextTower:
    """The run's CLIP, as trainings know it: its place, and what tells its weights from others.

    Attributes:
        path: folder or name.
        fingerprint, text_fingerprint: of its image and its text tower.
    """

    def __init__(self, path: str) -> None:
        clip = ClipTeacher.load(path)
        self.path = path
        self.fingerprint = clip.fingerprint()
        self.text_fingerprint = clip.text_fingerprint()

    def origin(self, model: str, text_bank: str) -> dict[str, str]:
        """Return what is kept with the weights of a pre-trained `model`, see `pretraining.read_projector`.

        Args:
            text_bank: key of that of the dataset's classes, in the knowledge store.
        """
        return {
            "model": model,
            "text_bank": text_bank,
            "clip": self.path,
            "clip_fingerprint": self.fingerprint,
            "text_fingerprint": self.text_fingerprint,
        }


@dataclass(frozen=True)
class OwnBank:
    """A textual bank of an objective's own classes or prompts, kept in the run's folder.

    Attributes:
        key: of names, prompts and text tower.
    """

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    clip: str
    key: str
    path: str

    def write(self) -> None:
        """Encode the names, unless that was done before."""
        if not storage.exists(self.path):
            say(f"textual bank: {len(self.names):,} classes × {len(self.prompts)} prompts → {self.path}")
            (bank_CE,) = ClipTeacher.load(self.clip).text_bank([self.prompts], self.names)
            storage.write_bytes(self.path, safetensors.torch.save({"bank": bank_CE.contiguous()}))

    def read(self) -> Tensor:
        """Return [C, E], unit length."""
        return safetensors.torch.load(storage.read_bytes(self.path))["bank"]


def own_bank(experiment: Experiment, config: PretrainingConfig, clip: TextTower) -> OwnBank | None:
    """Return an objective's own textual bank; None where that of the dataset's classes will do.

    Raises:
        UserError: its file of class names cannot be read or holds none.
    """
    if not isinstance(config, LGDConfig) or (config.bank_classes is None and config.bank_prompts is None):
        return None
    prompts = config.bank_prompts or experiment.prompts()[experiment.config.taught_views(config)[0]]
    names = experiment.task.class_names
    if config.bank_classes is not None:
        names = read_bank_classes(config.bank_classes)
    key = text_bank_key({"bank": prompts}, names, clip.text_fingerprint)
    path = storage.join(experiment.folder, "text_banks", f"{key}.safetensors")
    return OwnBank(names, prompts, clip.path, key, path)


def zero_shot_student(
    experiment: Experiment, method: str, encoder: ImageClassifier, path: str
) -> ZeroShotStudent:
    """Return a pre-trained student as a classifier, by the texts that its training was validated by.

    Args:
        path: of its MLP head.

    Raises:
        UserError: the head, or the store's text bank, is not there.
    """
    config = experiment.config
    projector, metadata = read_projector(path)
    bank_VCE, temperature = KnowledgeStore(experiment.store_path).text_bank(metadata["text_bank"])
    first = config.taught_views(config.named_methods()[method])[0]
    text_CE = bank_VCE[list(config.views).index(first)]
    return ZeroShotStudent(EmbeddingStudent(encoder, projector), text_CE, temperature)
