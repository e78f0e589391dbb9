"""Distillation losses, and the projectors from a student's levels to its teacher's features.

Sources: features by cosine and smooth L1 distance, Shang et al., Theia, CoRL 2024, arXiv 2407.20179; logits by
temperature, Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

# Theia's weights of the two terms of the feature loss.
COSINE_WEIGHT, SMOOTH_L1_WEIGHT = 0.9, 0.1


def feature_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute each sample's distance (batch,) of features (batch, channel, …) from standardized ones.

    The cosine is over the channels of each location; both terms are means over locations.
    """
    cosine_distance = 1 - functional.cosine_similarity(prediction, target, dim=1)
    smooth_l1 = functional.smooth_l1_loss(prediction, target, reduction="none")
    cosine_term = COSINE_WEIGHT * cosine_distance.reshape(len(prediction), -1).mean(dim=1)
    return cosine_term + SMOOTH_L1_WEIGHT * smooth_l1.flatten(1).mean(dim=1)


def logit_kl(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, is_multilabel: bool = False
) -> torch.Tensor:
    """Compute the mean KL divergence of the student's softened predictions from the teacher's.

    The mean is over samples, for segmentation also over all pixels (with or without a label), for multi-label also
    over classes, each of them a Bernoulli variable. Logits (batch, class, …) are divided by the temperature; its
    square as a factor keeps the magnitude of the gradient.
    """
    student, teacher = student / temperature, teacher / temperature
    if is_multilabel:
        target = torch.sigmoid(teacher)
        cross_entropy = functional.binary_cross_entropy_with_logits
        divergence = (cross_entropy(student, target) - cross_entropy(teacher, target)).mean()
    else:
        log_student, log_teacher = functional.log_softmax(student, dim=1), functional.log_softmax(teacher, dim=1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1).mean()
    return divergence * temperature**2


class Projectors(nn.Module):
    """One linear map from a student's levels to each of the teacher's arrays; used in training only.

    A teacher's map (channel, y, x) is predicted from the student's level of the most similar size, resized to the
    teacher's. A teacher's pooled vector (channel,) is predicted from the spatial means of all the student's levels,
    whose sides in pixels are `level_sizes`, finest first.
    """

    def __init__(self, level_sizes: Sequence[int], channels: Sequence[int], target_shapes: Sequence[tuple[int, ...]]):
        super().__init__()
        self.target_shapes = list(target_shapes)
        sizes = np.array(level_sizes)
        ratios = [np.maximum(sizes / shape[1], shape[1] / sizes) if shape[1:] else None for shape in target_shapes]
        self.source_levels = [None if ratio is None else int(ratio.argmin()) for ratio in ratios]  # None for a vector
        self.maps = nn.ModuleList(
            nn.Linear(sum(channels), shape[0]) if level is None else nn.Conv2d(channels[level], shape[0], 1)
            for shape, level in zip(target_shapes, self.source_levels, strict=True)
        )

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Predict each of the teacher's arrays, (batch, channel, …), from levels (batch, channel, y, x)."""
        predictions, pooled = [], torch.cat([level.mean(dim=(2, 3)) for level in levels], dim=1)
        for project, index, shape in zip(self.maps, self.source_levels, self.target_shapes, strict=True):
            source = pooled if index is None else levels[index]
            if index is not None and source.shape[2:] != shape[1:]:
                source = functional.interpolate(source, size=shape[1:], mode="bilinear", antialias=True)
            predictions.append(project(source))
        return predictions
