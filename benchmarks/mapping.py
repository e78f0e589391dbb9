"""Peak memory of mapping a scene, and one with sixteen times the pixels.

    python -m benchmarks.mapping

Each map is written by a separate process, of a GeoTIFF that repeats the sample's Sentinel-2 scene (mirrored, so that
no seam is sharper than the scene). The model is an exported student with random weights, which computes as much as a
trained one. Peaks are VmHWM, which starts at zero in each process. The control reads the whole scene first, as a map
without windows would, so its memory must grow.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import rasterio
import torch

from pipeline import export
from pipeline.data.sources import osm_landuse
from pipeline.distillation.student import Student, StudentSpec

FOLDER = Path("data/scratch/mapping")
BAND_INDICES = (1, 2, 3, 7)  # blue, green, red, nir
SIDE = 1024
MAP_SCRIPT = """
import sys
from pathlib import Path
from pipeline.mapping.scene import open_scene
from pipeline.mapping.predict_scene import predict_scene
from pipeline.mapping.predictors import load_onnx_student

scene, pixels = open_scene(Path(sys.argv[1])), None
if sys.argv[3] == "whole":
    pixels = scene.read_window((0, 0, scene.height, scene.width), range(len(scene.bands)))
predict_scene(scene, load_onnx_student(Path("data/scratch/mapping/student.onnx")), Path(sys.argv[2]))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
"""


def write_scene(path: Path, side: int) -> None:
    """Write a square GeoTIFF of `side` pixels, window by window."""
    image, transform, crs = osm_landuse.read_scene(Path("data/raw/sample-landuse"))
    tile = np.pad(image[list(BAND_INDICES), :512, :512], ((0, 0), (0, 512), (0, 512)), mode="symmetric")
    with rasterio.open(
        path, "w", driver="GTiff", height=side, width=side, count=len(BAND_INDICES), dtype="uint16", crs=crs,
        transform=transform, tiled=True, blockxsize=512, blockysize=512,
    ) as file:  # fmt: skip
        for row in range(0, side, 1024):
            for column in range(0, side, 1024):
                file.write(tile, window=rasterio.windows.Window(column, row, 1024, 1024))
        file.descriptions = [osm_landuse.BANDS[index].common_name for index in BAND_INDICES]
        file.update_tags(units="dn")


def write_student(path: Path) -> None:
    """Export a segmentation student for chips of 128 px."""
    torch.manual_seed(0)
    bands = [osm_landuse.BANDS[index] for index in BAND_INDICES]
    spec = StudentSpec("mobilenetv3_small_050", len(bands), len(osm_landuse.CLASSES), "segmentation", 128)
    metadata = {
        "dataset": "sample-landuse-seg", "task": "segmentation", "classes": list(osm_landuse.CLASSES), "ignore": 255,
        "bands": [
            {"name": band.name, "common_name": band.common_name, "wavelength": band.wavelength} for band in bands
        ],
        "units": "dn", "gsd": 10.0, "size": [128, 128],
    }  # fmt: skip
    student = Student(spec, [1500.0] * len(bands), [400.0] * len(bands)).eval()
    export.write_onnx(export.trace(student, metadata), metadata, path)


def measure(scene: Path, method: str) -> tuple[float, float]:
    """Return the peak resident megabytes of a process that maps a scene, and its seconds.

    Args:
        method: `windows`, or `whole` for the control.
    """
    folder = FOLDER / f"{scene.stem}-{method}"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-c", MAP_SCRIPT, scene, folder, method]
    start = time.perf_counter()
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(output.split()[-1]), time.perf_counter() - start


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_student(FOLDER / "student.onnx")
    scenes = [FOLDER / f"{name}.tif" for name in ("small", "large")]
    for scene, side in zip(scenes, (SIDE, 4 * SIDE), strict=True):
        write_scene(scene, side)
    windows, whole = ([measure(scene, method) for scene in scenes] for method in ("windows", "whole"))
    print(json.dumps({
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "pixels": [SIDE**2, (4 * SIDE) ** 2],
        "bands": len(BAND_INDICES),
        "peak_megabytes": [round(megabytes) for megabytes, _ in windows],
        "rss_growth": round(windows[1][0] / windows[0][0], 3),
        "rss_growth_whole_scene_read": round(whole[1][0] / whole[0][0], 3),
        "seconds": [round(seconds, 1) for _, seconds in windows],
    }))  # fmt: skip
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
