import dataclasses
import json
import math

import pytest

from pipeline.config import SearchConfig
from pipeline.training.search import search

DESCRIBED = SearchConfig(trials=16, trials_per_round=4, seed=0, learning_rate=(1e-4, 1e-1), weight_decay=(1e-6, 1e-1))


def bump(settings):
    """Best at a learning rate of 0.01, whatever the weight decay."""
    return [-((math.log10(setting.learning_rate) + 2) ** 2) for setting in settings]


def test_the_search_finds_the_bump_and_is_reproducible():
    asked = []
    found = search(lambda settings: asked.append(settings) or bump(settings), DESCRIBED)
    assert [len(settings) for settings in asked] == [4, 4, 4, 4]
    assert 0.004 < found["best"]["learning_rate"] < 0.025
    assert found["score"] == max(trial["score"] for trial in found["trials"])
    assert found == search(bump, DESCRIBED)


def test_bounds_hold_and_trials_differ_in_settings_alone():
    seen = []
    search(lambda settings: seen.extend(settings) or bump(settings), DESCRIBED)
    assert all(1e-4 <= one.learning_rate <= 1e-1 and 1e-6 <= one.weight_decay <= 1e-1 for one in seen)
    assert {one.seed for one in seen} == {0}
    assert len({one.learning_rate for one in seen}) == 16


class Killed(Exception):
    """Stands for a kill: the search gets no further."""


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_killed_search_goes_on_after_its_last_whole_round(tmp_path, rounds):
    asked, study = [], tmp_path / "studies/one.json"

    def until_killed(settings):
        if len(asked) == rounds:
            raise Killed
        asked.append(settings)
        return bump(settings)

    with pytest.raises(Killed):
        search(until_killed, DESCRIBED, study, cache_key="lite0")
    assert len(json.loads(study.read_text())["trials"]) == 4 * rounds
    after = []
    found = search(lambda settings: after.append(settings) or bump(settings), DESCRIBED, study, cache_key="lite0")
    unbroken = []
    assert found == search(lambda settings: unbroken.append(settings) or bump(settings), DESCRIBED)
    assert asked + after == unbroken
    assert search(until_killed, DESCRIBED, study, cache_key="lite0") == found, "a finished study asks for nothing"


def test_a_study_of_something_else_or_a_torn_one_is_begun_anew(tmp_path):
    study = tmp_path / "one.json"
    found = search(bump, DESCRIBED, study, cache_key="lite0")
    calls = []

    def counted(settings):
        calls.append(settings)
        return bump(settings)

    search(counted, DESCRIBED, study, cache_key="other features")
    assert len(calls) == 4
    study.write_bytes(study.read_bytes()[:40])
    assert search(counted, DESCRIBED, study, cache_key="lite0") == found
    assert len(calls) == 8
    study.write_bytes(b"\xff\xfe no text")
    assert search(counted, DESCRIBED, study, cache_key="lite0") == found
    assert len(calls) == 12


def test_a_diverged_head_is_the_worst():
    def diverging(settings):
        return [float("nan") if one.learning_rate > 1e-3 else 0.5 for one in settings]

    found = search(diverging, DESCRIBED)
    assert found["score"] == 0.5
    assert found["best"]["learning_rate"] <= 1e-3


def test_of_equals_the_one_that_shrinks_most_and_does_not_grow():
    """AdamW takes learning rate times weight decay of every weight; of more than 2 they grow without end."""
    described = dataclasses.replace(DESCRIBED, learning_rate=(1e-2, 1.0), weight_decay=(1e-2, 100.0), trials=32)
    found = search(lambda settings: [0.0] * len(settings), described)
    shares = [trial["learning_rate"] * trial["weight_decay"] for trial in found["trials"]]
    assert max(shares) > 2
    chosen = found["best"]["learning_rate"] * found["best"]["weight_decay"]
    assert abs(1 - chosen) == min(abs(1 - share) for share in shares)


def test_the_second_half_leans_on_the_first():
    trials = search(bump, DESCRIBED)["trials"]
    first, second = (sum(trial["score"] for trial in trials[half]) for half in (slice(8), slice(8, 16)))
    assert second > first


def test_of_equals_the_one_that_decays_most():
    found = search(lambda settings: [0.5] * len(settings), DESCRIBED)
    decays = [trial["learning_rate"] * trial["weight_decay"] for trial in found["trials"]]
    assert found["best"]["learning_rate"] * found["best"]["weight_decay"] == max(decays)
