"""The page of a sweep: one HTML file, as the report of a run."""

from collections.abc import Iterator

import yaml

from tmkd_ray.report.elements import Markup, data_table, details, element, fact_list, figure, grid, join
from tmkd_ray.report.formatting import MISSING, count, duration, of, percent, percent_with_std
from tmkd_ray.report.importance import MIN_TRIALS, Importance, parameter_importance
from tmkd_ray.report.page import save_page
from tmkd_ray.report.search_figures import (
    accuracy_against_latency,
    accuracy_over_time,
    importance_bars,
    learning_curves,
    parallel_coordinates,
)
from tmkd_ray.trials import Sweep, TrialRecord, short

_MAX_ROWS = 25
"""Trials in the first table; the rest are folded away."""


def write_search_report(path: str, sweep: Sweep) -> None:
    """Write the page: one file that needs nothing else, whole or not at all."""
    sections = list(_sections(sweep))
    record = sweep.record
    created = record.created[:19].replace("T", " ")
    links = (element("a", title, href=f"#{anchor}") for anchor, title, _ in sections)
    header = element(
        "header",
        element("h1", f"Sweep of {record.name}"),
        element("p", f"{record.dataset} · {record.student} · begun {created} UTC", class_="note"),
        element("nav", *links, aria_label="Sections"),
    )
    parts = (element("section", element("h2", title), part, id=anchor) for anchor, title, part in sections)
    body = element("body", header, element("main", *parts))
    save_page(path, f"{record.name} – sweep", body)


def _sections(sweep: Sweep) -> Iterator[tuple[str, str, Markup]]:
    yield "outcome", "Outcome", _outcome(sweep)
    usable = [trial for trial in sweep.with_status("finished", "stopped") if trial.accuracy is not None]
    if usable:
        yield "values", "Values and accuracy", _values(sweep)
        yield "time", "Accuracy over time", _time(sweep)
    if sweep.measures_latency and sweep.pareto_front():
        yield "latency", "Accuracy and latency", _latency(sweep)
    failed = sweep.with_status("failed")
    if failed:
        rows = [(str(t.number), str(t.failures), t.error or MISSING, _values_of(sweep, t)) for t in failed]
        header = ("Trial", "Failures", "Last error", "Values")
        yield "failed", "Failed trials", data_table(header, rows, words=(2, 3))
    yield "setup", "What was searched", _setup(sweep)


def summarise_sweep(sweep: Sweep) -> str:
    """Return in a paragraph what came of a sweep."""
    best = sweep.best()
    record = sweep.record
    sentences = [f"{len(sweep.trials)} of {of(record.num_trials, 'trial')} were begun."]
    if best is None:
        sentences.append("None was trained to an end.")
        return " ".join(sentences)
    sentences.append(
        f"The best is trial {best.number} with {percent(best.accuracy or 0.0)} % validation accuracy "
        f"(epoch {best.best_epoch} of {best.epochs}): {_values_of(sweep, best)}."
    )
    confirmed = sweep.confirmed()
    if confirmed:
        first = confirmed[0]
        sentences.append(
            f"Trained again with {of(len(first.seeds), 'fresh seed')} it reaches "
            f"{percent_with_std(first.mean, first.std)} %; it was chosen by that mean among the best "
            f"{len(confirmed)}."
        )
    else:
        sentences.append(
            "As the best of many, it flatters itself: trained again with other seeds it may reach less "
            "(search.confirm measures it)."
        )
    sentences.append("The test images were not read.")
    return " ".join(sentences)


def _outcome(sweep: Sweep) -> Markup:
    children = [element("p", summarise_sweep(sweep), class_="summary")]
    confirmed = sweep.confirmed()
    if confirmed:
        rows = [
            (
                str(each.trial.number),
                percent_with_std(each.mean, each.std),
                percent(each.trial.accuracy or 0.0),
                " ".join(percent(value) for value in each.accuracies),
                _values_of(sweep, each.trial),
            )
            for each in confirmed
        ]
        titles = ("Trial", "Fresh seeds: mean ± std (%)", "In the sweep (%)", "Each seed (%)", "Values")
        children += [element("h3", "Confirmed with fresh seeds"), data_table(titles, rows, words=(4,))]
    ranked = sweep.ranked()
    header: tuple[str, ...] = ("Trial", "Status", "Epochs", "Validation (%)")
    header += ("Latency (ms)",) if sweep.measures_latency else ()
    header += tuple(sweep.record.parameters)
    if ranked:
        children += [element("h3", "Trials, best first"), _trials(sweep, header, ranked[:_MAX_ROWS])]
    if len(ranked) > _MAX_ROWS:
        children.append(details("The other trials", _trials(sweep, header, ranked[_MAX_ROWS:])))
    note = (
        "Validation: the best epoch's accuracy. Trials that were trained to the end come first; stopped ones "
        "were ended by the scheduler. trials.csv and trials.parquet hold all of them, with all digits."
    )
    children.append(element("p", note, class_="note"))
    return join(children)


