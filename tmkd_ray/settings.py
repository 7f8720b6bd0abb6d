"""The base of every configuration section."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

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
