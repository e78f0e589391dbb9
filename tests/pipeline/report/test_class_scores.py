"""Tables of metrics and of classes, against scikit-learn, with a class that the test labels lack."""

import numpy as np
import pytest
from sklearn import metrics

from pipeline.report import class_scores
from pipeline.tasks import MultiLabel, Segmentation, counts_from_table
from pipeline.training.predictions import prediction_table


def test_average_precision_of_multilabel_predictions_is_sklearns_without_absent_classes():
    generator = np.random.default_rng(0)
    task, label, logits = MultiLabel(4), generator.integers(2, size=(50, 4)), generator.normal(size=(3, 50, 4))
    label[:, 2] = 0
    table = prediction_table([f"s{i}" for i in range(50)], label, logits, task)
    precision = class_scores.average_precision(table)
    assert np.isnan(precision[:, 2]).all()
    present = [0, 1, 3]
    expected = [metrics.average_precision_score(label[:, present], seed[:, present]) for seed in logits]
    scores = class_scores.metric_table(task, counts_from_table(table, task)[1], precision).set_index("metric")
    row = scores.loc["mean average precision"]
    assert (row["mean"], row["std"]) == pytest.approx((np.mean(expected), np.std(expected, ddof=1)))
    assert list(scores.index) == ["micro F1", "macro F1", "mean average precision"]


def test_class_table_of_an_absent_class_has_its_predictions_and_no_score():
    label = np.array([[[0, 0], [1, 1]]])
    counts = Segmentation(3).counts(np.array([[[0, 2], [1, 1]]]), label)[None]
    table = class_scores.class_table(Segmentation(3), counts, ["field", "wood", "pond"])
    assert table.support.tolist() == [2, 2, 0]
    assert table.predicted.tolist() == [1, 2, 1]
    np.testing.assert_array_equal(table.iou, [0.5, 1, np.nan])
    assert table.iou_std.isna().all(), "a single seed has no deviation"
