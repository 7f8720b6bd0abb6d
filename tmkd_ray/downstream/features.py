"""Penultimate features of frozen networks: each image is decoded once, for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import nn

from tmkd_ray.datasets.base import ImageDataset, SampleIndex, Split
from tmkd_ray.datasets.decode import SetAside, decode_batch
from tmkd_ray.errors import UserError
from tmkd_ray.models import ImageClassifier
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.types import ModelOutput


@dataclass
class FeatureTable:
    """Features of the images of a split that could be decoded.

    Attributes:
        features: by network, float32 [N, S]. labels: int64 [N]. ids: unicode [N].
        set_aside: images that could not be decoded.
    """

    features: dict[str, np.ndarray]
    labels: np.ndarray
    ids: np.ndarray
    set_aside: list[SetAside] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: np.ndarray) -> "FeatureTable":
        """Return the rows at these positions, in this order."""
        features = {name: values[positions] for name, values in self.features.items()}
        return FeatureTable(features, self.labels[positions], self.ids[positions])


class FeatureExtractor:
    """Features of chunks of images; pickles, to be sent to workers.

    Args:
        networks: by name.
        parts: the images of each split, whole or in part; positions count through one after the other.
        batch_size: images in a forward pass.
    """

    def __init__(
        self,
        networks: Mapping[str, ImageClassifier],
        dataset: ImageDataset,
        parts: Mapping[Split, SampleIndex],
        mean: ImageStatistics,
        std: ImageStatistics,
        batch_size: int,
    ) -> None:
        self.networks = nn.ModuleDict({f"network {name}": network.eval() for name, network in networks.items()})
        self.names = list(networks)
        self.dataset, self.parts = dataset, dict(parts)
        self.normalize = Normalize(mean, std)
        self.batch_size = batch_size
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return sum(len(index) for index in self.parts.values())

    def to(self, device: str | torch.device) -> "FeatureExtractor":
        """Move the networks; called once, by the worker that runs them."""
        self.device = torch.device(device)
        self.networks.to(self.device)
        self.normalize.to(self.device)
        cv2.setNumThreads(1)  # the workers are the parallelism
        return self

    @torch.inference_mode()
    def __call__(self, positions: np.ndarray) -> dict[Split, FeatureTable]:
        """Return the features of the images at these positions by their split, in their order.

        Raises:
            UserError: a network returns NaN or infinity; names the image.
        """
        tables, first = {}, 0
        for split, index in self.parts.items():
            own = positions[(positions >= first) & (positions < first + len(index))] - first
            tables[split] = self._features(split, index.take(own))
            first += len(index)
        return tables

    def _features(self, split: Split, chunk: SampleIndex) -> FeatureTable:
        images_NHWC, reasons = decode_batch(self.dataset, split, chunk)
        good = np.flatnonzero([reason is None for reason in reasons])
        features: dict[str, np.ndarray] = {}
        for name, network in zip(self.names, self.networks.values(), strict=True):
            parts = []
            for start in range(0, len(good), self.batch_size):
                rows = good[start : start + self.batch_size]
                images = torch.from_numpy(images_NHWC[rows]).to(self.device)
                output: ModelOutput = network(self.normalize(images))
                parts.append(output.feature.float().cpu().numpy())
            features[name] = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
            finite = np.isfinite(features[name]).all(axis=1)
            if not finite.all():
                raise UserError(
                    f"{name} returned NaN or infinite features for the image "
                    f"{chunk.ids[good][finite.argmin()]}; check its weights and normalisation"
                )
        set_aside = [
            SetAside(str(chunk.ids[i]), reason) for i, reason in enumerate(reasons) if reason is not None
        ]
        return FeatureTable(features, chunk.labels[good], chunk.ids[good], set_aside)


def joined(tables: Sequence[FeatureTable], names: Sequence[str] | None = None) -> FeatureTable:
    """Return the tables one after the other; at least one of them has an image.

    Args:
        names: networks to keep the features of; None: all.
    """
    whole = [table for table in tables if len(table)]
    kept = list(whole[0].features) if names is None else names
    return FeatureTable(
        {name: np.concatenate([table.features[name] for table in whole]) for name in kept},
        np.concatenate([table.labels for table in whole]),
        np.concatenate([table.ids for table in whole]),
        [entry for table in tables for entry in table.set_aside],
    )
