"""Write the finished blocks of a map as one Cloud Optimized GeoTIFF."""

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
    n_bands: int,
    tags: Mapping[str, str],
    band_names: Iterable[str],
    overview_resampling: str,
    scale: float = 1.0,
) -> None:
    """Write a map on the grid of its scene.

    Args:
        path: the file; a GeoTIFF without overviews lies next to it until it is finished.
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
