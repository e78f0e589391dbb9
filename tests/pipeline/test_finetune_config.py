"""The section `finetune` of params.yaml, and the models named for it."""

import pytest

from pipeline.config import FineTuneConfig
from pipeline.errors import UserError
from tests.pipeline.test_config import load_with


def test_none_is_the_default(params):
    assert params.grid.finetune == ()
    assert params.finetune.protocol == "fine-tuned (all)"


@pytest.mark.parametrize(
    ("what", "last", "protocol"),
    [
        ("lora", 0, "fine-tuned (lora)"),
        ("last1", 1, "fine-tuned (last 1 blocks)"),
        ("last12", 12, "fine-tuned (last 12 blocks)"),
    ],
)
def test_what(what, last, protocol):
    assert (FineTuneConfig(what).n_last_blocks, FineTuneConfig(what).protocol) == (last, protocol)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"what": "last0"}, ["finetune.what is 'last0'", "all, lora, or last and a number"]),
        ({"what": "head"}, ["finetune.what is 'head'"]),
        ({"rank": 0}, ["finetune.rank is 0"]),
        ({"steps": -1}, ["finetune.steps is -1", "at least 1"]),
        ({"learning_rates": []}, ["finetune.learning_rates is []"]),
        ({"learning_rates": [1e-3, 0]}, ["each above 0"]),
        ({"learning_rates": [1e-3, "1e-3"]}, ["each once"]),
        ({"decay": 1.5}, ["finetune.decay is 1.5", "at most 1"]),
        ({"weight_decay": -1}, ["finetune.weight_decay is -1"]),
        ({"precision": "float16"}, ["finetune.precision is 'float16'", "bfloat16"]),
        ({"epochs": 3}, ["unknown key: epochs", "steps"]),
    ],
)
def test_values_that_mean_nothing(tmp_path, change, words):
    with pytest.raises(UserError) as error:
        load_with(tmp_path, lambda content: content["finetune"].update(change))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("names", [["hiera_200m"], ["lite0", "lite0"], ["raw+lite0"]])
def test_only_models_with_frozen_heads(tmp_path, names):
    with pytest.raises(UserError, match="must name models of grid.models .*, whose frozen heads are the start"):
        load_with(tmp_path, lambda content: content["grid"].update(finetune=names))
