"""Task definitions: labels, losses and their gradients against autograd, predictions, scores."""

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn import metrics

from pipeline import tasks
from pipeline.errors import UserError
from pipeline.tasks import IGNORE, NO_CLASS, Classification, MultiLabel, Segmentation, Task, get_task
from tests.errors import raises

WEIGHTS = (0.2, 1.0, 4.0, 0.0)
TASKS = {
    "classification": Classification(4),
    "weighted classification": Classification(4, WEIGHTS),
    "multilabel": MultiLabel(4),
    "segmentation": Segmentation(4),
    "weighted segmentation": Segmentation(4, WEIGHTS),
}


def random_labels(task: Task, heads: int, batch: int) -> torch.Tensor:
    """Labels of `heads` heads; half of the pixels of masks are ignored, one mask as a whole."""
    generator = torch.Generator().manual_seed(1)
    if task.is_multilabel:
        return torch.randint(2, (heads, batch, task.n_classes), generator=generator)
    label = torch.randint(task.n_classes, (heads, batch, *((6, 5) if task.is_dense else ())), generator=generator)
    if task.is_dense:
        label[:, :, :3] = IGNORE
        label[:, 0] = IGNORE
        label = label.to(torch.uint8)
    return label


def random_logits(task: Task, heads: int, batch: int) -> torch.Tensor:
    return 3 * torch.randn(heads, batch, task.n_classes, *((6, 5) if task.is_dense else ()))


def test_get_task_of_an_unknown_name_is_refused():
    assert [get_task(name) for name in ("classification", "multilabel", "segmentation")] == list(tasks.TASKS.values())
    with raises(UserError, "segmentation", key="datasets.a.task", value="regresion", allowed=tasks.TASKS):
        get_task("regresion", "datasets.a.task")


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "value"),
    [
        ("classification", (), np.int64, NO_CLASS),
        ("multilabel", (5,), np.uint8, IGNORE),
        ("segmentation", (8, 9), np.uint8, IGNORE),
    ],
)
def test_missing_label_has_the_format_of_the_tasks_labels(name, shape, dtype, value):
    task = get_task(name)
    label = task.missing_label(5, (8, 9))
    assert (label.shape, label.dtype) == (shape, dtype)
    assert (label == value).all()
    assert len(task.label_dims) == 1 + len(shape)
    assert not Classification(5).is_valid_label(np.array(NO_CLASS))


@pytest.mark.parametrize(
    ("name", "expected", "present"),
    [
        ("classification", 2, [2]),
        ("multilabel", [1, 0, 1, 0], [0, 2]),
        ("segmentation", [[0, 2, 2], [IGNORE, 2, IGNORE]], [0, 2]),
    ],
)
def test_label_from_mask_ignores_unlabelled_pixels(name, expected, present):
    mask = np.array([[0, 2, 2], [IGNORE, 2, IGNORE]], np.uint8)
    label = get_task(name).label_from_mask(mask, 4)
    assert label.tolist() == expected
    assert label.dtype == get_task(name).label_dtype
    assert get_task(name).classes_present(label).tolist() == present
    assert get_task(name)(4).is_valid_label(label)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (Classification(4), [[0, 4], [-1], [IGNORE]]),
        (MultiLabel(4), [[[0, 1, 2, 0]], [[0, 1, 1]]]),
        (Segmentation(4), [[[[0, 4]]]]),
    ],
)
def test_is_valid_label_of_values_outside_the_classes_is_false(task, labels):
    assert not any(task.is_valid_label(np.array(label, task.label_dtype)) for label in labels)


@pytest.mark.parametrize("name", TASKS)
def test_class_frequencies_count_every_labelled_element(name):
    task = TASKS[name]
    label = random_labels(task, 1, 50)[0].numpy()
    expected = label.sum(0) if task.is_multilabel else [(label == index).sum() for index in range(task.n_classes)]
    np.testing.assert_array_equal(task.class_frequencies(label), expected)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_loss_of_masks_is_torchs_of_the_labelled_pixels(weights):
    task = Segmentation(4, weights)
    label, logits = random_labels(task, 2, 5), random_logits(task, 2, 5)
    class_weights = None if weights is None else torch.tensor(weights)
    for loss, head_logits, head_label in zip(task.loss(logits, label), logits, label.long(), strict=True):
        valid = (head_label != IGNORE).nonzero(as_tuple=True)
        of_pixels = head_logits.movedim(1, -1)[valid]
        expected = torch.nn.functional.cross_entropy(of_pixels, head_label[valid], class_weights)
        torch.testing.assert_close(loss, expected)


def test_loss_of_masks_without_a_label_is_zero():
    task, label = Segmentation(4), torch.full((1, 2, 5, 5), IGNORE, dtype=torch.uint8)
    logits = torch.randn(1, 2, 4, 5, 5, requires_grad=True)
    loss = task.loss(logits, label)
    loss.sum().backward()
    assert (loss.item(), logits.grad.abs().max()) == (0, 0)


