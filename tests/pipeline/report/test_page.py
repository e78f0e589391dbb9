"""The page as a whole, its tables, and the section on the composition search."""

import json
import subprocess

import pandas as pd
import pytest

from pipeline.report import figures, page, statements
from pipeline.report.sections import composition_section, finetuning_section
from pipeline.report.significance import summarize_runs
from tests.conftest import ROOT


def render(grid, compositions, folder, skipped=()) -> str:
    """Render the page of a grid with all its sections."""
    runs, draws = grid
    summary = summarize_runs(runs, draws)
    figures.draw_boxplots(runs, summary, folder / "boxplots.png")
    sections = [composition_section(compositions, summary, folder), finetuning_section(runs)]
    sentences, pairs = statements.key_comparisons(summary, draws), statements.all_pairs(summary, draws)
    return page.render_page(summary, runs, pairs, sentences, skipped, folder / "boxplots.png", sections)


def on_two_datasets(runs, draws):
    """The same runs of the frozen protocol on a second dataset, so that there is something to aggregate."""
    runs = pd.concat([runs, runs[runs.protocol == "frozen"].assign(dataset="e")])
    return runs, draws | {("e", model): model_draws for (_, model), model_draws in draws.items()}


def test_display_table_states_the_protocol_of_every_row(grid_with_fine_tuned):
    table = page.display_table(summarize_runs(*grid_with_fine_tuned))
    assert table.protocol.tolist() == ["frozen"] * 5 + ["fine-tuned (lora)"]


def test_markdown_table_has_one_line_per_row(summary):
    lines = page.markdown_table(page.display_table(summary)).splitlines()
    assert len(lines) == 2 + len(summary)
    assert lines[1] == "|" + "---|" * 8
    assert lines[2].split("|")[2].strip() == "a"


def test_render_page_fine_tuned_scores_are_shown_and_enter_no_frozen_statistic(
    grid, grid_with_fine_tuned, compositions, tmp_path
):
    frozen, both = (
        render(on_two_datasets(*models), compositions, tmp_path) for models in (grid, grid_with_fine_tuned)
    )
    aggregates = [text.split("<h2>Over several datasets</h2>")[1].split("<h2>")[0] for text in (frozen, both)]
    assert "interquartile mean" in aggregates[0]
    assert aggregates[0] == aggregates[1]
    assert "<h2>Fine-tuning</h2>" not in frozen
    table = both.split("<h2>Fine-tuning</h2>")[1].split("</table>")[0]
    assert all(
        value in table for value in ("b, fine-tuned", "fine-tuned (lora)", "1,234", "0.600", "0.900", "40, 40, 40")
    )
    row = next(line for line in both.split("<tr>") if "b, fine-tuned" in line)
    assert "1.000 ± 0.000" in row
    assert "fine-tuned (lora)" in row


def test_render_page_is_self_contained_and_escaped(grid, compositions, tmp_path):
    text = render(grid, compositions, tmp_path, skipped=["<x>"])
    assert "&lt;x&gt;" in text
    assert "<x>" not in text
    assert text.count("data:image/png;base64,") == 3
    assert text.index("<table") < text.index("<img") < text.index("<h2>")
    for table in text.split("<table")[1:]:
        assert "frozen" in table.split("</table>")[0], "every table states the protocol"


def test_render_page_settings_state_the_head_of_every_model(grid, tmp_path):
    runs, draws = grid
    heads = runs.model.map({"a": "linear, mean_level0", "a+b": "linear, film, mean_level0"})  # others: none
    summary = summarize_runs(runs.assign(head=heads), draws)
    figures.draw_boxplots(runs, summary, tmp_path / "p.png")
    text = page.render_page(summary, runs, statements.all_pairs(summary, draws), [], [], tmp_path / "p.png")
    settings = text.split("<h2>Settings</h2>")[1]
    rows = {line.split("<td>")[2].split("<")[0]: line for line in settings.split("<tr>")[1:]}
    assert "linear, film, mean_level0" in rows["a+b"]
    assert "<td>–</td>" in rows["b"]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_composition_section_greedy_selection_of_masks_mentions_pixels(summary, compositions, tmp_path, task):
    text = composition_section(compositions, summary.assign(task=task), tmp_path)
    caption = next(caption for caption in text.split("<caption>") if "greedy" in caption).split("</caption>")[0]
    assert "heads.levels" in caption
    assert ("pixels" in caption) == (task == "segmentation")


def test_composition_section_shows_probe_and_test_scores(grid, summary, compositions, tmp_path):
    runs, _ = grid
    text = composition_section(compositions, summary, tmp_path)
    score = runs[runs.model == "a+b"].score
    row = next(line for line in text.split("<tr>") if "b+a" in line)  # the grid's a+b, with its members swapped
    assert f"{score.mean():.3f} ± {score.std():.3f}" in row
    assert "+0.100" in row
    assert "a needs &lt;nir&gt;." in text
    assert (tmp_path / "cka.png").stat().st_size > 1000


def committed(name: str) -> str:
    """Text of a file as committed: `make run` overwrites scores, with other rounding on other CPUs."""
    result = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout if result.returncode == 0 else (ROOT / name).read_text()


def test_readme_shows_exactly_the_committed_scores():
    scores = json.loads(committed("results/metrics.json"))
    table = [line.split("|") for line in committed("README.md").splitlines() if "±" in line and "|" in line]
    shown = {(cells[1].strip(), cells[2].strip()): cells[5].strip() for cells in table if cells[1].strip() in scores}
    expected = {
        (dataset, model): f"{score['mean']:.3f} ± {score['std']:.3f}"
        for dataset, models in scores.items()
        for model, score in models.items()
    }
    assert shown == expected
