"""report: summarize all runs in tables, figures and one HTML page."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from pipeline import config
from pipeline.composition import CompositionResult
from pipeline.errors import UserError
from pipeline.report import class_scores, figures, sections, statements
from pipeline.report.controls import average_members
from pipeline.report.significance import AVERAGE_SUFFIX, FROZEN, Draws, ModelKind, bootstrap, summarize_runs
from pipeline.tasks import counts_from_table, get_task
from stages import cli

# Result folders by dataset and model.
Folders = dict[tuple[str, str], Path]
# Runs and predictions of the controls that average an ensemble's members, by dataset and name.
Averages = dict[tuple[str, str], tuple[pd.DataFrame, pd.DataFrame]]


def make_report() -> None:
    """Write results/report and results/metrics.json from the runs of the grid; other runs are ignored."""
    grid = config.load().grid
    compositions = {dataset: CompositionResult.read(cli.COMPOSITION / dataset) for dataset in grid.datasets}
    students = [_read_student(dataset, student) for dataset in grid.datasets for student in grid.students]
    folders, skipped = _model_folders(grid)
    for dataset, result in compositions.items():
        selected = result.missing_from(grid.models)
        folders |= {(dataset, model): cli.SELECTED_RUNS / dataset / model for model in selected}
    for student in students:
        folder = cli.DISTILLATION / student.dataset / student.name
        folders |= {(student.dataset, model): folder / variant for variant, model in student.models.items()}
    if not folders:
        reasons = " ".join(skipped)
        message = f"Every model of grid.models is skipped: {reasons} Add a model that the datasets' bands allow."
        raise UserError(message, key="grid.models", value=grid.models)
    tables = {key: pd.read_csv(folder / "runs.csv").assign(model=key[1]) for key, folder in folders.items()}
    averages = _average_members(folders, tables)
    runs = pd.concat([*tables.values(), *(averaged for averaged, _ in averages.values())], ignore_index=True)
    draws, costs = _bootstrap_all(folders, runs, averages), pd.DataFrame()
    metrics, classes = _class_scores(folders, runs, _class_names(grid))
    summary = summarize_runs(runs, draws)
    if students:
        costs = pd.concat([pd.read_csv(cli.require(cli.COSTS / f"{dataset}.csv")) for dataset in grid.datasets])
    large = summary[summary.kind != ModelKind.STUDENT]
    comparisons = statements.key_comparisons(large, draws)
    is_trained_head = (summary.protocol == FROZEN) & (summary.kind != ModelKind.AVERAGE)
    pairs = statements.all_pairs(summary[is_trained_head], draws)
    scores = sections.display_table(summary)

    with cli.publish_folder(cli.REPORT) as folder:
        runs.to_csv(folder / "runs.csv", index=False)
        summary.to_csv(folder / "summary.csv", index=False)
        metrics.to_csv(folder / "metrics.csv", index=False)
        classes.to_csv(folder / "per_class.csv", index=False)
        pairs.to_csv(folder / "pairs.csv", index=False)
        (folder / "summary.md").write_text(sections.markdown_table(scores))
        figures.draw_boxplots(runs, large, folder / "boxplots.png")
        students_section = sections.students(students, summary, draws, costs, folder)
        html = sections.render(
            "report.html.j2",
            scores=scores, boxplots=folder / "boxplots.png", comparisons=comparisons, pairs=pairs,
            metrics=sections.metrics(metrics), classes=sections.classes(classes),
            multiplicity_note=statements.multiplicity_note(pairs),
            aggregates=sections.aggregates(runs[runs.protocol == FROZEN], _score_ranges(grid.datasets)),
            composition=sections.composition(compositions, summary, folder),
            students=students_section, exports=sections.exports(students), maps=sections.maps(students, folder),
            finetuning=sections.finetuning(runs), skipped=skipped, settings=sections.settings(summary),
        )  # fmt: skip
        (folder / "index.html").write_text(html)
        sentences = [*comparisons, *students_section["sentences"]]
        (folder / "findings.md").write_text("".join(f"- {sentence}\n" for sentence in sentences))
    cli.write_json(cli.METRICS, _metrics(summary))
    print(sections.markdown_table(scores), *sentences, *skipped, sep="\n")
    print(f"\nReport: {cli.REPORT / 'index.html'}")


def _model_folders(grid: config.GridConfig) -> tuple[Folders, list[str]]:
    """Return the result folder of every (dataset, model) of the grid, and the reasons of the skipped ones."""
    folders, skipped = {}, []
    for dataset in grid.datasets:
        for model in grid.models:
            if reason := cli.read_json(cli.TUNING / dataset / f"{model}.json")["skipped"]:
                skipped.append(f"{dataset}, {model}: {reason}")
                continue
            folders[dataset, model] = cli.RUNS / dataset / model
            if model in grid.finetune:
                folders[dataset, model + statements.FINE_TUNED_SUFFIX] = cli.FINETUNING / dataset / model
    return folders, skipped


def _read_student(dataset: str, name: str) -> sections.StudentResult:
    map_folder = cli.MAPS / dataset / name
    distillation = cli.read_json(cli.DISTILLATION / dataset / name / "metadata.json")
    export = cli.read_json(cli.EXPORTS / dataset / name / "export.json")
    return sections.StudentResult(
        dataset, name, distillation, export, cli.read_json(map_folder / "map.json"), map_folder
    )


def _average_members(folders: Folders, runs: Mapping[tuple[str, str], pd.DataFrame]) -> Averages:
    """Average the members of every ensemble whose members ran; runs on masks save no probabilities."""
    averages: Averages = {}
    for (dataset, model), table in runs.items():
        members = [folders.get((dataset, name)) for name in model.split("+")]
        if len(members) > 1 and None not in members and not get_task(table.task.iloc[0]).is_dense:
            predicted = [pd.read_parquet(folder / "predictions.parquet") for folder in members if folder]
            averages[dataset, model + AVERAGE_SUFFIX] = average_members(predicted, table)
    return averages


def _bootstrap_all(folders: Folders, runs: pd.DataFrame, averages: Averages) -> Draws:
    """Bootstrap every model; UserError if models of one dataset were tested on different samples."""
    draws, tested_samples = {}, {}
    for number, key in enumerate([*folders, *averages]):
        dataset, model = key
        table = averages[key][1] if key in averages else pd.read_parquet(folders[key] / "predictions.parquet")
        first_run = runs[(runs.dataset == dataset) & (runs.model == model)].iloc[0]
        task = get_task(first_run.task)(int(first_run.classes))
        samples, counts = counts_from_table(table, task)
        if samples != tested_samples.setdefault(dataset, samples):
            message = f"{folders[key]} was tested on other samples than the other models of {dataset}. Run: dvc repro"
            raise UserError(message, path=folders[key])
        draws[key] = bootstrap(task, counts, stream=number)
    return draws


def _class_names(grid: config.GridConfig) -> dict[str, list[str]]:
    """Return the names of each dataset's classes; empty if no model was tuned on it."""
    names = {}
    for dataset in grid.datasets:
        tuned = [cli.read_json(cli.TUNING / dataset / f"{model}.json") for model in grid.models]
        if (path := cli.SELECTED_TUNING / f"{dataset}.json").exists():
            tuned += cli.read_json(path).values()
        names[dataset] = next((result["classes"] for result in tuned if "classes" in result), [])
    return names


