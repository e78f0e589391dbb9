"""Sentences state the right models, numbers and verdicts."""

import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from pipeline.composition import CompositionResult
from pipeline.report import statements
from pipeline.report.significance import Verdict, paired_difference


@pytest.fixture(scope="module")
def pairs(grid, summary):
    """All pairs of the grid."""
    return statements.all_pairs(summary, grid[1])


def mentions_in_order(sentence: str, model: str, reference: str) -> bool:
    """Whether a sentence names first the model and then its reference."""
    first, second = (rf"(?<![\w+]){re.escape(name)}(?![\w+])" for name in (model, reference))
    return bool(re.search(f"{first}.*{second}", sentence))


def test_key_comparisons_compare_models_with_members_controls_and_frozen_models(grid, summary):
    sentences = statements.key_comparisons(summary, grid[1])
    expected = [("a+b", "a", Verdict.NOT_SIGNIFICANT), ("a+c", "c", "lacks"), ("a", "a_random", Verdict.BETTER),
                ("b, fine-tuned", "b", Verdict.BETTER)]  # fmt: skip
    for sentence, (model, reference, verdict) in zip(sentences, expected, strict=True):
        assert sentence.startswith("d: ")
        assert mentions_in_order(sentence, model, reference)
        assert verdict in sentence.lower()
    assert "fine-tuned (lora)" in sentences[-1]


def test_all_pairs_compares_every_pair_of_the_same_protocol(grid, pairs):
    _, draws = grid
    assert len(pairs) == 10
    assert not pairs.sentence.str.contains("fine-tuned").any()
    rows = pairs.set_index(["model_a", "model_b"])
    assert rows.verdict["a", "b"] == "better"
    assert rows.verdict["b", "a+b"] == "worse"
    assert rows.verdict["a", "a+b"] == "no significant difference"
    assert all(row.verdict in row.sentence.lower() for row in pairs.itertuples())
    assert all(mentions_in_order(row.sentence, row.model_a, row.model_b) for row in pairs.itertuples())
    result, row = paired_difference(draws["d", "a"], draws["d", "b"]), rows.loc[("a", "b")]
    assert (row.difference, row.low, row.high, row.p) == (result.difference, *result.interval, result.p_value)
    assert (row.samples_low, row.samples_high) == result.samples_interval
    assert (row.seeds_low, row.seeds_high) == result.seeds_interval
    numbers = [result.difference, *result.interval, *result.samples_interval, *result.seeds_interval]
    assert all(f"{number:+.3f}" in row.sentence for number in numbers)
    assert all(size in row.sentence for size in ("accuracy", "300 test samples", "3 seeds"))
    assert (pairs.p_holm >= pairs.p).all()
    significant = pairs[pairs.verdict != Verdict.NOT_SIGNIFICANT]
    n_corrected = (significant.p_holm < 0.05).sum()
    numbers = ("10 pairs", "about 0.5 ", f"{len(significant)} pairs differ", f"{n_corrected} of")
    assert all(number in statements.multiplicity_note(pairs) for number in numbers)


def test_all_pairs_of_one_model_is_an_empty_table(grid, summary, pairs):
    empty = statements.all_pairs(summary[:1], grid[1])
    assert len(empty) == 0
    assert empty.columns.equals(pairs.columns)
    assert "0 pairs" in statements.multiplicity_note(empty)


def test_all_pairs_not_significant_after_holm_states_so(grid, summary, monkeypatch):
    monkeypatch.setattr(statements.significance, "holm_adjusted", lambda p_values: np.ones(len(p_values)))
    pairs = statements.all_pairs(summary, grid[1]).set_index(["model_a", "model_b"])
    assert all(text in pairs.sentence["a", "b"] for text in ("Holm", "10 pairs"))
    assert "Holm" not in pairs.sentence["a", "a+b"]
    assert pairs.verdict["a", "b"] == "better"


def test_cka_gain_relation_states_the_sign_of_a_significant_correlation():
    cka = np.array([0.9, 0.1, 0.3, 0.8, 0.2, 0.4, 0.5, 0.6, 0.7, 0.35])
    models = ["+".join(pair) for pair in combinations("abcde", 2)]
    findings = set()
    for gain, correlation in ((-cka, "-1.00"), (cka, "+1.00"), (np.abs(cka - 0.475), "+0.12")):
        subsets = pd.DataFrame({"model": models, "members": 2, "cka": cka, "gain": gain})
        result = CompositionResult(backbones=("a", "b"), probe="knn", subsets=subsets)
        pairs, sentence = statements.cka_gain_relation({"d": result})
        assert len(pairs) == 10
        assert f" {correlation}" in sentence
        assert "10 pairs" in sentence
        findings.add(sentence.split("): ")[1].split(".")[0])
    assert len(findings) == 3, "dissimilar backbones gain more, similar ones do, or no significant correlation"


def test_cka_gain_relation_of_too_few_pairs_states_their_number(compositions):
    pairs, sentence = statements.cka_gain_relation(compositions)
    assert len(pairs) == 2
    assert "2 pairs" in sentence
    assert "p =" not in sentence


def test_distillation_sentence_states_gains_and_fraction(grid):
    draws = {("d", "small (supervised)"): grid[1]["d", "b"], ("d", "small (distilled)"): grid[1]["d", "a"]}
    sentence = statements.distillation_sentence("d", "small", "a+b", grid[1] | draws)
    gain = paired_difference(grid[1]["d", "a"], grid[1]["d", "b"])
    teacher_gain = paired_difference(grid[1]["d", "a+b"], grid[1]["d", "b"])
    assert all(name in sentence for name in ("d", "small", "a+b", "better"))
    numbers = [gain.difference, *gain.interval, teacher_gain.difference, *teacher_gain.interval]
    assert all(f"{number:+.3f}" in sentence for number in numbers)
    assert f"{gain.difference / teacher_gain.difference:.0%}" in sentence
