"""Bootstrap and comparisons of models whose true accuracies are known."""

import numpy as np
import pytest

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
    assert result.p_value > 0.05 if verdict == Verdict.NOT_SIGNIFICANT else result.p_value < 0.002


def test_paired_difference_of_a_model_with_itself_is_zero():
    counts = make_counts(0.8, n_seeds=1)
    result = compare(counts, counts)
    assert result.difference == 0
    assert result.interval == result.samples_interval == result.seeds_interval == (0, 0)
    assert result.p_value == 1


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
    """Two models that err on nearly the same samples differ significantly, though each score is uncertain."""
    counts = make_counts(0.7, n_seeds=1)
    reference = counts.copy()
    correct = np.flatnonzero(counts[0, :, [0, 3]].sum(0))[:20]
    reference[0, correct] = reference[0, correct][:, [1, 0, 3, 2]]
    assert compare(counts, reference).verdict == Verdict.BETTER


def test_pairwise_differences_has_every_pair_once():
    accuracy = {"a": 0.95, "b": 0.75, "c": 0.5}
    models = {
        name: bootstrap(TASK, make_counts(value, seed=number), stream=number)
        for number, (name, value) in enumerate(accuracy.items())
    }
    results = significance.pairwise_differences(models)
    assert list(results) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert {result.verdict for result in results.values()} == {Verdict.BETTER}


def draws_of_accuracy(accuracy: float, stream: int, n_samples: int = 4000):
    """Draws of a model that is right on the first samples, this fraction of all, with both seeds."""
    is_correct = np.arange(n_samples) < accuracy * n_samples
    counts = np.zeros((2, n_samples, 4), int)
    counts[:, is_correct, 0], counts[:, ~is_correct, 1] = 1, 1
    return bootstrap(TASK, counts, stream=stream)


@pytest.mark.parametrize(
    ("teacher", "student", "student_verdict", "teacher_verdict", "fraction"),
    [
        (0.9, 0.8, Verdict.BETTER, Verdict.BETTER, 0.5),
        (0.9, 0.7, Verdict.NOT_SIGNIFICANT, Verdict.BETTER, 0),
        (0.7, 0.7, Verdict.NOT_SIGNIFICANT, Verdict.NOT_SIGNIFICANT, None),
        (0.6, 0.7, Verdict.NOT_SIGNIFICANT, Verdict.WORSE, None),
        (0.9, 0.6, Verdict.WORSE, Verdict.BETTER, -0.5),
    ],
)
def test_gain_recovered_has_a_fraction_only_if_the_teacher_gains(
    teacher, student, student_verdict, teacher_verdict, fraction
):
    """The supervised baseline has the accuracy 0.7."""
    models = [draws_of_accuracy(accuracy, stream) for stream, accuracy in enumerate((student, 0.7, teacher))]
    result = gain_recovered(*models)
    assert result.student_gain.verdict == student_verdict
    assert result.teacher_gain.verdict == teacher_verdict
    if fraction is None:
        assert result.fraction is result.interval is None
    else:
        assert result.fraction == pytest.approx(fraction)
        low, high = result.interval
        assert low <= result.fraction <= high
        assert high - low < 0.2


def test_holm_adjusted_equals_the_values_by_hand():
    """Holm 1979: the smallest p times n, the next times n - 1, and never smaller than the one before it."""
    adjusted = significance.holm_adjusted(np.array([0.03, 0.01, 0.04, 0.5]))
    np.testing.assert_allclose(adjusted, [0.09, 0.04, 0.09, 0.5])
    assert significance.holm_adjusted(np.array([0.7, 0.9])).tolist() == [1, 1]
    assert len(significance.holm_adjusted(np.array([]))) == 0
