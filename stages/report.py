"""report: every run of the grid and of the composition search, what they can tell, pictures and one page."""

from pathlib import Path

import pandas as pd

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.errors import UserError
from pipeline.report import composition, distillation, figures, mapped, page, statements
from pipeline.report.significance import bootstrap
from pipeline.training import predictions
from stages.cli import (
    COMPOSED,
    COST,
    DISTILLED,
    EXPORTED,
    FINETUNED,
    MAPS,
    METRICS,
    RATES,
    REPORT,
    RUNS,
    SCRATCH,
    TUNED,
    read_json,
    require,
    run,
    write_json,
)


def make_report() -> None:
    """Write results/report and results/metrics.json from the grid's runs; others lying about are not read."""
    grid = config.load().grid
    folders, skipped = {}, []
    searched = {dataset: _searched(dataset) for dataset in grid.datasets}
    for dataset in grid.datasets:
        for model in grid.models:
            if reason := read_json(TUNED / dataset / f"{model}.json")["skipped"]:
                skipped.append(f"{dataset}, {model}: {reason}")
            else:
                folders[dataset, model] = RUNS / dataset / model
                if model in grid.finetune:
                    folders[dataset, model + statements.FINE_TUNED_SUFFIX] = FINETUNED / dataset / model
        for model in searched[dataset].told["run"]:
            folders[dataset, model] = COMPOSED / dataset / model
    learned = [_learned(dataset, student) for dataset in grid.datasets for student in grid.students]
    folders |= {
        (one.dataset, f"{one.name}/{variant}"): DISTILLED / one.dataset / one.name / variant
        for one in learned
        for variant in one.metadata.get("variants", [])
    }
    if not folders:
        raise UserError("Every model of the grid is left out: " + " ".join(skipped) + " Add one that fits.")
    tables = [pd.read_csv(folder / "runs.csv").assign(model=model) for (_, model), folder in folders.items()]
    runs = pd.concat(tables, ignore_index=True)
    drawn = _drawn(folders, runs)
    summary = page.summarize_runs(runs, drawn)
    costs = pd.read_csv(require(COST)) if learned else pd.DataFrame()
    frozen, large = summary[summary.protocol == page.FROZEN], summary[summary.kind != "student"]
    said, pairs = statements.key_comparisons(large, drawn), statements.all_pairs(frozen, drawn)

    with atomic_dir(SCRATCH / "report", REPORT) as folder:
        runs.to_csv(folder / "runs.csv", index=False)
        summary.to_csv(folder / "summary.csv", index=False)
        pairs.to_csv(folder / "pairs.csv", index=False)
        (folder / "summary.md").write_text(page.markdown_table(page.display_table(summary)))
        figures.draw_boxplots(runs[runs.model.isin(large.model)], large, folder / "boxplots.png")
        composed = composition.composition_section(searched, frozen, folder)
        students, kept = distillation.students_section(learned, summary, drawn, costs, folder)
        (folder / "findings.md").write_text("".join(f"- {sentence}\n" for sentence in [*said, *kept]))
        students += mapped.exports_and_maps_section(_cells(EXPORTED, grid), pd.read_csv(require(RATES)), _cells(MAPS, grid), folder)
        text = page.render_page(summary, runs, pairs, said, skipped, composed, folder / "boxplots.png", students)
        (folder / "index.html").write_text(text)
    scores: dict[str, dict] = {}
    for row in summary.itertuples():
        one = {"mean": round(row.mean, 6)} | ({"std": round(row.std, 6)} if row.runs > 1 else {})
        scores.setdefault(row.dataset, {})[row.model] = one
    write_json(METRICS, scores)
    print(page.markdown_table(page.display_table(summary)), *said, *kept, *skipped, sep="\n")
    print(f"\nReport: {REPORT / 'index.html'}")


def _drawn(folders: dict, runs: pd.DataFrame) -> dict:
    """Bootstrap draws of every (dataset, model).

    Raises:
        UserError: models of one data set were tested on different samples.
    """
    drawn, tested = {}, {}
    for number, (key, folder) in enumerate(folders.items()):
        first = runs[(runs.dataset == key[0]) & (runs.model == key[1])].iloc[0]
        table = pd.read_parquet(folder / "predictions.parquet")
        samples, counts = predictions.counts(table, first.task, first.classes)
        if samples != tested.setdefault(key[0], samples):
            raise UserError(f"{folder} was tested on other samples than the models before it. Run: dvc repro")
        drawn[key] = bootstrap(first.task, counts, first.classes, stream=number)
    return drawn


def _learned(dataset: str, student: str) -> distillation.StudentResult:
    return distillation.StudentResult(read_json(DISTILLED / dataset / student / "metadata.json"))


def _cells(folder: Path, grid: config.GridConfig) -> dict[tuple[str, str], Path]:
    """Folders of what was made of every student."""
    return {(dataset, name): folder / dataset / name for dataset in grid.datasets for name in grid.students}


def _searched(dataset: str) -> composition.Searched:
    folder = COMPOSED / dataset
    told = read_json(folder / "compose.json")
    tables = [
        pd.read_csv(folder / f"{name}.csv") if (folder / f"{name}.csv").exists() else pd.DataFrame()
        for name in ("subsets", "cka", "greedy")
    ]
    return composition.Searched(told, *tables)


if __name__ == "__main__":
    run(make_report)
