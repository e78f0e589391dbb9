import dataclasses
import json
import math

import pytest

from pipeline.config import SearchConfig
from pipeline.errors import UserError
from pipeline.training.protocol import search
from tests.errors import raises

CONFIG = SearchConfig(trials=16, trials_per_round=4, seed=0, learning_rate=(1e-4, 1e-1), weight_decay=(1e-6, 1e-1))


class PeakedScore:
    """Best at a learning rate of 0.01; records the rounds, and fails after `n_rounds`."""

    def __init__(self, n_rounds=math.inf):
        self.rounds, self.n_rounds = [], n_rounds

    def __call__(self, all_hparams):
        if len(self.rounds) >= self.n_rounds:
            raise KeyboardInterrupt
        self.rounds.append(all_hparams)
        return [-((math.log10(hparams.learning_rate) + 2) ** 2) for hparams in all_hparams]


@pytest.fixture(scope="module")
def uninterrupted():
    """Score and result of a search."""
    score = PeakedScore()
    return score, search(score, CONFIG)


def decay_rate(hparams):
    return hparams["learning_rate"] * hparams["weight_decay"]


def test_search_finds_the_peak_within_bounds_with_one_seed(uninterrupted):
    score, result = uninterrupted
    assert [len(hparams) for hparams in score.rounds] == [4, 4, 4, 4]
    assert 0.004 < result["best"]["learning_rate"] < 0.025
    assert result["score"] == max(trial["score"] for trial in result["trials"])
    trials = [hparams for hparams_of_round in score.rounds for hparams in hparams_of_round]
    assert all(1e-4 <= hparams.learning_rate <= 1e-1 for hparams in trials)
    assert all(1e-6 <= hparams.weight_decay <= 1e-1 for hparams in trials)
    assert {hparams.seed for hparams in trials} == {0}
    assert len({hparams.learning_rate for hparams in trials}) == 16


def test_search_proposes_better_trials_in_its_second_half(uninterrupted):
    scores = [trial["score"] for trial in uninterrupted[1]["trials"]]
    assert sum(scores[8:]) > sum(scores[:8])


@pytest.mark.parametrize("n_rounds", [1, 3])
def test_search_killed_is_resumed_after_its_last_whole_round(tmp_path, uninterrupted, n_rounds):
    before, after, study_path = PeakedScore(n_rounds), PeakedScore(), tmp_path / "studies/one.json"
    with pytest.raises(KeyboardInterrupt):
        search(before, CONFIG, study_path, cache_key="lite0")
    assert len(json.loads(study_path.read_text())["trials"]) == 4 * n_rounds
    score, result = uninterrupted
    assert search(after, CONFIG, study_path, cache_key="lite0") == result
    assert before.rounds + after.rounds == score.rounds
    assert search(before, CONFIG, study_path, cache_key="lite0") == result, "a finished study needs no more trials"


def test_search_with_another_key_or_a_damaged_study_starts_again(tmp_path):
    study_path, score = tmp_path / "one.json", PeakedScore()
    result = search(score, CONFIG, study_path, cache_key="lite0")
    search(score, CONFIG, study_path, cache_key="other features")
    assert len(score.rounds) == 8
    for n_rounds, content in ((12, study_path.read_bytes()[:40]), (16, b"\xff\xfe no text")):
        study_path.write_bytes(content)
        assert search(score, CONFIG, study_path, cache_key="lite0") == result
        assert len(score.rounds) == n_rounds


def test_search_with_diverged_heads_chooses_another_or_is_refused():
    result = search(lambda trials: [math.nan if trial.learning_rate > 1e-3 else 0.5 for trial in trials], CONFIG)
    assert result["score"] == 0.5
    assert result["best"]["learning_rate"] <= 1e-3
    with raises(UserError, "16", "learning_rate", "weight_decay", key="learning_rate, weight_decay"):
        search(lambda trials: [math.nan] * len(trials), CONFIG)


@pytest.mark.parametrize("weight_decay", [(1e-6, 1e-1), (1e-2, 100.0)])
def test_search_with_ties_chooses_the_strongest_decay_that_does_not_grow(weight_decay):
    """AdamW subtracts learning rate times weight decay of every weight; above 2 weights grow."""
    config = dataclasses.replace(CONFIG, learning_rate=(1e-2, 1.0), weight_decay=weight_decay, trials=32)
    result = search(lambda trials: [0.5] * len(trials), config)
    rates = [decay_rate(trial) for trial in result["trials"]]
    assert (max(rates) > 2) == (weight_decay[1] > 2)
    assert abs(1 - decay_rate(result["best"])) == min(abs(1 - rate) for rate in rates)
