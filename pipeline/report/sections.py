"""Sections of the report page: composition search, students, exported files, maps and fine-tuning."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.composition.search import CompositionResult
from pipeline.report import figures
from pipeline.report.page import embedded_image, format_score, html_list, html_table
from pipeline.report.statements import Draws, cka_gain_relation, distillation_sentence
from pipeline.tasks import get_task

PROBE_NAMES = {"logistic": "logistic regression", "knn": "k nearest neighbours"}
# Dataset and student.
StudentKey = tuple[str, str]


@dataclass(frozen=True)
class StudentResult:
    """Record of the distillation of one student on one dataset: the content of its metadata.json."""

    metadata: Mapping

    @property
    def dataset(self) -> str:
        """Name of the dataset."""
        return self.metadata["dataset"]

    @property
    def name(self) -> str:
        """Name of the student."""
        return self.metadata["student"]

    @property
    def teacher(self) -> str:
        """Name of its teacher, a frozen model."""
        return self.metadata["teacher"]


# Composition search


def composition_section(compositions: Mapping[str, CompositionResult], summary: pd.DataFrame, folder: Path) -> str:
    """Render the composition search, and write its figures to `folder`.

    Args:
        compositions: result of the search by dataset.
        summary: of the runs of the frozen protocol.
    """
    parts = [
        "<h2>Composition search</h2><p>A quick probe scores every ensemble of the backbones below on the validation "
        "split. Backbones with random weights (controls) are excluded unless composition.backbones names them. The "
        "probe is a logistic regression (L-BFGS), or k nearest neighbours where stated, on the concatenated frozen "
        "features; for segmentation, on the features of single pixels. Its scores follow another protocol than the "
        "test scores next to them, and only rank the ensembles. The best ensembles were then trained by the full "
        "protocol; the first table contains their test scores too.</p>"
    ]
    for dataset, result in compositions.items():
        if result.subsets.empty:
            reason = " ".join(result.skipped) or "All backbones of the grid have random weights (controls)."
            parts.append(f"<p>{html.escape(f'{dataset}: no ensembles to search. {reason}')}</p>")
            continue
        tested = summary[(summary.dataset == dataset) & (summary.protocol == "frozen")]
        caption = (
            f"{dataset}: {len(result.subsets)} ensembles. Probe: {PROBE_NAMES[result.probe]}, frozen features, "
            "validation split."
        )
        parts.append(html_table(_ensemble_table(result.subsets, tested), caption))
        if len(result.greedy):
            steps = result.greedy.assign(score=result.greedy.score.map("{:.3f}".format))
            parts.append(html_table(steps, f"{dataset}: {_greedy_caption(tested)}"))
    return "".join(parts) + _similarity_section(compositions, folder)


def _ensemble_table(subsets: pd.DataFrame, tested: pd.DataFrame) -> pd.DataFrame:
    """Return the probed ensembles, every cell text, with test scores of those that were trained.

    An ensemble is recognized in any order of its members.
    """
    test_scores = {
        frozenset(row.model.split("+")): f"{format_score(row)} ({row.low:.3f}–{row.high:.3f})"
        for row in tested.itertuples()
    }
    metric = tested.metric.iloc[0] if len(tested) else "score"
    return pd.DataFrame(
        {
            "ensemble": subsets.model,
            "channels": subsets.channels.astype(str),
            f"probe, validation {metric}": subsets.score.map("{:.3f}".format),
            "gain over its best member": [_format(value, "{:+.3f}") for value in subsets.gain],
            "mean CKA of its pairs": [_format(value, "{:.2f}") for value in subsets.cka],
            f"full protocol (frozen), test {metric}": [
                test_scores.get(frozenset(model.split("+")), "–") for model in subsets.model
            ],
        }
    )


def _greedy_caption(tested: pd.DataFrame) -> str:
    caption = (
        "greedy selection. Layers are added one by one as long as the probe's validation score rises (frozen "
        "features). All stored layers are candidates, also those that heads.levels and heads.linear exclude."
    )
    if any(get_task(task).is_dense for task in set(tested.task)):
        caption += " Scores are of the pixels sampled for the probe, not of whole masks as for the ensembles."
    return caption


def _similarity_section(compositions: Mapping[str, CompositionResult], folder: Path) -> str:
    tables = [result.cka.assign(dataset=dataset) for dataset, result in compositions.items() if len(result.cka)]
    if not tables:
        return ""
    figures.draw_cka_matrices(pd.concat(tables, ignore_index=True), folder / "cka.png")
    pairs, sentence = cka_gain_relation(compositions)
    title = f"Do ensembles of dissimilar backbones gain more? n = {len(pairs)}"
    figures.draw_gain_against_cka(pairs, title, folder / "cka_gain.png")
    return (
        "<h3>Similarity of the backbones</h3><p>Debiased linear CKA (Kornblith et al. 2019; Nguyen et al. 2021) of "
        "standardized features, by level (for classification, of mean-pooled levels), and of all concatenated "
        "features that a head reads. 1: equal up to rotation and scale; 0: unrelated.</p>"
        + embedded_image(folder / "cka.png", "Linear CKA between backbones, one panel per level")
        + f"<p>{html.escape(sentence)}</p>"
        + embedded_image(folder / "cka_gain.png", "Gain of an ensemble of two backbones against their CKA")
    )


# Students


def students_section(
    students: Sequence[StudentResult], summary: pd.DataFrame, draws: Draws, costs: pd.DataFrame, folder: Path
) -> tuple[str, list[str]]:
    """Render the distilled students, and write their figure to `folder`.

    Args:
        summary: of all runs; see `significance.summarize_runs`.
        draws: bootstrap samples of all models.
        costs: as `cost.benchmark` returns them, with the dataset.

    Returns:
        HTML, and one sentence per student.
    """
    if not students:
        return "", []
    tables, sentences, rows_of_students = [], [], []
    for student in students:
        if student.metadata["skipped"]:
            sentences.append(f"{student.dataset}: no student {student.name}: {student.metadata['skipped']}")
            continue
        rows = _student_rows(student, summary, costs)
        start = {"random": "random weights", "pretrained": "pretrained weights"}[student.metadata["weights"]]
        tables.append(
            html_table(_student_table(rows), f"{student.dataset}: student {student.name}, initialized with {start}.")
        )
        sentence = distillation_sentence(student.dataset, student.name, student.teacher, draws)
        sentences.append(sentence + _cost_sentence(student, rows))
        rows_of_students.append(rows)
    figure = ""
    if rows_of_students:
        figures.draw_score_against_cost(pd.concat(rows_of_students, ignore_index=True), folder / "students.png")
        figure = embedded_image(folder / "students.png", "Score against cost, one panel per dataset")
    return (
        "<h2>Students</h2><p>A student is one compact network whose input is the chip itself. <i>distilled</i>: "
        "trained on the cached features of the teacher's backbones, the teacher's logits and the labels. "
        "<i>supervised</i>: the same network, initialization, steps and search without a teacher; this baseline "
        "shows the effect of distillation. Both are trained networks, which is another protocol than that of the "
        "frozen models next to them. The teacher was trained on the labels of the same training split. Costs are "
        "from a stored chip to its logits, with all backbones that a model needs.</p>"
        f"{html_list(sentences)}{figure}{''.join(tables)}"
    ), sentences


def _student_rows(student: StudentResult, summary: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of the teacher, its members and the student's variants, with their costs.

    Returns:
        Columns of the summary and of the CPU costs, and: display_name, role (teacher, member or student), model (name
        in the costs), gpu_chips_per_second.
    """
    members = [name for name in student.teacher.split("+") if name != student.teacher]
    variants = [f"{student.name} ({variant})" for variant in student.metadata["variants"]]
    dataset_summary = summary[summary.dataset == student.dataset].set_index("model")
    names = [name for name in (student.teacher, *members, *variants) if name in dataset_summary.index]
    rows = dataset_summary.loc[names].reset_index(names="display_name")
    role_of_name = {student.teacher: "teacher", **dict.fromkeys(members, "member")}
    rows["role"] = [role_of_name.get(name, "student") for name in rows.display_name]
    rows["model"] = rows.display_name.where(rows.role != "student", student.name)
    dataset_costs = costs[costs.dataset == student.dataset]
    gpu_costs = dataset_costs[dataset_costs.device != "cpu"].set_index("model")
    rows["gpu_chips_per_second"] = rows.model.map(gpu_costs.chips_per_second)
    cpu_costs = dataset_costs[dataset_costs.device == "cpu"].drop(columns="dataset")
    return rows.merge(cpu_costs, on="model", how="left")


