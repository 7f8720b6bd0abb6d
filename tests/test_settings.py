"""Settings: strict, frozen sections, and their errors in words."""

import math
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError, field_validator, model_validator

from tmkd_ray.registry import Registry
from tmkd_ray.settings import (
    ImageStatistics,
    SectionError,
    Settings,
    explain,
    names_as_mapping,
    resolve_each,
    resolve_named,
    shown,
)


class Inner(Settings):
    size: int = Field(default=3, ge=1, le=9)
    mode: Literal["fast", "slow"] = "fast"


class Outer(Settings):
    count: int = 1
    ratio: float = Field(default=0.5, gt=0, lt=1)
    limit: int | None = None
    flag: bool = False
    either: bool | int = 1
    label: str = "x"
    kernel: Literal[1, 3] = 3
    parts: tuple[float, ...] = (0.5,)
    pair: tuple[int, int] = (1, 2)
    some: tuple[int, ...] = Field(default=(1,), min_length=1, max_length=3)
    mean: ImageStatistics = (0.5, 0.5, 0.5)
    inner: Inner = Field(default_factory=Inner)
    maybe: Inner | None = None
    table: dict[str, Inner] = Field(default_factory=dict)
    noted: dict[str, Annotated[Inner, "a note"]] = Field(default_factory=dict)


def problems(section: type[Settings] = Outer, /, **given: Any) -> list[str]:
    with pytest.raises(ValidationError) as raised:
        section.model_validate(given)
    return [".".join(path) + ": " + text for path, text in explain(raised.value, section)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Types
        ({"count": True}, "count: expected a number (given: true)"),
        ({"ratio": False}, "ratio: expected a number (given: false)"),
        ({"limit": True}, "limit: expected a number (given: true)"),
        ({"kernel": True}, "kernel: expected a number (given: true)"),
        ({"parts": [0.5, True]}, "parts: expected a number (given: true)"),
        ({"mean": [0.1, 0.2, True]}, "mean: expected a number (given: true)"),
        ({"count": "20"}, 'count: expected a number (given: "20")'),
        ({"ratio": "high"}, 'ratio: expected a number (given: "high")'),
        ({"parts": ["0.5"]}, 'parts: expected a number (given: "0.5")'),
        ({"count": 2.5}, "count: expected a whole number (given: 2.5)"),
        ({"count": None}, "count: expected a whole number (given: null)"),
        ({"count": [1]}, "count: expected a whole number (given: a list)"),
        ({"ratio": {}}, "ratio: expected a number (given: a mapping)"),
        ({"mean": [0.1, 0.2, math.nan]}, "mean.2: expected a finite number (given: nan)"),
        ({"mean": [math.inf, 0.2, 0.3]}, "mean.0: expected a finite number (given: inf)"),
        ({"flag": 7}, "flag: expected true or false (given: 7)"),
        ({"flag": None}, "flag: expected true or false (given: null)"),
        ({"label": 3}, "label: expected text (given: 3); write it in quotes"),
        ({"label": True}, "label: expected text (given: true); write it in quotes"),
        ({"label": None}, "label: expected text (given: null)"),
        ({"label": ["a"]}, "label: expected text (given: a list)"),
        ({"parts": 0.5}, "parts: expected a list (given: 0.5)"),
        ({"inner": 3}, "inner: expected a mapping (given: 3)"),
        ({"inner": None}, "inner: expected a mapping (given: null)"),
        ({"maybe": "fast"}, 'maybe: expected a mapping (given: "fast")'),
        ({"table": []}, "table: expected a mapping (given: a list)"),
        ({"table": {3: {}}}, "table.3: a key must be text; write it in quotes"),
        ({"table": {"a": 3}}, "table.a: expected a mapping (given: 3)"),
        # Ranges and choices
        ({"ratio": 0}, "ratio: must be above 0 (given: 0)"),
        ({"ratio": 1}, "ratio: must be below 1 (given: 1)"),
        ({"inner": {"size": 0}}, "inner.size: must be at least 1 (given: 0)"),
        ({"inner": {"size": 10}}, "inner.size: must be at most 9 (given: 10)"),
        ({"inner": {"mode": "fats"}}, "inner.mode: expected 'fast' or 'slow' (given: \"fats\")"),
        ({"kernel": 5}, "kernel: expected 1 or 3 (given: 5)"),
        ({"pair": [1]}, "pair: has too few values"),
        ({"pair": [1, 2, 3]}, "pair: has too many values; expected at most 2 (given: a list)"),
        ({"some": []}, "some: has too few values; expected at least 1 (given: a list)"),
        ({"some": [1, 2, 3, 4]}, "some: has too many values; expected at most 3 (given: a list)"),
        # Unknown keys, wherever they are
        ({"cuont": 3}, "cuont: unknown key; did you mean 'count'?"),
        ({"inner": {"siez": 3}}, "inner.siez: unknown key; did you mean 'size'?"),
        ({"maybe": {"siez": 3}}, "maybe.siez: unknown key; did you mean 'size'?"),
        ({"table": {"a": {"siez": 3}}}, "table.a.siez: unknown key; did you mean 'size'?"),
        ({"noted": {"a": {"siez": 3}}}, "noted.a.siez: unknown key; did you mean 'size'?"),
        ({"inner": {"zzz": 3}}, "inner.zzz: unknown key; valid keys: mode, size"),
        ({3: 4}, "3: a key must be text; write it in quotes"),
        ({None: 4}, "null: a key must be text; write it in quotes"),
    ],
)
def test_one_problem_one_line(given, expected):
    with pytest.raises(ValidationError) as raised:
        Outer.model_validate(given)
    assert [".".join(path) + ": " + text for path, text in explain(raised.value, Outer)] == [expected]


