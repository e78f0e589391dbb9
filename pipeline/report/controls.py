"""Control of an ensemble, which joins the features of its members: join their predictions instead."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.errors import UserError
from pipeline.report.significance import AVERAGE_SUFFIX
from pipeline.tasks import counts_from_table, get_task


def average_members(tables: Sequence[pd.DataFrame], runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Average the probabilities that the members of an ensemble predict, seed by seed; nothing is trained.

    Args:
        tables: test predictions of the members, with probabilities (pipeline/training/predictions.py).
        runs: runs of the ensemble, one row per seed.

    Returns:
        The runs and the test predictions of the average. Runs have no validation score.

    Raises UserError if the members were tested with other seeds or on other samples.
    """
    sorted_tables = [table.sort_values(["seed", "sample"], kind="stable", ignore_index=True) for table in tables]
    first = sorted_tables[0]
    keys = ["seed", "sample"]
    if any(not table[keys].equals(first[keys]) for table in sorted_tables):
        model = runs.model.iloc[0]
        raise UserError(
            f"The members of {model} were tested with different seeds or samples. Run: dvc repro", value=model
        )
    task = get_task(runs.task.iloc[0])(int(runs.classes.iloc[0]))
    probability = np.mean([np.stack(table.probability) for table in sorted_tables], axis=0)
    # A class of a multi-label task is predicted above 0.5; the argmax of other tasks is not changed by a shift.
    predicted = first.assign(probability=list(probability), predicted=list(task.predict(probability - 0.5, axis=1)))
    averaged = runs.sort_values("seed", ignore_index=True).assign(
        model=runs.model.iloc[0] + AVERAGE_SUFFIX, head="average of probabilities", val_score=np.nan,
        learning_rate=np.nan, weight_decay=np.nan,
        score=task.score(counts_from_table(predicted, task)[1].sum(axis=1)),
    )  # fmt: skip
    return averaged, predicted
