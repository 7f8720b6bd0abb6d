from tmkd_ray.report.summary import summarise


def test_a_method_that_helps_is_named_with_its_interval(make_results, make_method):
    methods = [
        make_method("alone", [0.90, 0.91, 0.92]),
        make_method("kd", [0.915, 0.905, 0.925]),
        make_method("tmkd", [0.96, 0.98, 0.97]),
    ]
    text = summarise(make_results(methods=methods))
    assert text.startswith(
        "Method tmkd has the highest test accuracy: 97.00 ± 1.00 % (mean ± standard deviation of 3 seeds). "
        # 4.302653 · .01 / sqrt(3) = .024841
        "Against Method alone (91.00 ± 1.00 %): better, beyond the noise: Method tmkd by +6.00 ± 2.48 points; "
        "no clear difference, within the noise: Method kd by +0.50 ± 2.48 points. "
        "The lead of Method tmkd over the next, Method kd, is +5.50 ± 4.30 points, beyond the noise."
    )
    assert "does not show" not in text


def test_it_says_plainly_that_nothing_helps(make_results, make_method):
    methods = [make_method("alone", [0.90, 0.92, 0.94]), make_method("kd", [0.91, 0.95, 0.93])]
    assert "within the noise: Method kd" in summarise(make_results(methods=methods))
    assert "So this run does not show that it helps." in summarise(make_results(methods=methods))
    methods.append(make_method("bad", [0.5, 0.51, 0.52]))
    assert "worse, beyond the noise: Method bad by −41.00" in summarise(make_results(methods=methods))
    assert "So this run does not show that any of them helps." in summarise(make_results(methods=methods))


def test_one_seed_proves_nothing(make_results, make_method):
    text = summarise(make_results(methods=[make_method("alone", [0.5]), make_method("kd", [0.9])]))
    assert "90.00 % (one seed)" in text
    assert "noise unknown: Method kd by +40.00 points" in text
    assert "more seeds must show" in text
    assert "beyond the noise" not in text


def test_one_method_and_none(make_results, make_method):
    text = summarise(make_results(methods=[make_method("alone", [0.5])], teacher=None))
    first, second = text.split(". ", maxsplit=1)
    assert first == "Method alone reaches 50.00 % test accuracy (one seed)"
    assert second == "There is no second method to compare it with."
    assert summarise(make_results(methods=[], teacher=None)) == "No student was trained in this run."


def test_validation_accuracies_are_called_optimistic(make_results, make_method):
    text = summarise(make_results(methods=[make_method("alone", [None], [0.8])]))
    assert "80.00 % validation accuracy" in text
    assert "optimistic" in text
    assert "The teacher itself has 98.00 % validation accuracy." in text


def test_fusion_is_compared_with_the_best_view_in_images(make_results):
    results = make_results()
    # .985 - .98 of 200 images
    assert "reach 98.50 %, 1 image more than its best single view (original, 98.00 %)" in summarise(results)
    assert results.teacher is not None
    for semantic, words in ((0.98, "as many images as"), (0.95, "6 images fewer than")):
        fused = results.teacher.fused_validation_accuracy | {"semantic": semantic}
        teacher = results.teacher.model_copy(update={"fused_validation_accuracy": fused})
        assert words in summarise(results.model_copy(update={"teacher": teacher}))


def test_many_methods_are_not_all_named(make_results, make_method):
    methods = [make_method(f"m{index}", [0.5 + index / 100]) for index in range(9)]
    text = summarise(make_results(methods=methods))
    assert "Method m8 by +8.00 points, Method m7" in text
    assert "and 4 more" in text
    assert "Method m4" not in text
