"""Networks from outside: a Python function's, and exported programs."""

import io
import pickle
import sys
from pathlib import Path

import cloudpickle
import numpy as np
import outside_networks
import pytest
import torch
from torch import Tensor, nn

from tmkd_ray.config import VisualTeacherConfig
from tmkd_ray.errors import UserError
from tmkd_ray.models import ImageClassifier, build_model, check_model_name, count_parameters, load_checkpoint
from tmkd_ray.types import TaskSpec

SIZE = 16
TASK = TaskSpec(tuple("abcde"), SIZE)
OURS = "python:outside_networks:"


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9))


def formula(network: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Feature and logits of `Plain` in float64 NumPy."""
    state = {name: value.double().numpy() for name, value in network.state_dict().items()}
    windows = np.lib.stride_tricks.sliding_window_view(images().double().numpy(), (3, 3), axis=(2, 3))
    maps = np.einsum("bihwxy,oixy->bohw", windows[:, :, ::2, ::2], state["conv.weight"])
    maps += state["conv.bias"][:, None, None]
    mean, var, scale, shift = (
        state[f"bn.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    feature = np.maximum((maps - mean) / np.sqrt(var + 1e-5) * scale + shift, 0).mean((2, 3))
    return feature, feature @ state["fc.weight"].T + state["fc.bias"]


def exported(path: Path, network: nn.Module, dynamic: bool = True, size: int = SIZE) -> str:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(network.eval(), (torch.zeros(2, 3, size, size),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return f"program:{path}"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported(tmp_path_factory.mktemp("programs") / "teacher.pt2", outside_networks.pair(TASK))


@pytest.fixture(params=["plain", "telling", "program"])
def model(request: pytest.FixtureRequest, program: str) -> ImageClassifier:
    name = program if request.param == "program" else OURS + request.param
    return build_model(name, TASK).eval()


def test_feature_and_logits_are_the_networks(model: ImageClassifier) -> None:
    """However it is given, against the formula of the network's own weights."""
    feature, logits = formula(outside_networks.plain(TASK))
    with torch.no_grad():
        output = model(images())
    np.testing.assert_allclose(output.feature, feature, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.head(output.feature), output.logits)
    assert model.feature_width == 6
    assert count_parameters(model) == count_parameters(outside_networks.plain(TASK))
    assert model.map_shapes(SIZE) == ()


@pytest.mark.parametrize("pickled", ["pickle", "cloudpickle"])
def test_it_travels_to_actors(model: ImageClassifier, pickled: str) -> None:
    dumps = pickle.dumps if pickled == "pickle" else cloudpickle.dumps
    arrived = pickle.loads(dumps(model))
    with torch.no_grad():
        torch.testing.assert_close(arrived(images()).logits, model(images()).logits, rtol=0, atol=0)
        torch.testing.assert_close(arrived.head(arrived(images()).feature), arrived(images()).logits)
    assert arrived.source_fingerprint() == model.source_fingerprint()


def test_a_model_of_ours_from_outside() -> None:
    model = build_model(OURS + "ours", TASK).eval()
    expected = outside_networks.ours(TASK).eval()
    with torch.no_grad():
        assert torch.equal(model(images()).logits, expected(images()).logits)
    assert model.map_shapes(SIZE) == expected.map_shapes(SIZE)
    assert pickle.loads(pickle.dumps(model)).source_fingerprint() == model.source_fingerprint()


@pytest.mark.parametrize("function", ["plain", "ours"])
def test_a_checkpoint_is_loaded_over_its_weights(function: str, tmp_path: Path) -> None:
    network = getattr(outside_networks, function)(TASK)
    with torch.no_grad():
        network.fc.bias.add_(1)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = build_model(OURS + function, TASK)
    load_checkpoint(model, str(tmp_path / "weights.pth"))
    assert torch.equal(model.head.bias, network.fc.bias)


def test_it_can_be_trained() -> None:
    model = build_model(OURS + "plain", TASK)
    assert model.training
    model(images()).logits.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "conv.bias" not in name
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("outside_networks:plian", "has no function plian. Did you mean 'plain'?"),
        ("outside_networks:not_callable", "has no function not_callable"),
        ("no_such_module:plain", r"cannot import no_such_module \(ModuleNotFoundError"),
        ("outside_networks:failing", r"the function failed \(KeyError: 'no such weights'\)"),
        ("outside_networks:no_network", "returned a dict, not an nn.Module"),
        ("outside_networks:pair", r"the network returned a tuple; it must return the logits"),
        ("outside_networks:headless", "has no linear layer"),
        ("outside_networks:scaled", "not those of its last linear layer on its feature"),
        ("outside_networks:unused", "its last linear layer, 'spare', does not make the logits"),
        ("outside_networks:other_classes", r"its logits are \[3, 6\], not \[3, 5\]"),
        ("outside_networks:other_size", r"failed on images \[3, 3, 16, 16\] \(RuntimeError"),
    ],
)
def test_a_function_that_will_not_do(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        build_model(f"python:{name}", TASK)
    assert str(raised.value).startswith(f"python:{name}: ")


@pytest.mark.parametrize(
    "name", ["", "module", "module:", ":f", "a b:f", "module:f()", "a..b:f", "os.path:join:x", "1:f"]
)
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(UserError, match=r"is not of the form python:package\.module:function"):
        check_model_name(f"python:{name}")


def test_reading_a_configuration_imports_nothing() -> None:
    sys.modules.pop("this", None)
    config = VisualTeacherConfig(model="python:this:anything")
    assert "this" not in sys.modules
    assert config.is_given
    assert not config.is_fitted


def test_code_enters_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights in another function's hands are another teacher."""
    source = Path(outside_networks.__file__).read_text()
    fingerprints = []
    for module, text in (("outside_a", source), ("outside_b", source.replace("F.relu", "F.gelu"))):
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        fingerprints.append(build_model(f"python:{module}:plain", TASK).source_fingerprint())
    assert fingerprints[0] != fingerprints[1]
    assert len(str(fingerprints[0])) == 64
    assert build_model("resnet8", TASK).source_fingerprint() is None


def test_a_program_stays_in_evaluation_mode(program: str) -> None:
    model = build_model(program, TASK)
    with torch.no_grad():
        before = model(images()).logits
        model.train()
        assert torch.equal(model(images()).logits, before)
        assert torch.equal(model.to(memory_format=torch.channels_last)(images()).logits, before)
        channels_last = images().to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(channels_last).logits, before)


