"""Map a scene block by block. A killed run resumes after its last finished block on the disk.

The finished map is a folder, which is published atomically:

    class.tif        uint8, class index, 255 where the scene has no data; the names of the classes are in the tags
    confidence.tif   uint8, probability of the class in percent
    map.json         shares of the classes, the scene and the model

Maps of multi-label models have one band per class: whether the class is present, and its probability.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.windows import Window
from tqdm import tqdm

from cache.atomic import atomic_dir, sync_folder, write_file
from cache.checksums import fingerprint
from pipeline.errors import UserError
from pipeline.mapping import scene as scene_module
from pipeline.mapping import tiling
from pipeline.mapping.predictors import Predictor
from pipeline.mapping.scene import Scene, match_scene
from pipeline.mapping.tiling import COG_TILE, NODATA, MappingJob, output_blocks, tile_axis

# Overlap of neighbouring tiles as a fraction of a tile; models with one prediction per chip need more.
DENSE_OVERLAP, CHIP_OVERLAP = 0.25, 0.5
# GDAL's own default is a fraction of the machine's memory. rasterio takes bytes: with 32 of them a window of 13 JPEG
# 2000 files took 51 s instead of .8 s.
GDAL_CACHE_BYTES = 32 * 2**20


def predict_scene(scene: Scene, predictor: Predictor, folder: Path) -> dict:
    """Map a scene to a folder; return the content of map.json.

    Finished blocks are in `.<name>.partial` next to the folder. A resumed run ends with the same bytes. UserError if
    the scene does not fit the model, or `folder` exists and is not a map.
    """
    if folder.exists() and not (folder / "map.json").exists():
        raise UserError(f"{folder} exists and is not a map. Choose another folder, or remove it.", path=folder)
    signature = predictor.signature
    band_indices, overlap = match_scene(scene, signature), DENSE_OVERLAP if signature.task.is_dense else CHIP_OVERLAP
    y_tiles, x_tiles = (
        tile_axis(length, tile, int(tile * overlap))
        for length, tile in zip((scene.height, scene.width), signature.size, strict=True)
    )
    job = MappingJob(scene, predictor, tuple(band_indices), y_tiles, x_tiles)
    partial = folder.with_name(f".{folder.name}.partial")
    block_folder = partial / _cache_key(job)
    for stale_folder in set(partial.glob("*")) - {block_folder}:  # of another scene, model or version of the code
        shutil.rmtree(stale_folder, ignore_errors=True)
    block_folder.mkdir(parents=True, exist_ok=True)
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES):
        _predict_missing_blocks(job, block_folder)
        with atomic_dir(partial / "map", folder) as map_folder:
            metadata = _publish(job, block_folder, map_folder)
    shutil.rmtree(partial)
    return metadata


def class_shares(metadata: Mapping) -> str:
    """Format the share of each class in a map, the largest first, from the content of map.json."""
    shares = zip(metadata["class_shares"], metadata["classes"], strict=True)
    known_shares = sorted((pair for pair in shares if pair[0] is not None), reverse=True)
    return ", ".join(f"{name} {share:.1%}" for share, name in known_shares) or "no data"


def _predict_missing_blocks(job: MappingJob, block_folder: Path) -> None:
    blocks = list(output_blocks(job.y_tiles, job.x_tiles))
    missing = [block for block in blocks if not _block_path(block_folder, block).exists()]
    total, remaining = (sum(_count_tiles(job, block) for block in group) for group in (blocks, missing))
    with tqdm(total=total, initial=total - remaining, unit="tile", mininterval=2, file=sys.stderr) as progress:
        for block in missing:
            arrays = tiling.predict_block(job, block, progress.update)
            write_file(_block_path(block_folder, block), [array.data for array in arrays])
            sync_folder(block_folder)


def _publish(job: MappingJob, block_folder: Path, folder: Path) -> dict:
    """Write both maps from the finished blocks, and map.json; return the content of map.json."""
    signature, scene = job.predictor.signature, job.scene
    class_names, is_multilabel = signature.class_names, signature.task.is_multilabel
    n_bands = len(class_names) if is_multilabel else 1
    profile = {
        "driver": "GTiff", "height": scene.height, "width": scene.width, "count": n_bands, "dtype": "uint8",
        "nodata": NODATA, "crs": scene.crs or None, "transform": rasterio.Affine(*scene.transform), "tiled": True,
        "blockxsize": COG_TILE, "blockysize": COG_TILE, "bigtiff": "IF_SAFER",
    }  # fmt: skip
    pixel_counts = np.zeros((n_bands, 256), np.int64)  # of every value, by band
    plain = {name: folder / f"{name}-plain.tif" for name in ("class", "confidence")}
    with (
        rasterio.open(plain["class"], "w", **profile) as classes,
        rasterio.open(plain["confidence"], "w", **profile) as confidences,
    ):
        for block in output_blocks(job.y_tiles, job.x_tiles):
            values = np.fromfile(_block_path(block_folder, block), np.uint8)
            values = values.reshape(2, n_bands, block.height, block.width)
            classes.write(values[0], window=block)
            confidences.write(values[1], window=block)
            pixel_counts += [np.bincount(band.ravel(), minlength=256) for band in values[0]]
        classes.descriptions = class_names if is_multilabel else ("class",)
        confidences.descriptions = class_names if is_multilabel else ("probability of the class",)
        confidences.scales = (0.01,) * n_bands
        for file in (classes, confidences):
            file.update_tags(classes=", ".join(class_names), model=job.predictor.name, task=signature.task.type)
    # GDAL's COG driver copies whole files only.
    for name, resampling in (("class", "mode"), ("confidence", "average")):
        rasterio.shutil.copy(
            plain[name], folder / f"{name}.tif", driver="COG", compress="DEFLATE", blocksize=COG_TILE,
            bigtiff="IF_SAFER", overview_resampling=resampling,
        )  # fmt: skip
        plain[name].unlink()
    n_valid = int(pixel_counts[0, :NODATA].sum())
    n_per_class = pixel_counts[:, 1] if is_multilabel else pixel_counts[0, : len(class_names)]
    metadata = {
        "skipped": None, "scene": scene.name, "size": [scene.height, scene.width], "model": job.predictor.name,
        "model_sha256": job.predictor.digest, "task": signature.task.type, "classes": list(class_names),
        "class_shares": [round(float(count) / n_valid, 6) if n_valid else None for count in n_per_class],
        "nodata_share": round(1 - n_valid / (scene.height * scene.width), 6),
        "tile": list(signature.size), "overlap": [job.y_tiles.overlap, job.x_tiles.overlap],
    }  # fmt: skip
    (folder / "map.json").write_text(json.dumps(metadata, indent=1, sort_keys=True) + "\n")
    return metadata


def _count_tiles(job: MappingJob, block: Window) -> int:
    n_rows = len(job.y_tiles.overlapping(block.row_off, block.height))
    return n_rows * len(job.x_tiles.overlapping(block.col_off, block.width))


def _block_path(block_folder: Path, block: Window) -> Path:
    return block_folder / f"r{block.row_off:06d}c{block.col_off:06d}"


def _cache_key(job: MappingJob) -> str:
    """Fingerprint of everything that the bytes of a block depend on, including the code."""
    signature = job.predictor.signature
    code = [Path(module.__file__).read_bytes() for module in (tiling, scene_module, sys.modules[__name__])]
    return fingerprint(
        job.scene.fingerprint, job.predictor.digest, job.band_indices, signature.size, signature.task.type, code
    )[:16]
