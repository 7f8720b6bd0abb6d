"""The reference of the configuration, as Markdown: made from the typed tree, so that it cannot drift."""

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic_core import PydanticUndefined

from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config.search import Bounds, Distribution, Steps
from tmkd_ray.config.transfer import TRANSFERS, DenseTrainingConfig, TransferConfig
from tmkd_ray.datasets import DATASETS
from tmkd_ray.distillers import STRATEGIES, Strategy
from tmkd_ray.models import MODELS
from tmkd_ray.objective import PRESETS
from tmkd_ray.pretraining import PRETRAINERS
from tmkd_ray.settings import Settings
from tmkd_ray.views import VIEWS

_BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


def config_reference() -> str:
    """Return the page: every section with its keys, types, defaults and descriptions."""
    lines = [
        "# Configuration reference",
        "",
        "One YAML file for each experiment; any key can be set on the command line by its dotted path, as in",
        "`training.epochs=20`. Unknown keys and wrong values are reported all at once. `tmkd config show`",
        "prints a configuration with every default filled in. `tmkd config reference` generated this page.",
        "",
    ]
    first: dict[type, str] = {}
    for path, section in _sections("", ExperimentConfig, set()):
        if section in first:
            lines += [f"## `{path}`", "", f"The same keys as {first[section]}.", ""]
            continue
        first[section] = f"[`{path}`](#{path.replace('.', '')})"
        lines += _section(path or "The top level", section)
        lines += _additions(path)
    named: tuple[tuple[str, str, Any], ...] = (
        ("Datasets", "`dataset: {name: NAME, …}`", DATASETS),
        ("Views", "`views: {NAME: {…}, …}`", VIEWS),
        ("Strategies", "`distiller.strategy: {name: NAME, …}`", STRATEGIES),
        ("Pre-training without labels", "`distiller: {name: NAME, …}`", PRETRAINERS),
    )
    for title, usage, registry in named:
        lines += [f"## {title}", "", f"{usage}, with these options.", ""]
        for name in registry.names():
            entry = registry.get(name)
            lines += [f"### {name}", "", _first_paragraph(entry), ""]
            told = _documented(entry.Config) if "__doc__" in vars(entry.Config) else ""
            lines += [told, ""] if told else []
            lines += _reading(entry)
            lines += _table(entry.Config, without=("name",))
    lines += [
        "## Models",
        "",
        "`teacher.visual.model` and `student.model`: `torchvision/NAME`, `transformers/NAME_OR_FOLDER`, or",
    ]
    lines += [f"one of the CIFAR zoo: {', '.join(f'`{name}`' for name in MODELS.names())}.", ""]
    lines += _transfers()
    return "\n".join(lines).rstrip() + "\n"


def _reading(entry: Any) -> list[str]:
    """Return what a strategy reads of the teacher, which decides the modes that it runs in."""
    if not isinstance(entry, type) or not issubclass(entry, Strategy):
        return []
    if not entry.requires:
        return ["Needs no teacher.", ""]
    needed = ", ".join(f"`{name}`" for name in sorted(entry.requires))
    online = "; needs `knowledge.mode: online`" if any("maps" in name for name in entry.requires) else ""
    return [f"Reads the teacher's {needed}{online}.", ""]


def _additions(path: str) -> list[str]:
    """Return what a section's table cannot say: presets and distributions."""
    if path == "distiller":
        keys = list(dict.fromkeys(key for preset in PRESETS.values() for key in preset))
        rows = [
            f"| `{name}` | "
            + " | ".join(f"`{json.dumps(preset[key])}`" if key in preset else "" for key in keys)
            + " |"
            for name, preset in PRESETS.items()
        ]
        header = [f"| name | {' | '.join(f'`{key}`' for key in keys)} |", "|---|" + "---|" * len(keys)]
        return ["What the names set; `0.0` elsewhere:", "", *header, *rows, ""]
    if path == "search":
        forms = {
            Bounds: "`[low, high]`",
            Steps: "`[low, high, step]`",
            tuple[int, int]: "`[low, high]`, whole numbers",
        }
        rows = []
        for name, field in Distribution.model_fields.items():
            form = next(
                (forms[part] for part in _alternatives(field.annotation) if part in forms), "`[value, …]`"
            )
            rows.append(f"| `{name}` | {form} |")
        table = ["| distribution | given as |", "|---|---|", *rows, ""]
        return ["## `search.parameters`", "", _documented(Distribution), "", *table]
    return []


