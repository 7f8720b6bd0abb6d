"""`tmkd transfer TASK`: what a trained student is worth on other tasks."""

import argparse
from typing import Any

from tmkd_ray.commands.base import COMMANDS, Command
from tmkd_ray.config.transfer import TRANSFERS, ClassificationConfig
from tmkd_ray.config_reading import read_tree, resolve_as

DESCRIPTIONS = {
    "zero-shot": "classify by class names alone, in CLIP's embedding space",
    "knn": "weighted nearest neighbours on frozen features",
    "linear": "a linear classifier on frozen features, for parts of the labels",
    "detect": "object detection on COCO-format data, the student as backbone",
    "segment": "semantic segmentation, the student as backbone",
}


@COMMANDS.register("transfer")
class Transfer(Command):
    description = "carry a trained student to a downstream task, beside random and given weights; one table"
    computes = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        tasks = parser.add_subparsers(title="tasks", metavar="TASK", required=True)
        for task in TRANSFERS:
            sub = tasks.add_parser(task, help=DESCRIPTIONS[task], description=DESCRIPTIONS[task])
            sub.add_argument(
                "--student",
                metavar="PATH",
                help="the student's folder, its checkpoint, or a run that trained one",
            )
            sub.add_argument("--model", metavar="NAME", help="its architecture, where no run beside it says so")
            sub.add_argument("--data", metavar="PATH", help="the data's folder")
            sub.add_argument(
                "--baseline", metavar="PATH", help="other weights of the same model to compare with"
            )
            sub.add_argument("--config", metavar="FILE", help="a YAML file of the task's settings")
            sub.add_argument(
                "overrides", nargs="*", metavar="path=value", help="override, as training.epochs=20"
            )
            sub.set_defaults(task=task)

    def __call__(self, options: argparse.Namespace) -> int:
        from tmkd_ray.stages.transfer import transfer

        section = TRANSFERS.get(options.task)
        tree, source = read_tree(options.config, options.overrides)
        for name in ("student", "model", "baseline"):
            if getattr(options, name) is not None:
                tree[name] = getattr(options, name)
        if options.data is not None and issubclass(section, ClassificationConfig):
            tree["dataset"] = _dataset_at(options.data, tree.get("dataset"))
        elif options.data is not None:
            tree["data"] = options.data
        print(transfer(resolve_as(section, tree, source)).markdown(), end="")
        return 0


def _dataset_at(path: str, given: Any) -> Any:
    """Return the dataset section of a folder: Parquet shards, else a folder for each class."""
    from tmkd_ray import storage

    section = {"name": given} if isinstance(given, str) else dict(given or {})
    if "name" not in section:
        names = storage.list_names(path) + storage.list_names(storage.join(path, "data"))
        section["name"] = "parquet" if any(name.endswith(".parquet") for name in names) else "image_folder"
    return section | {"path": path}
