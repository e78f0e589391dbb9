"""The section on students: a row per model with protocol and cost, and a sentence per student."""

import re

import numpy as np
import pandas as pd
import pytest

from pipeline.report.sections import StudentResult, students_section
from pipeline.report.significance import bootstrap, summarize_runs
from pipeline.tasks import Classification

METADATA = {"dataset": "d", "student": "small", "teacher": "a+b", "skipped": None, "weights": "random",
            "variants": {"distilled": {}, "supervised": {}}}  # fmt: skip
ACCURACY = {"a+b": 0.9, "a": 0.8, "small (distilled)": 0.8, "small (supervised)": 0.7}
PROTOCOLS = {"a+b": "frozen", "a": "frozen", "small (distilled)": "distilled", "small (supervised)": "supervised"}


@pytest.fixture
def draws():
    """Draws of models that are right on the first samples, the fraction ACCURACY of all."""
    draws, n_samples = {}, 4000
    for number, (model, accuracy) in enumerate(ACCURACY.items()):
        is_correct = np.arange(n_samples) < accuracy * n_samples
        counts = np.zeros((2, n_samples, 4), int)
        counts[:, is_correct, 0], counts[:, ~is_correct, 1] = 1, 1
        draws["d", model] = bootstrap(Classification(2), counts, stream=number)
    return draws


@pytest.fixture
def summary(draws):
    """Summary of two seeds of each model."""
    runs = pd.DataFrame(
        [
            {"dataset": "d", "model": model, "weights": "random" if "small" in model else "pretrained", "seed": seed,
             "protocol": PROTOCOLS[model], "task": "classification", "metric": "accuracy",
             "score": accuracy + 0.01 * seed, "val_score": accuracy, "n_test": 4000, "classes": 2,
             "learning_rate": 0.1, "weight_decay": 0.1}
            for model, accuracy in ACCURACY.items() for seed in range(2)
        ]
    )  # fmt: skip
    return summarize_runs(runs, draws)


@pytest.fixture
def costs():
    """Costs on the CPU."""
    return pd.DataFrame(
        {"dataset": "d", "model": ["a+b", "a", "small"], "parameters": [2e7, 1e7, 1e6], "bytes": [8e7, 4e7, 4e6],
         "flops": [4e9, 2e9, 1e8], "device": "cpu", "cores": 2, "chips_per_second": [10.0, 20.0, 100.0]}
    )  # fmt: skip


def test_students_section_has_every_model_with_protocol_and_cost(draws, summary, costs, tmp_path):
    skipped = StudentResult({**METADATA, "dataset": "e", "skipped": "no teacher", "teacher": None})
    page, sentences = students_section([StudentResult(METADATA), skipped], summary, draws, costs, tmp_path)
    # The gain, the fraction of the teacher's gain, parameters, operations, and chips per second of both.
    assert all(number in sentences[0] for number in ("+0.100", "+0.200", "50%", "5.0%", "2.5%", " 100 ", " 10."))
    assert all(value in sentences[1] for value in ("e", "small", "no teacher"))
    cells = re.findall(r"<td>(.*?)</td>", page)
    table = [cells[start : start + 9] for start in range(0, len(cells), 9)]
    assert [row[0] for row in table] == list(ACCURACY)
    assert [row[1] for row in table] == ["teacher", "member", "student", "student"]
    assert [row[2] for row in table] == list(PROTOCOLS.values())
    assert [row[5] for row in table] == ["20.00", "10.00", "1.00", "1.00"]
    assert (tmp_path / "students.png").stat().st_size > 5000


def test_students_section_without_costs_has_no_numbers_of_them(draws, summary, costs, tmp_path):
    page, sentences = students_section([StudentResult(METADATA)], summary, draws, costs[:0], tmp_path)
    assert "5.0%" not in sentences[0]
    assert page.count("<td>–</td>") == 4 * 4


def test_students_section_with_a_gpu_has_its_speed(draws, summary, costs, tmp_path):
    gpu = costs.assign(device="cuda", chips_per_second=[1000.0, 2000.0, 7777.0])
    page, _ = students_section([StudentResult(METADATA)], summary, draws, pd.concat([costs, gpu]), tmp_path)
    assert page.count("<td>7777</td>") == 2
    assert page.count("<td>100</td>") == 2


def test_students_section_without_students_is_empty(draws, summary, costs, tmp_path):
    assert students_section([], summary, draws, costs, tmp_path) == ("", [])
