"""report: summarize all runs in tables, figures and one HTML page."""

from pathlib import Path

import pandas as pd

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.composition import CompositionResult
from pipeline.errors import UserError
from pipeline.report import figures, page, sections, statements
from pipeline.report.significance import FROZEN, BootstrapSamples, ModelKind, bootstrap, summarize_runs
from pipeline.tasks import get_task
from pipeline.training import predictions
from stages.cli import (
    COMPOSITION,
    COST,
    DISTILLATION,
    EXPORTS,
    FINETUNING,
    MAPS,
    METRICS,
    RATES,
    REPORT,
    RUNS,
    SCRATCH,
    TUNING,
    read_json,
    require,
    run,
    write_json,
)


def make_report() -> None:
    """Write results/report and results/metrics.json from the runs of the grid; other runs are ignored."""
    grid = config.load().grid
    compositions = {dataset: CompositionResult.read(COMPOSITION / dataset) for dataset in grid.datasets}
    students = [_load_student_result(dataset, student) for dataset in grid.datasets for student in grid.students]
    folders, skipped = _model_folders(grid)
    folders |= {
        (dataset, model): COMPOSITION / dataset / model
        for dataset, result in compositions.items()
        for model in result.missing_from(grid.models)
    }
    folders |= {
        (student.dataset, f"{student.name} ({variant})"): DISTILLATION / student.dataset / student.name / variant
        for student in students
        for variant in student.metadata.get("variants", [])
    }
    if not folders:
        raise UserError(
            "Every model of grid.models is skipped: "
            + " ".join(skipped)
            + " Add a model that the datasets' bands allow.",
            key="grid.models",
            value=grid.models,
        )
    tables = [pd.read_csv(folder / "runs.csv").assign(model=model) for (_, model), folder in folders.items()]
    runs = pd.concat(tables, ignore_index=True)
    draws = _bootstrap_all(folders, runs)
    summary = summarize_runs(runs, draws)
    costs = pd.read_csv(require(COST)) if students else pd.DataFrame()
    frozen, large = summary[summary.protocol == FROZEN], summary[summary.kind != ModelKind.STUDENT]
    model_sentences = statements.key_comparisons(large, draws)
    pairs = statements.all_pairs(frozen, draws)

    with atomic_dir(SCRATCH / "report", REPORT) as folder:
        runs.to_csv(folder / "runs.csv", index=False)
        summary.to_csv(folder / "summary.csv", index=False)
        pairs.to_csv(folder / "pairs.csv", index=False)
        (folder / "summary.md").write_text(page.markdown_table(page.display_table(summary)))
        figures.draw_boxplots(runs[runs.model.isin(large.model)], large, folder / "boxplots.png")
        composition_html = sections.composition_section(compositions, frozen, folder)
        students_html, student_sentences = sections.students_section(students, summary, draws, costs, folder)
        exports_html = sections.exports_and_maps_section(
            _student_folders(EXPORTS, grid), pd.read_csv(require(RATES)), _student_folders(MAPS, grid), folder
        )
        sentences = [*model_sentences, *student_sentences]
        (folder / "findings.md").write_text("".join(f"- {sentence}\n" for sentence in sentences))
        html_sections = [composition_html, students_html, exports_html, sections.finetuning_section(runs)]
        html = page.render_page(
            summary, runs, pairs, model_sentences, skipped, folder / "boxplots.png", html_sections
        )
        (folder / "index.html").write_text(html)
    write_json(METRICS, _metrics(summary))
    print(page.markdown_table(page.display_table(summary)), *sentences, *skipped, sep="\n")
    print(f"\nReport: {REPORT / 'index.html'}")


def _model_folders(grid: config.GridConfig) -> tuple[dict[tuple[str, str], Path], list[str]]:
    """Return the result folder of every (dataset, model) of the grid, and the reasons of the skipped ones."""
    folders, skipped = {}, []
    for dataset in grid.datasets:
        for model in grid.models:
            if reason := read_json(TUNING / dataset / f"{model}.json")["skipped"]:
                skipped.append(f"{dataset}, {model}: {reason}")
                continue
            folders[dataset, model] = RUNS / dataset / model
            if model in grid.finetune:
                folders[dataset, model + statements.FINE_TUNED_SUFFIX] = FINETUNING / dataset / model
    return folders, skipped


def _bootstrap_all(
    folders: dict[tuple[str, str], Path], runs: pd.DataFrame
) -> dict[tuple[str, str], BootstrapSamples]:
    """Return the bootstrap samples of every (dataset, model).

    Raises:
        UserError: models of one dataset were tested on different samples.
    """
    draws, tested_samples = {}, {}
    for number, (key, folder) in enumerate(folders.items()):
        first_run = runs[(runs.dataset == key[0]) & (runs.model == key[1])].iloc[0]
        table = pd.read_parquet(folder / "predictions.parquet")
        task = get_task(first_run.task)(int(first_run.classes))
        samples, counts = predictions.counts_from_table(table, task)
        if samples != tested_samples.setdefault(key[0], samples):
            raise UserError(
                f"{folder} was tested on other samples than the other models of {key[0]}. Run: dvc repro", path=folder
            )
        draws[key] = bootstrap(task, counts, stream=number)
    return draws


def _metrics(summary: pd.DataFrame) -> dict[str, dict]:
    """Return mean and standard deviation of the score by dataset and model; no deviation of a single run."""
    scores: dict[str, dict] = {}
    for row in summary.itertuples():
        score = {"mean": round(row.mean, 6)} | ({"std": round(row.std, 6)} if row.runs > 1 else {})
        scores.setdefault(row.dataset, {})[row.model] = score
    return scores


def _load_student_result(dataset: str, student: str) -> sections.StudentResult:
    return sections.StudentResult(read_json(DISTILLATION / dataset / student / "metadata.json"))


def _student_folders(root: Path, grid: config.GridConfig) -> dict[tuple[str, str], Path]:
    """Return the folder of every (dataset, student) below a folder of results."""
    return {(dataset, name): root / dataset / name for dataset in grid.datasets for name in grid.students}


if __name__ == "__main__":
    run(make_report)
