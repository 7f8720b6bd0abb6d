"""Read an experiment's configuration: YAML, dotted overrides, and errors a person can act on."""

import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tmkd_ray.config import DEFAULT_VIEWS, ExperimentConfig
from tmkd_ray.errors import ConfigError
from tmkd_ray.registry import nearest
from tmkd_ray.settings import NestedError, Settings


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads `3e-4` as a number (YAML 1.1 wants `3.0e-4`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text.

    Raises:
        ConfigError: it is not YAML; names the source, line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML file, apply dotted overrides, and check everything.

    Args:
        path: the YAML file; None starts from nothing, as if it were empty.
        overrides: `training.epochs=20`, values in YAML.

    Raises:
        ConfigError: every error at once, each with its dotted path and, for an unknown key, the nearest.
    """
    source = "the command line" if path is None else str(path)
    tree: Any = {}
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(f"--config: no file {path}")
        tree = parse_yaml(Path(path).read_text(), str(path))
        tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a mapping of sections at the top, found {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return resolve(tree, source)


def resolve(tree: dict[str, Any], source: str) -> ExperimentConfig:
    """Check a plain tree of values and return it typed; errors as in `read_config`."""
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        lines = explain(error, ExperimentConfig)
        count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
        listing = "\n".join(f"  {line}" for line in lines)
        raise ConfigError(f"{count} in the configuration from {source}:\n{listing}") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted path of a plain tree in place.

    Raises:
        ConfigError: no `=`, an empty path, or a path through something that has no keys.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected dotted.path=value, for example training.epochs=20")
    if keys[0] == "views" and len(keys) > 1:
        tree.setdefault("views", list(DEFAULT_VIEWS))
    node = tree
    for depth, key in enumerate(keys[:-1]):
        child = node.get(key)
        # Sections may be written short: a name, or a list of names.
        if child is None:
            child = {}
        elif isinstance(child, str):
            child = {"name": child}
        elif isinstance(child, list):
            child = {str(name): {} for name in child}
        elif not isinstance(child, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(keys[: depth + 1])} is {child!r}, not a section"
            )
        node[key] = child
        node = child
    node[keys[-1]] = parse_yaml(text, f"override {override!r}")


def explain(error: ValidationError, section: type[Settings], prefix: tuple[str, ...] = ()) -> list[str]:
    """Return one line per error: dotted path, what is wrong, and the nearest valid key if one is unknown."""
    lines = []
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"])
        dotted = ".".join(prefix + path) or "(top)"
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, NestedError):
            for inner_path, inner_section, inner_error in cause.parts:
                lines += explain(inner_error, inner_section, prefix + path + inner_path)
        elif item["type"] == "extra_forbidden":
            valid = _keys(section, path[:-1])
            guess = nearest(path[-1], valid)
            hint = f"did you mean {guess!r}?" if guess else f"valid keys: {', '.join(sorted(valid))}"
            lines.append(f"{dotted}: unknown key; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{dotted}: required, but not given")
        elif cause is not None:
            lines.append(f"{dotted}: {cause}" if path or prefix else str(cause))
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"{dotted}: {message} (given: {item['input']!r})")
    return lines


def _keys(section: type[Settings], path: Iterable[str]) -> list[str]:
    for key in path:
        inner = _section_of(section.model_fields[key].annotation)
        assert inner is not None, f"an unknown key below {key}, which is not a section"
        section = inner
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[Settings] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            found = _section_of(argument)
            if found is not None:
                return found
    return None


def dump_config(config: ExperimentConfig) -> str:
    """Return the resolved configuration as YAML that `read_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
