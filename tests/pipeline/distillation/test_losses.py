import pytest
import torch
from torch.nn import functional

from pipeline.distillation.losses import COSINE_WEIGHT, SMOOTH_L1_WEIGHT, Projectors, feature_loss, logit_kl


def test_feature_loss_equal_features_give_zero_and_samples_are_independent():
    target = torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(feature_loss(target, target), torch.zeros(4), atol=1e-6, rtol=0)
    prediction = target.clone()
    prediction[2] = -prediction[2]
    losses = feature_loss(prediction, target)
    assert (losses[[0, 1, 3]] < 1e-6).all()
    smooth_l1 = functional.smooth_l1_loss(prediction[2], target[2])
    torch.testing.assert_close(losses[2], COSINE_WEIGHT * torch.tensor(2.0) + SMOOTH_L1_WEIGHT * smooth_l1)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
def test_logit_kl_equals_torch_kl_times_squared_temperature(shape):
    student, teacher = torch.randn(2, *shape)
    actual = logit_kl(student, teacher, 3.0)
    student, teacher = (logits.movedim(1, -1).reshape(-1, 4) / 3 for logits in (student, teacher))
    kl = functional.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(actual, 9 * kl)


def test_logit_kl_multilabel_is_the_mean_over_bernoulli_classes():
    student, teacher = torch.randn(2, 6, 4)
    p, q = torch.sigmoid(teacher / 2), torch.sigmoid(student / 2)
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(logit_kl(student, teacher, 2.0, is_multilabel=True), 4 * kl.mean())


def test_projectors_return_the_target_shapes():
    levels = [torch.randn(2, channels, side, side) for channels, side in ((6, 16), (8, 8))]
    target_shapes = [(5, 16, 16), (7, 5, 5), (3, 20, 20), (9,)]
    predictions = Projectors([16, 8], [6, 8], target_shapes)(levels)
    assert [tuple(prediction.shape) for prediction in predictions] == [(2, *shape) for shape in target_shapes]


def test_projectors_keep_locations():
    """A change in one corner of the student's level changes the same corner of the teacher's map."""
    level = torch.zeros(1, 6, 16, 16)
    level[..., :4, 12:] = 1
    projectors = Projectors([16], [6], [(5, 4, 4)])
    (changed,), (unchanged,) = projectors([level]), projectors([torch.zeros_like(level)])
    assert (changed - unchanged).abs().sum(dim=1)[0].argmax() == 3
