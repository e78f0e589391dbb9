"""Finished blocks of a map as one Cloud Optimized GeoTIFF, written by windows."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.windows import Window

from pipeline.mapping.blend import NODATA
from pipeline.mapping.scene import Scene
from pipeline.mapping.tiling import COG_TILE, OutputBlock


def write_cog(
    path: Path,
    scene: Scene,
    blocks: Iterable[tuple[OutputBlock, np.ndarray]],
    bands: int,
    tags: Mapping[str, str],
    names: Iterable[str],
    overview: str,
    scale: float = 1.0,
) -> None:
    """Write a map on the scene's own grid.

    Args:
        blocks: uint8 (band, y, x) of every block.
        names: of the bands.
        overview: how GDAL makes coarser copies, for looking at the map from afar: `mode` or `average`.
        scale: what a value of 1 stands for.
    """
    plain = path.with_name(f"{path.stem}-plain.tif")
    with rasterio.open(
        plain, "w", driver="GTiff", height=scene.height, width=scene.width, count=bands, dtype="uint8", nodata=NODATA,
        crs=scene.crs or None, transform=rasterio.Affine(*scene.transform), tiled=True, blockxsize=COG_TILE,
        blockysize=COG_TILE, bigtiff="IF_SAFER",
    ) as file:  # fmt: skip
        for part, values in blocks:
            file.write(values, window=Window(part.column, part.row, part.width, part.height))
        file.update_tags(**tags)
        file.descriptions = tuple(names)
        file.scales = (scale,) * bands
    rasterio.shutil.copy(
        plain, path, driver="COG", compress="DEFLATE", blocksize=COG_TILE, bigtiff="IF_SAFER",
        overview_resampling=overview,
    )  # fmt: skip
    plain.unlink()