def _student_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the table of a student as readers see it; every cell is text."""
    cores = rows.cores.max()
    columns = {
        "model": rows.display_name,
        "role": rows.role,
        "protocol": rows.protocol,
        f"test {rows.metric.iloc[0]}, mean ± std over seeds": [format_score(row) for row in rows.itertuples()],
        "95 % interval": [f"{row.low:.3f}–{row.high:.3f}" for row in rows.itertuples()],
        "million parameters": [_format(value / 1e6, "{:.2f}") for value in rows.parameters],
        "GFLOPs per chip": [_format(value / 1e9, "{:.3f}") for value in rows.flops],
        f"chips per second, {cores:.0f} CPU cores": [_format(value, "{:.0f}") for value in rows.chips_per_second],
        "MB on disk": [_format(value / 1e6, "{:.1f}") for value in rows.bytes],
    }
    if rows.gpu_chips_per_second.notna().any():
        columns["chips per second, GPU"] = [_format(value, "{:.0f}") for value in rows.gpu_chips_per_second]
    return pd.DataFrame(columns)


def _cost_sentence(student: StudentResult, rows: pd.DataFrame) -> str:
    """Compare the costs of the student and its teacher on the CPU; empty if they were not measured."""
    own, teacher = (
        rows[rows.display_name == name].iloc[0] for name in (f"{student.name} (distilled)", student.teacher)
    )
    if not np.isfinite(own.chips_per_second / teacher.chips_per_second):
        return ""
    return (
        f" The student has {own.parameters / teacher.parameters:.1%} of the teacher's parameters and needs "
        f"{own.flops / teacher.flops:.1%} of its operations. On {teacher.cores:.0f} CPU cores it processes "
        f"{own.chips_per_second:.0f} chips per second, the teacher {teacher.chips_per_second:.0f}."
    )


# Exported students and maps


def exports_and_maps_section(
    exports: Mapping[StudentKey, Path], rates: pd.DataFrame, maps: Mapping[StudentKey, Path], folder: Path
) -> str:
    """Render the students' exported files and maps, and write the figures of the maps to `folder`.

    Args:
        exports, maps: folders of the stages export and map_dataset, by dataset and student.
        rates: throughput; columns dataset, student, file, images_per_second.
    """
    images_per_second = rates.set_index(["dataset", "student", "file"]).images_per_second
    rows = [row for key, path in exports.items() for row in _exported_files(key, path, images_per_second)]
    parts = []
    if rows:
        parts.append(
            "<h2>Exported students</h2><p>Each file was compared with torch on images of the dataset. Scores are on "
            "the validation split; images per second are on the CPU of this machine. int8: weights are stored as "
            "int8, activations are quantized dynamically.</p>" + html_table(pd.DataFrame(rows))
        )
    images = []
    for (dataset, student), path in maps.items():
        metadata = json.loads((path / "map.json").read_text())
        if metadata["skipped"]:
            continue
        figure = folder / f"map-{dataset}-{student}.png"
        figures.draw_map(path, metadata, f"{dataset}, student {student}", figure)
        images.append(embedded_image(figure, f"Map of the scene of {dataset} by the student {student}"))
    if images:
        parts.append(
            "<h2>Maps</h2><p>Whole scenes mapped by exported students in overlapping, blended tiles. The scenes "
            "contain the chips of all splits, so the maps include areas on which the student was trained.</p>"
        )
    return "".join([*parts, *images])


def _exported_files(key: StudentKey, folder: Path, images_per_second: pd.Series) -> list[dict[str, str]]:
    """Return a table row for each file of an exported student; every cell is text."""
    metadata = json.loads((folder / "export.json").read_text())
    if metadata["skipped"]:
        return []
    dataset, student = key
    return [
        {
            "dataset": dataset,
            "student": student,
            "file": name,
            "MB": f"{entry['bytes'] / 1e6:.1f}",
            "images per second": f"{images_per_second[(*key, name)]:g}"
            if (*key, name) in images_per_second
            else "not measured",
            "validation score": f"{metadata['metric']} {entry['score']:.3f} (n = {metadata['chips']})",
            "largest difference from torch's logits, in their standard deviations": f"{entry['difference']:.1g}",
        }
        for name, entry in metadata["files"].items()
    ]


# Fine-tuning


def finetuning_section(runs: pd.DataFrame) -> str:
    """Render the fine-tuned models; empty if there are none.

    Args:
        runs: one row per run, of all protocols.
    """
    runs = runs[runs.protocol.str.startswith("fine-tuned")]
    if runs.empty:
        return ""
    rows = [
        {
            "dataset": dataset,
            "model": model,
            "protocol": table.protocol.iloc[0],
            "trained parameters": f"{int(table.trained_parameters.iloc[0]):,}",
            "learning rate": f"{table.learning_rate.iloc[0]:g}",
            "validation score, frozen": f"{table.frozen_val_score.mean():.3f}",
            "validation score, fine-tuned": f"{table.val_score.mean():.3f}",
            "best step of each seed": ", ".join(str(int(step)) for step in table.best_step),
        }
        for (dataset, model), table in runs.groupby(["dataset", "model"], sort=False)
    ]
    return (
        "<h2>Fine-tuning</h2><p>Fine-tuning trains the backbones too, starting from the frozen model and the head "
        "of its best seed. This is another protocol: its scores are in the first table, and enter no statistic of "
        "the frozen protocol. The learning rate and the step are selected on the validation split. Step 0 is the "
        "frozen model: it is selected if no step improved the validation score. Seeds differ in the order of the "
        "images, not in the initialization of the head, so their spread is smaller than that of frozen heads.</p>"
        + html_table(pd.DataFrame(rows))
    )


def _format(value: float, template: str) -> str:
    """Format a number; a non-finite one is unknown."""
    return template.format(value) if np.isfinite(value) else "–"
