import math

from pipeline.params import Search
from pipeline.search import search

DESCRIBED = Search(trials=16, parallel=4, seed=0, learning_rate=(1e-4, 1e-1), weight_decay=(1e-6, 1e-1))


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
