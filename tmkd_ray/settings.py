"""The base of every configuration section, and what is wrong with one in words for people."""

import json
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from tmkd_ray.registry import Registry, UnknownNameError, nearest
from tmkd_ray.storage import refuse_credentials

ImageStatistics = tuple[FiniteFloat, FiniteFloat, FiniteFloat]
"""Per-channel value of RGB in [0, 1]."""

Precision = Literal["float32", "bfloat16", "float16"]
"""Of the arithmetic: anything but float32 means autocast."""


def _without_credentials(path: str) -> str:
    refuse_credentials(path)
    return path


Location = Annotated[str, AfterValidator(_without_credentials)]
"""A local path or a URI; credentials come from the environment, since a configuration is saved and shown."""


class Settings(BaseModel):
    """A frozen, typed section of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        ser_json_inf_nan="constants",  # else infinity, a legal temperature, would become null
    )

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic reads `true` as 1 and `"20"` as 20; in a config file both are mistakes.
        assert info.field_name is not None
        wanted = _scalar_types(cls.model_fields[info.field_name].annotation)
        if wanted & {int, float}:
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, bool | str) and type(item) not in wanted:
                    raise ValueError(f"expected a number (given: {shown(item)})")
        return value


def _scalar_types(annotation: Any) -> set[type]:
    """Return the plain types that an annotation admits, at any depth."""
    if typing.get_origin(annotation) is Literal:
        return {type(value) for value in typing.get_args(annotation)}
    inner = [_scalar_types(argument) for argument in typing.get_args(annotation)]
    return set().union(*inner) if inner else {annotation} if isinstance(annotation, type) else set()


class SectionError(ValueError):
    """What is wrong with a section: (path within the section, text) for each problem.

    Validators raise it when they find several, or one that lies deeper than themselves.
    """

    def __init__(self, problems: Iterable[tuple[tuple[str, ...], str]]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(": ".join(filter(None, [".".join(p), text])) for p, text in self.problems))


def resolve_named(value: Any, registry: Registry[Any], default: str | None = None) -> Any:
    """Turn `name` or `{name: …, options}` into the named entry's own Config; a validator's tool.

    Raises:
        ValueError: no name is given, no entry has it, or its options are wrong.
    """
    if isinstance(value, Settings):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise ValueError(f"expected a name, or a mapping with `name` (given: {shown(value)})")
    name = value.get("name", default)
    if name is None:
        raise ValueError(f"`name` is missing. Choices: {', '.join(registry.names())}")
    if not isinstance(name, str):
        raise SectionError([(("name",), f"expected a name (given: {shown(name)})")])
    section: type[Settings] = registry.get(name).Config
    try:
        return section.model_validate({**value, "name": name})
    except ValidationError as error:
        raise SectionError(explain(error, section)) from error


def names_as_mapping(value: Any) -> Any:
    """Return a name, or a list of names, as names without options; anything else as it is."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"given twice: {', '.join(twice)}")
        return {name: {} for name in names}
    return value


def resolve_each(values: Any, registry: Registry[Any]) -> dict[str, Any]:
    """Turn names, or `{name: options}`, into each named entry's own Config; options null leaves the entry out.

    Raises:
        ValueError: no entry has a name, or the options of any are wrong (all of them are reported).
    """
    values = names_as_mapping(values)
    if not isinstance(values, dict):
        raise ValueError(f"expected a list of names, or names with options (given: {shown(values)})")
    sections: dict[str, Any] = {}
    problems: list[tuple[tuple[str, ...], str]] = []
    for name, options in values.items():
        path = (shown(name) if not isinstance(name, str) else name,)
        try:
            section: type[Settings] = registry.get(path[0]).Config
            if options is not None:
                sections[path[0]] = section.model_validate(options)
        except UnknownNameError as error:
            problems.append((path, str(error)))
        except ValidationError as error:
            problems += [(path + inner, text) for inner, text in explain(error, section)]
    if problems:
        raise SectionError(problems)
    return sections


_EXPECTED = {
    "bool": "true or false",
    "dict": "a mapping",
    "finite": "a finite number",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model": "a mapping",
    "string": "text",
    "tuple": "a list",
}
"""What is expected, by the first word of Pydantic's name for the error."""

_BOUNDS = {
    "greater_than": ("gt", "must be above"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be below"),
    "less_than_equal": ("le", "must be at most"),
    "too_long": ("max_length", "has too many values; expected at most"),
    "too_short": ("min_length", "has too few values; expected at least"),
}


def explain(error: ValidationError, section: type[Settings]) -> list[tuple[tuple[str, ...], str]]:
    """Return (path, what is wrong) for each error: every one that could be found at once.

    An unknown key comes with the nearest valid one.

    Args:
        section: the class that was validated.
    """
    problems: list[tuple[tuple[str, ...], str]] = []
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"] if part != "[key]")
        kind, context, given = item["type"], item.get("ctx", {}), f"(given: {shown(item['input'])})"
        cause = context.get("error")
        if isinstance(cause, SectionError):
            problems += [(path + inner, text) for inner, text in cause.problems]
            continue
        if isinstance(cause, ValueError):
            text = str(cause)
        elif kind == "extra_forbidden":
            text = f"unknown key; {_hint(path[-1], _valid_keys(section, path[:-1]))}"
        elif kind == "missing" and isinstance(item["loc"][-1], int):
            path, text = path[:-1], "has too few values"
        elif kind == "missing":
            text = "required, but not given"
        elif kind == "invalid_key" or item["loc"][-1:] == ("[key]",):
            path, text = (*path[:-1], shown(item["input"])), "a key must be text; write it in quotes"
        elif kind == "literal_error":
            text = f"expected {context['expected']} {given}"
        elif kind in _BOUNDS:
            name, rule = _BOUNDS[kind]
            text = f"{rule} {context[name]:.15g} {given}"
        elif kind.partition("_")[0] in _EXPECTED:
            text = f"expected {_EXPECTED[kind.partition('_')[0]]} {given}"
            if kind == "string_type" and not isinstance(item["input"], dict | list | None):
                text += "; write it in quotes"
        else:
            text = f"{item['msg'][0].lower()}{item['msg'][1:]} {given}"
        problems.append((path, text))
    return problems


def shown(value: Any) -> str:
    """Return a value of a configuration in few words, as it is written in YAML."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        value = value if len(value) <= 80 else value[:80] + "…"
    if value is None or isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _hint(key: str, valid: Iterable[str]) -> str:
    guess = nearest(key, valid)
    return f"did you mean {guess!r}?" if guess else f"valid keys: {', '.join(sorted(valid))}"


def _valid_keys(section: type[Settings], path: Iterable[str]) -> list[str]:
    """Return the keys of the section at `path` below `section`."""
    found: Any = section
    for key in path:
        is_dict = typing.get_origin(found) is dict
        found = _bare(typing.get_args(found)[1] if is_dict else found.model_fields[key].annotation)
    return list(found.model_fields)


def _bare(annotation: Any) -> Any:
    """Return the Settings class, or the dict of them, that stands in an annotation beside null or metadata."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return next(argument for argument in typing.get_args(annotation) if argument is not types.NoneType)
    return annotation
