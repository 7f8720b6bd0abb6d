import hashlib
import struct

import numpy as np
import pytest
import torch

from tmkd_ray.augmentation import PARAMETERS, augment
from tmkd_ray.teachers.pixels import Normalize, weights_fingerprint

MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)


@pytest.fixture
def images() -> torch.Tensor:
    """uint8 [4, 5, 6, 3], every value among them."""
    values = torch.arange(360).remainder(256).to(torch.uint8)
    return values[torch.randperm(360, generator=torch.Generator().manual_seed(0))].reshape(4, 5, 6, 3)


def formula(images_BHWC: torch.Tensor) -> np.ndarray:
    """(x / 255 - mean) / std of each channel, channels first, in float64."""
    channels = [
        (images_BHWC[..., c].double().numpy() / 255 - mean) / std
        for c, (mean, std) in enumerate(zip(MEAN, STD, strict=True))
    ]
    return np.stack(channels, axis=1)


def test_normalize_is_the_formula(images: torch.Tensor) -> None:
    output = Normalize(MEAN, STD)(images)
    assert output.shape == (4, 3, 5, 6)
    assert output.dtype == torch.float32
    np.testing.assert_allclose(output.numpy(), formula(images), rtol=1e-5, atol=1e-6)


def test_channels_first_and_last_are_the_same_input(images: torch.Tensor) -> None:
    normalize = Normalize(MEAN, STD)
    assert torch.equal(normalize(images.permute(0, 3, 1, 2)), normalize(images))
    assert torch.equal(normalize(images.permute(0, 3, 1, 2).contiguous()), normalize(images))


def test_normalize_reads_what_the_student_gets(images: torch.Tensor) -> None:
    square = images[:, :, :5]
    parameters = torch.zeros(4, len(PARAMETERS), dtype=torch.int16)
    parameters[:, 2:4] = 5
    crops = augment(square, parameters).permute(0, 3, 1, 2)
    np.testing.assert_allclose(Normalize(MEAN, STD)(crops).numpy(), formula(square), rtol=1e-5, atol=1e-6)


def test_normalize_brings_nothing_to_a_checkpoint() -> None:
    normalize = Normalize(MEAN, STD)
    assert normalize.state_dict() == {}
    assert list(normalize.parameters()) == []


def test_black_and_white() -> None:
    output = Normalize((0.5, 0.5, 0.5), (0.5, 0.25, 1.0))(torch.tensor([[[[0, 0, 0], [255, 255, 255]]]]))
    np.testing.assert_allclose(output[0, :, 0].numpy(), [[-1, 1], [-2, 2], [-0.5, 0.5]], atol=1e-6)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {
        "layer.weight": torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]]),
        "layer.bias": torch.tensor([0.5, -0.5], dtype=torch.float16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0),
    }


def test_the_fingerprint_is_of_names_shapes_types_and_values(state: dict[str, torch.Tensor]) -> None:
    """Pinned, since the knowledge store compares it between versions: sorted by name, little-endian."""
    content = (
        b"count()torch.int64" + struct.pack("<q", 7),
        b"empty(0,)torch.float32",
        b"layer.bias(2,)torch.float16" + struct.pack("<2e", 0.5, -0.5),
        b"layer.weight(2, 3)torch.float32" + struct.pack("<6f", 1, -2, 0.5, 0.25, 3, -1),
    )
    assert weights_fingerprint(state) == hashlib.sha256(b"".join(content)).hexdigest()


def test_the_fingerprint_sees_the_content_alone(state: dict[str, torch.Tensor]) -> None:
    fingerprint = weights_fingerprint(state)
    assert weights_fingerprint(dict(reversed(state.items()))) == fingerprint
    assert weights_fingerprint({name: value.clone() for name, value in state.items()}) == fingerprint
    transposed = state["layer.weight"].T.contiguous().T
    assert not transposed.is_contiguous()
    assert weights_fingerprint(state | {"layer.weight": transposed}) == fingerprint
    parameter = torch.nn.Parameter(state["layer.weight"])
    assert weights_fingerprint(state | {"layer.weight": parameter}) == fingerprint


def test_any_change_changes_the_fingerprint(state: dict[str, torch.Tensor]) -> None:
    weight = state["layer.weight"]
    nudged = weight.clone()
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(0.0))
    others = [
        state | {"layer.weight": nudged},
        state | {"layer.weight": weight.reshape(3, 2)},
        state | {"layer.weight": weight.double()},
        state | {"layer.bias": state["layer.bias"].bfloat16()},
        {("renamed" if name == "count" else name): value for name, value in state.items()},
        {name: value for name, value in state.items() if name != "empty"},
        {},
    ]
    fingerprints = [weights_fingerprint(other) for other in [state, *others]]
    assert len(set(fingerprints)) == len(fingerprints)
