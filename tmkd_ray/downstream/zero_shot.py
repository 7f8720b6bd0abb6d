"""Zero-shot classification of a student that was taught CLIP's image embeddings.

Logits are `100 · s · TSB`, s the student's unit embedding, TSB the bank of the class names' unit text
embeddings (LGD, arXiv 2406.11689).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.pretraining.base import build_projector, read_projector


@dataclass(frozen=True)
class Projector:
    """A student's projection into CLIP's embedding space.

    Attributes:
        network: Linear-ReLU-Linear, feature [B, S] to embedding [B, E].
        clip: path or name of the CLIP, as the file's metadata says; None where it does not.
    """

    network: nn.Sequential
    clip: str | None


def load_projector(path: str, feature_width: int) -> Projector:
    """Load `projector.safetensors`.

    Raises:
        UserError: it is missing, is no such head, or is of a student of another feature width.
    """
    network, metadata = read_projector(path)
    first = network[0]
    assert isinstance(first, nn.Linear)
    if first.in_features != feature_width:
        raise UserError(
            f"the projector {path} takes features of width {first.in_features}, "
            f"the student's is {feature_width}"
        )
    return Projector(network.eval(), metadata.get("clip"))


def random_projector(like: nn.Sequential, seed: int = 0) -> nn.Sequential:
    """Return an untrained projector of the same widths, a function of `seed` alone."""
    first, last = like[0], like[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_projector(first.in_features, last.out_features, first.out_features).eval()


@torch.inference_mode()
def zero_shot_logits(
    features: np.ndarray, projector: nn.Module, bank_CE: Tensor, scale: float = 100.0
) -> Tensor:
    """Return the logits [N, C].

    Args:
        features: float32 [N, S]. bank_CE: text embeddings, unit length; on the projector's device.
    """
    embedding_NE = F.normalize(projector(torch.tensor(features, device=bank_CE.device)), dim=1)
    logits_NC: Tensor = scale * embedding_NE @ bank_CE.T
    return logits_NC