def _trials(sweep: Sweep, header: tuple[str, ...], trials: list[TrialRecord]) -> Markup:
    rows = (
        (
            str(trial.number),
            trial.status,
            f"{len(trial.history)}/{trial.epochs}",
            percent(trial.accuracy or 0.0),
            *((_milliseconds(trial.latency_ms),) if sweep.measures_latency else ()),
            *(short(trial.parameters.get(path)) for path in sweep.record.parameters),
        )
        for trial in trials
    )
    return data_table(header, rows, words=(1,))


def _values(sweep: Sweep) -> Markup:
    caption = "A line is a trial: its values and its accuracy. The stronger, the better; vermillion: the best."
    children = [element("div", figure(parallel_coordinates(sweep), caption), class_="scroll full")]
    importance = parameter_importance(sweep)
    if importance is None:
        text = f"The importance of the parameters is shown from {MIN_TRIALS} finished trials on."
        children.append(element("p", text, class_="note"))
    elif importance.explained <= 0:
        children.append(element("p", _unexplained(importance), class_="note"))
    else:
        children.append(grid(figure(importance_bars(importance), _importance_caption(importance))))
    return join(children)


def _importance_caption(importance: Importance) -> str:
    return (
        "Permutation importance in a random forest of 300 trees, fitted to "
        f"{of(importance.num_trials, 'trial')} (Breiman 2001): how much worse it predicts the accuracy with "
        "that parameter shuffled. On trials "
        f"that a tree has not seen, the forest explains {100 * importance.explained:.0f} % of the variance."
    )


def _unexplained(importance: Importance) -> str:
    return (
        f"A random forest fitted to the {of(importance.num_trials, 'trial')} does not predict the accuracy of "
        "trials it has not seen, so no importance is shown: it takes more trials, or the values matter little."
    )


def _time(sweep: Sweep) -> Markup:
    return grid(
        figure(accuracy_over_time(sweep), "Each trial when it ended, by its best epoch."),
        figure(learning_curves(sweep), "Every trial by epoch. Vermillion: the best."),
    )


def _latency(sweep: Sweep) -> Markup:
    front = sweep.pareto_front()
    rows = [
        (str(t.number), percent(t.accuracy or 0.0), _milliseconds(t.latency_ms), _values_of(sweep, t))
        for t in front
    ]
    caption = "One image at a time, median of 50 passes, measured before the trials began. Squares: the front."
    return join(
        [
            grid(figure(accuracy_against_latency(sweep), caption)),
            data_table(("Trial", "Validation (%)", "Latency (ms)", "Values"), rows, words=(3,)),
        ]
    )


def _setup(sweep: Sweep) -> Markup:
    record = sweep.record
    rows = [
        (path, kind, ", ".join(short(value) for value in values) if isinstance(values, list) else short(values))
        for path, distribution in record.parameters.items()
        for kind, values in distribution.items()
    ]
    seconds = sum(trial.seconds for trial in [*sweep.trials, *sweep.confirmations])
    facts = [
        ("Searcher", record.searcher),
        ("Scheduler", record.scheduler),
        ("Objectives", ", ".join(record.objectives)),
        ("Epochs of a trial", count(record.epochs)),
        ("Training time, all trials", duration(seconds)),
        ("Forward passes of teachers in the trials", count(sweep.teacher_passes)),
        ("Folder", record.folder),
    ]
    text = yaml.safe_dump(record.config, allow_unicode=True, sort_keys=True)
    return join(
        [
            data_table(("Parameter", "Distribution", "Values"), rows, words=(0, 1, 2)),
            fact_list(facts),
            details("The resolved configuration", element("pre", element("code", text))),
            details("Versions", fact_list(record.versions.items())),
        ]
    )


def _values_of(sweep: Sweep, trial: TrialRecord) -> str:
    return ", ".join(f"{path} = {short(trial.parameters.get(path))}" for path in sweep.record.parameters)


def _milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"
