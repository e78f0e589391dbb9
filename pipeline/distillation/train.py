"""Distillation: search hyperparameters on validation, then train and test several seeds.

Each seed reads the test split once.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pipeline.config import VARIANTS, DistillConfig
from pipeline.data.augmentation import AugmentedImages
from pipeline.data.image_store import UNLABELLED
from pipeline.distillation import losses
from pipeline.distillation.losses import Projectors
from pipeline.distillation.student import Student
from pipeline.distillation.teacher import CachedTeacher
from pipeline.tasks import Task
from pipeline.training import predictions
from pipeline.training.loop import HParams, TrainSchedule, batch_order
from pipeline.training.optim import NetworkAdamW, warm_cosine
from pipeline.training.protocol import ProtocolResult, search
from pipeline.training.task_data import task_from_store

# Chips per batch at prediction.
PREDICTION_BATCH = 64
# Keys of params.yaml that bound the students' learning rate and weight decay.
SEARCH_KEYS = "distill.search.learning_rate, distill.search.weight_decay"
# Names of the protocol in tables of runs, of variants whose own name is another.
PROTOCOLS = {"features": "labels and features", "logits": "labels and logits"}

CreateStudent = Callable[[int], Student]


@dataclass(frozen=True)
class DistillationSetup:
    """What all students of a dataset share."""

    images: AugmentedImages
    teacher: CachedTeacher
    config: DistillConfig
    device: str

    @property
    def task(self) -> Task:
        return task_from_store(self.images.images)

    @property
    def schedule(self) -> TrainSchedule:
        length = self.config.segmentation if self.task.is_dense else self.config.classification
        return TrainSchedule(length.steps, length.batch)

    def training_rows(self, variant: str) -> np.ndarray:
        """Return the indices of the training samples; variants with a teacher also use unlabelled samples."""
        return self.images.rows("train", *([UNLABELLED] if VARIANTS[variant] else []))


def train_variant(
    create_student: CreateStudent, setup: DistillationSetup, variant: str, metadata: Mapping, study_path: Path,
    cache_key: object,
) -> tuple[dict, ProtocolResult]:  # fmt: skip
    """Search hyperparameters on validation, train the seeds, and score each once on the test split.

    Args:
        create_student: from a seed to a student before training.
        metadata: further columns of each run: `dataset`, `model` and others.
        study_path, cache_key: as for `search`.

    Returns:
        The result of `search`; and the students, by seed. UserError if some diverged.
    """
    name, task, config = f"{metadata['dataset']} {metadata['model']}", setup.task, setup.config

    def score(trials: Sequence[HParams]) -> np.ndarray:
        students = _train_students(create_student, setup, variant, trials)
        scores = _scores(students, setup, "val")
        print(f"{name}: {len(trials)} trials, best on validation {scores.max():.4f}", flush=True)
        return np.where([_diverged(student) for student in students], np.nan, scores)

    search_result = search(score, config.search, study_path, [cache_key, variant, asdict(config)])
    hparams = [HParams(**search_result["best"], seed=seed) for seed in range(config.seeds)]
    students = _train_students(create_student, setup, variant, hparams)
    if diverged := [seed for seed, student in enumerate(students) if _diverged(student)]:
        raise predictions.divergence_error(diverged, len(students), SEARCH_KEYS)
    val_scores = _scores(students, setup, "val")
    rows, outputs = setup.images.rows("test"), [predict(student, setup, "test") for student in students]
    counts, logits = map(np.stack, zip(*outputs, strict=True))
    table, test_scores = predictions.tabulate(
        setup.images.sample[rows].tolist(), setup.images.label_tensor(rows).numpy(),
        counts if task.is_dense else logits, task, SEARCH_KEYS,
    )  # fmt: skip
    runs = [
        {**metadata, "protocol": PROTOCOLS.get(variant, variant), "task": task.type.value, "seed": seed,
         "metric": task.metric, "score": test_scores[seed], "val_score": val_scores[seed], "n_test": len(rows),
         "classes": task.n_classes, **search_result["best"]}
        for seed in range(len(students))
    ]  # fmt: skip
    print(f"{name}: test {test_scores.mean():.4f}, mean of {len(runs)} seeds", flush=True)
    return search_result, ProtocolResult(pd.DataFrame(runs), table, students, int(np.argmax(val_scores)))


def _diverged(student: Student) -> bool:
    """Return whether a parameter or a running statistic is not finite."""
    return not all(tensor.isfinite().all() for tensor in student.state_dict().values() if tensor.is_floating_point())


def _train_students(
    create_student: CreateStudent, setup: DistillationSetup, variant: str, hparams: Sequence[HParams]
) -> list[Student]:
    """Train one student for each entry of `hparams`; on a CPU in parallel, one core each."""
    has_projectors = "features" in VARIANTS[variant]
    # Created one after the other, because torch's random generator belongs to the whole process.
    students = [create_student(entry.seed) for entry in hparams]
    projectors = [
        make_projectors(student, setup, entry.seed) if has_projectors else None
        for student, entry in zip(students, hparams, strict=True)
    ]
    arguments = (students, projectors, repeat(setup), repeat(variant), hparams)
    if setup.device != "cpu":
        return list(map(train, *arguments))
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(train, *arguments))


def _scores(students: Sequence[Student], setup: DistillationSetup, split: str) -> np.ndarray:
    """Compute each student's score on a split, (student,)."""
    return setup.task.score(np.stack([predict(student, setup, split)[0].sum(axis=0) for student in students]))


