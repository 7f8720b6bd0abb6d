"""What a student learns from: TMKD's terms (`objective`), or a label-free pre-training (`pretraining`)."""

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from tmkd_ray.objective import PRESETS, DistillerConfig
from tmkd_ray.pretraining import PRETRAINERS, PretrainingConfig
from tmkd_ray.settings import SectionError, explain, resolve_named, shown

ObjectiveConfig = DistillerConfig | PretrainingConfig
"""Either family; `name` says which: `alone`, `kd`, `tmkd`, or a pre-trainer's."""


def resolve_objective(value: Any) -> ObjectiveConfig:
    """Turn a name, or a mapping with options, into the Config of its family.

    Raises:
        ValueError: nothing has this name, or the options are wrong.
    """
    if isinstance(value, DistillerConfig | PretrainingConfig):
        return value
    name = value.get("name") if isinstance(value, dict) else value
    if isinstance(name, str) and name in PRETRAINERS:
        config: PretrainingConfig = resolve_named(value, PRETRAINERS)
        return config
    problems: list[tuple[tuple[str, ...], str]] = []
    try:
        return DistillerConfig.model_validate(value)
    except ValidationError as error:
        problems = explain(error, DistillerConfig)
    if isinstance(name, str) and name not in PRESETS:
        *first, last = (f"'{choice}'" for choice in sorted([*PRESETS, *PRETRAINERS]))
        text = f"expected {', '.join(first)} or {last} (given: {shown(name)})"
        problems = [(path, text if path == ("name",) else problem) for path, problem in problems]
    raise SectionError(problems)


AnyObjective = Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(resolve_objective)]
"""The type of a field that takes either family."""