def test_loss_with_weights_first_used_in_inference_can_be_trained():
    task = Classification(2, (0.123, 0.456))
    logits, label = torch.randn(1, 3, 2, requires_grad=True), torch.zeros(1, 3, dtype=torch.long)
    with torch.inference_mode():
        task.loss(logits, label)
    task.loss(logits, label).sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["classification", "multilabel"])
def test_predict_labels_of_non_finite_logits_is_wrong(name):
    task, logits = TASKS[name], torch.randn(2, 9, 4)
    label = random_labels(task, 1, 9)[0]
    logits[0] = torch.nan
    logits[1, 3, 2] = torch.inf
    predicted = task.predict_labels(logits, label, dim=2)
    assert (predicted[0] != label).all()
    expected = (logits[1] > 0).long() if task.is_multilabel else logits[1].argmax(1)
    if task.is_multilabel:
        expected[3, 2] = 1 - label[3, 2]
    else:
        expected[3] = (label[3] + 1) % task.n_classes
    assert torch.equal(predicted[1], expected)


def test_predict_labels_of_nan_masks_is_wrong_at_labelled_pixels():
    task, label = Segmentation(2), torch.tensor([[[0, 1], [IGNORE, 1]]], dtype=torch.uint8)
    predicted = task.predict_labels(torch.full((1, 2, 2, 2), torch.nan), label, dim=1)
    assert predicted[0, 0].tolist() == [1, 0]
    assert predicted[0, 1, 1] == 0


@pytest.mark.parametrize("name", ["classification", "multilabel", "segmentation"])
def test_predict_and_probabilities_agree_with_torch_and_scipy(name):
    task = TASKS[name]
    logits, label = random_logits(task, 1, 9)[0], random_labels(task, 1, 9)[0]
    expected = expit(logits.numpy()) if task.is_multilabel else softmax(logits.numpy(), axis=1)
    np.testing.assert_allclose(task.probabilities(logits.numpy()), expected, rtol=1e-5)
    np.testing.assert_array_equal(task.predict(logits.numpy()), task.predict_labels(logits, label, dim=1))


def test_counts_of_chips_give_sklearns_scores_of_every_head():
    label, predicted = np.random.default_rng(0).integers(5, size=(2, 3, 400))
    task = Classification(5)
    pairs = list(zip(label, predicted, strict=True))
    counts = np.stack([task.counts(predicted, label).sum(0) for label, predicted in pairs])
    assert counts[0].reshape(5, 5).tolist() == metrics.confusion_matrix(label[0], predicted[0]).tolist()
    assert task.score(counts) == pytest.approx([metrics.accuracy_score(*pair) for pair in pairs])
    expected = {
        "balanced accuracy": [metrics.balanced_accuracy_score(*pair) for pair in pairs],
        "macro F1": [metrics.f1_score(*pair, average="macro") for pair in pairs],
    }
    assert expected.keys() == set(task.further_metrics)
    for name, scores in expected.items():
        assert task.score(counts, name) == pytest.approx(scores)


def test_counts_of_masks_with_ignored_pixels_give_sklearns_mean_iou():
    label, predicted = np.random.default_rng(0).integers(4, size=(2, 6, 20, 20))
    label[:, :5] = IGNORE
    valid = label != IGNORE
    expected = metrics.jaccard_score(label[valid], predicted[valid], average="macro")
    for n_classes in (4, 9):  # classes that do not occur count in no score
        counts = Segmentation(n_classes).counts(predicted, label)
        assert counts.sum() == valid.sum()
        assert Segmentation(n_classes).score(counts.sum(0)) == pytest.approx(expected)


def test_multilabel_counts_give_sklearns_f1_over_the_classes_of_the_labels():
    label, predicted = np.random.default_rng(0).integers(2, size=(2, 300, 6))
    label[:, 4] = 0
    task, present = MultiLabel(6), [0, 1, 2, 3, 5]
    counts = task.counts(predicted, label)
    assert counts.shape == (300, 18)
    assert task.score(counts.sum(0)) == pytest.approx(metrics.f1_score(label, predicted, average="micro"))
    expected = metrics.f1_score(label, predicted, average="macro", labels=present)
    assert task.score(counts.sum(0), "macro F1") == pytest.approx(expected)


@pytest.mark.parametrize("task", [Classification(4), Segmentation(4)])
def test_class_counts_give_sklearns_scores_of_every_class(task):
    label, predicted = np.random.default_rng(0).integers(3, size=(2, 500, *((1, 1) if task.is_dense else ())))
    scores = task.class_counts(task.counts(predicted, label).sum(0))
    expected = metrics.precision_recall_fscore_support(
        label.ravel(), predicted.ravel(), labels=range(4), zero_division=0
    )
    np.testing.assert_allclose([scores.precision, scores.recall, scores.f1, scores.support], expected)
    iou = metrics.jaccard_score(label.ravel(), predicted.ravel(), labels=range(4), average=None, zero_division=0)
    np.testing.assert_allclose(scores.iou, iou)