def make_projectors(student: Student, setup: DistillationSetup, seed: int) -> Projectors:
    """Create projectors from a student's levels to the teacher's arrays."""
    level_sizes = [-(-student.spec.input_size // stride) for stride in student.strides]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Projectors(level_sizes, student.channels, setup.teacher.shapes)


def train(
    student: Student, projectors: Projectors | None, setup: DistillationSetup, variant: str, hparams: HParams
) -> Student:
    """Train a student with AdamW and a cosine schedule with warm-up; return it in evaluation mode.

    Every chip is flipped or rotated at random (see `draw_views`). A chip whose view has no cached feature maps does
    not count in the loss on maps.
    """
    student = student.to(setup.device).to(memory_format=torch.channels_last).train()
    modules = torch.nn.ModuleList([student, *([projectors.to(setup.device)] if projectors else [])])
    optimizer = NetworkAdamW(modules, hparams.learning_rate, hparams.weight_decay)
    lr_factor = warm_cosine(setup.schedule.steps)
    rows, generator = setup.training_rows(variant), np.random.default_rng(hparams.seed)
    for step, positions in enumerate(batch_order(len(rows), setup.schedule, hparams.seed).numpy()):
        views = draw_views(setup, len(positions), generator)
        modules.zero_grad()
        _loss(student, projectors, setup, variant, rows[positions], views).backward()
        optimizer.step(lr_factor(step))
    return student.eval()


def draw_views(setup: DistillationSetup, count: int, generator: np.random.Generator) -> list[str]:
    """Draw a view for each of `count` chips.

    Views are drawn from those with cached features, if there are others than `identity`; otherwise from all views. If
    the teacher has feature maps, about half of the chips then stay upright: maps are cached for upright chips only.
    """
    cached = [view for view in setup.teacher.views if view in setup.images.views]
    if len(cached) > 1:
        return generator.choice(cached, count).tolist()
    views = generator.choice(setup.images.views, count)
    stays_upright = generator.random(count) < 0.5
    return np.where(stays_upright & bool(setup.teacher.n_maps), "identity", views).tolist()


def _loss(
    student: Student, projectors: Projectors | None, setup: DistillationSetup, variant: str, rows: np.ndarray,
    views: list[str],
) -> torch.Tensor:  # fmt: skip
    """Compute the weighted sum of a variant's losses on a batch."""
    images, teacher, config, device = setup.images, setup.teacher, setup.config, setup.device
    chips = images.image_tensor(rows, views).to(device)
    levels = student.levels(chips)
    logits = student.logits(levels, chips.shape[-2:])
    has_label = torch.from_numpy(images.split[rows] != UNLABELLED).to(device)
    total = logits.sum() * 0
    if has_label.any():
        label = images.label_tensor(rows, views).to(device)
        label_loss = setup.task.loss(logits[has_label][None], label[has_label][None]).sum()
        total = config.loss_weights.labels * label_loss
    if "logits" in VARIANTS[variant]:
        teacher_logits = teacher.logits(rows, views).to(device)
        kl = losses.logit_kl(logits, teacher_logits, config.temperature, setup.task.is_multilabel)
        total = total + config.loss_weights.logits * kl
    if projectors is not None:
        has_maps = teacher.has_cached_view(views).to(device)
        targets = [array.to(device) for array in teacher.features(rows, views)]
        total = total + config.loss_weights.features * _feature_loss(projectors(levels), targets, has_maps, teacher)
    return total


def _feature_loss(
    predictions: list[torch.Tensor], targets: list[torch.Tensor], has_maps: torch.Tensor, teacher: CachedTeacher
) -> torch.Tensor:
    """Average the feature loss over a member's arrays, then over members; for maps, where `has_maps`."""
    member_losses: dict[int, list[torch.Tensor]] = {}
    for index, ((member, _), prediction, target) in enumerate(zip(teacher.arrays, predictions, targets, strict=True)):
        sample_losses = losses.feature_loss(prediction, target)
        weights = has_maps if index < teacher.n_maps else torch.ones_like(has_maps)
        array_loss = (sample_losses * weights).sum() / weights.sum().clamp_min(1)
        member_losses.setdefault(member, []).append(array_loss)
    return torch.stack([torch.stack(array_losses).mean() for array_losses in member_losses.values()]).mean()


@torch.inference_mode()
def predict(student: Student, setup: DistillationSetup, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Predict upright chips: counts (sample, entry); logits (sample, class), empty for segmentation."""
    rows, task, counts, outputs = setup.images.rows(split), setup.task, [], []
    for start in range(0, len(rows), PREDICTION_BATCH):
        batch = rows[start : start + PREDICTION_BATCH]
        logits = student(setup.images.image_tensor(batch).to(setup.device)).float().cpu()
        label = setup.images.label_tensor(batch)
        counts.append(task.counts(task.predict_labels(logits, label, dim=1).numpy(), label.numpy()))
        outputs.append(np.empty(0) if task.is_dense else logits.numpy())
    return np.concatenate(counts), np.concatenate(outputs)
