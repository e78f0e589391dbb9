import numpy as np
import pandas as pd
import pytest

from pipeline import metrics, report
from tests.conftest import ROOT


@pytest.fixture
def grid():
    """Models on one set: one knows, one less, one guesses, and a join knows as much as the first."""
    label = np.random.default_rng(0).integers(2, size=300)
    runs, counts = [], {}
    for model, weights, right in (
        ("a", "pretrained", 0.9),
        ("b", "pretrained", 0.6),
        ("a_random", "random, seed 0", 0.5),
        ("a+b", "p+p", 0.9),
        ("a+c", "p+p", 0.9),
    ):
        generator = np.random.default_rng(sum(map(ord, model)))
        wrong = generator.random((3, 300)) > right
        counts["d", model] = np.stack(
            [metrics.counts("classification", np.where(w, 1 - label, label), label, 2, None) for w in wrong]
        )
        for seed, score in enumerate(metrics.score("classification", counts["d", model].sum(1), 2)):
            runs.append(
                {"dataset": "d", "model": model, "weights": weights, "protocol": "frozen", "task": "classification",
                 "seed": seed, "metric": "accuracy", "score": score, "val_score": score, "n_test": 300, "classes": 2,
                 "learning_rate": 0.1, "weight_decay": 0.1}
            )  # fmt: skip
    return pd.DataFrame(runs), counts


def test_summary_and_sentences(grid, tmp_path):
    runs, counts = grid
    summary = report.summarise(runs, counts).set_index("model")
    assert summary.kind.to_dict() == {
        "a": "pretrained", "b": "pretrained", "a_random": "random", "a+b": "joined", "a+c": "joined",
    }  # fmt: skip
    for model, row in summary.iterrows():
        scores = runs[runs.model == model].score
        assert (row["mean"], row["std"]) == pytest.approx((scores.mean(), scores.std()))
        assert row.low < row["mean"] < row.high
    said = report.findings(summary.reset_index(), counts)
    assert any("a against a_random, the same network untrained" in one and one.endswith("better.") for one in said)
    assert any("a+b against a, its best member" in one and "cannot be told apart" in one for one in said)
    assert any("a+c is not compared with its members: c not in the grid" in one for one in said)
    report.boxplots(runs, summary.reset_index(), tmp_path / "p.png")
    page = report.page(summary.reset_index(), said, ["<x>"], tmp_path / "p.png")
    assert "&lt;x&gt;" in page
    assert "<x>" not in page


def test_the_readme_shows_the_committed_scores():
    """Every score in the README's table is the one in results/metrics.json, and none is missing."""
    import json

    scores = json.loads((ROOT / "results/metrics.json").read_text())
    table = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines() if "±" in line and "|" in line]
    shown = {(cells[1].strip(), cells[2].strip()): cells[5].strip() for cells in table if cells[1].strip() in scores}
    expected = {
        (dataset, model): f"{score['mean']:.3f} ± {score['std']:.3f}"
        for dataset, models in scores.items()
        for model, score in models.items()
    }
    assert shown == expected
