"""Summaries over datasets: normalized scores and the interquartile mean."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pipeline.report import significance


@pytest.fixture
def runs():
    """Four seeds each of a on datasets x, y and z, of b on x and y, and of c on x."""
    generator = np.random.default_rng(0)
    rows = [
        {"dataset": dataset, "model": model, "seed": seed, "score": base + generator.uniform(0, 0.1)}
        for model, datasets, base in (("a", "xyz", 0.8), ("b", "xy", 0.5), ("c", "x", 0.2))
        for dataset in datasets
        for seed in range(4)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("model", "weights", "protocol", "kind"),
    [
        ("a+raw", "pretrained+none", "frozen", "ensemble"),
        ("a", "pretrained", "frozen", "pretrained"),
        ("a_random", "random, seed 0", "frozen", "random weights (control)"),
        ("raw", "none", "frozen", "band statistics (control)"),
        ("a, fine-tuned", "pretrained", "fine-tuned (lora)", "fine-tuned"),
        ("small (distilled)", "random", "distilled", "student"),
        ("small (supervised)", "pretrained", "supervised", "student"),
    ],
)
def test_model_kind_follows_protocol_and_weights(model, weights, protocol, kind):
    assert significance.model_kind(model, weights, protocol) == kind


def test_summarize_runs_has_mean_and_spread_of_each_model(grid, summary):
    runs, _ = grid
    rows = summary.set_index("model")
    assert rows.kind.to_dict() == {
        "a": "pretrained", "b": "pretrained", "a_random": "random weights (control)", "a+b": "ensemble",
        "a+c": "ensemble",
    }  # fmt: skip
    for model, row in rows.iterrows():
        scores = runs[runs.model == model].score
        assert (row["mean"], row["std"]) == pytest.approx((scores.mean(), scores.std()))
        assert row.low < row["mean"] < row.high


def test_min_max_normalized_worst_run_is_zero_and_best_is_one(runs):
    scaled = runs.assign(score=significance.min_max_normalized(runs))
    assert scaled.groupby("dataset").score.agg(["min", "max"]).to_numpy().tolist() == [[0, 1]] * 3
    x = runs[runs.dataset == "x"].score
    np.testing.assert_allclose(scaled[scaled.dataset == "x"].score, (x - x.min()) / (x.max() - x.min()))
    assert (significance.min_max_normalized(runs.assign(score=0.4)) == 0).all()


def test_interquartile_mean_excludes_the_outer_quarters():
    assert significance.interquartile_mean(np.array([-99, 1, 2, 99])) == 1.5
    values = np.random.default_rng(0).normal(size=(5, 13))
    np.testing.assert_allclose(significance.interquartile_mean(values), stats.trim_mean(values, 0.25, axis=1))


def test_aggregate_over_datasets_has_only_models_that_ran_on_all(runs):
    groups = significance.common_dataset_groups(runs)
    assert groups == [["x", "y", "z"], ["x", "y"]]
    all_three, first_two = (significance.aggregate_over_datasets(runs, datasets) for datasets in groups)
    assert all_three.model.tolist() == ["a"]
    assert first_two.model.tolist() == ["a", "b"]
    scores = significance.min_max_normalized(runs)[(runs.model == "b")]
    assert first_two.iqm[1] == pytest.approx(stats.trim_mean(scores, 0.25))
    assert (first_two.low <= first_two.iqm).all()
    assert (first_two.iqm <= first_two.high).all()


def test_aggregate_over_datasets_resamples_seeds_within_each_dataset(runs):
    """A model with equal scores of all seeds has no spread, however different the datasets are."""
    constant = runs[runs.model == "a"].assign(score=lambda table: table.dataset.map({"x": 0.9, "y": 0.4, "z": 0.1}))
    runs = pd.concat([constant, runs[runs.model != "a"]])
    table = significance.aggregate_over_datasets(runs, ["x", "y"]).set_index("model")
    assert table.low["a"] == table.high["a"] == table.iqm["a"]
    assert table.low["b"] < table.high["b"]