def _transfers() -> list[str]:
    common = tuple(TransferConfig.model_fields)
    lines = [
        "## Downstream tasks",
        "",
        "`tmkd transfer TASK key=value …`, or a YAML file of these keys. The options `--student`, `--model`,",
        "`--baseline` and `--data` set the keys of their names; for zero-shot, knn and linear `--data` sets",
        "`dataset.path`. All tasks take:",
        "",
        *_table(TransferConfig),
    ]
    for task in TRANSFERS.names():
        section = TRANSFERS.get(task)
        lines += [f"### {task}", "", _documented(section), "", *_table(section, without=common)]
    lines += ["### `training` of detect and segment", "", _documented(DenseTrainingConfig), ""]
    return lines + _table(DenseTrainingConfig)


def _sections(path: str, section: type[Settings], seen: set[type]) -> Iterator[tuple[str, type[Settings]]]:
    yield path, section
    for name, field in section.model_fields.items():
        inner = _settings_of(field.annotation)
        if inner is not None and inner not in seen and inner.model_fields:
            yield from _sections(f"{path}.{name}".lstrip("."), inner, seen | {inner})


def _settings_of(annotation: Any) -> type[Settings] | None:
    """Return the section's class that an annotation admits, if it is one; dicts and registries have none."""
    for part in _alternatives(annotation):
        if isinstance(part, type) and issubclass(part, Settings):
            return part
    return None


def _section(path: str, section: type[Settings]) -> list[str]:
    title = path if " " in path else f"`{path}`"
    return [f"## {title}", "", _documented(section), "", *_table(section)]


def _table(section: type[Settings], without: tuple[str, ...] = ()) -> list[str]:
    rows = []
    notes = _attribute_notes(section)
    for name, field in section.model_fields.items():
        if name in without:
            continue
        bounds = [
            f"{sign} {getattr(item, key):g}"
            for item in field.metadata
            for key, sign in _BOUNDS
            if isinstance(getattr(item, key, None), int | float)
        ]
        kind = ", ".join([_kind(field.annotation), *bounds])
        cells = (f"`{name}`", kind, _default(field), field.description or notes.get(name, ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    if not rows:
        return ["No options.", ""]
    return ["| key | value | default | |", "|---|---|---|---|", *rows, ""]


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = (
        field.get_default(call_default_factory=True) if field.default is PydanticUndefined else field.default
    )
    if isinstance(value, Settings):
        return "its own"
    if isinstance(value, dict) and any(isinstance(item, Settings) for item in value.values()):
        return f"`{', '.join(value)}`"
    return f"`{json.dumps(value, default=str, ensure_ascii=False)}`"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, without null and metadata."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(
            part
            for argument in typing.get_args(annotation)
            if argument is not types.NoneType
            for part in _alternatives(argument)
        )
    return (annotation,)


_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def _kind(annotation: Any) -> str:
    """Return a type in words."""
    words = []
    for part in _alternatives(annotation):
        origin = typing.get_origin(part)
        if origin is Literal:
            words.append(" / ".join(f"`{value}`" for value in typing.get_args(part)))
        elif origin is tuple:
            words.append(f"list of {_kind(typing.get_args(part)[0])}")
        elif origin in (dict, list):
            words.append("mapping" if origin is dict else f"list of {_kind(typing.get_args(part)[0])}")
        elif isinstance(part, type) and issubclass(part, Settings):
            words.append("section")
        else:
            words.append(_WORDS.get(part, "value"))
    if types.NoneType in typing.get_args(annotation):
        words.append("null")
    return " or ".join(dict.fromkeys(words))


def _documented(section: type[Settings]) -> str:
    """Return a class's docstring without what only code is told."""
    text = inspect.cleandoc(section.__doc__ or "")
    return text.partition("\n\nAttributes:")[0].partition("\nAttributes:")[0].strip()


def _attribute_notes(section: type[Settings]) -> dict[str, str]:
    """Return what the docstrings of a class and those it extends say of each attribute."""
    notes: dict[str, str] = {}
    for base in reversed(section.__mro__):
        _, found, listing = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        if found and issubclass(base, Settings):
            for entry in re.split(r"\n(?= {4}\S)", listing.split("\n\n")[0]):
                name, _, text = entry.strip().partition(": ")
                notes[name] = " ".join(text.split()).removesuffix(".")
    return notes


def _first_paragraph(entry: Any) -> str:
    text = inspect.cleandoc(entry.__doc__ or "")
    return text.split("\n\n")[0].replace("\n", " ")
