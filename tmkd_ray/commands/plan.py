"""`tmkd plan`: what a run would take on a cluster."""

import argparse

from tmkd_ray.commands.base import COMMANDS, Command, add_config_arguments
from tmkd_ray.config_reading import read_config
from tmkd_ray.errors import UserError


@COMMANDS.register("plan")
class PlanCommand(Command):
    description = "estimate images/s, hours, bytes and dollars of a run on a cluster; starts nothing"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_config_arguments(parser)
        parser.add_argument(
            "--nodes", required=True, metavar="views=N,teacher=N,train=N", help="number of nodes of each kind"
        )
        parser.add_argument(
            "--images", type=int, metavar="N", help="training images; else the dataset's are counted"
        )
        parser.add_argument(
            "--classes", type=int, metavar="N", help="their classes; with --images 1000, if not given"
        )
        parser.add_argument(
            "--constants",
            metavar="FILE",
            help="your own, by `python benchmarks/plan_constants.py --output FILE`, in which GPUs, machines "
            "and prices are to be put in by hand; else those that come with the package, once measured",
        )

    def __call__(self, options: argparse.Namespace) -> int:
        from tmkd_ray.datasets import build_dataset
        from tmkd_ray.planning import format_plan, make_plan, read_constants, read_nodes

        config = read_config(options.config, options.overrides)
        nodes, constants = read_nodes(options.nodes), read_constants(options.constants)
        images, classes = options.images, options.classes or 1000
        if images is None:
            dataset = build_dataset(config.dataset)
            images, classes = len(dataset.index("train")), len(dataset.class_names)
        if images < 1 or classes < 1:
            raise UserError("--images, --classes: at least 1")
        plan = make_plan(config, nodes, images, classes, constants)
        print(format_plan(plan, images, constants, options.constants or "the package"))
        return 0
