import json
import subprocess

import numpy as np
import pandas as pd
import pytest

from pipeline.composition.result import CompositionResult
from pipeline.report import composition, figures, statements
from pipeline.report import page as report
from pipeline.report.significance import bootstrap
from pipeline.tasks import Classification
from tests.conftest import ROOT


@pytest.fixture
def grid():
    """Models on one set: one knows, one less, one guesses, and a join knows as much as the first."""
    label = np.random.default_rng(0).integers(2, size=300)
    runs, drawn = [], {}
    for model, weights, right in (
        ("a", "pretrained", 0.9),
        ("b", "pretrained", 0.6),
        ("a_random", "random, seed 0", 0.5),
        ("a+b", "p+p", 0.9),
        ("a+c", "p+p", 0.9),
    ):
        generator = np.random.default_rng(sum(map(ord, model)))
        wrong = generator.random((3, 300)) > right
        counts = np.stack(
            [Classification(2).counts(np.where(w, 1 - label, label), label) for w in wrong]
        )
        drawn["d", model] = bootstrap("classification", counts, 2, stream=len(drawn))
        for seed, score in enumerate(Classification(2).score(counts.sum(1))):
            runs.append(
                {"dataset": "d", "model": model, "weights": weights, "protocol": "frozen", "task": "classification",
                 "seed": seed, "metric": "accuracy", "score": score, "val_score": score, "n_test": 300, "classes": 2,
                 "learning_rate": 0.1, "weight_decay": 0.1}
            )  # fmt: skip
    return pd.DataFrame(runs), drawn


@pytest.fixture
def searched():
    """What the compose stage wrote of two sets, of which one has nothing to compose."""
    cka = pd.DataFrame(
        [
            {"level": level, "backbone_a": one, "backbone_b": other, "cka": 1.0 if one == other else 0.25}
            for level in ("level0", "all")
            for one in "ab"
            for other in "ab"
        ]
    )
    subsets = pd.DataFrame(
        {"model": ["b+a", "a", "b"], "members": [2, 1, 1], "channels": [9, 4, 5], "score": [0.9, 0.8, 0.7],
         "gain": [0.1, np.nan, np.nan], "cka": [0.25, np.nan, np.nan]}
    )  # fmt: skip
    greedy = pd.DataFrame({"backbone": ["a"], "layer": ["level0"], "score": [0.8]})
    return {
        "d": CompositionResult(("a", "b"), (), "logistic", subsets, cka, greedy),
        "e": CompositionResult(skipped=("a needs <nir>.",)),
    }


def test_summary_and_sentences(grid):
    runs, drawn = grid
    summary = report.summarize_runs(runs, drawn).set_index("model")
    assert summary.kind.to_dict() == {
        "a": "pretrained", "b": "pretrained", "a_random": "random", "a+b": "joined", "a+c": "joined",
    }  # fmt: skip
    for model, row in summary.iterrows():
        scores = runs[runs.model == model].score
        assert (row["mean"], row["std"]) == pytest.approx((scores.mean(), scores.std()))
        assert row.low < row["mean"] < row.high
    said = statements.key_comparisons(summary.reset_index(), drawn)
    assert any("a against a_random, the same network untrained" in one and one.endswith("better.") for one in said)
    assert any("a+b against a, its best member" in one and "cannot be told apart" in one for one in said)
    assert any("a+c is not compared with its members: c not in the grid" in one for one in said)


def test_every_pair_has_its_sentence(grid):
    runs, drawn = grid
    pairs = statements.all_pairs(report.summarize_runs(runs, drawn), drawn)
    assert len(pairs) == 10
    told = pairs.set_index(["one", "other"])
    assert told.verdict["a", "b"] == "better"
    assert told.sentence["a", "b"].startswith("a is better than b: +0.")
    assert told.sentence["b", "a+b"].startswith("b is worse than a+b: -0.")
    assert told.sentence["a", "a+b"].startswith("a and a+b cannot be told apart with this test set: ")
    assert "the 300 test samples alone" in told.sentence["a", "b"]
    assert "the 3 seeds alone" in told.sentence["a", "b"]
    assert (pairs.holm >= pairs.p).all()
    differ = (pairs.verdict != "cannot be told").sum()
    said = statements.multiplicity_note(pairs)
    assert said.startswith(
        "10 pairs are compared, each at 95 %: about 0.5 would seem to differ by chance if none did."
    )
    assert f"{differ} differ; " in said


