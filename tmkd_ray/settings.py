"""The base of every configuration section."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from tmkd_ray.registry import Registry

ImageStatistics = tuple[float, float, float]
"""Per-channel value of RGB in [0, 1]."""


class Settings(BaseModel):
    """A frozen, typed section of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic reads `true` as 1, which in a config file is always a mistake.
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (
            int,
            float,
            int | None,
            float | None,
        ):
            raise ValueError(f"expected a number, not {str(value).lower()}")
        return value


Precision = Literal["float32", "bfloat16", "float16"]
"""Of the arithmetic: anything but float32 means autocast."""


class NestedError(ValueError):
    """Errors inside a section whose class is chosen by name: (path within the section, class, errors)."""

    def __init__(self, parts: list[tuple[tuple[str, ...], type[Settings], ValidationError]]) -> None:
        super().__init__("; ".join(str(error) for _, _, error in parts))
        self.parts = parts


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
        raise ValueError(f"expected a name or a mapping with `name`, not {value!r}")
    name = value.get("name", default)
    if name is None:
        raise ValueError(f"`name` is missing. Choices: {', '.join(registry.names())}")
    section: type[Settings] = registry.get(str(name)).Config
    try:
        return section.model_validate({**value, "name": name})
    except ValidationError as error:
        raise NestedError([((), section, error)]) from error


def resolve_each(values: dict[str, Any], registry: Registry[Any]) -> dict[str, Any]:
    """Turn `{name: options}` into each named entry's own Config; options null leaves the entry out.

    Raises:
        ValueError: no entry has a name, or the options of any are wrong (all of them are reported).
    """
    sections: dict[str, Any] = {}
    errors: list[tuple[tuple[str, ...], type[Settings], ValidationError]] = []
    for name, options in values.items():
        section: type[Settings] = registry.get(name).Config
        if options is None:
            continue
        try:
            sections[name] = section.model_validate(options)
        except ValidationError as error:
            errors.append(((name,), section, error))
    if errors:
        raise NestedError(errors)
    return sections
