import dataclasses
import json
import math

import pytest

from pipeline.config import SearchConfig
from pipeline.errors import UserError
from pipeline.training.protocol import search
from tests.errors import raises

CONFIG = SearchConfig(trials=16, trials_per_round=4, seed=0, learning_rate=(1e-4, 1e-1), weight_decay=(1e-6, 1e-1))


def peaked_score(all_hparams):
    """Best at a learning rate of 0.01, whatever the weight decay."""
    return [-((math.log10(hparams.learning_rate) + 2) ** 2) for hparams in all_hparams]


class RecordedScore:
    """`peaked_score` with a list of the rounds that it was called with."""

    def __init__(self):
        self.rounds = []

    def __call__(self, all_hparams):
        self.rounds.append(all_hparams)
        return peaked_score(all_hparams)


def decay_rate(hparams):
    return hparams["learning_rate"] * hparams["weight_decay"]


def test_search_finds_the_peak_and_is_deterministic():
    score = RecordedScore()
    result = search(score, CONFIG)
    assert [len(hparams) for hparams in score.rounds] == [4, 4, 4, 4]
    assert 0.004 < result["best"]["learning_rate"] < 0.025
    assert result["score"] == max(trial["score"] for trial in result["trials"])
    assert result == search(peaked_score, CONFIG)


def test_search_trials_are_within_bounds_with_one_seed():
    score = RecordedScore()
    search(score, CONFIG)
    trials = [hparams for hparams_of_round in score.rounds for hparams in hparams_of_round]
    assert all(1e-4 <= hparams.learning_rate <= 1e-1 for hparams in trials)
    assert all(1e-6 <= hparams.weight_decay <= 1e-1 for hparams in trials)
    assert {hparams.seed for hparams in trials} == {0}
    assert len({hparams.learning_rate for hparams in trials}) == 16


class Killed(Exception):
    """Takes the place of a kill: the search gets no further."""


@pytest.mark.parametrize("n_rounds", [1, 3])
def test_search_killed_is_resumed_after_its_last_whole_round(tmp_path, n_rounds):
    before, study_path = RecordedScore(), tmp_path / "studies/one.json"

    def score_until_killed(all_hparams):
        if len(before.rounds) == n_rounds:
            raise Killed
        return before(all_hparams)

    with pytest.raises(Killed):
        search(score_until_killed, CONFIG, study_path, cache_key="lite0")
    assert len(json.loads(study_path.read_text())["trials"]) == 4 * n_rounds
    after, uninterrupted = RecordedScore(), RecordedScore()
    result = search(after, CONFIG, study_path, cache_key="lite0")
    assert result == search(uninterrupted, CONFIG)
    assert before.rounds + after.rounds == uninterrupted.rounds
    finished = search(score_until_killed, CONFIG, study_path, cache_key="lite0")
    assert finished == result, "a finished study needs no more trials"


def test_search_with_another_key_or_a_damaged_study_starts_again(tmp_path):
    study_path = tmp_path / "one.json"
    result = search(peaked_score, CONFIG, study_path, cache_key="lite0")
    score = RecordedScore()
    search(score, CONFIG, study_path, cache_key="other features")
    assert len(score.rounds) == 4
    study_path.write_bytes(study_path.read_bytes()[:40])
    assert search(score, CONFIG, study_path, cache_key="lite0") == result
    assert len(score.rounds) == 8
    study_path.write_bytes(b"\xff\xfe no text")
    assert search(score, CONFIG, study_path, cache_key="lite0") == result
    assert len(score.rounds) == 12


def test_search_with_diverged_heads_chooses_another():
    result = search(lambda trials: [math.nan if trial.learning_rate > 1e-3 else 0.5 for trial in trials], CONFIG)
    assert result["score"] == 0.5
    assert result["best"]["learning_rate"] <= 1e-3


def test_search_of_which_all_trials_diverged_is_refused():
    with raises(UserError, "16", "learning_rate", "weight_decay", key="learning_rate, weight_decay"):
        search(lambda trials: [math.nan] * len(trials), CONFIG)


def test_search_with_ties_chooses_the_strongest_decay_that_does_not_grow():
    """AdamW subtracts learning rate times weight decay of every weight; above 2 weights grow."""
    config = dataclasses.replace(CONFIG, learning_rate=(1e-2, 1.0), weight_decay=(1e-2, 100.0), trials=32)
    result = search(lambda trials: [0.0] * len(trials), config)
    rates = [decay_rate(trial) for trial in result["trials"]]
    assert max(rates) > 2
    assert abs(1 - decay_rate(result["best"])) == min(abs(1 - rate) for rate in rates)


def test_search_with_ties_chooses_the_strongest_decay():
    result = search(lambda trials: [0.5] * len(trials), CONFIG)
    assert decay_rate(result["best"]) == max(decay_rate(trial) for trial in result["trials"])


def test_search_proposes_better_trials_in_its_second_half():
    trials = search(peaked_score, CONFIG)["trials"]
    first, second = (sum(trial["score"] for trial in trials[half]) for half in (slice(8), slice(8, 16)))
    assert second > first
