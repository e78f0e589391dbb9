import pytest
import torch
from torch.nn import functional

from pipeline.distillation.losses import COSINE, SMOOTH, feature_loss, logit_kl


def test_features_that_agree_cost_nothing_and_each_sample_counts_alone():
    wanted = torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(feature_loss(wanted, wanted), torch.zeros(4), atol=1e-6, rtol=0)
    said = wanted.clone()
    said[2] = -said[2]
    each = feature_loss(said, wanted)
    assert (each[[0, 1, 3]] < 1e-6).all()
    smooth = functional.smooth_l1_loss(said[2], wanted[2])
    torch.testing.assert_close(each[2], COSINE * torch.tensor(2.0) + SMOOTH * smooth)


def test_a_vector_is_one_place():
    said, wanted = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(feature_loss(said, wanted), torch.tensor([COSINE + SMOOTH * 0.5]))


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
def test_logits_are_hintons(shape):
    said, wanted = torch.randn(2, *shape)
    ours = logit_kl(said, wanted, 3.0, "classification")
    flat = [one.movedim(1, -1).reshape(-1, 4) / 3 for one in (said, wanted)]
    kl = functional.kl_div(flat[0].log_softmax(1), flat[1].log_softmax(1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(ours, 9 * kl)
    assert logit_kl(wanted, wanted, 3.0, "classification").abs() < 1e-6


def test_multilabel_is_each_class_by_itself():
    said, wanted = torch.randn(2, 6, 4)
    p, q = torch.sigmoid(wanted / 2), torch.sigmoid(said / 2)
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(logit_kl(said, wanted, 2.0, "multilabel"), 4 * kl.mean())
    assert logit_kl(wanted, wanted, 2.0, "multilabel").abs() < 1e-6
