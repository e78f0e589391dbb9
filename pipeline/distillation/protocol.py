"""Protocol of students: search on validation, then several seeds that each read the test split once."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pipeline.config import VARIANTS
from pipeline.distillation.losses import Projectors
from pipeline.distillation.student import Student
from pipeline.distillation.train import DistillationSetup, make_projectors, predict, train
from pipeline.training import predictions
from pipeline.training.loop import HParams
from pipeline.training.protocol import ProtocolResult
from pipeline.training.search import search

# Keys of params.yaml that bound the students' learning rate and weight decay.
SEARCH_KEYS = "distill.search.learning_rate, distill.search.weight_decay"
# Name of the protocol in tables of runs, by variant.
PROTOCOLS = {
    "distilled": "distilled",
    "features": "labels and features",
    "logits": "labels and logits",
    "supervised": "supervised",
}


def train_variant(
    create_student: Callable[[int], Student],
    setup: DistillationSetup,
    variant: str,
    metadata: Mapping,
    study_path: Path,
    cache_key: object,
) -> tuple[dict, ProtocolResult]:
    """Search hyperparameters on validation, train the seeds, and score each once on the test split.

    Args:
        create_student: from a seed to a student before training.
        setup: images, teacher and configuration.
        variant: a key of `VARIANTS`.
        metadata: further columns of each run: `dataset`, `model` and others.
        study_path, cache_key: as for `search`.

    Returns:
        The result of `search`; and the runs, the predictions and the students of all seeds, with the index of the
        student that is best on validation. A student's index is its seed.

    Raises:
        UserError: students diverged.
    """
    name, task = f"{metadata['dataset']} {metadata['model']}", setup.task

    def score(trials: Sequence[HParams]) -> np.ndarray:
        students = _train_students(create_student, setup, variant, trials)
        scores = _scores(students, setup, "val")
        print(f"{name}: {len(trials)} trials, best on validation {scores.max():.4f}", flush=True)
        return np.where([_diverged(student) for student in students], np.nan, scores)

    config = setup.config
    search_result = search(score, config.search, study_path, [cache_key, variant, asdict(config)])
    hparams = [HParams(**search_result["best"], seed=seed) for seed in range(config.seeds)]
    students = _train_students(create_student, setup, variant, hparams)
    if diverged := [seed for seed, student in enumerate(students) if _diverged(student)]:
        raise predictions.divergence_error(diverged, len(students), SEARCH_KEYS)
    val_scores = _scores(students, setup, "val")
    table = _predictions(students, setup)
    samples, counts = predictions.counts_from_table(table, task)
    test_scores = task.score(counts.sum(axis=1))
    runs = [
        {**metadata, "protocol": PROTOCOLS[variant], "task": task.type.value, "seed": seed, "metric": task.metric,
         "score": test_scores[seed], "val_score": val_scores[seed], "n_test": len(samples),
         "classes": task.n_classes, **search_result["best"]}
        for seed in range(len(students))
    ]  # fmt: skip
    print(f"{name}: test {test_scores.mean():.4f}, mean of {len(runs)} seeds", flush=True)
    return search_result, ProtocolResult(pd.DataFrame(runs), table, students, int(np.argmax(val_scores)))


def _diverged(student: Student) -> bool:
    """Return whether a parameter or a running statistic is not finite."""
    return not all(tensor.isfinite().all() for tensor in student.state_dict().values() if tensor.is_floating_point())


def _train_students(
    create_student: Callable[[int], Student], setup: DistillationSetup, variant: str, hparams: Sequence[HParams]
) -> list[Student]:
    """Train one student for each entry of `hparams`; on a CPU in parallel, one core each."""
    # Created one after the other, because torch's random generator belongs to the whole process.
    students = [create_student(entry.seed) for entry in hparams]
    projectors: list[Projectors | None] = [None] * len(students)
    if "features" in VARIANTS[variant]:
        projectors = [
            make_projectors(student, setup, entry.seed) for student, entry in zip(students, hparams, strict=True)
        ]

    def train_one(student: Student, projector: Projectors | None, entry: HParams) -> Student:
        return train(student, projector, setup, variant, entry)

    if setup.device != "cpu":
        return list(map(train_one, students, projectors, hparams))
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(train_one, students, projectors, hparams))


def _scores(students: Sequence[Student], setup: DistillationSetup, split: str) -> np.ndarray:
    """Compute each student's score on a split, (student,)."""
    task, outputs = setup.task, [predict(student, setup, split) for student in students]
    if task.is_dense:
        counts = outputs
    else:
        label = setup.images.label_tensor(setup.images.rows(split))
        predicted = [task.predict_labels(torch.from_numpy(logits), label, dim=1).numpy() for logits in outputs]
        counts = [task.counts(classes, label.numpy()) for classes in predicted]
    return task.score(np.stack([student_counts.sum(axis=0) for student_counts in counts]))


def _predictions(students: Sequence[Student], setup: DistillationSetup) -> pd.DataFrame:
    """Return the table of predictions of the test split, one row per seed and sample."""
    rows = setup.images.rows("test")
    outputs = np.stack([predict(student, setup, "test") for student in students])
    samples = setup.images.sample[rows].tolist()
    if setup.task.is_dense:
        return predictions.confusion_table(samples, outputs)
    label = setup.images.label_tensor(rows).numpy()
    return predictions.prediction_table(samples, label, outputs, setup.task, SEARCH_KEYS)
