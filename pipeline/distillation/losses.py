"""What a student is told by its teachers.

Sources: features by cosine and smooth-L1, Shang et al., Theia, CoRL 2024, arXiv 2407.20179; logits by temperature,
Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
"""

import torch
from torch.nn import functional

# Theia's weights of the two, which sum to one.
COSINE, SMOOTH = 0.9, 0.1


def feature_loss(said: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Loss of each sample, (batch,), from features (batch, channel, …), wanted ones standardised.

    The cosine is over channels at every place; both terms are means over places.
    """
    apart = 1 - functional.cosine_similarity(said, wanted, dim=1)
    smooth = functional.smooth_l1_loss(said, wanted, reduction="none")
    return COSINE * apart.reshape(len(said), -1).mean(dim=1) + SMOOTH * smooth.flatten(1).mean(dim=1)


def logit_kl(said: torch.Tensor, wanted: torch.Tensor, temperature: float, kind: str) -> torch.Tensor:
    """Mean divergence of the student's softened answers from the teacher's, times the squared temperature.

    The square keeps its gradient as large as the labels', whatever the temperature. Of segmentation every pixel is an
    answer, also those without a label; of multi-label every class is one, yes or no.

    Args:
        said, wanted: logits (batch, class, …).
    """
    said, wanted = said / temperature, wanted / temperature
    if kind == "multilabel":
        soft = torch.sigmoid(wanted)
        binary = functional.binary_cross_entropy_with_logits
        apart = (binary(said, soft) - binary(wanted, soft)).mean()
    else:
        ours, theirs = functional.log_softmax(said, dim=1), functional.log_softmax(wanted, dim=1)
        apart = (theirs.exp() * (theirs - ours)).sum(dim=1).mean()
    return apart * temperature**2
