"""A student's variants, each by the protocol of the heads: search on validation, then seeds on the test split."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pipeline import metrics
from pipeline.config import VARIANTS
from pipeline.distillation.student_files import Student
from pipeline.distillation.train import DistillationSetup, make_projectors, predict, train
from pipeline.errors import UserError
from pipeline.training import predictions
from pipeline.training.loop import HParams
from pipeline.training.losses import predict_labels
from pipeline.training.search import search

# What holds the students' learning rate and weight decay down.
BOUNDS = "distill.search.learning_rate, distill.search.weight_decay"
# The runs' `protocol`, by variant; frozen heads have another.
PROTOCOLS = {
    "distilled": "distilled",
    "features": "labels and features",
    "logits": "labels and logits",
    "supervised": "supervised",
}


@dataclass(frozen=True)
class Taught:
    """What became of one variant.

    Attributes:
        tuned: of `search`.
        runs: one row a seed, as `pipeline.training.protocol.test` gives them.
        predicted: one row a seed and test sample (pipeline/training/predictions.py).
        best: the student of the seed that is best on validation; `seed` is its seed.
    """

    tuned: dict
    runs: pd.DataFrame
    predicted: pd.DataFrame
    best: Student
    seed: int


def train_variant(
    make: Callable[[int], Student], lesson: DistillationSetup, variant: str, told: Mapping, study: Path, about: object
) -> Taught:
    """Search learning rate and weight decay on validation, train the seeds, and read the test split once for each.

    Args:
        make: from a seed to a student before training.
        told: what else each run's row says.
        study, about: as for `search`.

    Raises:
        UserError: students diverged.
    """
    name, kind, classes = f"{told['dataset']} {told['model']}", lesson.task.type, lesson.task.n_classes

    def validation(students: Sequence[Student]) -> np.ndarray:
        return _scores(students, lesson, "val")

    def score(settings: Sequence[HParams]) -> np.ndarray:
        students = _train_students(make, lesson, variant, settings)
        scores = validation(students)
        print(f"{name}: {len(settings)} trials, best on validation {scores.max():.4f}", flush=True)
        return np.where([_diverged(one) for one in students], np.nan, scores)

    tuned = search(score, lesson.config.search, study, [about, variant, asdict(lesson.config)])
    settings = [HParams(**tuned["best"], seed=seed) for seed in range(lesson.config.seeds)]
    students = _train_students(make, lesson, variant, settings)
    if wrong := [seed for seed, one in enumerate(students) if _diverged(one)]:
        raise UserError(predictions.diverged(wrong, len(students), BOUNDS))
    valid = validation(students)
    predicted = _predicted(students, lesson)
    samples, counts = predictions.counts(predicted, kind, classes)
    tested = metrics.score(kind, counts.sum(axis=1), classes)
    runs = [
        {**told, "protocol": PROTOCOLS[variant], "task": kind, "seed": seed, "metric": metrics.METRICS[kind],
         "score": tested[seed], "val_score": valid[seed], "n_test": len(samples), "classes": classes, **tuned["best"]}
        for seed in range(len(students))
    ]  # fmt: skip
    best = int(np.argmax(valid))
    print(f"{name}: test {tested.mean():.4f}, the mean of {len(runs)} seeds", flush=True)
    return Taught(tuned, pd.DataFrame(runs), predicted, students[best], best)


def _diverged(student: Student) -> bool:
    """Whether it has parameters, or running statistics, that are no numbers."""
    return not all(one.isfinite().all() for one in student.state_dict().values() if one.is_floating_point())


def _train_students(make, lesson: DistillationSetup, variant: str, settings: Sequence[HParams]) -> list[Student]:
    """A student for each setting; on a processor a core trains one, as in pipeline/training/loop.py."""
    # Made one after the other: torch's generator of random numbers is the process's.
    fresh = [make(setting.seed) for setting in settings]
    taught = "features" in VARIANTS[variant]
    ends = [
        make_projectors(one, lesson, two.seed) if taught else None for one, two in zip(fresh, settings, strict=True)
    ]
    work = partial(train, lesson=lesson, variant=variant)
    if lesson.device != "cpu":
        return [work(*one[:2], setting=one[2]) for one in zip(fresh, ends, settings, strict=True)]
    cores = torch.get_num_threads()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(lambda *one: work(*one[:2], setting=one[2]), fresh, ends, settings))


def _scores(students: Sequence[Student], lesson: DistillationSetup, split: str) -> np.ndarray:
    each, task = [predict(one, lesson, split) for one in students], lesson.task
    if not lesson.images.dense:
        label = lesson.images.label(lesson.images.rows(split))
        predicted = [predict_labels(torch.from_numpy(one), label, task, dim=1).numpy() for one in each]
        each = [metrics.counts(task.type, one, label.numpy(), task.n_classes, None) for one in predicted]
    return metrics.score(task.type, np.stack([one.sum(axis=0) for one in each]), task.n_classes)


def _predicted(students: Sequence[Student], lesson: DistillationSetup) -> pd.DataFrame:
    rows, said = lesson.images.rows("test"), np.stack([predict(one, lesson, "test") for one in students])
    names = lesson.images.store.sample.values[rows].tolist()
    if lesson.images.dense:
        return predictions.of_masks(names, said)
    return predictions.of_samples(names, lesson.images.label(rows).numpy(), said, lesson.task.type, BOUNDS)
