"""The section on exported files and maps."""

import json

import numpy as np
import pandas as pd
import pytest
import rasterio

from pipeline.report import figures
from pipeline.report.sections import exports_and_maps_section

RATES = pd.DataFrame(
    [("lakes", "small", "student.onnx", 75.5)], columns=["dataset", "student", "file", "images_per_second"]
)


@pytest.fixture
def folders(tmp_path):
    """Folders of an exported student (export), of its map (map), and of a skipped student (skipped)."""
    files = {"student.onnx": {"bytes": 3_800_000, "score": 0.5, "difference": 4e-6}}
    for name in ("export", "map", "skipped"):
        (tmp_path / name).mkdir()
    metadata = {"skipped": None, "files": files, "metric": "mean IoU", "chips": 18}
    (tmp_path / "export/export.json").write_text(json.dumps(metadata))
    metadata = {"skipped": None, "task": "segmentation", "classes": ["water", "land", "ice"]}
    (tmp_path / "map/map.json").write_text(json.dumps(metadata))
    for name in ("export", "map"):
        (tmp_path / f"skipped/{name}.json").write_text(json.dumps({"skipped": "no teacher"}))
    classes = np.full((40, 3000), 255, np.uint8)
    classes[:, :1000], classes[:, 1000:2000] = 0, 1
    for name, values in (("class", classes), ("confidence", np.minimum(classes, 100))):
        with rasterio.open(
            tmp_path / f"map/{name}.tif", "w", driver="GTiff", height=40, width=3000, count=1, dtype="uint8"
        ) as file:
            file.write(values, 1)
    return tmp_path


def test_exports_and_maps_section_shows_files_and_maps_but_no_skipped_students(folders, tmp_path):
    exports = {("lakes", "small"): folders / "export", ("woods", "small"): folders / "skipped"}
    maps = {("lakes", "small"): folders / "map", ("woods", "small"): folders / "skipped"}
    text = exports_and_maps_section(exports, RATES, maps, tmp_path)
    assert "<td>student.onnx</td>" in text
    assert "mean IoU 0.500 (n = 18)" in text
    assert "<td>75.5</td>" in text
    assert text.count("<img") == 1
    assert text.count("<h2>") == 2
    assert "woods" not in text
    png = (tmp_path / "map-lakes-small.png").read_bytes()
    exports_and_maps_section(exports, RATES, maps, tmp_path)
    assert (tmp_path / "map-lakes-small.png").read_bytes() == png


def test_exports_and_maps_section_without_measured_rate_shows_none(folders, tmp_path):
    text = exports_and_maps_section({("lakes", "small"): folders / "export"}, RATES[:0], {}, tmp_path)
    assert "<td>student.onnx</td>" in text
    assert "75.5" not in text


def test_exports_and_maps_section_without_results_is_empty(folders, tmp_path):
    assert exports_and_maps_section({}, RATES, {}, tmp_path) == ""
    assert exports_and_maps_section({("woods", "small"): folders / "skipped"}, RATES, {}, tmp_path) == ""


def test_read_downsampled_large_map_is_reduced_and_nodata_is_masked(folders):
    values = figures._read_downsampled(folders / "map/class.tif")
    assert values.shape == (14, 1024)
    assert values[:, :300].max() == 0
    assert values.mask[:, 700:].all()
    assert not values.mask[:, :650].any()
