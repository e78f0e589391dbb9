"""Map a scene block by block.

Finished blocks are on disk, so that a killed run resumes after the last of them.

The finished map is a folder, which is published atomically:

    class.tif        uint8, class index, 255 where the scene has no data; the names of the classes are in the tags
    confidence.tif   uint8, probability of the class in percent
    map.json         shares of the classes, the scene and the model

Maps of multi-label models have one band per class: whether the class is present, and its probability.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.windows import Window
from tqdm import tqdm

from cache.atomic import atomic_dir, sync_folder, write_file
from cache.checksums import fingerprint
from pipeline.errors import UserError
from pipeline.mapping import scene as open_scene
from pipeline.mapping import scene as scene_module
from pipeline.mapping import tiling
from pipeline.mapping.predictors import Predictor
from pipeline.mapping.scene import Scene
from pipeline.mapping.tiling import COG_TILE, NODATA, MappingJob, OutputBlock, output_blocks, tile_axis

# Overlap of neighbouring tiles as a fraction of a tile. The resolution of models with one prediction
# per chip is the stride of their tiles.
DENSE_OVERLAP, CHIP_OVERLAP = 0.25, 0.5
# GDAL's own default is a fraction of the machine's memory.
GDAL_CACHE_MB = 32


def plan_mapping(scene: Scene, predictor: Predictor) -> MappingJob:
    """Match a scene with a model and place the tiles.

    Raises:
        UserError: a band or a metadata input is missing, or units or pixel size differ.
    """
    signature = predictor.signature
    scene_module.check_metadata(scene, signature.metadata_keys)
    height, width = signature.size
    overlap = DENSE_OVERLAP if signature.task.is_dense else CHIP_OVERLAP
    return MappingJob(
        scene=scene,
        predictor=predictor,
        band_indices=tuple(scene_module.match_scene_bands(scene, signature)),
        y_tiles=tile_axis(scene.height, height, int(height * overlap)),
        x_tiles=tile_axis(scene.width, width, int(width * overlap)),
    )


def predict_scene(scene: Scene, predictor: Predictor, folder: Path) -> dict:
    """Map a scene. A killed run resumes after its last finished block and ends with the same bytes.

    Args:
        folder: the map's folder, published atomically. Finished blocks are in `.<name>.partial` next to it.

    Returns:
        The content of map.json.

    Raises:
        UserError: the scene does not fit the model, or `folder` exists and is not a map.
    """
    if folder.exists() and not (folder / "map.json").exists():
        raise UserError(f"{folder} exists and is not a map. Choose another folder, or remove it.", path=folder)
    job = plan_mapping(scene, predictor)
    partial = folder.with_name(f".{folder.name}.partial")
    block_folder = partial / _cache_key(job)
    _remove_stale_blocks(partial, block_folder)
    block_folder.mkdir(parents=True, exist_ok=True)
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_MB):
        _predict_missing_blocks(job, block_folder)
        with atomic_dir(partial / "map", folder) as map_folder:
            metadata = _publish(job, block_folder, map_folder)
    shutil.rmtree(partial)
    return metadata


def class_shares(metadata: Mapping) -> str:
    """Format the share of each class in a map, the largest first.

    Args:
        metadata: the content of map.json.
    """
    shares = [
        (share, name)
        for share, name in zip(metadata["class_shares"], metadata["classes"], strict=True)
        if share is not None
    ]
    return ", ".join(f"{name} {share:.1%}" for share, name in sorted(shares, reverse=True)) or "no data"


def _predict_missing_blocks(job: MappingJob, block_folder: Path) -> None:
    """Predict and save every block that an earlier run has not finished."""
    blocks = list(output_blocks(job.y_tiles, job.x_tiles))
    n_tiles = [_count_tiles(job, block) for block in blocks]
    is_finished = [_block_path(block_folder, block).exists() for block in blocks]
    initial = sum(count for count, finished in zip(n_tiles, is_finished, strict=True) if finished)
    with tqdm(total=sum(n_tiles), initial=initial, unit="tile", mininterval=2, file=sys.stderr) as progress:
        for block, finished in zip(blocks, is_finished, strict=True):
            if not finished:
                arrays = tiling.predict_block(job, block, progress.update)
                write_file(_block_path(block_folder, block), [np.ascontiguousarray(array).data for array in arrays])
                sync_folder(block_folder)


def _publish(job: MappingJob, block_folder: Path, folder: Path) -> dict:
    """Write both maps from the finished blocks, and map.json; return the content of map.json."""
    signature, scene = job.predictor.signature, job.scene
    class_names, is_multilabel = signature.class_names, signature.task.is_multilabel
    n_bands = len(class_names) if is_multilabel else 1
    tags = {"classes": ", ".join(class_names), "model": job.predictor.name, "task": signature.task.type}

    # Pixels of every value, by band.
    pixel_counts = np.zeros((n_bands, 256), np.int64)

    def classes() -> Iterator[tuple[OutputBlock, np.ndarray]]:
        for block, values, _ in _read_blocks(job, block_folder, n_bands):
            for counts, band in zip(pixel_counts, values, strict=True):
                counts += np.bincount(band.ravel(), minlength=256)
            yield block, values

    def confidences() -> Iterator[tuple[OutputBlock, np.ndarray]]:
        return ((block, values) for block, _, values in _read_blocks(job, block_folder, n_bands))

    band_names = class_names if is_multilabel else ("class",)
    _write_cog(folder / "class.tif", scene, classes(), n_bands, tags, band_names, "mode")
    band_names = class_names if is_multilabel else ("probability of the class",)
    _write_cog(folder / "confidence.tif", scene, confidences(), n_bands, tags, band_names, "average", scale=0.01)
    n_valid = int(pixel_counts[0, :NODATA].sum())
    n_per_class = pixel_counts[:, 1] if is_multilabel else pixel_counts[0, : len(class_names)]
    metadata = {
        "skipped": None,
        "scene": scene.name,
        "size": [scene.height, scene.width],
        "model": job.predictor.name,
        "model_sha256": job.predictor.digest,
        "task": signature.task.type,
        "classes": list(class_names),
        "class_shares": [round(float(count) / n_valid, 6) if n_valid else None for count in n_per_class],
        "nodata_share": round(1 - n_valid / (scene.height * scene.width), 6),
        "tile": list(signature.size),
        "overlap": [job.y_tiles.overlap, job.x_tiles.overlap],
    }
    (folder / "map.json").write_text(json.dumps(metadata, indent=1, sort_keys=True) + "\n")
    return metadata


def _write_cog(
    path: Path,
    scene: Scene,
    blocks: Iterable[tuple[OutputBlock, np.ndarray]],
    n_bands: int,
    tags: Mapping[str, str],
    band_names: Iterable[str],
    overview_resampling: str,
    scale: float = 1.0,
) -> None:
    """Write a map as a Cloud Optimized GeoTIFF on the grid of its scene.

    Args:
        path: the file; a GeoTIFF without overviews exists next to it until it is finished.
        blocks: every block and its values, uint8 (band, y, x).
        overview_resampling: how GDAL computes the overviews: `mode` or `average`.
        scale: factor from stored values to physical values.
    """
    plain = path.with_name(f"{path.stem}-plain.tif")
    with rasterio.open(
        plain, "w", driver="GTiff", height=scene.height, width=scene.width, count=n_bands, dtype="uint8",
        nodata=NODATA, crs=scene.crs or None, transform=rasterio.Affine(*scene.transform), tiled=True,
        blockxsize=COG_TILE, blockysize=COG_TILE, bigtiff="IF_SAFER",
    ) as file:  # fmt: skip
        for block, values in blocks:
            file.write(values, window=Window(block.column, block.row, block.width, block.height))
        file.update_tags(**tags)
        file.descriptions = tuple(band_names)
        file.scales = (scale,) * n_bands
    rasterio.shutil.copy(
        plain, path, driver="COG", compress="DEFLATE", blocksize=COG_TILE, bigtiff="IF_SAFER",
        overview_resampling=overview_resampling,
    )  # fmt: skip
    plain.unlink()


def _read_blocks(
    job: MappingJob, block_folder: Path, n_bands: int
) -> Iterator[tuple[OutputBlock, np.ndarray, np.ndarray]]:
    """Iterate over all finished blocks, with their classes and confidences, uint8 (band, y, x)."""
    for block in output_blocks(job.y_tiles, job.x_tiles):
        values = np.fromfile(_block_path(block_folder, block), np.uint8)
        yield block, *values.reshape(2, n_bands, block.height, block.width)


def _count_tiles(job: MappingJob, block: OutputBlock) -> int:
    y_starts = job.y_tiles.overlapping(block.row, block.row + block.height)
    return len(y_starts) * len(job.x_tiles.overlapping(block.column, block.column + block.width))


def _block_path(block_folder: Path, block: OutputBlock) -> Path:
    return block_folder / f"r{block.row:06d}c{block.column:06d}"


def _cache_key(job: MappingJob) -> str:
    """Fingerprint of everything that the bytes of a block depend on, including the code."""
    signature = job.predictor.signature
    modules = (tiling, scene_module, open_scene, tiling, sys.modules[__name__])
    code = [Path(module.__file__).read_bytes() for module in modules]
    return fingerprint(
        job.scene.fingerprint,
        job.predictor.digest,
        job.band_indices,
        signature.size,
        signature.task.type,
        tiling.BATCH_TILES,
        code,
    )[:16]


def _remove_stale_blocks(partial: Path, block_folder: Path) -> None:
    """Remove the blocks of earlier runs with another scene, model or version of the code."""
    for folder in partial.glob("*"):
        if folder != block_folder:
            shutil.rmtree(folder, ignore_errors=True)
