"""Fit a CLIP on views × prior-aware prompts."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray import storage
from tmkd_ray.augmentation import AugmentationConfig
from tmkd_ray.config import TrainingConfig
from tmkd_ray.datasets.decode import LoadedImages, list_set_aside
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.training.augmented_views import AugmentedViews, ViewBatch
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.loop import StepOutput, TrainTask
from tmkd_ray.training.metrics import evaluate
from tmkd_ray.types import LossOutput
from tmkd_ray.views.base import View

_MAX_LOGIT_SCALE = 4.6052
"""ln 100: CLIP clips its scale there."""

_NEVER = -1e4
"""Logit of what is no candidate: its probability is zero, and zero times its logarithm is finite."""


def contrastive_loss(similarity_BM: Tensor, positives_BM: Tensor) -> Tensor:
    """Symmetric contrastive loss of images against captions, where several images may share a caption.

    Each image has one right caption; each caption that some image has is spread evenly over its images.
    With as many captions as images this is CLIP's loss. Source: Yang et al. 2022, "Unified contrastive learning
    in image-text-label space", arXiv 2204.03610, eq. 2-4.

    Args:
        similarity_BM: over the temperature.
        positives_BM: bool, caption m is image b's; exactly one per row, at least one per column.
    """
    image_to_text = F.cross_entropy(similarity_BM, positives_BM.float().argmax(1))
    share_MB = positives_BM.T.float() / positives_BM.sum(0).float()[:, None]
    text_to_image = F.cross_entropy(similarity_BM.T, share_MB)
    return 0.5 * (image_to_text + text_to_image)


class ClipModule(nn.Module):
    """CLIP and its captions: every view's templates filled with every class name.

    Args:
        locked_CE: embeddings of the class names, unit length, that the text side is locked to; None: it
            learns. The images then learn to meet these, which is locked-image tuning turned round (Zhai et al.
            2022, "LiT", arXiv 2111.07991), and the text tower learns to give them for every caption of the
            class, so that what is saved is a whole CLIP.
    """

    input_ids: Tensor
    attention_mask: Tensor
    locked_text: Tensor | None

    def __init__(
        self,
        clip: ClipTeacher,
        prompts: Sequence[Sequence[str]],
        class_names: Sequence[str],
        locked_CE: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("locked_text", locked_CE, persistent=False)
        self.clip = clip
        self.num_classes = len(class_names)
        texts: list[str] = []
        self.first: list[list[int]] = []
        for templates in prompts:
            self.first.append([])
            for template in templates:
                self.first[-1].append(len(texts))
                texts += [template.format(name) for name in class_names]
        tokens = clip.tokenize(texts)
        self.register_buffer("input_ids", tokens["input_ids"], persistent=False)
        self.register_buffer("attention_mask", tokens["attention_mask"], persistent=False)

    def forward(self, batch: ViewBatch) -> StepOutput:
        image_BE = self.clip.encode_images(batch.images)
        captions_B = batch.view_indices * self.num_classes + batch.labels
        captions_M, position_B = torch.unique(captions_B, return_inverse=True)
        # One template per view and step, drawn from the generator that the loop seeds.
        first_V = torch.tensor(
            [choices[int(torch.randint(len(choices), ()))] for choices in self.first],
            device=captions_M.device,
        )
        rows_M = first_V[captions_M // self.num_classes] + captions_M % self.num_classes
        text_ME = self.clip.encode_texts(
            {"input_ids": self.input_ids[rows_M], "attention_mask": self.attention_mask[rows_M]}
        )
        terms: dict[str, Tensor] = {}
        if self.locked_text is not None:
            locked_ME = self.locked_text[captions_M % self.num_classes]
            terms["locked_text"] = 1 - (text_ME * locked_ME).sum(dim=1).mean()
            text_ME = locked_ME
        with torch.autocast(image_BE.device.type, enabled=False):  # a scale of up to 100 wants all the digits
            scale = self.clip.model.logit_scale.float().clamp(max=_MAX_LOGIT_SCALE).exp()
            similarity_BM = scale * image_BE @ text_ME.T
        # Candidates are the captions of the image's own view: telling classes apart is what the text teacher is
        # for, and telling the views apart is so much easier that it would be learnt in its place.
        same_view_BM = batch.view_indices[:, None] == captions_M // self.num_classes
        similarity_BM = similarity_BM.masked_fill(~same_view_BM, _NEVER)
        positives_BM = F.one_hot(position_B, len(captions_M)).bool()
        terms["contrastive"] = contrastive_loss(similarity_BM, positives_BM)
        correct = (similarity_BM.argmax(1) == position_B).sum()
        return StepOutput(LossOutput(torch.stack(list(terms.values())).sum(), terms), correct)


class ClipTask(TrainTask):
    """A CLIP in training. The epoch to keep has the best zero-shot accuracy, averaged over the views.

    Args:
        views: by name. prompts: of each view, in the same order.
        locked_CE: see `ClipModule`.
    """

    def __init__(
        self,
        clip: ClipTeacher,
        train: LoadedImages,
        validation: LoadedImages,
        views: dict[str, View],
        prompts: Sequence[Sequence[str]],
        class_names: Sequence[str],
        training: TrainingConfig,
        augmentation: AugmentationConfig,
        locked_CE: Tensor | None = None,
    ) -> None:
        self.module: ClipModule = ClipModule(clip, prompts, class_names, locked_CE)
        self.training = training
        self.prompts, self.class_names = prompts, class_names
        self.data = AugmentedViews(train, list(views.values()), augmentation, training.seed)
        self.num_samples = len(self.data)
        self.notes = list_set_aside("train", train.set_aside) + list_set_aside(
            "validation", validation.set_aside
        )
        self.validation_views = [torch.from_numpy(view(validation.images)) for view in views.values()]
        self.validation_labels = torch.from_numpy(validation.labels)

    def batches(self, epoch: int, context: WorkerContext, first_step: int = 0) -> Iterator[ViewBatch]:
        return self.data.batches(
            epoch, self.training.batch_size, context.rank, context.world_size, context.device, first_step
        )

    def sample_ids(self, indices_B: Tensor) -> list[str]:
        return [str(self.data.images.ids[index]) for index in indices_B.tolist()]

    def validate(self, context: WorkerContext) -> dict[str, float]:
        clip = self.module.clip
        bank_VCE = clip.text_bank(self.prompts, self.class_names)
        accuracies = []
        for images, text_CE in zip(self.validation_views, bank_VCE, strict=True):

            def predict(batch: Tensor, text_CE: Tensor = text_CE) -> Tensor:
                return clip.encode_images(batch) @ text_CE.T

            accuracies.append(
                evaluate(predict, images, self.validation_labels, context, self.training.evaluation_batch_size)[
                    "accuracy"
                ]
            )
        return {"accuracy": sum(accuracies) / len(accuracies)}

    @property
    def kept(self) -> nn.Module:
        network: nn.Module = self.module.clip.model
        return network

    def save(self, folder: str, weights: Mapping[str, Tensor]) -> None:
        """Write a folder that `from_pretrained` reads."""
        self.kept.load_state_dict(weights)
        with tempfile.TemporaryDirectory() as local:
            self.module.clip.save(local)
            for file in sorted(Path(local).iterdir()):
                storage.write_bytes(storage.join(folder, file.name), file.read_bytes())
