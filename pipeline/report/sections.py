"""The report page: the data of its sections; the text is in the templates. Cells of tables are text."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from pipeline.composition import CompositionResult
from pipeline.report import figures, significance
from pipeline.report.significance import FROZEN, Draws
from pipeline.report.statements import cka_gain_relation, distillation_sentence
from pipeline.tasks import get_task

PROBE_NAMES = {"logistic": "logistic regression", "knn": "k nearest neighbours"}


@dataclass(frozen=True)
class StudentResult:
    """Records of one student on one dataset.

    Attributes:
        distillation, export, map: content of its metadata.json, export.json and map.json.
        map_folder: folder of its class.tif and confidence.tif.
    """

    dataset: str
    name: str
    distillation: Mapping
    export: Mapping
    map: Mapping
    map_folder: Path

    @property
    def teacher(self) -> str:
        return self.distillation["teacher"]

    @property
    def models(self) -> dict[str, str]:
        """Trained networks by variant, such as `small (distilled)`; empty if the student is skipped."""
        return {variant: f"{self.name} ({variant})" for variant in self.distillation.get("variants", [])}


def render(template: str, **context: object) -> str:
    """Render a template to self-contained HTML; every text is escaped, and a missing variable is an error.

    Args:
        template: `report.html.j2`, or that of one section, such as `students.html.j2`.
        context: tables are data frames whose cells are text; figures are paths of PNG files, which are embedded.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["base64"] = lambda path: base64.b64encode(Path(path).read_bytes()).decode()
    return environment.get_template(template).render(context)


def display_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `significance.summarize_runs` as readers see it; every cell is text."""
    table = summary[["dataset", "model", "kind", "metric"]].copy()
    table["test score, mean ± std over seeds"] = format_scores(summary)
    table["95 % interval"] = format_intervals(summary)
    table["test samples"] = summary.n_test.astype(str)
    return table.assign(protocol=summary.protocol)


def markdown_table(table: pd.DataFrame) -> str:
    """Format a table of text in Markdown, as the README shows it."""
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in table.to_numpy().tolist())
    return f"| {' | '.join(table.columns)} |\n|{'---|' * len(table.columns)}\n{rows}"


def format_number(value: float, specification: str) -> str:
    """Format a number; a non-finite one is unknown."""
    return format(value, specification) if np.isfinite(value) else "–"


def format_scores(summary: pd.DataFrame) -> list[str]:
    """Format mean and standard deviation over seeds of every row; one run has no deviation."""
    return [f"{row.mean:.3f} ± {format_number(row.std, '.3f')}" for row in summary.itertuples()]


def format_intervals(table: pd.DataFrame) -> list[str]:
    """Format the bounds `low` and `high` of every row."""
    return [f"{low:.3f}–{high:.3f}" for low, high in zip(table.low, table.high, strict=True)]


def metrics(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with a column per metric, from `class_scores.metric_table` of every model."""
    scores = table.assign(score=format_scores(table))
    keys = ["dataset", "model", "protocol"]
    wide = scores.pivot(index=keys, columns="metric", values="score")[scores.metric.unique()].fillna("–")
    return wide.loc[pd.MultiIndex.from_frame(scores[keys].drop_duplicates())].reset_index()


def classes(table: pd.DataFrame) -> list[dict]:
    """Return `dataset` and `scores` of each dataset, from `class_scores.class_table` of every model.

    A row per class: its number of test labels, and F1 and IoU of every model.
    """
    section = []
    for dataset, rows in table.groupby("dataset", sort=False):
        first_model = rows[rows.model == rows.model.iloc[0]]
        scores = pd.DataFrame({"class": first_model["class"], "test labels": first_model.support.map("{:d}".format)})
        for (model, protocol), row in rows.groupby(["model", "protocol"], sort=False):
            pairs = zip(row.f1, row.iou, strict=True)
            cells = [f"{format_number(f1, '.3f')} / {format_number(iou, '.3f')}" for f1, iou in pairs]
            scores[f"{model} ({protocol})" if protocol not in model else model] = cells
        section.append({"dataset": dataset, "scores": scores})
    return section


