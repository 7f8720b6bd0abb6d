"""`tmkd report`: one page of one run, or of several side by side."""

import argparse

from tmkd_ray.commands.base import COMMANDS, Command


@COMMANDS.register("report")
class Report(Command):
    description = "one self-contained HTML page of finished runs, side by side where there are several"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "runs", nargs="+", metavar="RUN", help="a run's folder, as runs/NAME; or a results file"
        )
        parser.add_argument(
            "--out", metavar="FILE", help="default: report.html in the run's folder; of several runs, here"
        )

    def __call__(self, options: argparse.Namespace) -> int:
        from tmkd_ray import storage
        from tmkd_ray.report.html import write_page
        from tmkd_ray.report.loading import load_run

        pages = [load_run(run) for run in options.runs]
        out = options.out
        if out is None:
            first = options.runs[0]
            folder = first.rstrip("/") if not first.endswith(".json") else first.rpartition("/")[0] or "."
            out = "report.html" if len(pages) > 1 else storage.join(folder, "report.html")
        out = storage.absolute(out)
        write_page(out, pages)
        print(out)
        for run, page in zip(options.runs, pages, strict=True):
            if page.missing is not None:
                print(f"{run}: {page.missing}")
        return 0
