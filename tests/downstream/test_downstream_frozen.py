"""Features, nearest neighbours, linear probe and zero-shot, against NumPy and scikit-learn."""

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.linear_model import LogisticRegression

from tmkd_ray.config.transfer import LinearConfig
from tmkd_ray.datasets import build_dataset
from tmkd_ray.datasets.digits import DigitsConfig
from tmkd_ray.downstream.features import FeatureExtractor, FeatureTable, joined
from tmkd_ray.downstream.knn import knn_accuracy, knn_votes, top_accuracies
from tmkd_ray.downstream.linear_probe import fit_probes, labelled_rows, probe
from tmkd_ray.downstream.student import build_student
from tmkd_ray.downstream.zero_shot import load_projector, random_projector, zero_shot_logits
from tmkd_ray.errors import UserError
from tmkd_ray.pretraining.base import build_projector


def test_features_are_the_networks_whatever_the_chunks_and_batches():
    dataset = build_dataset(DigitsConfig(image_size=16))
    index = dataset.index("test").take(np.arange(10))
    others = dataset.index("train").take(np.arange(3))
    networks = {
        "student": build_student("resnet8", 16, None, 0),
        "other": build_student("resnet8", 16, None, 1),
    }
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)
    work = FeatureExtractor(networks, dataset, {"train": others, "test": index}, mean, std, 3).to("cpu")
    assert len(work) == 13
    chunks = [work(np.arange(0, 5)), work(np.arange(5, 13))]
    assert [chunk["train"].ids.tolist() for chunk in chunks] == [others.ids.tolist(), []]
    table = joined([chunk["test"] for chunk in chunks])
    assert list(joined([chunk["test"] for chunk in chunks], ["other"]).features) == ["other"]
    assert table.ids.tolist() == index.ids.tolist()
    assert table.labels.tolist() == index.labels.tolist()
    images = np.stack([np.asarray(image) for image in dataset.read("test", index)]).astype(np.float32) / 255
    normalised = torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))
    for name, network in networks.items():
        with torch.no_grad():
            expected = network.eval()(normalised).feature
        np.testing.assert_allclose(table.features[name], expected.numpy(), atol=1e-5)
    assert not np.allclose(table.features["student"], table.features["other"])
    networks["student"].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=f"NaN.*{index.ids[2]}"):
        work(np.arange(5, 7))


def numpy_votes(bank, labels, queries, num_classes, k, temperature):
    """Wu et al. 2018, eq. 5 and what follows, query by query, in float64."""
    votes = np.zeros((len(queries), num_classes))
    unit = [
        values.astype(np.float64) / np.linalg.norm(values, axis=1, keepdims=True) for values in (bank, queries)
    ]
    for row, query in enumerate(unit[1]):
        cosines = unit[0] @ query
        for neighbour in np.argsort(-cosines)[:k]:
            votes[row, labels[neighbour]] += np.exp(cosines[neighbour] / temperature)
    return votes


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (500, 0.5)])
def test_knn_votes_are_those_of_numpy(k, temperature):
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(120, 6)).astype(np.float32), rng.normal(size=(50, 6)).astype(np.float32)
    labels = rng.integers(0, 5, 120)
    expected = numpy_votes(bank, labels, queries, 5, k, temperature)
    votes = knn_votes(*map(torch.from_numpy, (bank, labels, queries)), 5, k, temperature).double().numpy()
    shares = [values / values.sum(1, keepdims=True) for values in (votes, expected)]
    np.testing.assert_allclose(*shares, atol=1e-5)
    answers = rng.integers(0, 5, 50)
    top1, top5 = knn_accuracy(bank, labels, queries, answers, 5, k, temperature)
    assert top1 == np.mean(expected.argmax(1) == answers)
    assert top5 == 1.0


def test_a_cold_vote_is_that_of_the_nearest():
    """exp(1 / 0.001) is beyond float32; the nearest alone decides all the same."""
    bank = np.eye(3, dtype=np.float32)
    labels = np.array([2, 0, 1])
    votes = knn_votes(*map(torch.from_numpy, (bank, labels, 2 * bank)), 3, 3, 0.001)
    assert votes.isfinite().all()
    assert votes.argmax(1).tolist() == [2, 0, 1]


