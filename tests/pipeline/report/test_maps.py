import json

import numpy as np
import pandas as pd
import pytest
import rasterio

from pipeline.report import mapped

RATES = pd.DataFrame(
    [("lakes", "small", "student.onnx", 75.5)], columns=["dataset", "student", "file", "images_per_second"]
)


@pytest.fixture
def folders(tmp_path):
    """An exported student, its map, and a cell that was left out of both."""
    files = {"student.onnx": {"bytes": 3_800_000, "score": 0.5, "difference": 4e-6}}
    told = {"skipped": None, "files": files, "metric": "mean IoU", "chips": 18}
    for name in ("export", "map", "left"):
        (tmp_path / name).mkdir()
    (tmp_path / "export/export.json").write_text(json.dumps(told))
    said = {"skipped": None, "task": "segmentation", "classes": ["water", "land", "ice"]}
    (tmp_path / "map/map.json").write_text(json.dumps(said))
    for name in ("export", "map"):
        (tmp_path / f"left/{name}.json").write_text(json.dumps({"skipped": "no teacher"}))
    classes = np.full((40, 3000), 255, np.uint8)
    classes[:, :1000], classes[:, 1000:2000] = 0, 1
    for name, values in (("class", classes), ("confidence", np.minimum(classes, 100))):
        with rasterio.open(
            tmp_path / f"map/{name}.tif", "w", driver="GTiff", height=40, width=3000, count=1, dtype="uint8"
        ) as file:
            file.write(values, 1)
    return tmp_path


def test_files_and_maps_are_shown_but_what_was_left_out(folders, tmp_path):
    exported = {("lakes", "small"): folders / "export", ("woods", "small"): folders / "left"}
    maps = {("lakes", "small"): folders / "map", ("woods", "small"): folders / "left"}
    text = mapped.exports_and_maps_section(exported, RATES, maps, tmp_path)
    assert "<td>student.onnx</td>" in text
    assert "mean IoU 0.500 (n = 18)" in text
    assert "<td>75.5</td>" in text
    assert "<td>not timed</td>" in mapped.exports_and_maps_section(exported, RATES[:0], {}, tmp_path)
    assert text.count("<img") == 1
    assert "woods" not in text
    first = (tmp_path / "map-lakes-small.png").read_bytes()
    mapped.exports_and_maps_section(exported, RATES, maps, tmp_path)
    assert (tmp_path / "map-lakes-small.png").read_bytes() == first
    assert mapped.exports_and_maps_section({}, RATES, {}, tmp_path) == ""
    assert mapped.exports_and_maps_section({("woods", "small"): folders / "left"}, RATES, {}, tmp_path) == ""


def test_a_large_map_is_read_coarser_and_no_data_is_masked(folders):
    values = mapped._coarse(folders / "map/class.tif")
    assert values.shape == (14, 1024)
    assert values[:, :300].max() == 0
    assert values.mask[:, 700:].all()
    assert not values.mask[:, :650].any()
