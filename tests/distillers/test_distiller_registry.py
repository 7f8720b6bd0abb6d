"""What every strategy promises: a new file in tmkd_ray/distillers is held to it at once."""

import pickle
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from teaching_samples import (
    CLASSES,
    LABELS,
    SPEC,
    TEACHER_WIDTH,
    VIEWS,
    extreme_outputs,
    leaves,
    student_output,
    teacher_output,
)

from tmkd_ray.distillers import STRATEGIES, Strategy, build_strategy
from tmkd_ray.fusion import TeacherConstants, TeachingSignal
from tmkd_ray.objective import Distiller, DistillerConfig
from tmkd_ray.registry import UnknownNameError
from tmkd_ray.settings import resolve_named
from tmkd_ray.types import Knowledge, LossOutput, TeacherOutput

pytestmark = pytest.mark.parametrize("name", STRATEGIES.names())

HALF = [torch.float16, torch.bfloat16]
# The student's tensors that a strategy is compared by, when it is not the teacher's field of the same name.
COMPARED = {"tf_kd": {"logits"}, "reviewkd": {"feature_maps", "feature"}}
KNOWN_FIELDS = set(TeacherOutput.__dataclass_fields__)


def build(name: str) -> Strategy:
    torch.manual_seed(0)
    return build_strategy(STRATEGIES.get(name).Config(), SPEC)


class Watched:
    """A teacher's output that remembers which fields are read."""

    def __init__(self, output: TeacherOutput) -> None:
        self.output = output
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.output, name)


def only(output: TeacherOutput, fields: frozenset[str]) -> TeacherOutput:
    """The output with the other fields None."""
    return TeacherOutput(**{name: value if name in fields else None for name, value in vars(output).items()})


def test_returns_a_scalar_and_scalar_parts(name: str) -> None:
    output = build(name)(student_output(), teacher_output(), LABELS)
    assert isinstance(output, LossOutput)
    for value in (output.loss, *output.terms.values()):
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.isfinite()
    assert output.loss > 0


def test_is_deterministic(name: str) -> None:
    strategy = build(name)
    first = strategy(student_output(), teacher_output(), LABELS)
    again = strategy(student_output(), teacher_output(), LABELS)
    assert torch.equal(first.loss, again.loss)
    assert first.terms.keys() == again.terms.keys()


def test_does_not_change_its_inputs(name: str) -> None:
    student, teacher, labels = student_output(), teacher_output(), LABELS.clone()
    build(name)(student, teacher, labels).loss.backward()
    assert torch.equal(labels, LABELS)
    for actual, fresh in ((student, student_output()), (teacher, teacher_output())):
        for field, values in vars(fresh).items():
            found = getattr(actual, field)
            for value, same in zip(
                values if isinstance(values, tuple) else (values,),
                found if isinstance(found, tuple) else (found,),
                strict=True,
            ):
                assert torch.equal(same, value)


def test_gradient_reaches_what_the_student_is_compared_by(name: str) -> None:
    """One that reads the teacher's logits (feature, maps) moves the student's, and its own heads."""
    strategy, student = build(name), student_output()
    strategy(student, teacher_output(), LABELS).loss.backward()
    compared = COMPARED.get(name, strategy.requires) & set(vars(student))
    moved = {field: leaf.grad for field, leaf in leaves(student).items() if leaf.grad is not None}
    assert {field.partition(".")[0] for field in moved} == compared
    assert strategy.trains_classifier == ("logits" in moved)
    for gradient in moved.values():
        assert gradient.isfinite().all()
        assert (gradient.abs().flatten(1).amax(dim=1) > 0).all(), "every sample teaches"
    for parameter in strategy.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_a_step_against_the_gradient_lowers_the_loss(name: str) -> None:
    strategy, student, teacher = build(name), student_output(), teacher_output()
    loss = strategy(student, teacher, LABELS).loss
    gradients = torch.autograd.grad(loss, list(leaves(student).values()), allow_unused=True)
    length = torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt()
    for leaf, gradient in zip(leaves(student).values(), gradients, strict=True):
        if gradient is not None:
            leaf.data -= 1e-2 * gradient / length
    assert strategy(student, teacher, LABELS).loss < loss


def test_requires_names_exactly_what_is_read(name: str) -> None:
    strategy, watched = build(name), Watched(teacher_output())
    strategy(student_output(), watched, LABELS)
    assert strategy.requires <= KNOWN_FIELDS
    assert watched.read == strategy.requires


