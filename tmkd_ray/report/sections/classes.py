"""The sections on classes: accuracy of each, what is taken for what, and how sure the networks are."""

import statistics
from collections.abc import Sequence

import numpy as np

from tmkd_ray.analysis_record import NetworkFindings
from tmkd_ray.report import network_figures
from tmkd_ray.report.elements import Markup, data_table, details, element, figure, grid, join
from tmkd_ray.report.figures import MAX_CLASSES, NUM_EXTREME_CLASSES
from tmkd_ray.report.formatting import MISSING, of, percent, signed
from tmkd_ray.report.sections.base import RunPage
from tmkd_ray.results import MethodRecord

_MAX_PAIRS = 15
_MAX_NETWORKS = 6
"""So many matrices and diagrams are drawn: the teacher's and those of the first methods."""

Accuracies = Sequence[float | None]


def _method_accuracy(method: MethodRecord) -> list[float | None] | None:
    """The mean over the seeds, by class; None where one did not measure it."""
    per_seed = [run.per_class_accuracy for run in method.runs if run.per_class_accuracy is not None]
    if len(per_seed) < len(method.runs):
        return None

    def mean(values: tuple[float | None, ...]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    return [mean(values) for values in zip(*per_seed, strict=True)]


def _minus(ours: Accuracies, theirs: Accuracies) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(ours, theirs, strict=True)]


def classes_section(page: RunPage) -> Markup | None:
    """Accuracy of each class: teacher, students, difference; None where it was not measured."""
    results = page.results
    names = results.dataset.class_names
    methods = [
        (index, values)
        for index, method in enumerate(results.methods)
        if (values := _method_accuracy(method)) is not None
    ]
    if not methods:
        return None
    teacher = None if results.teacher is None else results.teacher.per_class_accuracy
    differences = [(index, _minus(values, teacher)) for index, values in methods] if teacher else []
    explanation = "Accuracy on each class's test images; the students' are means over their seeds."
    if teacher is not None:
        explanation += " Upright bar: the teacher."
    labels: list[int] = list(range(len(names)))
    if len(labels) > MAX_CLASSES:
        labels = _extremes((differences or methods)[-1][1])
        compared = results.methods[methods[-1][0]].label
        what = f"where {compared} is farthest behind and ahead of the teacher" if teacher else "best and worst"
        explanation += f" Drawn are {len(labels)} of the {len(names)} classes, those {what}; the table has all."
    draw = network_figures.class_accuracy(page.name("classes"), teacher, methods, names, labels)
    panels = [figure(draw, "Accuracy by class.")]
    if differences:
        draw = network_figures.class_difference(page.name("class-gap"), differences, names, labels)
        panels.append(figure(draw, "Student minus teacher by class."))
    table = details("Every class", _class_table(page, teacher, methods, differences))
    return join([element("p", explanation), page.legend_of_methods("class-swatch"), grid(*panels), table])


def _extremes(values: Accuracies) -> list[int]:
    known = [label for label, value in enumerate(values) if value is not None]
    order = sorted(known, key=lambda label: values[label] or 0.0)
    if len(order) <= 2 * NUM_EXTREME_CLASSES:
        return order
    return order[:NUM_EXTREME_CLASSES] + order[-NUM_EXTREME_CLASSES:]


def _class_table(
    page: RunPage,
    teacher: Accuracies | None,
    methods: Sequence[tuple[int, Accuracies]],
    differences: Sequence[tuple[int, Accuracies]],
) -> Markup:
    def shown(value: float | None) -> str:
        return MISSING if value is None else percent(value)

    def points(value: float | None) -> str:
        return MISSING if value is None else signed(100 * value)

    labels = [page.results.methods[index].label for index, _ in methods]
    header = ["Class", *(["Teacher (%)"] if teacher else []), *(f"{label} (%)" for label in labels)]
    header += [f"{label}, minus teacher (points)" for label in labels] if differences else []
    rows = [
        [
            name,
            *([shown(teacher[number])] if teacher else []),
            *(shown(values[number]) for _, values in methods),
            *(points(values[number]) for _, values in differences),
        ]
        for number, name in enumerate(page.results.dataset.class_names)
    ]
    return data_table(header, rows)


