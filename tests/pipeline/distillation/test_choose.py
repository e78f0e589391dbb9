import dataclasses

import pytest
from pipeline.distillation.choose import choose_teacher


def tuned(described, **scores):
    named = {name.replace("_and_", "+"): score for name, score in scores.items()}
    return {
        model: {"skipped": None if model in named else "no such bands", "score": named.get(model)}
        for model in described.grid.models
    }


@pytest.fixture
def params(params):
    return dataclasses.replace(params, distill=dataclasses.replace(params.distill, datasets=()))


def test_data_sets_that_students_do_not_learn_have_no_teacher(params):
    distill, said = dataclasses.replace(params.distill, datasets=("e", "f")), tuned(params, lite0=0.6)
    of = dataclasses.replace(params, distill=distill)
    assert choose_teacher(of, "e", said) == ("lite0", None)
    assert choose_teacher(of, "d", said) == (None, "distill.datasets in params.yaml names e, f.")


def test_the_best_network_on_validation(params):
    said = tuned(params, raw=0.9, csmask_b4=0.5, lite0=0.6, csmask_b4_and_lite0=0.55, lite0_random=0.99)
    assert choose_teacher(params, "d", said) == ("lite0", None)
    said = tuned(params, csmask_b4=0.6, csmask_b4_and_lite0=0.6, lite0=0.1)
    assert choose_teacher(params, "d", said) == ("csmask_b4+lite0", None), "of equals the one that joins more"


def test_a_model_that_is_left_out_teaches_nothing(params):
    said = tuned(params, raw=0.9, lite0=0.6)
    assert choose_teacher(params, "d", said) == ("lite0", None)
    named = dataclasses.replace(params, distill=dataclasses.replace(params.distill, teacher="csmask_b4+lite0"))
    assert choose_teacher(named, "d", said) == (None, "The teacher csmask_b4+lite0 is left out: no such bands")
    assert "no teacher" in choose_teacher(params, "d", tuned(params, raw=0.9, lite0_random=0.3))[1]


@pytest.mark.parametrize("control", ["lite0_random"])
def test_a_control_teaches_nothing(params, control):
    named = dataclasses.replace(params, distill=dataclasses.replace(params.distill, teacher=control))
    assert "a control is no teacher" in choose_teacher(named, "d", tuned(params, lite0_random=0.3))[1]
