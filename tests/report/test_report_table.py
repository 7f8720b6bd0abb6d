import math

import numpy as np
import pytest
from scipy import stats

from tmkd_ray.report.comparison import Difference, difference
from tmkd_ray.report.formatting import byte_size, count, duration, of, signed
from tmkd_ray.report.table import format_table, markdown_table


def cells(table: str, start: str) -> str:
    return " ".join(row(table, start).split())


def row(table: str, start: str) -> str:
    lines = [line for line in table.splitlines() if line.startswith(start)]
    assert len(lines) == 1, (start, table)
    return lines[0]


def test_mean_std_and_difference_are_those_computed_by_hand(make_results, make_method):
    # The gains are .04, .05, .03: mean .04, standard deviation .01; two degrees of freedom, t = 4.302653,
    # half-width 4.302653 · .01 / sqrt(3) = .024841.
    methods = [make_method("alone", [0.90, 0.92, 0.94]), make_method("better", [0.94, 0.97, 0.97])]
    table = format_table(make_results(methods=methods))
    assert cells(table, "Method alone") == "Method alone 92.00 ± 2.00 – 3 small 19,466 20.0"
    assert cells(table, "Method better") == "Method better 96.00 ± 1.73 +4.00 ± 2.48 3 small 19,466 20.0"
    assert "Test accuracy (%)" in table
    assert "One of the 400 test images is 0.25 points." in " ".join(table.split())


def test_rows_of_the_teachers(make_results):
    table = format_table(make_results())
    assert cells(table, "Teacher  ") == "Teacher 97.00 large 272,474 88.0"
    assert row(table, "Teacher, uniform").split()[-2:] == ["(validation)", "97.50"]
    assert row(table, "Teacher, semantic").split()[-2:] == ["(validation)", "98.50"]
    assert row(table, "Teacher, oracle").split()[-2:] == ["(validation)", "99.50"]
    assert row(table, "Text teacher").split()[-4:] == ["96.00", "CLIP", "412,332", "64.0"]


def test_validation_is_named_where_test_was_not_read(make_results, make_method):
    methods = [make_method("alone", [None, None], [0.80, 0.90]), make_method("kd", [0.95, 0.97], [0.90, 0.98])]
    table = format_table(make_results(methods=methods))
    assert "Validation accuracy (%)" in table
    assert "Test accuracy" not in table
    assert "The test images were not read" in " ".join(table.split())
    # kd's test accuracies, .95 and .97, must not stand in a column of validation.
    assert "94.00 ± 5.66" in row(table, "Method kd")
    assert "98.00" in row(table, "Teacher  ")


def test_one_seed_has_no_uncertainty(make_results, make_method):
    table = format_table(make_results(methods=[make_method("a", [0.9]), make_method("b", [0.85])]))
    assert cells(table, "Method b") == "Method b 85.00 −5.00 1 small 19,466 10.0"
    assert "±" not in table


def test_a_table_without_teachers_or_methods(make_results, make_method):
    alone = format_table(make_results(methods=[make_method("a", [0.9])], teacher=None, clip=None))
    assert "eacher" not in alone
    assert "Difference: to" not in alone
    teachers = format_table(make_results(methods=[]))
    assert "Method a" not in teachers
    assert "97.00" in row(teachers, "Teacher  ")


def test_columns_line_up(make_results):
    lines = format_table(make_results()).splitlines()
    header = next(line for line in lines if line.startswith("Method  "))
    end = header.index("accuracy (%)") + len("accuracy (%)")
    for start in ("Method alone", "Method tmkd", "Teacher  ", "Teacher, uniform"):
        line = row("\n".join(lines), start)
        assert line[:end].rstrip() == line[:end]
        assert line[end - 1].isdigit()
        assert line[end : end + 2].strip() == ""
    assert max(map(len, lines)) == len(lines[1])


def test_markdown_has_the_same_cells_and_escapes_them(make_results, make_method):
    strange = make_method("a", [0.9]).model_copy(update={"label": "a | b *c*\n<d>"})
    lines = markdown_table(make_results(methods=[strange, make_method("b", [0.8])])).splitlines()
    assert lines[0].startswith("| Method | Test accuracy (%) |")
    assert lines[1] == "| --- | ---: | ---: | ---: | --- | ---: | ---: |"
    assert lines[2].startswith("| a \\| b \\*c\\* &lt;d> | 90.00 | – | 1 | small |")
    assert lines[3].startswith("| Method b | 80.00 | −10.00 |")


def test_difference_of_the_same_seeds_is_paired(make_method):
    a, b = [0.90, 0.92, 0.95], [0.93, 0.94, 0.99]
    found = difference(make_method("b", b), make_method("a", a), "test")
    gains = np.subtract(b, a)
    assert found.mean == pytest.approx(gains.mean())
    # 4.302653: the 97.5 % quantile of Student's t with two degrees of freedom, from a printed table.
    assert found.half_width == pytest.approx(4.302653 * gains.std(ddof=1) / np.sqrt(3), rel=1e-6)


def test_difference_of_other_seeds_is_welchs_interval(make_method):
    a, b = [0.90, 0.92, 0.94, 0.93], [0.95, 0.96, 0.97]
    found = difference(make_method("b", b), make_method("a", a), "test")
    squared_errors = [np.var(b, ddof=1) / 3, np.var(a, ddof=1) / 4]
    degrees = sum(squared_errors) ** 2 / (squared_errors[0] ** 2 / 2 + squared_errors[1] ** 2 / 3)
    assert found.mean == pytest.approx(np.mean(b) - np.mean(a))
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, degrees) * np.sqrt(sum(squared_errors)))


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([0.90, 0.91, 0.92], [0.96, 0.98, 0.98], "better"),
        ([0.96, 0.98, 0.98], [0.90, 0.91, 0.92], "worse"),
        ([0.90, 0.92, 0.94], [0.91, 0.95, 0.94], "within noise"),
        ([0.9], [0.95, 0.96], "noise unknown"),
        # No scatter in three seeds is a coarse accuracy, not certainty.
        ([0.1 + 0.2] * 3, [0.4] * 3, "noise unknown"),
    ],
)
def test_verdict(make_method, a, b, verdict):
    assert difference(make_method("b", b), make_method("a", a), "test").verdict == verdict


def test_the_edge_of_the_interval_is_within_the_noise():
    assert Difference(0.02, 0.02).verdict == "within noise"
    assert Difference(-math.nextafter(0.02, 1), 0.02).verdict == "worse"


def test_numbers_as_text():
    assert [signed(x) for x in (1.254, -0.4, -0.001, 0.0)] == ["+1.25", "−0.40", "0.00", "0.00"]
    assert [duration(x) for x in (0.416, 12.34, 59.96, 200, 3599.6, 7500)] == [
        "0.42 s",
        "12.3 s",
        "1 min 00 s",
        "3 min 20 s",
        "1 h 00 min",
        "2 h 05 min",
    ]
    assert [byte_size(x) for x in (512, 1536, 24.5 * 2**20, 3 * 2**40)] == [
        "512 B",
        "1.5 KiB",
        "24.5 MiB",
        "3.0 TiB",
    ]
    assert [count(1234567), of(1, "seed"), of(3, "seed")] == ["1,234,567", "1 seed", "3 seeds"]
