"""Read an experiment's configuration: YAML, dotted overrides, and errors a person can act on."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from tmkd_ray.config import DEFAULT_VIEWS, ExperimentConfig
from tmkd_ray.errors import ConfigError
from tmkd_ray.settings import Settings, explain, names_as_mapping, shown

Section = TypeVar("Section", bound=Settings)

_NUMBER_WITH_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_NUMBERS_BEGIN_WITH = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads `3e-4` as a number (YAML 1.1 wants `3.0e-4`) and refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:
            # What PyYAML lets through for `2024-99-99`, `!!int x` and their like.
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{node.value!r} cannot be read as {kind}; for text write it in quotes",
                node.start_mark,
            ) from error

    def refuse_tag(self, node: yaml.Node) -> Any:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"the tag {tag} is not allowed: a configuration holds plain values only",
            node.start_mark,
        )


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER_WITH_EXPONENT, _NUMBERS_BEGIN_WITH)
_Loader.add_constructor(None, _Loader.refuse_tag)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text.

    Raises:
        ConfigError: it is not YAML, has a key twice or a tag; names the source, line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        column = error.position - text.rfind("\n", 0, error.position)
        where, problem = f"line {line + 1}, column {column}", "a character that YAML does not allow"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        where = f"line {mark.line + 1}, column {mark.column + 1}"
        problem = ": ".join(filter(None, [error.context, error.problem]))
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply to be a configuration") from None
    raise ConfigError(f"{source} is not valid YAML: {where}: {problem}")


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML file, apply dotted overrides, and check everything.

    Args:
        path: the YAML file; None starts from nothing, as if it were empty.
        overrides: `training.epochs=20`, values in YAML.

    Raises:
        ConfigError: every error at once, each with its dotted path and, for an unknown key, the nearest.
    """
    return resolve(*read_tree(path, overrides))


def read_tree(path: str | Path | None, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Read a YAML file and apply dotted overrides; return plain values, unchecked, and what to call them.

    A file may begin with `extends: other.yaml`, a path from its own folder: it takes over that file's values,
    which must not extend another one in turn, and says what differs.

    Raises:
        ConfigError: a file cannot be read or is not YAML, or an override is none.
    """
    tree, source = ({}, "the command line (no --config is given)") if path is None else _read_file(Path(path))
    for override in overrides:
        apply_override(tree, override)
    if EXTENDS in tree:
        raise ConfigError(
            f"override {EXTENDS}=…: a file names the one it extends; on the command line give such a file"
        )
    return tree, source


EXTENDS = "extends"
"""The key under which a file names another one whose values it takes over."""


def _read_file(path: Path) -> tuple[dict[str, Any], str]:
    """Return a file's tree over that of the file it extends, if any, and what to call the two."""
    tree = _read_mapping(path, "--config")
    named = tree.pop(EXTENDS, None)
    if named is None:
        return tree, str(path)
    if not isinstance(named, str):
        raise ConfigError(f"{path}: {EXTENDS}: expected the path of one file (given: {shown(named)})")
    base = path.parent / named
    inherited = _read_mapping(base, f"{path}: {EXTENDS}")
    if EXTENDS in inherited:
        raise ConfigError(
            f"{path}: {EXTENDS}: {base} extends a file itself, which is one level too many; "
            "extend that file, or write out what is needed of it"
        )
    source = f"{path} (which extends {base})"
    try:
        return merged(inherited, tree), source
    except ValueError as error:  # the one short form that can be wrong: a list of names
        raise ConfigError(f"{source}: views: {error}") from error


def _read_mapping(path: Path, where: str) -> dict[str, Any]:
    tree = parse_yaml(_read_text(path, where), str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections at the top, not {shown(tree)}")
    return tree


def merged(inherited: dict[str, Any], own: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a new tree with the values of `own`, and those of `inherited` where it says nothing.

    Sections are merged key by key; but one that names something else (another dataset, strategy, objective) is
    replaced as a whole, as the options of the two have nothing in common. So are lists and plain values.

    Args:
        path: of the two within the configuration.
    """
    result = dict(inherited)
    for key, value in own.items():
        where = [*path, str(key)]
        if isinstance(value, dict) and inherited.get(key) is not None:
            below = _long_form(inherited[key], where)
            if isinstance(below, dict) and value.get("name", below.get("name")) == below.get("name"):
                value = merged(below, value, tuple(where))
        result[key] = value
    return result


def _read_text(path: Path, where: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{where}: there is no file {path}") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{where}: {path} is not UTF-8 text: line {line}. Save it as UTF-8") from error


def resolve(tree: dict[str, Any], source: str) -> ExperimentConfig:
    """Check a plain tree of values and return it typed; errors as in `read_config`."""
    return resolve_as(ExperimentConfig, tree, source)


def resolve_as(section: type[Section], tree: dict[str, Any], source: str) -> Section:
    """Check a plain tree of values as a configuration of another kind; errors as in `read_config`."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        problems = explain(error, section)
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        listing = "\n".join(f"  {'.'.join(path)}: {text}" for path, text in problems)
        raise ConfigError(f"{count} in the configuration from {source}:\n{listing}") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted path of a plain tree in place.

    Raises:
        ConfigError: no `=`, an empty path, or a path through something that has no keys.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"override {override!r}: expected dotted.path=value, for example training.epochs=20; "
            "a file goes after --config"
        )
    node = tree
    for depth, key in enumerate(keys[:-1], start=1):
        dotted = ".".join(keys[:depth])
        try:
            section = _long_form(node.get(key), keys[:depth])
        except ValueError as error:
            raise ConfigError(f"override {override!r}: {dotted}: {error}") from error
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {dotted} is {shown(section)}, which has no keys")
        node[key] = dict(section)  # a copy: YAML's aliases make one section appear in several places
        node = node[key]
    node[keys[-1]] = parse_yaml(text, f"override {override!r}")


def _long_form(section: Any, path: list[str]) -> Any:
    """Return a section that may be missing or written short as a mapping."""
    if path == ["views"]:
        return names_as_mapping(list(DEFAULT_VIEWS) if section is None else section)
    if section is None:
        return {}
    takes_name = path in (["dataset"], ["distiller"]) or path[-1] == "strategy" or path[:-1] == ["methods"]
    return {"name": section} if takes_name and isinstance(section, str) else section


def dump_config(config: Settings) -> str:
    """Return the resolved configuration as YAML that `read_config` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
