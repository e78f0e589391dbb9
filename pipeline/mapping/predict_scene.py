"""Making a map: block by block, each safe on the disk before the next, so that a killed run goes on where it was.

The finished map is a folder that appears whole:

    class.tif        uint8, a class index, 255 where the scene has no data; classes in the tags
    confidence.tif   uint8, its probability in percent
    map.json         the classes' shares, and what was mapped by what

With `multilabel` models both have a band a class: whether it holds, and its probability.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import rasterio
from tqdm import tqdm

from cache.atomic import atomic_dir, sync_folder, write_file
from pipeline.errors import UserError
from pipeline.mapping import blend, cog, open_scene, tiling
from pipeline.mapping import scene as scenes
from pipeline.mapping.blend import NODATA, MappingJob
from pipeline.mapping.scene import Scene
from pipeline.mapping.signature import Predictor
from pipeline.mapping.tiling import OutputBlock, output_blocks, tile_axis

# Share of a tile by which neighbours overlap. A class of a whole chip is known only as finely as tiles overlap.
OVERLAP_FRACTION = {"segmentation": 0.25, "classification": 0.5, "multilabel": 0.5}
# Of GDAL, in megabytes; its own is a share of the machine's memory.
GDAL_CACHE_MB = 32


def plan_mapping(scene: Scene, predictor: Predictor) -> MappingJob:
    """A scene and what maps it, checked to fit together.

    Raises:
        UserError: a band is missing, or units or the size of pixels are others.
    """
    wanted = predictor.signature
    scenes.check_metadata(scene, wanted.extra_inputs)
    height, width = wanted.size
    share = OVERLAP_FRACTION[wanted.task]
    rows = tile_axis(scene.height, height, int(height * share))
    return MappingJob(scene, predictor, tuple(scenes.match_scene_bands(scene, wanted)), rows,
               tile_axis(scene.width, width, int(width * share)))  # fmt: skip


def predict_scene(scene: Scene, predictor: Predictor, final: Path) -> dict:
    """Map a scene; a run that was killed goes on from its last finished block, and ends with the same bytes.

    Args:
        final: the map's folder, which appears in one step; beside it, until then, `.<name>.partial`.

    Returns:
        what map.json says.

    Raises:
        UserError: the scene does not fit the model, or `final` is something else than a map.
    """
    if final.exists() and not (final / "map.json").exists():
        raise UserError(f"{final} exists and is no map. Give another folder, or remove it.")
    made = plan_mapping(scene, predictor)
    partial = final.with_name(f".{final.name}.partial")
    finished = partial / _cache_key(made)
    _clear(partial, finished)
    finished.mkdir(parents=True, exist_ok=True)
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_MB):
        _predict(made, finished)
        with atomic_dir(partial / "map", final) as folder:
            told = _publish(made, finished, folder)
    shutil.rmtree(partial)
    return told


def _predict(made: MappingJob, finished: Path) -> None:
    """Every block that an earlier run has not finished."""
    parts = list(output_blocks(made.y_tiles, made.x_tiles))
    counts = [_tiles(made, part) for part in parts]
    there = [_path(finished, part).exists() for part in parts]
    initial = sum(count for count, is_there in zip(counts, there, strict=True) if is_there)
    with tqdm(total=sum(counts), initial=initial, unit="tile", mininterval=2, file=sys.stderr) as progress:
        for part, is_there in zip(parts, there, strict=True):
            if not is_there:
                arrays = blend.predict_block(made, part, progress.update)
                write_file(_path(finished, part), [np.ascontiguousarray(one).data for one in arrays])
                sync_folder(finished)


def _publish(made: MappingJob, finished: Path, folder: Path) -> dict:
    """Both maps from the finished blocks, and what is to be told of them."""
    wanted, scene = made.predictor.signature, made.scene
    several = wanted.task == "multilabel"
    bands = len(wanted.classes) if several else 1
    areas = np.zeros((bands, 256), np.int64)

    def read(which: int):
        for part in output_blocks(made.y_tiles, made.x_tiles):
            shape = (2, bands, part.height, part.width)
            values = np.fromfile(_path(finished, part), np.uint8).reshape(shape)[which]
            if which == 0:
                for band, one in enumerate(values):
                    areas[band] += np.bincount(one.ravel(), minlength=256)
            yield part, values

    tags = {"classes": ", ".join(wanted.classes), "model": made.predictor.name, "task": wanted.task}
    names = wanted.classes if several else ("class",)
    cog.write_cog(folder / "class.tif", scene, read(0), bands, tags, names, "mode")
    names = wanted.classes if several else ("probability of the class",)
    cog.write_cog(folder / "confidence.tif", scene, read(1), bands, tags, names, "average", scale=0.01)
    there = int(areas[0, :NODATA].sum())
    held = areas[:, 1] if several else areas[0, : len(wanted.classes)]
    told = {
        "skipped": None,
        "scene": scene.name,
        "size": [scene.height, scene.width],
        "model": made.predictor.name,
        "model_sha256": made.predictor.digest,
        "task": wanted.task,
        "classes": list(wanted.classes),
        "shares": [round(float(one) / there, 6) if there else None for one in held],
        "nodata": round(1 - there / (scene.height * scene.width), 6),
        "tile": list(wanted.size),
        "overlap": [made.y_tiles.overlap, made.x_tiles.overlap],
    }
    (folder / "map.json").write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    return told


def class_shares(told: Mapping) -> str:
    """How much of a map each class covers, the largest first, as text."""
    known = [(share, name) for share, name in zip(told["shares"], told["classes"], strict=True) if share is not None]
    return ", ".join(f"{name} {share:.1%}" for share, name in sorted(known, reverse=True)) or "no data"


def _tiles(made: MappingJob, part: OutputBlock) -> int:
    rows = made.y_tiles.overlapping(part.row, part.row + part.height)
    return len(rows) * len(made.x_tiles.overlapping(part.column, part.column + part.width))


def _path(finished: Path, part: OutputBlock) -> Path:
    return finished / f"r{part.row:06d}c{part.column:06d}"


def _cache_key(made: MappingJob) -> str:
    """Of all that decides a block's bytes."""
    wanted = made.predictor.signature
    code = [
        Path(module.__file__).read_bytes() for module in (blend, scenes, open_scene, tiling, sys.modules[__name__])
    ]
    decides = [made.scene.fingerprint, made.predictor.digest, made.band_indices, wanted.size, wanted.task, blend.BATCH_TILES,
               [hashlib.sha256(one).hexdigest() for one in code]]  # fmt: skip
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def _clear(partial: Path, finished: Path) -> None:
    """Remove what an earlier run left that mapped another scene or by another model."""
    for old in partial.glob("*"):
        if old != finished:
            shutil.rmtree(old, ignore_errors=True)