def test_top_five():
    scores = torch.arange(7.0).repeat(3, 1)
    assert top_accuracies(scores, torch.tensor([6, 2, 1])) == (1 / 3, 2 / 3)


def blobs(num, width=4, num_classes=3, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    labels = np.arange(num) % num_classes
    features = (centres[labels] + spread * rng.normal(size=(num, width))).astype(np.float32)
    ids = np.array([f"{seed}-{i}" for i in range(num)])
    return FeatureTable({"student": features}, labels, ids)


def linear_config(**changes):
    return LinearConfig.model_validate({"student": "s", "dataset": "digits", **changes})


def test_probe_steps_are_those_of_numpy():
    """Momentum, decay, cosine and the side-by-side rates: SGD by hand in float64, full batches."""
    table = blobs(30)
    config = linear_config(epochs=1, min_steps=7, probe_batch_size=30, weight_decay=0.01, momentum=0.8)
    rates = [0.1, 0.7]
    weights, biases = fit_probes(
        torch.from_numpy(table.features["student"]), torch.from_numpy(table.labels), 3, rates, config
    )
    features, onehot = table.features["student"].astype(np.float64), np.eye(3)[table.labels]
    for number, rate in enumerate(rates):
        w, b, vw, vb = np.zeros((3, 4)), np.zeros(3), np.zeros((3, 4)), np.zeros(3)
        for step in range(7):
            scores = np.exp(features @ w.T + b)
            error = (scores / scores.sum(1, keepdims=True) - onehot) / 30
            vw = 0.8 * vw + error.T @ features + 0.01 * w
            vb = 0.8 * vb + error.sum(0)
            lr = rate * (1 + np.cos(np.pi * step / 7)) / 2
            w, b = w - lr * vw, b - lr * vb
        np.testing.assert_allclose(weights[number].numpy(), w, atol=1e-5)
        np.testing.assert_allclose(biases[number].numpy(), b, atol=1e-5)


def test_probe_converges_to_scikit_learns_logistic_regression():
    table = blobs(90)
    config = linear_config(epochs=1, min_steps=3000, probe_batch_size=90, weight_decay=0.02)
    features = torch.from_numpy(table.features["student"])
    weights, biases = fit_probes(features, torch.from_numpy(table.labels), 3, [0.5], config)
    # scikit-learn minimises C · sum of cross-entropies + |w|² / 2; here it is their mean + decay · |w|² / 2.
    reference = LogisticRegression(C=1 / (0.02 * 90), tol=1e-10, max_iter=5000).fit(features, table.labels)
    ours = (features @ weights[0].T + biases[0]).softmax(1)
    np.testing.assert_allclose(ours.numpy(), reference.predict_proba(features), atol=2e-3)


def test_every_sample_of_an_epoch_is_used_once():
    """Batches of 10 of 20 samples, and 2 steps: the gradient at zero, summed, is that of all samples."""
    table = blobs(20)
    config = linear_config(epochs=1, min_steps=2, probe_batch_size=10, momentum=0, weight_decay=0)
    features, labels = torch.from_numpy(table.features["student"]), torch.from_numpy(table.labels)
    tiny = 1e-4  # so small that the second step still sees the gradient at zero
    weights, _ = fit_probes(features, labels, 3, [tiny], config)
    error = np.full((20, 3), 1 / 3) - np.eye(3)[table.labels]
    by_sample = np.einsum("nc,ns->ncs", error, table.features["student"]) / 10
    first = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:10].numpy()
    second = np.setdiff1d(np.arange(20), first)
    expected = -tiny * (by_sample[first].sum(0) + by_sample[second].sum(0) / 2)  # half the rate, by the cosine
    np.testing.assert_allclose(weights[0].numpy(), expected, atol=1e-8)