def aggregates(runs: pd.DataFrame, score_ranges: significance.ScoreRanges) -> list[dict]:
    """Return `datasets`, `geobench_scaled` (some of them) and `scores` of each group with common models."""
    groups = []
    for datasets in significance.common_dataset_groups(runs):
        table = significance.aggregate_over_datasets(runs, datasets, score_ranges)
        scores = table[["model"]].assign(**{"interquartile mean": table.iqm.map("{:.3f}".format)})
        scores["95 % interval over seeds"] = format_intervals(table)
        scores["protocol"] = ", ".join(runs.protocol.unique())
        geobench_scaled = [dataset for dataset in datasets if dataset in score_ranges]
        groups.append({"datasets": datasets, "geobench_scaled": geobench_scaled, "scores": scores})
    return groups


def settings(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the table of weights, heads and hyperparameters."""
    table = summary.drop(columns=["task", "classes", "low", "high", "n_test"])
    return table.map(lambda value: format_number(value, ".4g") if isinstance(value, float) else str(value))


# Composition search


def composition(compositions: Mapping[str, CompositionResult], summary: pd.DataFrame, folder: Path) -> dict:
    """Return the composition searches by dataset, and write the figures of similarities to `folder`."""
    section: dict[str, Any] = {"searches": [], "correlation": None, "cka_figure": None, "gain_figure": None}
    for dataset, result in compositions.items():
        tested = summary[(summary.dataset == dataset) & (summary.protocol == FROZEN)]
        has_ensembles = len(result.subsets) > 0
        search = {
            "dataset": dataset, "skipped": result.skipped,
            "ensembles": _ensemble_table(result.subsets, tested) if has_ensembles else None,
            "probe": PROBE_NAMES[result.probe] if has_ensembles else None,
            "greedy": result.greedy.map(lambda value: f"{value:.3f}" if isinstance(value, float) else value),
            "is_dense": any(get_task(task).is_dense for task in set(tested.task)),
        }  # fmt: skip
        section["searches"].append(search)
    similarities = [result.cka.assign(dataset=dataset) for dataset, result in compositions.items() if len(result.cka)]
    if similarities:
        pairs, section["correlation"] = cka_gain_relation(compositions)
        section |= {"cka_figure": folder / "cka.png", "gain_figure": folder / "cka_gain.png"}
        figures.draw_cka_matrices(pd.concat(similarities, ignore_index=True), section["cka_figure"])
        figures.draw_gain_against_cka(pairs, section["gain_figure"])
    return section


def _ensemble_table(subsets: pd.DataFrame, tested: pd.DataFrame) -> pd.DataFrame:
    """Return the probed ensembles, with test scores of those tested, with members in any order."""
    scores = zip(tested.model, format_scores(tested), format_intervals(tested), strict=True)
    test_scores = {frozenset(model.split("+")): f"{score} ({interval})" for model, score, interval in scores}
    metric = tested.metric.iloc[0] if len(tested) else "score"
    return pd.DataFrame(
        {
            "ensemble": subsets.model,
            "channels": subsets.channels.astype(str),
            f"probe, validation {metric}": subsets.score.map("{:.3f}".format),
            "gain over its best member": [format_number(gain, "+.3f") for gain in subsets.gain],
            "mean CKA of its pairs": [format_number(cka, ".2f") for cka in subsets.cka],
            f"full protocol (frozen), test {metric}": [
                test_scores.get(frozenset(model.split("+")), "–") for model in subsets.model
            ],
        }
    )


# Students


def students(
    results: Sequence[StudentResult], summary: pd.DataFrame, draws: Draws, costs: pd.DataFrame, folder: Path
) -> dict:
    """Return a sentence and a table of each distilled student, and write their figure to `folder`.

    Args:
        costs: as `cost.benchmark` returns them, with the dataset.
    """
    section: dict[str, Any] = {"sentences": [], "tables": [], "figure": folder / "students.png"}
    rows_of_students = []
    for student in results:
        if reason := student.distillation["skipped"]:
            section["sentences"].append(f"{student.dataset}: no student {student.name}: {reason}")
            continue
        rows = _student_rows(student, summary, costs)
        rows_of_students.append(rows)
        sentence = distillation_sentence(student.dataset, student.name, student.teacher, draws)
        section["sentences"].append(sentence + _cost_sentence(student, rows))
        labels = {"dataset": student.dataset, "name": student.name, "weights": student.distillation["weights"]}
        section["tables"].append({**labels, "models": _student_table(rows)})
    if rows_of_students:
        figures.draw_score_against_cost(pd.concat(rows_of_students, ignore_index=True), section["figure"])
    return section


def _student_rows(student: StudentResult, summary: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of the teacher, its members and the student's variants, with their CPU costs.

    Further columns: display_name, role (teacher, member or student), model (as in the costs), gpu_chips_per_second.
    """
    roles = {student.teacher: "teacher"}
    roles |= {name: "member" for name in student.teacher.split("+") if name != student.teacher}
    roles |= dict.fromkeys(student.models.values(), "student")
    rows = summary[summary.dataset == student.dataset].set_index("model")
    rows = rows.loc[[name for name in roles if name in rows.index]].reset_index(names="display_name")
    rows["role"] = rows.display_name.map(roles)
    rows["model"] = rows.display_name.where(rows.role != "student", student.name)
    costs = costs[costs.dataset == student.dataset].drop(columns="dataset")
    is_cpu = costs.device == "cpu"
    rows["gpu_chips_per_second"] = rows.model.map(costs[~is_cpu].set_index("model").chips_per_second)
    return rows.merge(costs[is_cpu], on="model", how="left")


def _student_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the table of a student as readers see it."""

    def column(values: pd.Series, specification: str) -> list[str]:
        return [format_number(value, specification) for value in values]

    columns = {
        "model": rows.display_name,
        "role": rows.role,
        "protocol": rows.protocol,
        f"test {rows.metric.iloc[0]}, mean ± std over seeds": format_scores(rows),
        "95 % interval": format_intervals(rows),
        "million parameters": column(rows.parameters / 1e6, ".2f"),
        "GFLOPs per chip": column(rows.flops / 1e9, ".3f"),
        f"chips per second, {rows.cores.max():.0f} CPU cores": column(rows.chips_per_second, ".0f"),
        "MB on disk": column(rows.bytes / 1e6, ".1f"),
    }
    if rows.gpu_chips_per_second.notna().any():
        columns["chips per second, GPU"] = column(rows.gpu_chips_per_second, ".0f")
    return pd.DataFrame(columns)


def _cost_sentence(student: StudentResult, rows: pd.DataFrame) -> str:
    """Compare the costs of the student and its teacher on the CPU; empty if they were not measured."""
    rows = rows.set_index("display_name")
    own, teacher = rows.loc[f"{student.name} (distilled)"], rows.loc[student.teacher]
    if not np.isfinite(own.chips_per_second / teacher.chips_per_second):
        return ""
    return (
        f" The student has {own.parameters / teacher.parameters:.1%} of the teacher's parameters and needs "
        f"{own.flops / teacher.flops:.1%} of its operations. On {teacher.cores:.0f} CPU cores it processes "
        f"{own.chips_per_second:.0f} chips per second, the teacher {teacher.chips_per_second:.0f}."
    )


def exports(results: Sequence[StudentResult]) -> pd.DataFrame:
    """Return the table of exported files."""
    rows = []
    for student in results:
        for name, file in student.export.get("files", {}).items():
            row = {"dataset": student.dataset, "student": student.name, "file": name}
            row["MB"], row["images per second"] = f"{file['bytes'] / 1e6:.1f}", f"{file['images_per_second']:g}"
            score = f"{student.export['metric']} {file['score']:.3f} (n = {student.export['chips']})"
            difference = "largest difference from torch's logits, in their standard deviations"
            rows.append({**row, "validation score": score, difference: f"{file['difference']:.1g}"})
    return pd.DataFrame(rows)


def maps(results: Sequence[StudentResult], folder: Path) -> list[dict]:
    """Return `dataset`, `student` and `figure` of every map, and write the figures to `folder`."""
    section = []
    for student in results:
        if not student.map["skipped"]:
            figure = folder / f"map-{student.dataset}-{student.name}.png"
            title = f"{student.dataset}, student {student.name}"
            figures.draw_map(student.map_folder, student.map, title, figure)
            section.append({"dataset": student.dataset, "student": student.name, "figure": figure})
    return section


# Fine-tuning


def finetuning(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the table of the fine-tuned models among the runs of all protocols; empty if there are none."""
    runs = runs[runs.protocol.str.startswith("fine-tuned")]
    return pd.DataFrame(
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
    )
