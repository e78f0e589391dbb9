"""Sentences state the right models, numbers and verdicts."""

import re

import numpy as np
import pandas as pd

from pipeline.composition.search import CompositionResult
from pipeline.report import statements
from pipeline.report.significance import Verdict, paired_difference, summarize_runs


def mentions_in_order(sentence: str, model: str, reference: str) -> bool:
    """Whether a sentence names first the model and then its reference."""
    first, second = (rf"(?<![\w+]){re.escape(name)}(?![\w+])" for name in (model, reference))
    return bool(re.search(f"{first}.*{second}", sentence))


def test_key_comparisons_compare_ensembles_with_members_and_networks_with_controls(grid, summary):
    sentences = statements.key_comparisons(summary, grid[1])
    assert len(sentences) == 3
    with_member, without_member, with_control = sentences
    assert mentions_in_order(with_member, "a+b", "a")
    assert Verdict.NOT_SIGNIFICANT in with_member.lower()
    assert mentions_in_order(without_member, "a+c", "c")
    assert mentions_in_order(with_control, "a", "a_random")
    assert Verdict.BETTER in with_control
    assert all(sentence.startswith("d: ") for sentence in sentences)


def test_all_pairs_compares_every_pair_of_the_dataset(grid, summary):
    _, draws = grid
    pairs = statements.all_pairs(summary, draws)
    assert len(pairs) == 10
    rows = pairs.set_index(["model_a", "model_b"])
    assert rows.verdict["a", "b"] == "better"
    assert rows.verdict["b", "a+b"] == "worse"
    assert rows.verdict["a", "a+b"] == "no significant difference"
    assert all(row.verdict in row.sentence.lower() for row in pairs.itertuples())
    assert all(mentions_in_order(row.sentence, row.model_a, row.model_b) for row in pairs.itertuples())
    result = paired_difference(draws["d", "a"], draws["d", "b"])
    row = rows.loc[("a", "b")]
    assert (row.difference, row.low, row.high, row.p) == (result.difference, *result.interval, result.p_value)
    numbers = [result.difference, *result.interval, *result.samples_interval, *result.seeds_interval]
    assert all(f"{number:+.3f}" in row.sentence for number in numbers)
    assert all(size in row.sentence for size in ("accuracy", "300 test samples", "3 seeds"))
    assert (pairs.p_holm >= pairs.p).all()


def test_all_pairs_of_one_model_is_an_empty_table(grid, summary):
    pairs = statements.all_pairs(summary[:1], grid[1])
    assert len(pairs) == 0
    assert {"dataset", "protocol", "model_a", "model_b", "verdict", "p_holm", "sentence"} <= set(pairs.columns)
    assert "0 pairs" in statements.multiplicity_note(pairs)


def test_multiplicity_note_counts_significant_pairs_and_those_expected_by_chance(grid, summary):
    pairs = statements.all_pairs(summary, grid[1])
    n_significant = (pairs.verdict != Verdict.NOT_SIGNIFICANT).sum()
    n_corrected = ((pairs.verdict != Verdict.NOT_SIGNIFICANT) & (pairs.p_holm < 0.05)).sum()
    note = statements.multiplicity_note(pairs)
    assert note.startswith("10 pairs")
    assert all(
        number in note for number in ("95 %", "about 0.5 ", f"{n_significant} pairs differ", f"{n_corrected} of")
    )


def test_all_pairs_not_significant_after_holm_states_so(grid, summary, monkeypatch):
    monkeypatch.setattr(statements, "holm_adjusted", lambda p_values: np.ones(len(p_values)))
    pairs = statements.all_pairs(summary, grid[1]).set_index(["model_a", "model_b"])
    assert "Holm" in pairs.sentence["a", "b"]
    assert "10 pairs" in pairs.sentence["a", "b"]
    assert "Holm" not in pairs.sentence["a", "a+b"]
    assert pairs.verdict["a", "b"] == "better"


def test_all_pairs_never_mixes_protocols(grid):
    runs, draws = grid
    other = runs[runs.model == "b"].assign(protocol="fine-tuned", model="b, other")
    draws = draws | {("d", "b, other"): draws["d", "b"]}
    summary = summarize_runs(pd.concat([runs, other]), draws)
    assert not any("other" in sentence for sentence in statements.all_pairs(summary, draws).sentence)


def test_key_comparisons_fine_tuned_model_is_compared_with_the_frozen_one_only(grid, summary, grid_with_fine_tuned):
    _, draws = grid_with_fine_tuned
    both = summarize_runs(*grid_with_fine_tuned)
    assert both.set_index("model").kind["b, fine-tuned"] == "fine-tuned"
    pd.testing.assert_frame_equal(both[both.protocol == "frozen"], summary)
    frozen_sentences = statements.key_comparisons(summary, grid[1])
    added = [sentence for sentence in statements.key_comparisons(both, draws) if sentence not in frozen_sentences]
    assert len(added) == 1
    assert mentions_in_order(added[0], "b, fine-tuned", "b")
    assert Verdict.BETTER in added[0]
    assert "fine-tuned (lora)" in added[0]
    assert statements.all_pairs(both, draws).equals(statements.all_pairs(summary, grid[1]))


def compositions_of(cka, gain, composition):
    subsets = pd.DataFrame({"model": "a+b", "members": 2, "cka": cka, "gain": gain})
    return {"d": CompositionResult(backbones=("a", "b"), probe="knn", subsets=subsets, cka=composition.cka)}


def test_cka_gain_relation_states_the_sign_of_a_significant_correlation(compositions):
    cka = np.linspace(0.1, 0.9, 7)
    findings = set()
    for gain, correlation in ((-cka, "-1.00"), (cka, "+1.00"), (np.array([1, 0, 1, 0, 1, 0, 1]), "+0.00")):
        pairs, sentence = statements.cka_gain_relation(compositions_of(cka, gain, compositions["d"]))
        assert len(pairs) == 7
        assert f" {correlation} " in sentence
        assert "7 pairs" in sentence
        findings.add(sentence.split("): ")[1].split(".")[0])
    assert len(findings) == 3, (
        "dissimilar backbones gain more, similar ones do, or the correlation is not significant"
    )


def test_cka_gain_relation_of_too_few_pairs_states_their_number(compositions):
    pairs, sentence = statements.cka_gain_relation(compositions)
    assert len(pairs) == 1
    assert "1 pairs" in sentence
    assert "p =" not in sentence


def test_distillation_sentence_states_gains_and_fraction(grid):
    _, draws = grid
    draws_of_students = {("d", "small (distilled)"): draws["d", "a"], ("d", "small (supervised)"): draws["d", "b"]}
    sentence = statements.distillation_sentence("d", "small", "a+b", draws | draws_of_students)
    gain = paired_difference(draws["d", "a"], draws["d", "b"])
    teacher_gain = paired_difference(draws["d", "a+b"], draws["d", "b"])
    assert all(name in sentence for name in ("d", "small", "a+b"))
    numbers = [gain.difference, *gain.interval, teacher_gain.difference, *teacher_gain.interval]
    assert all(f"{number:+.3f}" in sentence for number in numbers)
    assert f"{gain.difference / teacher_gain.difference:.0%}" in sentence
