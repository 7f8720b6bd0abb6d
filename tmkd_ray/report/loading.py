"""Find a finished run's results and analysis in its folder."""

from tmkd_ray import storage
from tmkd_ray.analysis_record import Analysis, analysis_path
from tmkd_ray.errors import UserError
from tmkd_ray.report.sections.base import RunPage
from tmkd_ray.results import RunResults

_STEMS = {"results": "run", "ablation": "ablate"}
"""Names of results files in a run's folder, the first one first, and the commands that write them."""


def load_run(path: str, prefix: str = "") -> RunPage:
    """Read a run.

    Args:
        path: the run's folder, or a results file in it; local or a URI.
        prefix: of its ids on the page.

    Raises:
        UserError: there are no results, or they cannot be read.
    """
    path = storage.absolute(path)
    file = path if path.endswith(".json") else _results_file(path)
    results = RunResults.load(file)
    found = analysis_path(file)
    missing = None
    analysis = None
    if not storage.exists(found):
        missing = f"there is no {found}"
    else:
        analysis = Analysis.load(found)
        if analysis.created != results.created:
            missing = f"{found} is of another run than {file}"
            analysis = None
    if missing is not None:
        folder, _, name = file.rpartition("/")
        parent = folder.rpartition("/")[0]
        command = _STEMS.get(name.removesuffix(".json"), "run")
        missing = (
            f"Not here: {missing}. `tmkd {command} --config {storage.join(folder, 'config.yaml')} "
            f"output={parent}` makes it; what is trained already is kept."
        )
    return RunPage(results, analysis, missing, prefix)


def _results_file(folder: str) -> str:
    if not storage.is_folder(folder):
        raise UserError(
            f"there is no run at {folder}: give the folder that `tmkd run` wrote, such as runs/NAME"
        )
    for stem in _STEMS:
        file = storage.join(folder, f"{stem}.json")
        if storage.exists(file):
            return file
    inside = [name for name in storage.list_names(folder) if storage.is_folder(storage.join(folder, name))]
    runs = [name for name in inside if storage.exists(storage.join(folder, name, "results.json"))]
    if runs:
        advice = f"it holds the runs {', '.join(runs)}: give one of these, as {storage.join(folder, runs[0])}"
    else:
        advice = "give the folder that `tmkd run` wrote, or let an unfinished run end first"
    raise UserError(f"{folder} is no finished run: there is no results.json in it; {advice}")
