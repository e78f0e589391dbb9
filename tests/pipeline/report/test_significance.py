import numpy as np
import pytest

from pipeline.report import significance
from pipeline.tasks import Classification
from pipeline.report.significance import bootstrap, paired_difference


def counts(right, seed=0, runs=4, samples=400):
    """Counts of a two-class classifier that is right with this probability, on the same labels every time."""
    label = np.random.default_rng(9).integers(2, size=samples)
    generator = np.random.default_rng(seed)
    wrong = generator.random((runs, samples)) > right
    return np.stack([Classification(2).counts(np.where(w, 1 - label, label), label) for w in wrong])


def draws(counts, stream=0):
    return bootstrap("classification", counts, 2, stream)


def gap(ours, theirs):
    return paired_difference(draws(ours), draws(theirs, 1))


def width(values):
    return np.ptp(significance.percentile_interval(values))


def test_the_interval_has_the_binomials_width():
    drawn = draws(counts(0.8, runs=1))
    assert drawn.samples.std() == pytest.approx(np.sqrt(0.8 * 0.2 / 400), rel=0.15)
    assert (drawn.both == drawn.samples).all()
    assert np.ptp(drawn.seeds) == 0


def test_verdicts():
    assert gap(counts(0.9), counts(0.6, 1)).verdict == "better"
    assert gap(counts(0.6), counts(0.9, 1)).verdict == "worse"
    assert gap(counts(0.8), counts(0.8, 1)).verdict == "cannot be told"
    assert gap(counts(0.9), counts(0.6, 1)).p < 0.002
    assert gap(counts(0.8), counts(0.8, 1)).p > 0.05


def test_a_model_against_itself_differs_by_nothing():
    one_run = counts(0.8, runs=1)
    same = gap(one_run, one_run)
    assert (same.mean, same.both, same.samples, same.seeds, same.p) == (0, (0, 0), (0, 0), (0, 0), 1)


def test_the_two_spreads_are_apart_and_the_verdict_needs_both():
    """Seeds that disagree widen what is over seeds, and leave what is over test samples as it is."""
    steady = counts(0.7, runs=4)
    unsteady = np.concatenate([counts(0.5, runs=2), counts(0.9, 1, runs=2)])
    ours, theirs = draws(steady), draws(unsteady)
    assert width(theirs.seeds) > 5 * width(ours.seeds)
    assert width(theirs.samples) < 1.3 * width(ours.samples)
    assert width(theirs.both) > 1.5 * width(ours.both)
    assert ours.seeds.mean() == pytest.approx(ours.mean, abs=2e-3)
    # By its test samples alone this would pass for better.
    shaky = np.concatenate([counts(0.95, 2, runs=1), counts(0.55, 3, runs=1)])
    told = gap(shaky, counts(0.7, 4, runs=2))
    assert told.samples[0] > 0
    assert told.verdict == "cannot be told"


def test_pairing_narrows_the_interval():
    """Two models that err on nearly the same samples are told apart, though each score alone is uncertain."""
    ours = counts(0.7, runs=1)
    theirs = ours.copy()
    right = np.flatnonzero(ours[0, :, [0, 3]].sum(0))[:20]
    theirs[0, right] = theirs[0, right][:, [1, 0, 3, 2]]
    assert gap(ours, theirs).verdict == "better"


def test_every_pair_once():
    found = significance.pairwise_differences({name: draws(counts(right, i), i) for i, (name, right) in enumerate(RIGHT.items())})
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [one.verdict for one in found.values()] == ["better", "better", "better"]


RIGHT = {"a": 0.95, "b": 0.75, "c": 0.5}


def test_holm_by_hand():
    """Holm 1979: the smallest p times n, the next times n − 1, and none below one before it."""
    adjusted = significance.holm_adjusted(np.array([0.03, 0.01, 0.04, 0.5]))
    np.testing.assert_allclose(adjusted, [0.09, 0.04, 0.09, 0.5])
    assert significance.holm_adjusted(np.array([0.7, 0.9])).tolist() == [1, 1]
    assert len(significance.holm_adjusted(np.array([]))) == 0