def test_a_difference_that_does_not_outlast_the_others_says_so(grid, monkeypatch):
    runs, drawn = grid
    monkeypatch.setattr(statements, "holm", lambda p: np.ones(len(p)))
    pairs = statements.all_pairs(report.summarize_runs(runs, drawn), drawn).set_index(["one", "other"])
    assert pairs.sentence["a", "b"].endswith("; no longer so after Holm's correction for 10 pairs.")
    assert "Holm" not in pairs.sentence["a", "a+b"]


def test_protocols_are_not_mixed(grid):
    """The same scores under another protocol: nothing is compared across, and every row says which it is."""
    runs, drawn = grid
    tuned = runs[runs.model == "b"].assign(protocol="fine-tuned", model="b, tuned")
    drawn = drawn | {("d", "b, tuned"): drawn["d", "b"]}
    summary = report.summarize_runs(pd.concat([runs, tuned]), drawn)
    assert not any("tuned" in pair for pair in statements.all_pairs(summary, drawn).sentence)
    assert report.display_table(summary).protocol.tolist() == ["frozen"] * 5 + ["fine-tuned"]


@pytest.fixture
def tuned(grid):
    """The grid with one of its models fine-tuned too, better than any of the frozen."""
    runs, drawn = grid
    label = np.random.default_rng(0).integers(2, size=300)
    counts = np.stack([Classification(2).counts(label, label)] * 3)
    more = runs[runs.model == "b"].assign(
        protocol="fine-tuned (lora)", model="b" + statements.FINE_TUNED_SUFFIX, score=1.0, val_score=0.9, learning_rate=1e-3,
        frozen_val_score=0.6, best_step=40, trained_parameters=1234,
    )  # fmt: skip
    drawn = drawn | {("d", "b" + statements.FINE_TUNED_SUFFIX): bootstrap("classification", counts, 2, stream=9)}
    return pd.concat([runs, more], ignore_index=True), drawn


def test_a_fine_tuned_model_is_compared_with_itself_frozen_and_nothing_else(grid, tuned):
    frozen, both = (report.summarize_runs(*one) for one in (grid, tuned))
    assert both.set_index("model").kind["b, fine-tuned"] == "fine-tuned"
    pd.testing.assert_frame_equal(both[both.protocol == "frozen"], frozen)
    more = [one for one in statements.key_comparisons(both, tuned[1]) if one not in statements.key_comparisons(frozen, grid[1])]
    assert len(more) == 1
    assert more[0].startswith("d: b, fine-tuned against b, itself frozen (fine-tuned (lora): another protocol): +0.")
    assert more[0].endswith(": better.")
    assert statements.all_pairs(both, tuned[1]).equals(statements.all_pairs(frozen, grid[1]))


def test_fine_tuned_scores_stand_in_the_page_and_enter_no_frozen_figure(grid, tuned, searched, tmp_path):
    pages = {}
    for name, (runs, drawn) in {"frozen": grid, "tuned": tuned}.items():
        runs = pd.concat([runs, runs[runs.protocol == "frozen"].assign(dataset="e")])  # two sets, to aggregate over
        drawn = drawn | {("e", model): one for (_, model), one in drawn.items()}
        summary = report.summarize_runs(runs, drawn)
        said, pairs = statements.key_comparisons(summary, drawn), statements.all_pairs(summary, drawn)
        figures.draw_boxplots(runs, summary, tmp_path / "p.png")
        composed = composition.composition_section(searched, summary, tmp_path)
        pages[name] = report.render_page(summary, runs, pairs, said, [], composed, tmp_path / "p.png")
    over = [page.split("<h2>Over the data sets</h2>")[1].split("<h2>Composition")[0] for page in pages.values()]
    assert "interquartile mean" in over[0]
    assert over[0] == over[1]
    assert "Fine-tuning</h2>" not in pages["frozen"]
    table = pages["tuned"].split("Fine-tuning</h2>")[1].split("</table>")[0]
    assert all(
        word in table for word in ("b, fine-tuned", "fine-tuned (lora)", "1,234", "0.600", "0.900", "40, 40, 40")
    )
    row = next(line for line in pages["tuned"].split("<tr>") if "b, fine-tuned" in line)
    assert "1.000 ± 0.000" in row
    assert "fine-tuned (lora)" in row