def test_the_rate_is_chosen_on_validation_and_test_says_how_good_it_is():
    train, validation, test = (blobs(90, width=20, seed=seed, spread=2.0) for seed in range(3))
    rates = [1e-3, 0.1, 10.0]
    config = linear_config(learning_rates=rates, epochs=5, min_steps=50)
    few, whole = (probe(train, validation, test, "student", 3, part, config) for part in (0.1, 1.0))
    assert (few.num_labelled, whole.num_labelled) == (9, 90)
    alone = {
        rate: probe(
            train, validation, test, "student", 3, 1.0, config.model_copy(update={"learning_rates": (rate,)})
        )
        for rate in rates
    }
    accuracies = [result.validation_accuracy for result in alone.values()]
    assert len(set(accuracies)) > 1
    assert whole.validation_accuracy == max(accuracies)
    assert (whole.accuracy, whole.learning_rate) == (
        alone[whole.learning_rate].accuracy,
        rates[np.argmax(accuracies)],
    )
    # Labels of test that say something else change nothing but the test figure.
    wrong = FeatureTable(test.features, (test.labels + 1) % 3, test.ids)
    other = probe(train, validation, wrong, "student", 3, 1.0, config)
    assert (other.learning_rate, other.validation_accuracy) == (whole.learning_rate, whole.validation_accuracy)
    assert other.accuracy < 0.4 < whole.accuracy
    # Where all rates do equally well the smallest is taken, in whatever order they are given.
    far = blobs(90, seed=0, spread=0.01)
    tied = linear_config(learning_rates=[0.3, 0.1, 0.2], epochs=5)
    assert probe(far, far, far, "student", 3, 1.0, tied).learning_rate == 0.1


def test_a_feature_that_never_varies_does_no_harm():
    train = blobs(60)
    constant = FeatureTable(
        {"student": np.concatenate([train.features["student"], np.full((60, 1), 7.0, np.float32)], 1)},
        train.labels,
        train.ids,
    )
    result = probe(constant, constant, constant, "student", 3, 1.0, linear_config(epochs=2))
    plain = probe(train, train, train, "student", 3, 1.0, linear_config(epochs=2))
    assert result.accuracy == plain.accuracy


def test_few_labels_are_of_every_class():
    labels = np.array([0] * 100 + [1] * 50 + [2])
    ids = np.array([f"i{i}" for i in range(151)])
    rows = labelled_rows(ids, labels, 0.1, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10, 5, 1]
    assert labelled_rows(ids, labels, 1.0, seed=0).tolist() == list(range(151))
    assert labelled_rows(ids, labels, 0.1, seed=1).tolist() != rows.tolist()
    assert np.bincount(labels[labelled_rows(ids, labels, 0.001, seed=0)]).tolist() == [1, 1, 1]


def save_projector(path, network, **metadata):
    safetensors.torch.save_file(network.state_dict(), path, metadata=metadata or None)


def test_zero_shot_logits_are_those_of_numpy(tmp_path):
    network = build_projector(6, 4, 5)
    path = tmp_path / "projector.safetensors"
    save_projector(path, network, clip="somewhere", E="4")
    projector = load_projector(str(path), 6)
    assert projector.clip == "somewhere"
    rng = np.random.default_rng(0)
    features = rng.normal(size=(9, 6)).astype(np.float32)
    bank = rng.normal(size=(3, 4))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    state = {name: value.double().numpy() for name, value in network.state_dict().items()}
    hidden = np.maximum(features @ state["0.weight"].T + state["0.bias"], 0)
    embedding = hidden @ state["2.weight"].T + state["2.bias"]
    expected = 100 * (embedding / np.linalg.norm(embedding, axis=1, keepdims=True)) @ bank.T
    logits = zero_shot_logits(features, projector.network, torch.from_numpy(bank).float())
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-3)


def test_projectors_that_do_not_do(tmp_path):
    path = tmp_path / "projector.safetensors"
    with pytest.raises(UserError, match=r"projector\.safetensors does not exist.*lgd"):
        load_projector(str(path), 6)
    save_projector(path, build_projector(6, 4, 5))
    with pytest.raises(UserError, match="width 6, the student's is 8"):
        load_projector(str(path), 8)
    assert load_projector(str(path), 6).clip is None
    safetensors.torch.save_file({"weight": torch.zeros(3, 6)}, path)
    with pytest.raises(UserError, match="is not the MLP head"):
        load_projector(str(path), 6)


def test_a_random_projector_is_of_the_same_widths():
    network = build_projector(6, 4, 5)
    first, again, other = (random_projector(network, seed).state_dict() for seed in (0, 0, 1))
    assert {name: value.shape for name, value in first.items()} == {
        name: value.shape for name, value in network.state_dict().items()
    }
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])