def test_what_is_right_is_taken():
    section = Outer.model_validate(
        {
            "count": 1e3,  # YAML's way to write a thousand
            "ratio": 0.25,
            "limit": None,
            "flag": True,
            "either": True,
            "label": "20",
            "kernel": 1,
            "parts": [0.25, 1],
            "maybe": {"mode": "slow"},
            "table": {"a": {}},
        }
    )
    assert (section.count, section.ratio, section.limit) == (1000, 0.25, None)
    assert section.flag is True
    assert section.either is True
    assert section.label == "20"
    assert section.parts == (0.25, 1.0)
    assert section.maybe == Inner(mode="slow")
    assert section.table == {"a": Inner()}


def test_all_problems_are_found_at_once():
    found = problems(
        count=True, cuont=1, inner={"size": 0, "mood": 1}, maybe={"mode": 3}, table={"a": {"siez": 1}}
    )
    assert sorted(line.split(": ")[0] for line in found) == [
        "count",
        "cuont",
        "inner.mood",
        "inner.size",
        "maybe.mode",
        "table.a.siez",
    ]


def test_defaults_are_checked_too():
    class Wrong(Settings):
        size: int = Field(default=0, ge=1)

    with pytest.raises(ValidationError):
        Wrong()


def test_frozen():
    section = Outer()
    with pytest.raises(ValidationError, match="frozen"):
        section.count = 3
    with pytest.raises(ValidationError, match="frozen"):
        section.inner.size = 4
    assert section == Outer()


class Warmth(Settings):
    """A temperature has no upper end: at infinity all views weigh the same."""

    value: float = 1.0


def test_json_round_trip():
    section = Outer(count=5, maybe=Inner(size=2), table={"a": Inner(mode="slow")}, pair=(3, 4))
    assert Outer.model_validate_json(section.model_dump_json()) == section
    assert Outer.model_validate(section.model_dump(mode="json")) == section
    infinite = Warmth(value=math.inf)
    assert Warmth.model_validate_json(infinite.model_dump_json()) == infinite


class Checked(Settings):
    low: int = 0
    high: int = 10
    even: int = 2

    @field_validator("even")
    @classmethod
    def _is_even(cls, even: int) -> int:
        if even % 2:
            raise ValueError(f"{even} is odd")
        return even

    @model_validator(mode="after")
    def _ordered(self) -> "Checked":
        found = []
        if self.low > self.high:
            found.append((("low",), f"{self.low} is above high, {self.high}"))
        if self.low < 0:
            found.append((("low",), "is negative"))
        if self.high == 13:
            found.append(((), "an unlucky section"))
        if found:
            raise SectionError(found)
        return self


class Parent(Settings):
    checked: Checked = Field(default_factory=Checked)


def test_a_section_tells_several_problems_by_their_own_paths():
    assert problems(Parent, checked={"low": -5, "high": -9}) == [
        "checked.low: -5 is above high, -9",
        "checked.low: is negative",
    ]
    assert problems(Parent, checked={"high": 13}) == ["checked: an unlucky section"]
    assert problems(Parent, checked={"even": 3}) == ["checked.even: 3 is odd"]


def test_a_section_error_reads_well_by_itself():
    error = SectionError([(("a", "b"), "is wrong"), ((), "so is this")])
    assert str(error) == "a.b: is wrong; so is this"


class Circle(Settings):
    name: str = "circle"
    radius: float = Field(default=1.0, gt=0)


class Square(Settings):
    name: str = "square"
    side: int = 1
    inner: Inner = Field(default_factory=Inner)


class CircleEntry:
    Config: ClassVar[type[Settings]] = Circle


class SquareEntry:
    Config: ClassVar[type[Settings]] = Square


SHAPES: Registry[Any] = Registry("shape")
SHAPES.register("circle")(CircleEntry)
SHAPES.register("square")(SquareEntry)


class Drawing(Settings):
    shape: Settings
    default_shape: Settings = Circle()

    @field_validator("shape", mode="before")
    @classmethod
    def _shape(cls, value: Any) -> Any:
        return resolve_named(value, SHAPES)

    @field_validator("default_shape", mode="before")
    @classmethod
    def _default_shape(cls, value: Any) -> Any:
        return resolve_named(value, SHAPES, default="circle")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("square", Square()),
        ({"name": "square", "side": 4}, Square(side=4)),
        (Square(side=5), Square(side=5)),
    ],
    ids=["a name alone", "a mapping", "a section"],
)
def test_a_named_section_takes_its_own_class(given, expected):
    assert Drawing(shape=given).shape == expected


