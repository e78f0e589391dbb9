"""The report's part on students, on draws whose truth is known."""

import re

import numpy as np
import pandas as pd
import pytest

from pipeline.report import distillation
from pipeline.report import page as report
from pipeline.report.significance import bootstrap

TOLD = {"dataset": "d", "student": "small", "teacher": "a+b", "skipped": None, "weights": "random",
        "variants": {"distilled": {}, "supervised": {}}}  # fmt: skip


def said_of(shares: dict[str, float], count: int = 4000) -> dict:
    """Draws of models that are right on these shares of the same samples."""
    drawn = {}
    for number, (model, share) in enumerate(shares.items()):
        right = np.arange(count) < share * count
        counts = np.zeros((2, count, 4), int)
        counts[:, right, 0], counts[:, ~right, 1] = 1, 1
        drawn["d", model] = bootstrap("classification", counts, 2, stream=number)
    return drawn


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        (
            {"a+b": 0.9, "small (distilled)": 0.8, "small (supervised)": 0.7},
            "Distillation helps.*It keeps 50% of",
        ),
        ({"a+b": 0.9, "small (distilled)": 0.7, "small (supervised)": 0.7}, "cannot be told with this test set.*keeps 0%"),
        ({"a+b": 0.7, "small (distilled)": 0.7, "small (supervised)": 0.7}, "gain it keeps cannot be told"),
        ({"a+b": 0.6, "small (distilled)": 0.7, "small (supervised)": 0.7}, "there is no gain to keep"),
        ({"a+b": 0.9, "small (distilled)": 0.6, "small (supervised)": 0.7}, "Distillation harms"),
    ],
)
def test_what_is_kept_is_said_only_where_it_can_be_told(shares, says):
    sentence = distillation.gain_recovered(distillation.StudentResult(TOLD), said_of(shares))
    assert re.search(says, sentence), sentence


def test_the_section_has_every_row_with_its_protocol_and_cost(tmp_path):
    shares = {"a+b": 0.9, "a": 0.8, "small (distilled)": 0.8, "small (supervised)": 0.7}
    protocols = dict(zip(shares, ["frozen", "frozen", "distilled", "supervised"], strict=True))
    runs = pd.DataFrame(
        [
            {"dataset": "d", "model": model, "weights": "random" if "small" in model else "pretrained", "seed": seed,
             "protocol": protocols[model], "task": "classification", "metric": "accuracy",
             "score": share + 0.01 * seed, "val_score": share, "n_test": 4000, "classes": 2,
             "learning_rate": 0.1, "weight_decay": 0.1}
            for model, share in shares.items() for seed in range(2)
        ]
    )  # fmt: skip
    drawn = said_of(shares)
    summary = report.summarize_runs(runs, drawn)
    assert summary.set_index("model").kind.to_dict() == {
        "a+b": "joined", "a": "pretrained", "small (distilled)": "student", "small (supervised)": "student"
    }  # fmt: skip
    costs = pd.DataFrame(
        {"dataset": "d", "model": ["a+b", "a", "small"], "parameters": [2e7, 1e7, 1e6], "bytes": [8e7, 4e7, 4e6],
         "flops": [4e9, 2e9, 1e8], "device": "cpu", "cores": 2, "chips_per_second": [10.0, 20.0, 100.0]}
    )  # fmt: skip
    skipped = distillation.StudentResult({**TOLD, "dataset": "e", "skipped": "no teacher", "teacher": None})
    page, said = distillation.students_section([distillation.StudentResult(TOLD), skipped], summary, drawn, costs, tmp_path)
    assert "5.0% of the teacher's parameters, takes 2.5% of its operations" in said[0]
    assert "100 chips a second where the teacher reads 10" in said[0]
    assert said[1] == "e: no student small: no teacher"
    cells = re.findall(r"<td>(.*?)</td>", page)
    table = [cells[start : start + 9] for start in range(0, len(cells), 9)]
    assert [row[0] for row in table] == ["a+b", "a", "small (distilled)", "small (supervised)"]
    assert [row[1] for row in table] == ["teacher", "member", "student", "student"]
    assert [row[2] for row in table] == list(protocols.values())
    assert [row[5] for row in table] == ["20.00", "10.00", "1.00", "1.00"]
    assert (tmp_path / "students.png").stat().st_size > 5000
    assert distillation.students_section([], summary, drawn, costs, tmp_path) == ("", [])
