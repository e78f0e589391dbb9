"""The report page: one self-contained HTML file, rendered from the templates in templates/."""

import base64
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd


def render(template: str, **context: object) -> str:
    """Render a template; every text is escaped, and a missing variable is an error.

    Args:
        template: such as `report.html.j2`; or that of one section, such as `students.html.j2`.
        context: the variables of the template, such as those of pipeline/report/sections.py. Tables are data frames
            whose cells are text, and figures are paths of PNG files, which are embedded.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda path: base64.b64encode(Path(path).read_bytes()).decode()
    return environment.get_template(template).render(context)


def display_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `significance.summarize_runs` as readers see it; every cell is text."""
    return pd.DataFrame(
        {
            "dataset": summary.dataset,
            "model": summary.model,
            "kind": summary.kind,
            "metric": summary.metric,
            "test score, mean ± std over seeds": format_scores(summary),
            "95 % interval": format_intervals(summary),
            "test samples": summary.n_test.astype(str),
            "protocol": summary.protocol,
        }
    )


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