def test_a_named_section_may_have_a_default_name():
    assert Drawing(shape="square", default_shape={"radius": 2}).default_shape == Circle(radius=2)
    assert resolve_named({"side": 2}, SHAPES, default="square") == Square(side=2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"name": "circle", "raduis": 3}, ["shape.raduis: unknown key; did you mean 'radius'?"]),
        ({"name": "circle", "radius": 0}, ["shape.radius: must be above 0 (given: 0)"]),
        ({"name": "circle", "side": 3}, ["shape.side: unknown key; valid keys: name, radius"]),
        (
            {"name": "square", "side": True, "inner": {"size": 0, "siez": 1}},
            [
                "shape.side: expected a number (given: true)",
                "shape.inner.size: must be at least 1 (given: 0)",
                "shape.inner.siez: unknown key; did you mean 'size'?",
            ],
        ),
        ("cirle", ["shape: unknown shape 'cirle'. Did you mean 'circle'? Choices: circle, square"]),
        ({"radius": 3}, ["shape: `name` is missing. Choices: circle, square"]),
        ({"name": None}, ["shape: `name` is missing. Choices: circle, square"]),
        ({"name": ["circle"]}, ["shape.name: expected a name (given: a list)"]),
        (3, ["shape: expected a name, or a mapping with `name` (given: 3)"]),
        (None, ["shape: expected a name, or a mapping with `name` (given: null)"]),
        (["circle"], ["shape: expected a name, or a mapping with `name` (given: a list)"]),
    ],
)
def test_a_wrong_named_section_is_told_by_its_whole_path(given, expected):
    assert problems(Drawing, shape=given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("square", {"square": Square()}),
        (["square", "circle"], {"square": Square(), "circle": Circle()}),
        ({"circle": {"radius": 2}, "square": {}}, {"circle": Circle(radius=2), "square": Square()}),
        ({"circle": None, "square": {}}, {"square": Square()}),
        ({"circle": Circle(radius=3)}, {"circle": Circle(radius=3)}),
        ({}, {}),
    ],
    ids=["a name", "names", "options", "left out", "a section", "none"],
)
def test_each_of_several(given, expected):
    resolved = resolve_each(given, SHAPES)
    assert resolved == expected
    assert list(resolved) == list(expected), "the order is the user's"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"circle": {"radius": 0}, "hexagon": {}, "square": {"sied": 1}},
            [
                (("circle", "radius"), "must be above 0 (given: 0)"),
                (("hexagon",), "unknown shape 'hexagon'. Choices: circle, square"),
                (("square", "sied"), "unknown key; did you mean 'side'?"),
            ],
        ),
        (
            {"circl": None},
            [(("circl",), "unknown shape 'circl'. Did you mean 'circle'? Choices: circle, square")],
        ),
        ({3: {}}, [(("3",), "unknown shape '3'. Choices: circle, square")]),
        ({"circle": [1]}, [(("circle",), "expected a mapping (given: a list)")]),
    ],
)
def test_all_that_is_wrong_with_several(given, expected):
    with pytest.raises(SectionError) as raised:
        resolve_each(given, SHAPES)
    assert raised.value.problems == expected


@pytest.mark.parametrize("given", [3, None, ["circle", 3], [["circle"]], [{"circle": {}}]])
def test_several_must_be_names_or_names_with_options(given):
    with pytest.raises(ValueError, match=r"^expected a list of names, or names with options \(given: "):
        resolve_each(given, SHAPES)


def test_a_name_twice_in_a_list_is_refused():
    with pytest.raises(ValueError, match=r"^given twice: circle$"):
        names_as_mapping(["circle", "square", "circle"])


def test_names_as_mapping_leaves_alone_what_is_no_list_of_names():
    assert names_as_mapping(["a", "b"]) == {"a": {}, "b": {}}
    for other in ({"a": 1}, ["a", 3], None, 7):
        assert names_as_mapping(other) is other


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (3, "3"),
        (3e-4, "0.0003"),
        ("Käse", '"Käse"'),
        ('say "a"\n', '"say \\"a\\"\\n"'),
        ("x" * 100, '"' + "x" * 80 + '…"'),
        ([1, 2], "a list"),
        ((), "a list"),
        ({"a": 1}, "a mapping"),
    ],
)
def test_shown(value, expected):
    assert shown(value) == expected


def test_what_contains_itself_or_is_huge_is_shown_in_words():
    circular: list[Any] = []
    circular.append(circular)
    laughs: list[Any] = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]  # 2⁶⁰ laughs when written out
    assert problems(count=circular) == ["count: expected a whole number (given: a list)"]
    assert problems(count=laughs, label=laughs) == [
        "count: expected a whole number (given: a list)",
        "label: expected text (given: a list)",
    ]
