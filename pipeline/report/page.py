"""The report: scores as a table, what they can tell, the composition search, and one self-contained page."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from pipeline.report import aggregate, finetuned, statements
from pipeline.report.significance import BootstrapSamples, percentile_interval

STYLE = """body{font:15px/1.5 sans-serif;max-width:1150px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;font-size:13px}td,th{padding:3px 8px;border-bottom:1px solid #ddd;text-align:left}
img{max-width:100%}caption{text-align:left;padding:.3em 0;color:#444}summary{cursor:pointer;color:#05a}"""


# The protocol of models whose backbones stay as they are; others are trained networks.
FROZEN = "frozen"


def model_kind(model: str, weights: str, protocol: str = FROZEN) -> str:
    """What a model is: `student`, `fine-tuned`, or, frozen, `joined`, `pretrained`, `random` or `baseline`."""
    if protocol.startswith("fine-tuned"):
        return "fine-tuned"
    if protocol != FROZEN:
        return "student"
    if "random" in weights:
        return "random"
    if weights == "none":
        return "baseline"
    return "joined" if "+" in model else "pretrained"


def summarize_runs(runs: pd.DataFrame, drawn: Mapping[tuple[str, str], BootstrapSamples]) -> pd.DataFrame:
    """One row a dataset and model.

    Args:
        runs: one row a run, as `protocol.test` gives them.
        drawn: of each (dataset, model).

    Returns:
        mean; std, over seeds; low and high, the 95 % bootstrap interval of the mean over test samples.
    """
    rows = []
    for (dataset, model), group in runs.groupby(["dataset", "model"], sort=False):
        first = group.iloc[0]
        spread = group.score.std(ddof=1) if len(group) > 1 else float("nan")
        low, high = percentile_interval(drawn[dataset, model].samples)
        rows.append(
            {"dataset": dataset, "model": model, "kind": model_kind(model, first.weights, first.protocol),
             "protocol": first.protocol, "metric": first.metric, "mean": group.score.mean(), "std": spread,
             "low": low, "high": high, "val_mean": group.val_score.mean(), "runs": len(group), "n_test": first.n_test,
             "weights": first.weights, "head": _head(first), "learning_rate": first.learning_rate,
             "weight_decay": first.weight_decay,
             "task": first.task, "classes": first.classes}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _head(run: pd.Series) -> str:
    """What a run says of its head; students have none, and older runs do not say."""
    said = run.get("head")
    return said if isinstance(said, str) else "–"


def display_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The table of scores as a reader sees it, every cell text."""
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
    """A table of text, as the README shows it."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "".join(f"| {' | '.join(line)} |\n" if line[0] != "---" else f"|{'|'.join(line)}|\n" for line in lines)


def render_page(
    summary: pd.DataFrame,
    runs: pd.DataFrame,
    pairs: pd.DataFrame,
    said: Sequence[str],
    skipped: Sequence[str],
    composition: str,
    picture: Path,
    students: str = "",
) -> str:
    """One HTML page that needs no other file.

    Args:
        summary: of `summarise`, all protocols.
        runs: one row a run, of all protocols.
        pairs, said: of `findings.every_pair` and `findings.headlines`.
        composition, students: HTML of pipeline/report/composition.py and pipeline/report/distillation.py.
    """
    settings = summary.drop(columns=["task", "classes", "low", "high", "n_test"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>eo-compose report</title>
<style>{STYLE}</style></head><body>
<h1>Which backbones, joined how, read these data best?</h1>
<p>Protocol: <b>{" and ".join(summary.protocol.unique())}</b>. In the frozen protocol features are cached once and
heads trained on them; learning rate and weight decay are searched on the validation split; every row is the test
split, touched once per seed. A student, or a fine-tuned model, is a trained network and so another protocol: no
statistic below mixes the two. Random
networks and the raw-band baseline are controls, not models to use.</p>
{html_table(display_table(summary))}
<p>± is over seeds; the interval is the 95 % bootstrap of the mean over test samples, apart from the seeds.</p>
{embedded_image(picture, "Box plots of test scores over seeds, one panel a dataset")}
<h2>What can be told</h2>
<p>Differences are paired: the same test samples are drawn for both models. A verdict goes by the interval over test
samples and seeds together.</p>{html_list(said)}
<h3>Every pair</h3><p>{html.escape(statements.multiplicity_note(pairs))}</p>{_pairs(pairs)}
<h2>Over the data sets</h2>{_aggregated(runs[runs.protocol == FROZEN])}
{composition}
{students}
{finetuned.finetuning_section(runs)}
<h2>Left out</h2>
<p>A model is left out of a dataset that lacks a band its backbones were trained on.</p>{html_list(skipped)}
<h2>Settings</h2>
<details><summary>weights, heads and what they read, chosen learning rates and weight decays, validation scores
(protocol as stated)</summary>
{settings.to_html(index=False, float_format=lambda value: f"{value:.4g}")}</details>
</body></html>
"""


def html_table(table: pd.DataFrame, caption: str = "") -> str:
    """A table of text."""
    text = table.to_html(index=False, na_rep="–")
    return text.replace("<thead>", f"<caption>{html.escape(caption)}</caption><thead>", 1) if caption else text


def html_list(texts: Sequence[str]) -> str:
    """A list, or `none`."""
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts or ["none"]) + "</ul>"


def embedded_image(path: Path, what: str) -> str:
    """A picture inside the page."""
    coded = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{coded}">'


def format_score(row) -> str:
    """A row of the summary as its mean and spread over seeds."""
    return f"{row.mean:.3f} ± {f'{row.std:.3f}' if row.runs > 1 else '–'}"


def _pairs(pairs: pd.DataFrame) -> str:
    return "".join(
        f"<details><summary>{html.escape(dataset)}, {protocol}: {len(table)} pairs</summary>"
        f"{html_list(table.sentence.tolist())}</details>"
        for (dataset, protocol), table in pairs.groupby(["dataset", "protocol"], sort=False)
    )


def _aggregated(runs: pd.DataFrame) -> str:
    texts = []
    for datasets in aggregate.common_dataset_groups(runs):
        table = aggregate.aggregate_over_datasets(runs, datasets)
        text = pd.DataFrame(
            {
                "model": table.model,
                "interquartile mean": table.iqm.map("{:.3f}".format),
                "95 % interval over seeds": [f"{row.low:.3f}–{row.high:.3f}" for row in table.itertuples()],
                "protocol": " and ".join(runs.protocol.unique()),
            }
        )
        texts.append(html_table(text, f"Over {', '.join(datasets)}"))
    if not texts:
        return "<p>No model ran on two data sets, so there is nothing to aggregate.</p>"
    return (
        "<p>As GEO-Bench does (arXiv 2306.03831): scores of a data set are scaled so that its worst run, controls "
        "included, is 0 and its best is 1; then the mean of the middle half of all runs. The intervals are over "
        "seeds alone: which data sets were picked, and which test samples, is not in them. A table has the models "
        "that ran on all of its data sets; figures of different tables are not to be compared.</p>" + "".join(texts)
    )
