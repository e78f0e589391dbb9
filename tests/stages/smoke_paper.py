"""The paper's profile, small: python -m tests.stages.smoke_paper FOLDER

All twelve sets (files laid out as released), its four backbones and eight models by their smallest kin with random
weights at 224 px, both heads, every stage to the report, in one process. Scores mean nothing.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from pipeline import archives
from pipeline.datasets import geobench, landuse, trees
from stages import extract, fetch, prepare, report, resolve, train, tune
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
    "heads": {"linear": {"steps": 20, "batch": 4}, "upernet": {"steps": 2, "channels": 8, "batch": 2}},
    "search": {"trials": 2, "parallel": 2},
    "train": {"seeds": 2},
    "compute": {"device": "cpu"},
}


def main(folder: Path) -> None:
    """Run everything in an empty folder."""
    folder.mkdir(parents=True)
    raw = {}
    for source in (landuse, trees):
        raw[source] = folder / "raw" / source.__name__
        raw[source].mkdir(parents=True)
        archives.unpack(source.ARCHIVE, archives.fetch(source.ARCHIVE, ROOT / "data/archives"), raw[source])
    scene, transform, _ = landuse.read_scene(raw[landuse])
    mask = landuse.read_mask(raw[landuse], transform, scene.shape[1:])
    photo = np.asarray(Image.open(next(raw[trees].glob("*crop.png"))).convert("RGB")).transpose(2, 0, 1)
    for name in geobench.SETS:
        geobench_files.write(name, folder / "geobench", scene, photo, mask)
    content, paper = (yaml.safe_load((ROOT / one).read_text()) for one in ("params.yaml", "profiles/paper.yaml"))
    content = merge(merge(merge(content, paper), SMALL), {"geobench_dir": str(folder / "geobench")})
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    os.chdir(folder)
    grid, begun = content["grid"], time.monotonic()
    for backbone in grid["backbones"]:
        fetch.fetch(None, backbone)
    for name in grid["datasets"]:
        fetch.fetch(name, None)
        prepare.prepare(name, False)
        for backbone in grid["backbones"]:
            extract.extract(name, backbone)
        resolve.resolve(name)
        for model in grid["models"]:
            tune.tune(name, model)
            train.train(name, model)
    report.make_report()
    cells = len(grid["datasets"]) * len(grid["models"])
    print(f"{cells} cells to a report in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
