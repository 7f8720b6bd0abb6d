"""teacher.visual: which ways of having a teacher go together."""

import pytest

from tmkd_ray.config_reading import read_config
from tmkd_ray.errors import ConfigError

GIVEN = "teacher.visual.checkpoint=/weights.pth"
PYTHON = "teacher.visual.model=python:package.module:function"
PROGRAM = "teacher.visual.model=program:/teacher.pt2"


@pytest.mark.parametrize(
    ("overrides", "given", "fitted", "of_views"),
    [
        ([], False, True, False),
        ([GIVEN], True, False, False),
        ([PYTHON], True, False, False),
        ([PYTHON, GIVEN], True, False, False),
        ([PROGRAM], True, False, False),
        (["teacher.visual.fit_views=true"], False, True, False),
        (["teacher.visual.fit_views=true", "teacher.visual.view_batch_norm=per_view"], False, True, True),
        ([GIVEN, "teacher.visual.adapt=statistics"], True, True, True),
        ([PYTHON, "teacher.visual.adapt=fit"], True, True, False),
        ([GIVEN, "teacher.visual.adapt=fit", "teacher.visual.view_batch_norm=per_view"], True, True, True),
    ],
)
def test_what_there_is_and_what_is_to_do(
    overrides: list[str], given: bool, fitted: bool, of_views: bool
) -> None:
    visual = read_config(None, ["dataset=digits", *overrides]).teacher.visual
    assert (visual.is_given, visual.is_fitted, visual.has_view_statistics) == (given, fitted, of_views)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([PROGRAM, GIVEN], "teacher.visual.checkpoint: an exported program has its weights; set it to null"),
        ([PROGRAM, "teacher.visual.adapt=fit"], "teacher.visual.adapt: an exported program cannot be changed"),
        (
            ["teacher.visual.adapt=statistics"],
            "teacher.visual.adapt: adapts a given teacher; give a checkpoint",
        ),
        (["teacher.visual.adapt=both"], "teacher.visual.adapt: expected 'none', 'statistics' or 'fit'"),
        (
            [GIVEN, "teacher.visual.view_batch_norm=per_view"],
            "teacher.visual.view_batch_norm: per_view is for a teacher fitted on all views",
        ),
        (
            [GIVEN, "teacher.visual.fit_views=true", "teacher.visual.view_batch_norm=per_view"],
            "teacher.visual.view_batch_norm: per_view is for a teacher fitted on all views",
        ),
        (
            [
                "teacher.visual.fit_views=true",
                "teacher.visual.view_batch_norm=per_view",
                "teacher.visual.fit.compile=true",
            ],
            "teacher.visual.fit.compile: not with view_batch_norm per_view",
        ),
        ([PYTHON.replace(":function", "")], "is not of the form python:package.module:function"),
        ([PROGRAM.replace(".pt2", ".pth")], "is not of the form program:PATH.pt2"),
        (["student.model=program:/s.pt2"], "student.model: an exported program cannot be trained"),
    ],
)
def test_what_does_not_go_together_is_said(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_config(None, ["dataset=digits", *overrides])
    assert said in str(raised.value)
