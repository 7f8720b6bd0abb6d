"""`tmkd views`: what each prior does to one's own images, before a run is paid for."""

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tmkd_ray.commands.base import COMMANDS, Command
from tmkd_ray.config_reading import parse_yaml, read_config
from tmkd_ray.errors import UnreadableImageError, UserError
from tmkd_ray.registry import nearest

if TYPE_CHECKING:
    import numpy as np

    from tmkd_ray.datasets import DatasetConfig
    from tmkd_ray.report.panels import PanelRow
    from tmkd_ray.views.base import ViewConfig

LEAST_PIXELS = 8
MOST_PIXELS = 224
"""Larger images are shown at this size, unless another is asked for."""
MAX_PANELS = 2000
"""More cannot be looked at in one picture."""


@dataclass
class ViewSweep:
    """The values that the options of one view are swept over, in the order given."""

    view: str
    values: dict[str, list[Any]] = field(default_factory=dict)


@COMMANDS.register("views")
class Views(Command):
    description = "draw what each view does to your images, its options swept in a grid by choice"
    open_end = "what"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "what",
            nargs="+",
            metavar="IMAGE_OR_FOLDER_OR_CONFIG",
            help="images, folders of them, one folder of Parquet shards, or one configuration (.yaml) and its "
            "overrides (path=value): its images, its views",
        )
        parser.add_argument("--out", default="gallery.png", metavar="FILE", help="a .png; default: gallery.png")
        parser.add_argument(
            "--grid",
            action="append",
            default=[],
            metavar="VIEW.OPTION=VALUE,VALUE",
            help="sweep an option, as edge.strength=0.1,0.2,0.4; again for more, of one view or several",
        )
        parser.add_argument("--num", type=int, default=6, help="images at most; default: 6")
        parser.add_argument(
            "--size",
            type=int,
            help="of the images in pixels, as dataset.image_size; default: the config's, else the images' "
            f"own up to {MOST_PIXELS}",
        )

    def __call__(self, options: argparse.Namespace) -> int:
        from tmkd_ray import storage
        from tmkd_ray.report.panels import panels_png
        from tmkd_ray.views import VIEWS

        if options.num < 1:
            raise UserError(f"--num is at least 1, not {options.num}")
        if options.size is not None and options.size < LEAST_PIXELS:
            raise UserError(f"--size is at least {LEAST_PIXELS} pixels, not {options.size}")
        if not options.out.endswith(".png"):
            raise UserError(f"--out {options.out}: the picture is a PNG; let its name end in .png")
        sweeps = read_grid(options.grid)
        configs = {name: VIEWS.get(name).Config.model_validate({}) for name in _default_views()}
        if options.what[0].endswith((".yaml", ".yml")):
            path, *overrides = options.what
            if any("=" not in override for override in overrides):
                raise UserError("give one configuration and overrides (path=value), or images and folders")
            config = read_config(path, overrides)
            configs = dict(config.views)
            images, labels = _dataset_images(config.dataset, options.num, options.size)
        elif (shards := _parquet(options.what)) is not None:
            images, labels = _dataset_images(shards, options.num, options.size or _own_size(shards))
        else:
            images, labels = _files(options.what, options.num, options.size)
        rows = gallery_rows(images, labels, configs, sweeps)
        content = panels_png(rows)
        storage.write_bytes(storage.absolute(options.out), content)
        panels = sum(len(row.panels) for row in rows)
        print(f"{options.out}: {len(images)} images of {images.shape[1]} pixels, {panels} panels")
        return 0


def _default_views() -> tuple[str, ...]:
    from tmkd_ray.config import DEFAULT_VIEWS

    return DEFAULT_VIEWS


def read_grid(entries: Sequence[str]) -> list[ViewSweep]:
    """Read `VIEW.OPTION=VALUE,VALUE` entries, one sweep a view.

    Raises:
        UserError: an entry has another form, or names an unknown view or option.
    """
    from tmkd_ray.views import VIEWS

    sweeps: dict[str, ViewSweep] = {}
    for entry in entries:
        path, equals, text = entry.partition("=")
        name, dot, option = path.strip().partition(".")
        values = [value.strip() for value in text.split(",")]
        if not equals or not dot or not all(values):
            raise UserError(f"--grid {entry}: expected VIEW.OPTION=VALUE,VALUE, as edge.strength=0.1,0.2,0.4")
        known = [field for field in VIEWS.get(name).Config.model_fields if field != "prompts"]
        if option not in known:
            guess = nearest(option, known)
            hint = f"did you mean {guess!r}?" if guess else f"its options: {', '.join(known) or 'none'}"
            raise UserError(f"--grid {entry}: {name} has no option {option!r} that changes pixels; {hint}")
        sweep = sweeps.setdefault(name, ViewSweep(name))
        if option in sweep.values:
            raise UserError(f"--grid {entry}: {path.strip()} is swept twice; give all its values at once")
        sweep.values[option] = [parse_yaml(value, f"--grid {entry}") for value in values]
    return list(sweeps.values())


