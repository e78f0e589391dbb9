import numpy as np
import pytest

from pipeline import compare, metrics


def counts(right, seed=0, runs=4, samples=400):
    """Counts of a two-class classifier that is right with this probability, on the same labels every time."""
    label = np.random.default_rng(9).integers(2, size=samples)
    generator = np.random.default_rng(seed)
    wrong = generator.random((runs, samples)) > right
    return np.stack([metrics.counts("classification", np.where(w, 1 - label, label), label, 2, None) for w in wrong])


def test_the_interval_has_the_binomials_width():
    scores = compare.bootstrap("classification", counts(0.8, runs=1), 2)
    assert scores.std() == pytest.approx(np.sqrt(0.8 * 0.2 / 400), rel=0.15)


def test_verdicts():
    assert compare.difference("classification", counts(0.9), counts(0.6, 1), 2).verdict == "better"
    assert compare.difference("classification", counts(0.6), counts(0.9, 1), 2).verdict == "worse"
    assert compare.difference("classification", counts(0.8), counts(0.8, 1), 2).verdict == "cannot be told"


def test_a_model_against_itself_differs_by_nothing():
    one_run = counts(0.8, runs=1)
    same = compare.difference("classification", one_run, one_run, 2)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_seeds_that_disagree_widen_the_interval():
    steady = counts(0.7, runs=4)
    unsteady = np.concatenate([counts(0.5, runs=2), counts(0.9, 1, runs=2)])
    widths = [np.ptp(compare.interval(compare.bootstrap("classification", c, 2))) for c in (steady, unsteady)]
    assert widths[1] > 1.5 * widths[0]


def test_pairing_narrows_the_interval():
    """Two models that err on nearly the same samples are told apart, though each score alone is uncertain."""
    ours = counts(0.7, runs=1)
    theirs = ours.copy()
    right = np.flatnonzero(ours[0, :, [0, 3]].sum(0))[:20]
    theirs[0, right] = theirs[0, right][:, [1, 0, 3, 2]]
    assert compare.difference("classification", ours, theirs, 2).verdict == "better"
