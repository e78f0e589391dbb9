import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pipeline.report import aggregate


@pytest.fixture
def runs():
    """`a` on three sets, `b` on two of them, `c` on one; four seeds each."""
    generator = np.random.default_rng(0)
    rows = [
        {"dataset": dataset, "model": model, "seed": seed, "score": base + generator.uniform(0, 0.1)}
        for model, sets, base in (("a", "xyz", 0.8), ("b", "xy", 0.5), ("c", "x", 0.2))
        for dataset in sets
        for seed in range(4)
    ]
    return pd.DataFrame(rows)


def test_the_worst_run_of_a_set_is_nought_and_its_best_is_one(runs):
    scaled = runs.assign(score=aggregate.min_max_normalized(runs))
    assert scaled.groupby("dataset").score.agg(["min", "max"]).to_numpy().tolist() == [[0, 1]] * 3
    x = runs[runs.dataset == "x"].score
    np.testing.assert_allclose(scaled[scaled.dataset == "x"].score, (x - x.min()) / (x.max() - x.min()))
    assert (aggregate.min_max_normalized(runs.assign(score=0.4)) == 0).all()


def test_the_interquartile_mean_leaves_the_quarters_out():
    assert aggregate.interquartile_mean(np.array([-99, 1, 2, 99])) == 1.5
    values = np.random.default_rng(0).normal(size=(5, 13))
    np.testing.assert_allclose(aggregate.interquartile_mean(values), stats.trim_mean(values, 0.25, axis=1))


def test_models_are_compared_over_the_sets_they_all_saw(runs):
    assert aggregate.common_dataset_groups(runs) == [["x", "y", "z"], ["x", "y"]]
    wide, narrow = (aggregate.aggregate_over_datasets(runs, chosen) for chosen in aggregate.common_dataset_groups(runs))
    assert wide.model.tolist() == ["a"]
    assert narrow.model.tolist() == ["a", "b"]
    pooled = aggregate.min_max_normalized(runs)[(runs.model == "b")]
    assert narrow.iqm[1] == pytest.approx(stats.trim_mean(pooled, 0.25))
    assert (narrow.low <= narrow.iqm).all()
    assert (narrow.iqm <= narrow.high).all()


def test_seeds_are_drawn_within_each_set(runs):
    """A model whose seeds agree on every set has no spread, however far the sets lie apart."""
    steady = runs[runs.model == "a"].assign(score=lambda t: t.dataset.map({"x": 0.9, "y": 0.4, "z": 0.1}))
    other = runs[runs.model != "a"]
    table = aggregate.aggregate_over_datasets(pd.concat([steady, other]), ["x", "y"]).set_index("model")
    assert table.low["a"] == table.high["a"] == table.iqm["a"]
    assert table.low["b"] < table.high["b"]