def gallery_rows(
    images_NHWC: "np.ndarray",
    labels: Sequence[str],
    configs: "dict[str, ViewConfig]",
    sweeps: Sequence[ViewSweep],
) -> "list[PanelRow]":
    """Return the rows of the gallery: without sweeps one an image, its views side by side.

    With sweeps, an image has a row for each combination of all swept options of a view but the last; the last
    one runs along the row, the original before it.

    Raises:
        UserError: a swept value does not suit its option, or there are too many panels.
    """
    from tmkd_ray.report.panels import Panel, PanelRow
    from tmkd_ray.views import build_view

    if not sweeps:
        lines = [[(_title(name, config), build_view(name, config)) for name, config in configs.items()]]
    else:
        original = ("original", build_view("original", {}))
        lines = [
            [original, *((title, build_view(sweep.view, config)) for title, config in line)]
            for sweep in sweeps
            for line in _swept(sweep, configs.get(sweep.view))
        ]
    panels = len(images_NHWC) * sum(len(line) for line in lines)
    if panels > MAX_PANELS:
        raise UserError(
            f"{panels:,} panels; at most {MAX_PANELS:,} fit a picture. Sweep fewer values, or --num less"
        )
    rows = []
    for image, label in zip(images_NHWC, labels, strict=True):
        for line in lines:
            shown: list[Panel] = [Panel(title, view(image[None])[0]) for title, view in line]
            rows.append(PanelRow(label, shown))
    return rows


def _title(name: str, config: "ViewConfig") -> str:
    """Return a view's name, and below it the options that are not its defaults."""
    usual = type(config).model_validate({})
    options = config.model_dump(exclude={"prompts"})
    changed = [f"{option}={value}" for option, value in options.items() if value != getattr(usual, option)]
    return "\n".join([name, *changed])


def _swept(sweep: ViewSweep, base: "ViewConfig | None") -> "Iterator[list[tuple[str, ViewConfig]]]":
    """Yield the lines of a sweep, each (title, configuration) along the last option."""
    from pydantic import ValidationError

    from tmkd_ray.settings import explain
    from tmkd_ray.views import VIEWS

    section = VIEWS.get(sweep.view).Config
    fixed = {} if base is None else base.model_dump()
    *outer, last = sweep.values
    for chosen in itertools.product(*(sweep.values[option] for option in outer)):
        line = []
        for value in sweep.values[last]:
            options = dict(zip([*outer, last], [*chosen, value], strict=True))
            title = "\n".join([sweep.view, *(f"{option}={each}" for option, each in options.items())])
            try:
                line.append((title, section.model_validate({**fixed, **options})))
            except ValidationError as error:
                problems = "; ".join(": ".join([*path, text]) for path, text in explain(error, section))
                given = ", ".join(f"{option}={each}" for option, each in options.items())
                raise UserError(f"--grid: {sweep.view} with {given}: {problems}") from error
        yield line


def _files(paths: Sequence[str], num: int, size: int | None) -> "tuple[np.ndarray, list[str]]":
    import numpy as np

    from tmkd_ray import storage
    from tmkd_ray.export.images import list_images, read_images

    files = list_images(paths)
    chosen = np.unique(np.linspace(0, len(files) - 1, min(num, len(files))).astype(int))
    chosen_files = [files[index] for index in chosen]
    read = read_images(chosen_files, size or _shown_size(map(storage.read_bytes, chosen_files)))
    for entry in read.set_aside:
        print(f"{entry.id}: cannot be decoded: {entry.reason}", file=sys.stderr)
    return read.images, [_short_path(path, paths) for path in read.paths]


def _short_path(path: str, given: Sequence[str]) -> str:
    """Return a file's name, with its folder's, mostly a class's, if only a folder above that was named."""
    from tmkd_ray import storage

    folder, name = os.path.split(path)
    named = {storage.absolute(each).rstrip("/") for each in given}
    return name if path in named or folder in named else f"{os.path.basename(folder)}/{name}"


def _shown_size(contents: "Iterable[bytes | np.ndarray | UnreadableImageError]") -> int:
    """Return the shortest side of these images, within what can be shown; what is no image does not count."""
    from tmkd_ray.datasets.decode import to_rgb

    sides = [MOST_PIXELS]
    for content in contents:
        if isinstance(content, UnreadableImageError):
            continue
        with contextlib.suppress(UnreadableImageError):
            sides.append(min(to_rgb(content).shape[:2]))
    return max(LEAST_PIXELS, min(sides))


def _parquet(paths: Sequence[str]) -> "DatasetConfig | None":
    """Return the dataset in a lone folder of Parquet shards."""
    from tmkd_ray import storage
    from tmkd_ray.datasets import DATASETS

    folder = storage.absolute(paths[0])
    if len(paths) > 1 or not storage.is_folder(folder):
        return None
    names = storage.list_names(folder) + storage.list_names(storage.join(folder, "data"))
    if not any(name.endswith(".parquet") for name in names):
        return None
    return DATASETS.get("parquet").Config.model_validate({"name": "parquet", "path": folder})


def _own_size(config: "DatasetConfig") -> int:
    """Return the size of a dataset's first images."""
    import numpy as np

    from tmkd_ray.datasets import build_dataset

    dataset = build_dataset(config)
    index = dataset.index("train")
    return _shown_size(dataset.read("train", index.take(np.arange(min(8, len(index))))))


def _dataset_images(config: "DatasetConfig", num: int, size: int | None) -> "tuple[np.ndarray, list[str]]":
    """Return training images of as many classes as possible, and their classes' names."""
    import numpy as np

    from tmkd_ray.datasets import build_dataset
    from tmkd_ray.datasets.decode import load_images

    dataset = build_dataset(config if size is None else config.model_copy(update={"image_size": size}))
    index = dataset.index("train")
    _, first = np.unique(index.labels, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(num, len(first))).astype(int)]
    rest = np.setdiff1d(np.arange(len(index)), chosen)[: num - len(chosen)]
    loaded = load_images(dataset, "train", index.take(np.concatenate([chosen, rest])))
    return loaded.images, [dataset.class_names[label] for label in loaded.labels]
