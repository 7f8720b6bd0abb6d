"""One plain paragraph that says what the numbers say, and no more."""

import statistics

from tmkd_ray.report.comparison import Verdict, difference
from tmkd_ray.report.formatting import of, percent, percent_with_std
from tmkd_ray.results import MethodRecord, RunResults, Split, sample_std

# The groups of the comparison with the first method, in the order they are told.
_VERDICTS: dict[Verdict, str] = {
    "better": "better, beyond the noise",
    "within noise": "no clear difference, within the noise",
    "worse": "worse, beyond the noise",
    "noise unknown": "noise unknown",
}

_MAX_NAMED = 4
"""So many methods of a group are named, the best of it; the table has them all."""


def summarise(results: RunResults) -> str:
    """Which method is best, by how much, and whether that is more than the scatter of the seeds."""
    return " ".join([*_method_sentences(results), *_teacher_sentences(results)])


def _accuracy(method: MethodRecord, split: Split) -> str:
    values = method.accuracies(split)
    return f"{percent_with_std(statistics.fmean(values), sample_std(values))} %"


def _method_sentences(results: RunResults) -> list[str]:
    split = results.split
    if not results.methods:
        return ["No student was trained in this run."]
    reference, *others = results.methods
    # Stable: of equals the earlier one leads.
    ranking = sorted(results.methods, key=lambda method: -statistics.fmean(method.accuracies(split)))
    best = ranking[0]
    spread = "one seed" if len(best.runs) == 1 else f"mean ± standard deviation of {len(best.runs)} seeds"
    sentences = [f"{best.label} has the highest {split} accuracy: {_accuracy(best, split)} ({spread})."]
    if not others:
        sentences = [
            f"{best.label} reaches {_accuracy(best, split)} {split} accuracy ({spread}).",
            "There is no second method to compare it with.",
        ]
    else:
        sentences += _against_reference(reference, others, split)
    if others and best is not reference and ranking[1] is not reference:
        lead = difference(best, ranking[1], split)
        outcome = {
            "better": "beyond the noise",
            "within noise": "within the noise",
            "noise unknown": "of unknown noise",
        }[lead.verdict]
        sentences.append(
            f"The lead of {best.label} over the next, {ranking[1].label}, is {lead.in_points()} points, "
            f"{outcome}."
        )
    if split == "validation":
        sentences.append(
            "The test images were not read; the validation images also chose each run's epoch, so these "
            "accuracies are a little optimistic."
        )
    return sentences


def _against_reference(reference: MethodRecord, others: list[MethodRecord], split: Split) -> list[str]:
    compared = [(method, difference(method, reference, split)) for method in others]
    compared.sort(key=lambda pair: -pair[1].mean)
    parts = []
    for verdict, title in _VERDICTS.items():
        group = [
            f"{method.label} by {gap.in_points()} points" for method, gap in compared if gap.verdict == verdict
        ]
        if len(group) > _MAX_NAMED:
            group[_MAX_NAMED:] = [f"and {len(group) - _MAX_NAMED} more"]
        if group:
            parts.append(f"{title}: {', '.join(group)}")
    sentences = [f"Against {reference.label} ({_accuracy(reference, split)}): {'; '.join(parts)}."]
    verdicts = {gap.verdict for _, gap in compared}
    if "noise unknown" in verdicts:
        sentences.append("Where the noise is unknown, more seeds must show whether the difference is real.")
    elif "better" not in verdicts:
        subject = "it" if len(others) == 1 else "any of them"
        sentences.append(f"So this run does not show that {subject} helps.")
    return sentences


def _teacher_sentences(results: RunResults) -> list[str]:
    teacher = results.teacher
    if teacher is None:
        return []
    if results.split == "test" and teacher.test_accuracy is not None:
        sentences = [f"The teacher itself has {percent(teacher.test_accuracy)} % test accuracy."]
    else:
        sentences = [f"The teacher itself has {percent(teacher.validation_accuracy)} % validation accuracy."]
    fused, views = teacher.fused_validation_accuracy, teacher.view_validation_accuracy
    if "semantic" not in fused or not views:
        return sentences
    best_view = max(sorted(views), key=lambda view: views[view])
    # In images, as a reader sees at once how little one or two of them mean.
    gain = round((fused["semantic"] - views[best_view]) * results.dataset.num_validation)
    if gain == 0:
        comparison = "as many images as"
    else:
        comparison = f"{of(abs(gain), 'image')} {'more' if gain > 0 else 'fewer'} than"
    sentences.append(
        f"On the {of(results.dataset.num_validation, 'validation image')}, its views fused by semantic weights "
        f"reach {percent(fused['semantic'])} %, {comparison} its best single view "
        f"({best_view.replace('_', ' ')}, {percent(views[best_view])} %)"
        + (f"; fused by uniform weights, {percent(fused['uniform'])} %." if "uniform" in fused else ".")
    )
    return sentences