def _class_scores(
    folders: Folders, runs: pd.DataFrame, class_names: dict[str, list[str]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return metrics, and scores of every class, by dataset and model (pipeline/report/class_scores.py)."""
    metrics, classes = [], []
    for (dataset, model), folder in folders.items():
        first_run = runs[(runs.dataset == dataset) & (runs.model == model)].iloc[0]
        task = get_task(first_run.task)(int(first_run.classes))
        predicted = pd.read_parquet(folder / "predictions.parquet")
        precision = class_scores.average_precision(predicted) if task.is_multilabel else None
        _, counts = counts_from_table(predicted, task)
        names = class_names[dataset] or list(map(str, range(task.n_classes)))
        tables = (
            class_scores.metric_table(task, counts, precision),
            class_scores.class_table(task, counts, names, precision),
        )
        for group, table in zip((metrics, classes), tables, strict=True):
            group.append(pd.DataFrame({"dataset": dataset, "model": model, "protocol": first_run.protocol, **table}))
    return pd.concat(metrics, ignore_index=True), pd.concat(classes, ignore_index=True)


def _score_ranges(datasets: Iterable[str]) -> dict[str, list[float]]:
    """Return the ranges of the scores in GEO-Bench's own runs, as fetched with its datasets."""
    sources = {dataset: cli.read_json(cli.RAW / dataset / "source.json") for dataset in datasets}
    return {dataset: source["score_range"] for dataset, source in sources.items() if source.get("score_range")}


def _metrics(summary: pd.DataFrame) -> dict[str, dict]:
    """Return mean and standard deviation of the score by dataset and model; no deviation of a single run."""
    scores: dict[str, dict] = {}
    for row in summary.itertuples():
        score = {"mean": round(row.mean, 6)} | ({"std": round(row.std, 6)} if row.runs > 1 else {})
        scores.setdefault(row.dataset, {})[row.model] = score
    return scores


if __name__ == "__main__":
    cli.run(make_report)
