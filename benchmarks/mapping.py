"""Peak memory of mapping a scene, and one with sixteen times the pixels.

    python -m benchmarks.mapping

Each map is written by a separate process, of a GeoTIFF that repeats the sample's Sentinel-2 scene (mirrored, so that
no seam is sharper than the scene). The model is an exported student with random weights, which computes as much as a
trained one. Peaks are VmHWM, which starts at zero in each process. The control reads the whole scene first, as a map
without windows would, so its memory must grow.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.windows import Window

from benchmarks.timing import save_results
from pipeline import export
from pipeline.data.sources import osm_landuse
from pipeline.distillation.student import Student, StudentSpec

FOLDER = Path("data/scratch/mapping")
BANDS = [osm_landuse.BANDS[index] for index in (1, 2, 3, 7)]  # blue, green, red, nir
SIDES = {"small": 2048, "large": 8192}  # the small scene fills GDAL's cache of 32 MB
MAP_SCRIPT = """
import sys
from pathlib import Path
from rasterio.windows import Window
from pipeline.mapping.scene import open_scene
from pipeline.mapping.predict_scene import predict_scene
from pipeline.mapping.predictors import load_onnx_student

folder, name, method = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
scene = open_scene(folder / f"{name}.tif")
if method == "whole":
    pixels = scene.read_window(Window(0, 0, scene.width, scene.height), range(len(scene.bands)))
predict_scene(scene, load_onnx_student(folder / "student.onnx"), folder / f"{name}-{method}")
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
"""


def write_scene(path: Path, side: int) -> None:
    """Write a square GeoTIFF of `side` pixels, window by window."""
    image, transform, crs = osm_landuse.read_scene(Path("data/raw/sample-landuse-seg"))
    image = image[[osm_landuse.BANDS.index(band) for band in BANDS], :512, :512]
    tile = np.pad(image, ((0, 0), (0, 512), (0, 512)), mode="symmetric")
    with rasterio.open(
        path, "w", driver="GTiff", height=side, width=side, count=len(BANDS), dtype="uint16", crs=crs,
        transform=transform, tiled=True, blockxsize=512, blockysize=512,
    ) as file:  # fmt: skip
        for row in range(0, side, 1024):
            for column in range(0, side, 1024):
                file.write(tile, window=Window(column, row, 1024, 1024))
        file.descriptions = [band.common_name for band in BANDS]
        file.update_tags(units="dn")


def write_student(path: Path) -> None:
    """Export a segmentation student for chips of 128 px."""
    torch.manual_seed(0)
    spec = StudentSpec("mobilenetv3_small_050", len(BANDS), len(osm_landuse.CLASSES), "segmentation", 128)
    metadata = {
        "task": "segmentation", "classes": list(osm_landuse.CLASSES), "units": "dn", "gsd": 10.0, "size": [128, 128],
        "bands": [{key: getattr(band, key) for key in ("name", "common_name", "wavelength")} for band in BANDS],
    }  # fmt: skip
    student = Student(spec, [1500.0] * len(BANDS), [400.0] * len(BANDS)).eval()
    export.write_onnx(export.trace(student, metadata), metadata, path)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_student(FOLDER / "student.onnx")
    peaks, seconds = {}, {}
    for name, side in SIDES.items():
        write_scene(FOLDER / f"{name}.tif", side)
        for method in ("windows", "whole"):
            start, command = time.perf_counter(), [sys.executable, "-c", MAP_SCRIPT, FOLDER, name, method]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            peaks[name, method], seconds[name, method] = float(output), time.perf_counter() - start
    save_results("mapping", {
        "pixels": [side**2 for side in SIDES.values()],
        "bands": len(BANDS),
        "peak_megabytes": [round(peaks[name, "windows"]) for name in SIDES],
        "rss_growth": round(peaks["large", "windows"] / peaks["small", "windows"], 3),
        "rss_growth_whole_scene_read": round(peaks["large", "whole"] / peaks["small", "whole"], 3),
        "seconds": [round(seconds[name, "windows"], 1) for name in SIDES],
    })  # fmt: skip
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
