"""Peak resident memory of mapping a scene, and one of sixteen times the pixels.

    python -m benchmarks.mapping

Each map is a process of its own: a GeoTIFF of the sample's Sentinel-2 scene, repeated (mirrored, so that no seam is
sharper than the scene), mapped by an exported student of random weights, whose arithmetic is the same as a trained
one's. Peaks are VmHWM, which begins anew with each process. The control reads the whole scene first, as a map without
windows would, and must grow.
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

FOLDER = Path("data/scratch/mapping")
BANDS = (1, 2, 3, 7)  # blue, green, red, nir
SIDE = 1024
MAP = """
import sys
from pathlib import Path
from pipeline.mapping.open_scene import open_scene
from pipeline.mapping.predict_scene import predict_scene
from pipeline.mapping.predictors import load_onnx_student

scene, kept = open_scene(Path(sys.argv[1])), None
if sys.argv[3] == "whole":
    kept = scene.read((0, 0, scene.height, scene.width), range(len(scene.bands)))
predict_scene(scene, load_onnx_student(Path("data/scratch/mapping/student.onnx")), Path(sys.argv[2]))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
"""


def write_scene(path: Path, side: int) -> None:
    """A GeoTIFF of so many pixels each way, written by windows."""
    from pipeline.data.sources import osm_landuse

    image, transform, crs = osm_landuse.read_scene(Path("data/raw/sample-landuse"))
    tile = np.pad(image[list(BANDS), :512, :512], ((0, 0), (0, 512), (0, 512)), mode="symmetric")
    with rasterio.open(
        path, "w", driver="GTiff", height=side, width=side, count=len(BANDS), dtype="uint16", crs=crs,
        transform=transform, tiled=True, blockxsize=512, blockysize=512,
    ) as file:  # fmt: skip
        for row in range(0, side, 1024):
            for column in range(0, side, 1024):
                file.write(tile, window=rasterio.windows.Window(column, row, 1024, 1024))
        file.descriptions = [osm_landuse.BANDS[place].common_name for place in BANDS]
        file.update_tags(units="dn")


def write_student(path: Path) -> None:
    """A student of masks, 128 px, exported."""
    import torch

    from pipeline.data.sources import osm_landuse
    from pipeline.distillation.student import Student, StudentSpec
    from pipeline.export import graphs

    torch.manual_seed(0)
    bands = [osm_landuse.BANDS[place] for place in BANDS]
    shape = StudentSpec("mobilenetv3_small_050", len(bands), len(osm_landuse.CLASSES), "segmentation", 128)
    told = {
        "dataset": "sample-landuse-seg", "task": "segmentation", "classes": list(osm_landuse.CLASSES), "ignore": 255,
        "bands": [{"name": b.name, "common_name": b.common_name, "wavelength": b.wavelength} for b in bands],
        "units": "dn", "gsd": 10.0, "size": [128, 128],
    }  # fmt: skip
    student = Student(shape, [1500.0] * len(bands), [400.0] * len(bands)).eval()
    graphs.write_onnx(graphs.trace(student, told), told, path)


def peak(scene: Path, way: str) -> tuple[float, float]:
    """Peak resident megabytes of a process that maps a scene, and its seconds."""
    out = FOLDER / f"{scene.stem}-{way}"
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    said = subprocess.run([sys.executable, "-c", MAP, scene, out, way], stdout=subprocess.PIPE, text=True, check=True)
    return float(said.stdout.split()[-1]), time.perf_counter() - begun


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_student(FOLDER / "student.onnx")
    scenes = [FOLDER / f"{name}.tif" for name in ("small", "large")]
    for scene, side in zip(scenes, (SIDE, 4 * SIDE), strict=True):
        write_scene(scene, side)
    ours, whole = ([peak(scene, way) for scene in scenes] for way in ("windows", "whole"))
    print(json.dumps({
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "pixels": [SIDE**2, (4 * SIDE) ** 2],
        "bands": len(BANDS),
        "peak_megabytes": [round(one) for one, _ in ours],
        "rss_growth": round(ours[1][0] / ours[0][0], 3),
        "rss_growth_whole_scene_read": round(whole[1][0] / whole[0][0], 3),
        "seconds": [round(one, 1) for _, one in ours],
    }))  # fmt: skip
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
