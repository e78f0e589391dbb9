"""The report page: tables, sentences on significance and figures in one self-contained HTML file."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pipeline.report import significance, statements
from pipeline.report.significance import FROZEN

STYLE = """body{font:15px/1.5 sans-serif;max-width:1150px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;font-size:13px}td,th{padding:3px 8px;border-bottom:1px solid #ddd;text-align:left}
img{max-width:100%}caption{text-align:left;padding:.3em 0;color:#444}summary{cursor:pointer;color:#05a}"""


def display_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the table of scores as readers see it; every cell is text.

    Args:
        summary: as `significance.summarize_runs` returns it.
    """
    return pd.DataFrame(
        {
            "dataset": summary.dataset,
            "model": summary.model,
            "kind": summary.kind,
            "metric": summary.metric,
            "test score, mean ± std over seeds": [format_score(row) for row in summary.itertuples()],
            "95 % interval": [f"{row.low:.3f}–{row.high:.3f}" for row in summary.itertuples()],
            "test samples": summary.n_test.astype(str),
            "protocol": summary.protocol,
        }
    )


def markdown_table(table: pd.DataFrame) -> str:
    """Format a table of text in Markdown, as the README shows it."""
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in table.to_numpy().tolist())
    return f"| {' | '.join(table.columns)} |\n|{'---|' * len(table.columns)}\n{rows}"


def render_page(
    summary: pd.DataFrame,
    runs: pd.DataFrame,
    pairs: pd.DataFrame,
    sentences: Sequence[str],
    skipped: Sequence[str],
    boxplots: Path,
    sections: Sequence[str] = (),
) -> str:
    """Render the page; it needs no other file.

    Args:
        summary: of all protocols, as `significance.summarize_runs` returns it.
        runs: one row per run, of all protocols.
        pairs: as `statements.all_pairs` returns them.
        sentences: as `statements.key_comparisons` returns them.
        skipped: which models were skipped on which datasets, and why.
        boxplots: figure of the scores.
        sections: HTML of further sections; see pipeline/report/sections.py.
    """
    settings = summary.drop(columns=["task", "classes", "low", "high", "n_test"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>eo-compose report</title>
<style>{STYLE}</style></head><body>
<h1>Which backbones and ensembles score best?</h1>
<p>Protocols: <b>{", ".join(summary.protocol.unique())}</b>. In the frozen protocol the backbones are not trained:
heads are trained on cached features, learning rate and weight decay are searched on the validation split, and every
seed is scored once on the test split. Students and fine-tuned models are trained networks, which is another protocol:
no statistic below mixes protocols. Networks with random weights and band statistics are controls, not models to
use.</p>
{html_table(display_table(summary))}
<p>± is the standard deviation over seeds. The interval is the 95 % bootstrap interval of the mean over test samples,
with the seeds fixed.</p>
{embedded_image(boxplots, "Box plots of test scores over seeds, one panel per dataset")}
<h2>Which differences are significant?</h2>
<p>Differences are paired: the bootstrap uses the same test samples for both models. A difference is significant if
its 95 % interval over test samples and seeds does not contain zero.</p>{html_list(sentences)}
<h3>All pairs of models</h3><p>{html.escape(statements.multiplicity_note(pairs))}</p>{_pairs_by_dataset(pairs)}
<h2>Over several datasets</h2>{_aggregate_tables(runs[runs.protocol == FROZEN])}
{"".join(sections)}
<h2>Skipped models</h2>
<p>A model is skipped on a dataset that lacks a band which its backbones need.</p>{html_list(skipped)}
<h2>Settings</h2>
<details><summary>Weights, heads and their inputs, selected learning rates and weight decays, validation scores
</summary>
{settings.to_html(index=False, float_format=lambda value: f"{value:.4g}")}</details>
</body></html>
"""


def html_table(table: pd.DataFrame, caption: str = "") -> str:
    """Format a table of text in HTML."""
    text = table.to_html(index=False, na_rep="–")
    return text.replace("<thead>", f"<caption>{html.escape(caption)}</caption><thead>", 1) if caption else text


def html_list(texts: Sequence[str]) -> str:
    """Format texts as an HTML list; an empty list shows `none`."""
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts or ["none"]) + "</ul>"


def embedded_image(path: Path, description: str) -> str:
    """Embed a PNG file in HTML."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def format_score(row) -> str:
    """Format mean and standard deviation over seeds of a row of the summary."""
    return f"{row.mean:.3f} ± {f'{row.std:.3f}' if row.runs > 1 else '–'}"


def _pairs_by_dataset(pairs: pd.DataFrame) -> str:
    return "".join(
        f"<details><summary>{html.escape(dataset)}, {protocol}: {len(table)} pairs</summary>"
        f"{html_list(table.sentence.tolist())}</details>"
        for (dataset, protocol), table in pairs.groupby(["dataset", "protocol"], sort=False)
    )


def _aggregate_tables(runs: pd.DataFrame) -> str:
    """Render one table for each group of datasets with common models."""
    tables = []
    for datasets in significance.common_dataset_groups(runs):
        table = significance.aggregate_over_datasets(runs, datasets)
        text = pd.DataFrame(
            {
                "model": table.model,
                "interquartile mean": table.iqm.map("{:.3f}".format),
                "95 % interval over seeds": [f"{row.low:.3f}–{row.high:.3f}" for row in table.itertuples()],
                "protocol": ", ".join(runs.protocol.unique()),
            }
        )
        tables.append(html_table(text, f"Datasets: {', '.join(datasets)}"))
    if not tables:
        return "<p>No model ran on two datasets, so there is nothing to aggregate.</p>"
    return (
        "<p>As in GEO-Bench (arXiv 2306.03831): the scores of a dataset are scaled so that its worst run, controls "
        "included, is 0 and its best run is 1; the figure is the mean of the middle half of all runs. The intervals "
        "are over seeds only: the selection of datasets and test samples is not included. A table has the models "
        "that ran on all its datasets; figures of different tables cannot be compared.</p>" + "".join(tables)
    )
