"""One student's training, and what it says afterwards."""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline import metrics
from pipeline.config import VARIANTS, DistillConfig
from pipeline.data.image_store import UNLABELLED
from pipeline.distillation import losses
from pipeline.distillation.chips import Chips
from pipeline.distillation.projectors import Projectors
from pipeline.distillation.student_files import Student
from pipeline.distillation.teacher import CachedTeacher
from pipeline.training import loop
from pipeline.training.losses import Task, loss, predict_labels
from pipeline.training.optim import TorchAdamW, warm_cosine
from pipeline.training.task_data import task_from_store

# Chips in a batch that is predicted.
_PREDICTED = 64


@dataclass(frozen=True)
class DistillationSetup:
    """What a student learns from.

    Attributes:
        chips, teacher: of the same images store.
        described: the losses' weights, the temperature, and how long.
        device: where it is trained.
    """

    images: Chips
    teacher: CachedTeacher
    config: DistillConfig
    device: str

    @property
    def task(self) -> Task:
        """What is asked."""
        return task_from_store(self.images.store)

    @property
    def schedule(self) -> loop.TrainSchedule:
        steps = self.config.segmentation if self.images.dense else self.config.classification
        return loop.TrainSchedule(steps.steps, steps.batch)

    def rows(self, variant: str) -> np.ndarray:
        """Samples that a variant learns from: with a teacher, also those without a label."""
        return self.images.rows("train", *([UNLABELLED] if VARIANTS[variant] else []))


def make_projectors(student: Student, lesson: DistillationSetup, seed: int) -> Projectors:
    """Projectors to what the lesson's teachers have, drawn from a seed."""
    sides = [-(-student.shape.input_size // stride) for stride in student.strides]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Projectors(sides, student.channels, lesson.teacher.shapes)


def train(
    student: Student, projectors: Projectors | None, lesson: DistillationSetup, variant: str, setting: loop.HParams
) -> Student:
    """Train a student by AdamW with a warmed-up cosine schedule; what a variant does not name it never sees.

    Every chip is turned by one of its symmetries (see `views`). Its maps are learned where the cache has them of the
    chip so turned (pipeline/distillation/teacher.py).

    Args:
        projectors: for variants that learn features; they end here.
    """
    student = student.to(lesson.device, memory_format=torch.channels_last).train()
    parts = torch.nn.ModuleList([student, *([projectors.to(lesson.device)] if projectors else [])])
    optimiser, factor = (
        TorchAdamW(parts, setting.learning_rate, setting.weight_decay),
        warm_cosine(lesson.schedule.steps),
    )
    rows, generator = lesson.rows(variant), np.random.default_rng(setting.seed)
    for step, places in enumerate(loop.order(len(rows), lesson.schedule, setting.seed).numpy()):
        chosen, turned = rows[places], draw_views(lesson, len(places), generator)
        optimiser.zero_grad()
        _loss(student, projectors, lesson, variant, chosen, turned).backward()
        optimiser.step(factor(step))
    return student.eval()


def draw_views(lesson: DistillationSetup, count: int, generator: np.random.Generator) -> list[str]:
    """A symmetry for each of so many chips.

    Those whose features are cached, if there are any but upright ones. Else any; of masks every second chip stays
    upright, since only then are the teachers' maps known.
    """
    known = [view for view in lesson.teacher.views if view in lesson.images.views]
    if len(known) > 1:
        return generator.choice(known, count).tolist()
    drawn = generator.choice(lesson.images.views, count)
    upright = generator.random(count) < 0.5
    return np.where(upright & bool(lesson.teacher.maps), "identity", drawn).tolist()


def _loss(
    student, projectors, lesson: DistillationSetup, variant: str, rows: np.ndarray, turned: list[str]
) -> torch.Tensor:
    """The weighted sum of what the variant learns from."""
    chips, teacher, described, device = lesson.images, lesson.teacher, lesson.config, lesson.device
    image = chips.image(rows, turned).to(device)
    levels = student.levels(image)
    said = student.logits(levels, image.shape[-2:])
    known = torch.from_numpy(chips.split[rows] != UNLABELLED).to(device)
    total = said.sum() * 0
    if known.any():
        label = chips.label(rows, turned).to(device)
        total = described.loss_weights.labels * loss(said[known][None], label[known][None], lesson.task).sum()
    if "logits" in VARIANTS[variant]:
        wanted = teacher.logits(rows, turned).to(device)
        total = total + described.loss_weights.logits * losses.logit_kl(said, wanted, described.temperature, lesson.task.type)
    if projectors is not None:
        matched = teacher.has_cached_view(turned).to(device)
        wanted = [array.to(device) for array in teacher.features(rows, turned)]
        total = total + described.loss_weights.features * _feature_loss(projectors(levels), wanted, matched, teacher)
    return total


def _feature_loss(said, wanted, matched: torch.Tensor, teacher: CachedTeacher) -> torch.Tensor:
    """Mean over the teachers, each the mean of its arrays; maps of chips turned otherwise do not count."""
    by_member: dict[int, list[torch.Tensor]] = {}
    for number, ((member, _), ours, theirs) in enumerate(zip(teacher.arrays, said, wanted, strict=True)):
        each = losses.feature_loss(ours, theirs)
        counts = matched if number < teacher.maps else torch.ones_like(matched)
        by_member.setdefault(member, []).append((each * counts).sum() / counts.sum().clamp_min(1))
    return torch.stack([torch.stack(parts).mean() for parts in by_member.values()]).mean()


@torch.inference_mode()
def predict(student: Student, lesson: DistillationSetup, split: str) -> np.ndarray:
    """What a student says of a split's upright chips: logits float32 (sample, class), or of masks their counts.

    Counts are int64 (sample, cells), see pipeline/metrics.
    """
    rows, task, parts = lesson.images.rows(split), lesson.task, []
    for start in range(0, len(rows), _PREDICTED):
        some = rows[start : start + _PREDICTED]
        answered = student(lesson.images.image(some).to(lesson.device)).float().cpu()
        if lesson.images.dense:
            label = lesson.images.label(some)
            predicted = predict_labels(answered, label, task, dim=1).numpy()
            parts.append(metrics.counts(task.type, predicted, label.numpy(), task.n_classes, task.ignore_value))
        else:
            parts.append(answered.numpy())
    return np.concatenate(parts)
