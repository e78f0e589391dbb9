"""Bootstrap, comparisons and summaries of models whose true accuracies are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pipeline.report import significance
from pipeline.report.significance import Verdict, bootstrap, gain_recovered, paired_difference
from pipeline.tasks import Classification

TASK = Classification(2)


def make_counts(accuracy, seed=0, n_seeds=4, n_samples=400):
    """Counts of a binary classifier with this accuracy; the labels are the same in all calls."""
    label = np.random.default_rng(9).integers(2, size=n_samples)
    is_wrong = np.random.default_rng(seed).random((n_seeds, n_samples)) > accuracy
    return np.stack([TASK.counts(np.where(wrong, 1 - label, label), label) for wrong in is_wrong])


def compare(counts, reference_counts):
    return paired_difference(bootstrap(TASK, counts), bootstrap(TASK, reference_counts, stream=1))


def width(values):
    return np.ptp(significance.percentile_interval(values))


def test_bootstrap_spread_over_samples_is_binomial():
    draws = bootstrap(TASK, make_counts(0.8, n_seeds=1))
    assert draws.over_samples.std() == pytest.approx(np.sqrt(0.8 * 0.2 / 400), rel=0.15)
    assert (draws.over_both == draws.over_samples).all()
    assert np.ptp(draws.over_seeds) == 0


@pytest.mark.parametrize(
    ("accuracy", "reference", "verdict"),
    [(0.9, 0.6, Verdict.BETTER), (0.6, 0.9, Verdict.WORSE), (0.8, 0.8, Verdict.NOT_SIGNIFICANT)],
)
def test_paired_difference_verdict_and_p_value_agree(accuracy, reference, verdict):
    result = compare(make_counts(accuracy), make_counts(reference, seed=1))
    assert result.verdict == verdict
    assert result.p_value > 0.05 if verdict == Verdict.NOT_SIGNIFICANT else result.p_value < 0.003


def test_paired_difference_of_a_model_with_itself_is_zero():
    counts = make_counts(0.8, n_seeds=1)
    result = compare(counts, counts)
    assert result.interval == result.samples_interval == result.seeds_interval == (0, 0)
    assert (result.difference, result.p_value) == (0, 1)


def test_paired_difference_needs_significance_over_samples_and_seeds():
    """Seeds that disagree widen the spread over seeds only."""
    agreeing = bootstrap(TASK, make_counts(0.7, n_seeds=4))
    disagreeing = bootstrap(TASK, np.concatenate([make_counts(0.5, n_seeds=2), make_counts(0.9, 1, n_seeds=2)]))
    assert width(disagreeing.over_seeds) > 5 * width(agreeing.over_seeds)
    assert width(disagreeing.over_samples) < 1.3 * width(agreeing.over_samples)
    assert width(disagreeing.over_both) > 1.5 * width(agreeing.over_both)
    assert agreeing.over_seeds.mean() == pytest.approx(agreeing.score, abs=2e-3)
    # Significant over test samples only.
    two_seeds = np.concatenate([make_counts(0.95, 2, n_seeds=1), make_counts(0.55, 3, n_seeds=1)])
    result = compare(two_seeds, make_counts(0.7, 4, n_seeds=2))
    assert result.samples_interval[0] > 0
    assert result.verdict == Verdict.NOT_SIGNIFICANT


def test_paired_difference_of_models_with_common_errors_is_significant():
    counts = make_counts(0.7, n_seeds=1)
    reference = counts.copy()
    correct = np.flatnonzero(counts[0, :, [0, 3]].sum(0))[:20]
    reference[0, correct] = reference[0, correct][:, [1, 0, 3, 2]]
    assert compare(counts, reference).verdict == Verdict.BETTER


@pytest.mark.parametrize(
    ("teacher", "student", "student_verdict", "fraction"),
    [
        (0.9, 0.8, Verdict.BETTER, 0.5),
        (0.7, 0.7, Verdict.NOT_SIGNIFICANT, None),
        (0.6, 0.7, Verdict.NOT_SIGNIFICANT, None),
        (0.9, 0.6, Verdict.WORSE, -0.5),
    ],
)
def test_gain_recovered_has_a_fraction_only_if_the_teacher_gains(teacher, student, student_verdict, fraction):
    """The supervised baseline has the accuracy 0.7."""

    def draws(accuracy: float, n_samples: int = 1000):
        """Draws of a model that is right on the first samples."""
        is_correct = np.arange(n_samples) < accuracy * n_samples
        return bootstrap(TASK, np.stack([TASK.counts(is_correct.astype(int), np.ones(n_samples, int))] * 2))

    result = gain_recovered(draws(student), draws(0.7), draws(teacher))
    assert result.student_gain.verdict == student_verdict
    if fraction is None:
        assert np.isnan([result.fraction, *result.interval]).all()
    else:
        low, high = result.interval
        assert result.fraction == pytest.approx(fraction)
        assert low <= result.fraction <= high < low + 0.4


def test_holm_adjusted_equals_the_values_by_hand():
    """Holm 1979: the smallest p times n, the next times n - 1, and never smaller than the one before it."""
    adjusted = significance.holm_adjusted(np.array([0.03, 0.01, 0.04, 0.5]))
    np.testing.assert_allclose(adjusted, [0.09, 0.04, 0.09, 0.5])
    assert significance.holm_adjusted(np.array([0.7, 0.9])).tolist() == [1, 1]
    assert len(significance.holm_adjusted(np.array([]))) == 0


def test_summarize_runs_has_kind_mean_and_spread_of_each_model(grid):
    runs, draws = grid
    summary = significance.summarize_runs(runs, draws)
    kinds = ["pretrained", "pretrained", "random weights (control)", "ensemble", "ensemble", "fine-tuned", "student"]
    assert summary.model.tolist() == runs.model.unique().tolist()
    assert summary.kind.tolist() == [*kinds, "student"]
    assert significance.model_kind("raw", "none", "frozen") == "band statistics (control)"
    for row in summary.itertuples():
        scores = runs[runs.model == row.model].score
        assert (row.mean, row.std, row.runs) == pytest.approx((scores.mean(), scores.std(), 3))
        assert row.low <= row.mean <= row.high


@pytest.fixture
def runs():
    """Four seeds each of a on datasets x, y and z, of b on x and y, and of c on x."""
    generator = np.random.default_rng(0)
    rows = [
        {"dataset": dataset, "model": model, "weights": "pretrained", "protocol": "frozen",
         "seed": seed, "score": base + generator.uniform(0, 0.1)}
        for model, datasets, base in (("a", "xyz", 0.8), ("b", "xy", 0.5), ("c", "x", 0.2))
        for dataset in datasets
        for seed in range(4)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_aggregate_over_datasets_has_only_models_that_ran_on_all(runs):
    groups = significance.common_dataset_groups(runs)
    assert groups == [["x", "y", "z"], ["x", "y"]]
    all_three, first_two = (significance.aggregate_over_datasets(runs, datasets) for datasets in groups)
    assert all_three.model.tolist() == ["a"]
    assert first_two.model.tolist() == ["a", "b"]
    normalized = significance.normalized_scores(runs, {})
    assert normalized.groupby(runs.dataset).agg(["min", "max"]).to_numpy().tolist() == [[0, 1]] * 3
    scores = normalized[runs.model == "b"]
    assert first_two.iqm[1] == pytest.approx(stats.trim_mean(scores, 0.25))
    assert (first_two.low <= first_two.iqm).all()
    assert (first_two.iqm <= first_two.high).all()


def test_normalized_scores_of_controls_do_not_set_the_scale_and_geobench_does(runs):
    control = runs[runs.model == "a"].assign(model="a_random", weights="random, seed 0", score=0.1)
    both = pd.concat([runs, control], ignore_index=True)
    table = both.assign(normalized=significance.normalized_scores(both, {"y": [0.0, 2.0]}))
    networks, controls = table[: len(runs)], table[len(runs) :]
    x, y, z = (networks[networks.dataset == name] for name in "xyz")
    np.testing.assert_array_equal(x.normalized, significance.normalized_scores(runs, {})[x.index])
    np.testing.assert_allclose(y.normalized, y.score / 2)
    assert 0.5 < z.normalized.min() < z.normalized.max() == 1, "one network spans no scale, so the control counts"
    assert (controls.normalized[controls.dataset == "x"] < 0).all()


def test_aggregate_over_datasets_resamples_seeds_within_each_dataset(runs):
    """A model with equal scores of all seeds has no spread, however different the datasets are."""
    constant = runs[runs.model == "a"].assign(score=lambda table: table.dataset.map({"x": 0.9, "y": 0.4, "z": 0.1}))
    runs = pd.concat([constant, runs[runs.model != "a"]])
    table = significance.aggregate_over_datasets(runs, ["x", "y"]).set_index("model")
    assert table.low["a"] == table.high["a"] == table.iqm["a"]
    assert table.low["b"] < table.high["b"]