class Biasless(outside_networks.Paired):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.fc = nn.Linear(6, num_classes, bias=False)


class Decoy(outside_networks.Paired):
    """It has another layer of the same shape before the one that counts."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.decoy = nn.Linear(6, num_classes)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        feature = self.pooled(images_BCHW)
        return self.fc(feature) + 0 * self.decoy(feature), feature


@pytest.mark.parametrize("kind", [Biasless, Decoy])
def test_the_head_of_a_program_is_found(kind: type[nn.Module], tmp_path: Path) -> None:
    network = kind(TASK.num_classes)
    model = build_model(exported(tmp_path / "p.pt2", network), TASK)
    assert torch.equal(model.head.weight, network.fc.weight)
    assert (model.head.bias is None) == (network.fc.bias is None)


class Swapped(outside_networks.Paired):
    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        return super().forward(images_BCHW)[::-1]


class Earlier(outside_networks.Paired):
    """Its feature is not what its last layer is given."""

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        logits, feature = super().forward(images_BCHW)
        return logits, feature.square()


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (
            outside_networks.Plain(5),
            r"it returned one tensor \[3, 5\]; it must return \(logits \[B, C\], feature",
        ),
        (Swapped(5), "no parameters of the program, a weight"),
        (Earlier(5), r"no parameters of the program, a weight \[5, 6\] with or without a bias"),
        (outside_networks.Paired(4), r"its logits are \[3, 4\], not \[3, 5\]"),
    ],
    ids=["logits alone", "swapped", "another feature", "other classes"],
)
def test_a_program_that_will_not_do(network: nn.Module, said: str, tmp_path: Path) -> None:
    name = exported(tmp_path / "p.pt2", network)
    with pytest.raises(UserError, match=said) as raised:
        build_model(name, TASK)
    assert str(raised.value).startswith(name)


def test_a_program_of_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with a dynamic number of images"):
        build_model(exported(tmp_path / "p.pt2", outside_networks.Paired(5), dynamic=False), TASK)


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    for content in (b"", b"no program", buffer.getvalue()):
        (tmp_path / "p.pt2").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as an exported program"):
            build_model(f"program:{tmp_path / 'p.pt2'}", TASK)
    with pytest.raises(UserError, match="there is no such file"):
        build_model(f"program:{tmp_path / 'q.pt2'}", TASK)
    with pytest.raises(UserError, match=r"is not of the form program:PATH\.pt2"):
        check_model_name("program:teacher.pth")