def test_the_page_is_whole_and_escapes(grid, searched, tmp_path):
    runs, drawn = grid
    summary = report.summarize_runs(runs, drawn)
    said, pairs = statements.key_comparisons(summary, drawn), statements.all_pairs(summary, drawn)
    figures.draw_boxplots(runs, summary, tmp_path / "p.png")
    composed = composition.composition_section(searched, summary, tmp_path)
    page = report.render_page(summary, runs, pairs, said, ["<x>"], composed, tmp_path / "p.png")
    assert "&lt;x&gt;" in page
    assert "<x>" not in page
    assert page.count("data:image/png;base64,") == 3
    assert page.index("test score, mean ± std") < page.index("Box plots") < page.index("What can be told")
    for table in page.split("<table")[1:]:
        assert "frozen" in table.split("</table>")[0]


def test_settings_say_what_was_trained_on_what(grid, searched, tmp_path):
    runs, drawn = grid
    heads = runs.model.map(
        {"a": "linear, mean_level0", "a+b": "linear, film, mean_level0"}
    )  # others: of an older run
    summary = report.summarize_runs(runs.assign(head=heads), drawn)
    figures.draw_boxplots(runs, summary, tmp_path / "p.png")
    page = report.render_page(summary, runs, statements.all_pairs(summary, drawn), [], [], "", tmp_path / "p.png")
    settings = page.split("<h2>Settings</h2>")[1]
    rows = {line.split("<td>")[2].split("<")[0]: line for line in settings.split("<tr>")[1:]}
    assert "linear, film, mean_level0" in rows["a+b"]
    assert "<td>–</td>" in rows["b"]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_layers_one_by_one_say_what_they_were_scored_on(grid, searched, tmp_path, task):
    runs, drawn = grid
    text = composition.composition_section(searched, report.summarize_runs(runs, drawn).assign(task=task), tmp_path)
    assert "also what heads.levels and heads.linear leave out" in text
    assert ("not on whole masks" in text) == (task == "segmentation")


def test_the_search_beside_the_full_protocol(grid, searched, tmp_path):
    runs, drawn = grid
    text = composition.composition_section(searched, report.summarize_runs(runs, drawn), tmp_path)
    score = runs[runs.model == "a+b"].score
    row = next(line for line in text.split("<tr>") if "b+a" in line)  # the grid's a+b, its members in another order
    assert f"{score.mean():.3f} ± {score.std():.3f}" in row
    assert "+0.100" in row
    assert "e: nothing to compose. a needs &lt;nir&gt;." in text
    assert "cannot be asked of 1 pairs of backbones on 1 data sets" in text
    assert (tmp_path / "cka.png").stat().st_size > 1000


def test_low_cka_that_foretells_gain_is_said_so(searched):
    one = searched["d"]
    alike = np.linspace(0.1, 0.9, 7)
    pairs = pd.DataFrame({"model": "a+b", "members": 2, "cka": alike, "gain": -alike})
    table, sentence = composition.cka_gain_relation({"d": CompositionResult(subsets=pairs, cka=one.cka, greedy=one.greedy)})
    assert len(table) == 7
    assert "correlation of CKA and gain is -1.00 (permutation p = 0.00): unlike gain more" in sentence


def committed(name: str) -> str:
    """A file as it was committed: `make run` writes scores over it, on another processor with other last digits."""
    shown = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, text=True)
    return shown.stdout if shown.returncode == 0 else (ROOT / name).read_text()


def test_the_readme_shows_the_committed_scores():
    """Every score in the README's table is the one in results/metrics.json, and none is missing."""
    scores = json.loads(committed("results/metrics.json"))
    table = [line.split("|") for line in committed("README.md").splitlines() if "±" in line and "|" in line]
    shown = {(cells[1].strip(), cells[2].strip()): cells[5].strip() for cells in table if cells[1].strip() in scores}
    expected = {
        (dataset, model): f"{score['mean']:.3f} ± {score['std']:.3f}"
        for dataset, models in scores.items()
        for model, score in models.items()
    }
    assert shown == expected
