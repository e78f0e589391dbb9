"""The report of a folder of results: its page, section by section, its tables and its figures."""

import json
import re
import subprocess

import jinja2
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from pipeline.errors import UserError
from pipeline.report import figures, sections
from stages import report
from tests.conftest import ROOT
from tests.errors import raises


@pytest.fixture(scope="module")
def html(results):
    """The page."""
    return (results / "report/index.html").read_text()


@pytest.fixture
def student(results, monkeypatch):
    """Records of the student on d."""
    monkeypatch.chdir(results.parent)
    return report._read_student("d", "small")


def section_of(html: str, title: str) -> str:
    """Section of the page below a title."""
    return re.split("<h[12]>", html.split(f"<h2>{title}</h2>")[1])[0]


def rows_of(html: str, *columns: str) -> list[list[str]]:
    """Cells of these columns of the first table."""
    table = html.split("<table>")[1].split("</table>")[0]
    names = re.findall("<th>(.*?)</th>", table)
    rows = [re.findall("<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    return [[row[names.index(column)] for column in columns] for row in rows]


def test_report_page_is_self_contained_and_escaped(html):
    assert html.count("data:image/png;base64,") == html.count("<img") == 5
    assert not re.search(r"(src|href)=\"http", html)
    assert html.count("needs &lt;nir&gt;.") == 3 + 1, "skipped models, and the composition search"
    assert "<nir>" not in html
    assert html.index("<table") < html.index("<img") < html.index("<h2>")
    tables = [table.split("</table>")[0] for table in html.split("<table>")[1:]]
    without_protocol = [table for table in tables if "frozen" not in table]
    assert len(without_protocol) == 1, "every table but that of exported files states the protocol"
    assert "student.onnx" in without_protocol[0]


def test_report_tables_have_every_model_and_its_protocol(results, html, grid):
    lines = (results / "report/summary.md").read_text().splitlines()
    assert lines[1] == "|" + "---|" * 8
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    rows = rows_of(html, "dataset", "model", "protocol")
    assert [[dataset, model, row[-1]] for dataset, model, *row in cells] == rows
    runs, _ = grid
    expected = runs[["dataset", "model", "protocol"]].drop_duplicates().to_numpy().tolist()
    averaged = ["d", "a+b, averaged", "frozen"]
    assert sorted(rows) == sorted([*expected, averaged, ["e", "a", "frozen"]])
    assert ["a+b, averaged", "average of probabilities (control)"] in rows_of(html, "model", "kind")
    scores = json.loads((results / "metrics.json").read_text())
    score = runs[runs.model == "a"].score
    assert scores["d"]["a"] == pytest.approx({"mean": score.mean(), "std": score.std()}, abs=1e-6)
    assert scores["e"]["a"] == {"mean": 0.25}, "a single run has no deviation"
    assert sum("| 0.250 ± – |" in line for line in lines) == 1


def test_report_has_further_metrics_and_scores_of_every_class(results, html, grid):
    table = pd.read_csv(results / "report/metrics.csv").set_index(["dataset", "model", "metric"])
    runs, _ = grid
    assert table.loc["d", "a", "accuracy"]["mean"] == pytest.approx(runs[runs.model == "a"].score.mean())
    section = section_of(html, "Other metrics, and classes")
    columns = ("dataset", "model", "balanced accuracy", "mean IoU")
    assert ["e", "a", "0.000 ± –", "0.000 ± –"] in rows_of(section, *columns)
    assert ["d", "–"] in rows_of(section, "dataset", "mean IoU")
    classes = pd.read_csv(results / "report/per_class.csv")
    predicted = pd.read_parquet(results / "runs/d/a/predictions.parquet")
    expected = [f1_score(seed.label, seed.predicted, average=None) for _, seed in predicted.groupby("seed")]
    rows = classes[(classes.dataset == "d") & (classes.model == "a")]
    assert rows["class"].tolist() == ["no", "yes"]
    np.testing.assert_allclose(rows.f1, np.mean(expected, axis=0))
    np.testing.assert_allclose(rows.f1_std, np.std(expected, axis=0, ddof=1))
    (table_of_d,) = [group for group in section.split("<details>") if group.startswith("<summary>d:")]
    assert [row[0] for row in rows_of(table_of_d, "class", "test labels")] == ["no", "yes"]
    assert rows_of(table_of_d, "a (frozen)")[0][0].startswith(f"{rows.f1.iloc[0]:.3f} / ")


def test_report_comparisons_are_in_the_page_and_in_findings(results, html):
    findings = (results / "report/findings.md").read_text().splitlines()
    assert len(findings) == 4 + 1 + 2  # ensembles and controls, the fine-tuned model, the student on both datasets
    assert sum(" a+b, averaged (control: " in sentence for sentence in findings) == 1
    pairs = pd.read_csv(results / "report/pairs.csv")
    assert set(pairs.protocol) == {"frozen"}
    assert "a+b" in set(pairs.model_b)
    assert "a+b, averaged" not in {*pairs.model_a, *pairs.model_b}
    for sentence in [*(finding.removeprefix("- ") for finding in findings), *pairs.sentence]:
        assert sentence.replace("'", "&#39;") in html


def test_report_aggregates_have_frozen_models_of_all_datasets_only(html):
    section = section_of(html, "Over several datasets")
    assert rows_of(section, "model", "protocol") == [["a", "frozen"]]
    assert "Datasets: d, e. On GEO-Bench&#39;s scale: d." in section


def test_report_composition_section_shows_probe_and_test_scores(results, html, summary):
    row = summary.set_index("model").loc["a+b"]
    columns = ("ensemble", "gain over its best member", "full protocol (frozen), test accuracy")
    table = {name: values for name, *values in rows_of(section_of(html, "Composition search"), *columns)}
    gain, score = table["b+a"]  # the grid's a+b, with its members swapped
    assert gain == "+0.100"
    assert score.startswith(f"{row['mean']:.3f} ± {row['std']:.3f} (")
    assert table["a"][0] == "–"
    assert (results / "report/cka.png").stat().st_size > 1000


def test_report_students_section_has_every_model_with_protocol_and_cost(html):
    section = section_of(html, "Students")
    speeds = ("chips per second, 2 CPU cores", "chips per second, GPU")
    assert rows_of(section, "model", "role", "protocol", "million parameters", *speeds) == [
        ["a+b", "teacher", "frozen", "20.00", "10", "1000"],
        ["a", "member", "frozen", "10.00", "20", "2000"],
        ["b", "member", "frozen", "10.00", "20", "2000"],
        ["small (distilled)", "student", "distilled", "1.00", "100", "7777"],
        ["small (supervised)", "student", "supervised", "1.00", "100", "7777"],
    ]
    distilled, skipped = re.findall("<li>(.*?)</li>", section)
    # Parameters, operations, and chips per second of both.
    assert all(number in distilled for number in ("5.0%", "2.5%", " 100 ", " 10."))
    assert "no teacher" in skipped


def test_students_without_costs_show_none(results, student, grid):
    summary = pd.read_csv(results / "report/summary.csv")
    costs = pd.read_csv(results / "cost/d.csv")[:0]
    data = sections.students([student], summary, grid[1], costs, results / "report")
    assert "5.0%" not in data["sentences"][0]
    assert (data["tables"][0]["models"] == "–").sum().sum() == 5 * 4


def test_report_exports_and_maps_show_no_skipped_students(results, html, student):
    columns = ("dataset", "file", "MB", "images per second", "validation score")
    assert rows_of(section_of(html, "Exported students"), *columns) == [
        ["d", "student.onnx", "3.8", "75.5", "accuracy 0.500 (n = 18)"],
        ["d", "student.pt2", "3.8", "75.5", "accuracy 0.500 (n = 18)"],
    ]
    assert re.findall('alt="(Map .*?)"', html) == ["Map of the scene of d by the student small"]
    png = (results / "report/map-d-small.png").read_bytes()
    sections.maps([student], results / "report")
    assert (results / "report/map-d-small.png").read_bytes() == png, "the same numbers yield the same bytes"


def test_read_downsampled_large_map_is_reduced_and_nodata_is_masked(results):
    values = figures._read_downsampled(results / "map/d/small/class.tif")
    assert values.shape == (14, 1024)
    assert values[:, :300].max() == 0
    assert values.mask[:, 700:].all()
    assert not values.mask[:, :650].any()


def test_report_finetuning_section_and_settings_state_how_models_were_trained(html):
    columns = ("model", "protocol", "trained parameters", "validation score, frozen", "best step of each seed")
    expected = ["b, fine-tuned", "fine-tuned (lora)", "1,234", "0.600", "40, 40, 40"]
    assert rows_of(section_of(html, "Fine-tuning"), *columns) == [expected]
    heads = dict(rows_of(section_of(html, "Settings"), "model", "head"))
    assert heads["a+b"] == "linear, film, mean_level0"
    assert heads["b"] == heads["small (distilled)"] == "–"


def test_render_sections_without_results_are_empty(tmp_path):
    no_students = sections.students([], pd.DataFrame(), {}, pd.DataFrame(), tmp_path)
    assert sections.render("students.html.j2", students=no_students).strip() == ""
    assert sections.render("exports.html.j2", exports=pd.DataFrame(), maps=[]).strip() == ""
    assert sections.render("finetuning.html.j2", finetuning=pd.DataFrame()).strip() == ""
    assert "nothing to aggregate" in sections.render("aggregates.html.j2", aggregates=[])
    with pytest.raises(jinja2.UndefinedError):
        sections.render("aggregates.html.j2")


def test_report_models_tested_on_other_samples_are_refused(results):
    folders = {("d", "a"): results / "runs/d/a", ("d", "b"): results / "runs/e/a"}
    runs = pd.read_csv(results / "report/runs.csv")
    runs.loc[runs.model == "b", "task"] = "segmentation"
    with raises(UserError, "dvc repro", path=results / "runs/e/a"):
        report._bootstrap_all(folders, runs, {})


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
