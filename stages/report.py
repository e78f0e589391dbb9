"""report: every run of the grid as one table, what it can tell, box plots and one page."""

import numpy as np
import pandas as pd

from cache.durable import building
from pipeline import params, report
from pipeline.errors import UserError
from stages.cli import METRICS, REPORT, RUNS, SCRATCH, TUNED, read_json, run, write_json


def make_report() -> None:
    """Write results/report and results/metrics.json from the grid's runs; other runs lying about are not read."""
    grid = params.load().grid
    runs, counts, left_out = [], {}, []
    for dataset in grid.datasets:
        for model in grid.models:
            if reason := read_json(TUNED / dataset / f"{model}.json")["left_out"]:
                left_out.append(f"{dataset}, {model}: {reason}")
                continue
            folder = RUNS / dataset / model
            runs.append(pd.read_csv(folder / "runs.csv"))
            tested = pd.read_parquet(folder / "test_counts.parquet")
            counts[dataset, model] = np.stack(
                [np.stack(group.sort_values("sample").counts) for _, group in tested.groupby("seed")]
            )
    if not runs:
        raise UserError("Every model of the grid is left out: " + " ".join(left_out) + " Add one that fits.")
    runs = pd.concat(runs, ignore_index=True)
    summary = report.summarise(runs, counts)
    said = report.findings(summary, counts)

    with building(SCRATCH / "report", REPORT) as folder:
        runs.to_csv(folder / "runs.csv", index=False)
        summary.to_csv(folder / "summary.csv", index=False)
        (folder / "summary.md").write_text(report.markdown(summary))
        (folder / "findings.md").write_text("".join(f"- {sentence}\n" for sentence in said))
        report.boxplots(runs, summary, folder / "boxplots.png")
        (folder / "index.html").write_text(report.page(summary, said, left_out, folder / "boxplots.png"))
    scores: dict[str, dict] = {}
    for row in summary.itertuples():
        one = {"mean": round(row.mean, 6)} | ({"std": round(row.std, 6)} if row.runs > 1 else {})
        scores.setdefault(row.dataset, {})[row.model] = one
    write_json(METRICS, scores)
    print(report.markdown(summary), *said, *left_out, sep="\n")
    print(f"\nReport: {REPORT / 'index.html'}")


if __name__ == "__main__":
    run(make_report)