def test_runs_on_what_it_requires_alone(name: str) -> None:
    strategy = build(name)
    whole = strategy(student_output(), teacher_output(), LABELS)
    bare = strategy(student_output(), only(teacher_output(), strategy.requires), LABELS)
    assert torch.equal(bare.loss, whole.loss)


def test_no_gradient_reaches_the_teacher(name: str) -> None:
    """From the student's loss through the teaching signal, as in training: nothing there can be trained."""
    like, strategy = teacher_output(), build(name)
    assert like.clip_embedding is not None
    assert like.feature_maps is not None
    assert like.preactivation_maps is not None

    def of_views(value: torch.Tensor) -> torch.Tensor:
        return torch.stack([value] * VIEWS, dim=1).requires_grad_()

    knowledge = Knowledge(
        of_views(like.feature),
        of_views(like.clip_embedding),
        tuple(of_views(value) for value in like.feature_maps),
        tuple(of_views(value) for value in like.preactivation_maps),
    )
    names = tuple("abc")
    head = torch.randn(CLASSES, TEACHER_WIDTH, requires_grad=True)
    constants = TeacherConstants(names, head, torch.zeros(CLASSES), like.text_bank, clip_temperature=0.05)
    teacher = TeachingSignal(constants, names, "label", fusion_temperature=0.1)(knowledge, LABELS)
    strategy(student_output(), teacher, LABELS).loss.backward()
    assert all(parameter.requires_grad for parameter in strategy.parameters())
    assert knowledge.clip_embedding is not None
    assert knowledge.feature_maps is not None
    assert knowledge.preactivation_maps is not None
    given = (
        knowledge.feature,
        knowledge.clip_embedding,
        *knowledge.feature_maps,
        *knowledge.preactivation_maps,
    )
    assert all(value.grad is None for value in (*given, head))


def test_is_pickled_with_its_weights(name: str) -> None:
    strategy = build(name)
    copy = pickle.loads(pickle.dumps(strategy))
    assert torch.equal(
        copy(student_output(), teacher_output(), LABELS).loss,
        strategy(student_output(), teacher_output(), LABELS).loss,
    )


def test_state_dict_brings_the_weights_back(name: str) -> None:
    strategy = build(name)
    torch.manual_seed(99)
    other = build_strategy(STRATEGIES.get(name).Config(), SPEC)
    other.load_state_dict(strategy.state_dict())
    assert torch.equal(
        other(student_output(), teacher_output(), LABELS).loss,
        strategy(student_output(), teacher_output(), LABELS).loss,
    )


@pytest.mark.parametrize("mode", ["python", "json"])
def test_config_survives_the_round_trip(name: str, mode: Any) -> None:
    config = STRATEGIES.get(name).Config()
    assert config.name == name
    read = resolve_named(config.model_dump(mode=mode), STRATEGIES)
    assert read == config
    assert type(read) is type(config)
    assert resolve_named(name, STRATEGIES) == config

    distiller = DistillerConfig.model_validate({"name": "kd", "strategy": name})
    assert distiller.strategy == config
    assert DistillerConfig.model_validate(distiller.model_dump(mode=mode)) == distiller
    assert DistillerConfig.model_validate_json(distiller.model_dump_json()) == distiller


def test_config_refuses_unknown_options(name: str) -> None:
    with pytest.raises(ValidationError, match="unknown_option"):
        STRATEGIES.get(name).Config(unknown_option=1)


def test_misspelled_name_is_told_the_nearest(name: str) -> None:
    with pytest.raises(UnknownNameError, match=name):
        STRATEGIES.get(name + "x")


def test_fits_the_objective(name: str) -> None:
    """Any strategy fits the objective: its loss is the `kd` term, its parts come along by their own names."""
    torch.manual_seed(0)
    distiller = Distiller(DistillerConfig.model_validate({"name": "kd", "strategy": name}), SPEC)
    output = distiller(student_output(), teacher_output(), LABELS)
    alone = distiller.strategy(student_output(), teacher_output(), LABELS)
    assert output.terms.keys() == {"ce", "kd"} | alone.terms.keys()
    assert not {"ce", "kd", "feature", "text", "contrastive"} & alone.terms.keys()
    assert torch.equal(output.terms["kd"], alone.loss)


@pytest.mark.parametrize("dtype", HALF)
def test_finite_under_autocast_at_extreme_outputs(name: str, dtype: torch.dtype) -> None:
    """Logits, features and maps at ±100, teacher and student agreeing or each sure of another class."""
    strategy = build(name)
    student, teacher, labels = extreme_outputs(dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = strategy(student, teacher, labels).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    for value in (*leaves(student).values(), *strategy.parameters()):
        assert value.grad is None or value.grad.isfinite().all()