def confusion_section(page: RunPage, networks: Sequence[NetworkFindings]) -> Markup:
    """A matrix a network, and the pairs that are confused most."""
    names = page.results.dataset.class_names
    matrices = [(each, each.confusion_matrix(len(names))) for each in networks]
    panels = [
        figure(
            network_figures.confusion(page.name(f"confusion-{index}"), matrix, names),
            f"{page.label(each.key)}{_seeds(each)}: {100 * np.trace(matrix) / matrix.sum():.1f} % right.",
        )
        for index, (each, matrix) in enumerate(matrices[:_MAX_NETWORKS])
    ]
    explanation = (
        "Of the test images with the label of the row, the share predicted as the class of the column. "
        "The scale of colours is stretched at its lower end, where the errors are."
    )
    children = [element("p", explanation), grid(*panels)]
    if (pairs := _confused_pairs(page, matrices)) is not None:
        children += [element("h3", "Most confused"), pairs]
    return join(children)


def _seeds(network: NetworkFindings) -> str:
    return "" if network.seeds == 1 else f", {of(network.seeds, 'seed')} together"


def _confused_pairs(page: RunPage, matrices: Sequence[tuple[NetworkFindings, np.ndarray]]) -> Markup | None:
    """The pairs of classes with the most errors of the students (of all networks without one)."""
    names = page.results.dataset.class_names
    students = [matrix for each, matrix in matrices if each.role == "student"]
    errors_CC = np.sum(students or [matrix for _, matrix in matrices], axis=0)
    errors_CC = errors_CC - np.diag(np.diag(errors_CC))
    order = np.argsort(-errors_CC, axis=None, kind="stable")[:_MAX_PAIRS]
    pairs = [divmod(int(place), len(names)) for place in order]
    pairs = [pair for pair in pairs if errors_CC[pair] > 0]
    if not pairs:
        return None

    def share(matrix: np.ndarray, pair: tuple[int, int]) -> str:
        images = matrix[pair[0]].sum()
        return f"{100 * matrix[pair] / images:.1f}" if images else MISSING

    header = ("Label", "Taken for", *(f"{page.label(each.key)} (%)" for each, _ in matrices))
    rows = [
        (names[pair[0]], names[pair[1]], *(share(matrix, pair) for _, matrix in matrices)) for pair in pairs
    ]
    note = element("p", "Shares of the label's test images; pairs by the students' errors.", class_="note")
    return join([data_table(header, rows, words=(0, 1)), note])


def calibration_section(page: RunPage, networks: Sequence[NetworkFindings]) -> Markup:
    """A reliability diagram a network with its expected calibration error."""
    explanation = (
        "How often a network is right when it is so sure. On the dashed line confidence is accuracy; below it "
        f"the network is too sure of itself. Hollow: fewer than {network_figures.FEW_IMAGES} images. Grey: the "
        "share of the images with that confidence. ECE, the expected calibration error, is the mean gap "
        "(Guo et al. 2017)."
    )

    def caption(each: NetworkFindings) -> str:
        text = f"{page.label(each.key)}: ECE {100 * each.ece:.2f} %"
        if each.seeds == 1:
            return f"{text}."
        method = next(method for method in page.results.methods if method.name == each.key)
        known = [run.test_ece for run in method.runs if run.test_ece is not None]
        mean = f"; of one seed {100 * statistics.fmean(known):.2f} % on average" if known else ""
        return f"{text}{_seeds(each)}{mean}."

    panels = [
        figure(
            network_figures.reliability(
                page.name(f"calibration-{index}"), each.bin_counts, each.bin_hits, each.bin_confidences
            ),
            caption(each),
        )
        for index, each in enumerate(networks[:_MAX_NETWORKS])
    ]
    return join([element("p", explanation), grid(*panels)])
