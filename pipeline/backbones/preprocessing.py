"""Preprocessing: from stored images to a backbone's input tensor.

The order is: select bands, convert units, stretch, normalise, resize.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import xarray as xr
from torch.nn import functional

from cache.running_stats import mean_std_from_sums
from pipeline.backbones.base import BackboneSpec, InputBands, match_images
from pipeline.bands import DISPLAY_UNITS, full_scale
from pipeline.config import BackboneConfig
from pipeline.errors import UserError

# Coordinates of an images store that make up each metadata input.
_METADATA_COORDINATES = {"location": ("lat", "lon"), "time": ("time",)}
# Threads that read for the statistics of the training split.
_READ_THREADS = 8
# A band with a smaller standard deviation is constant; dividing by it would amplify noise.
_MIN_STD = 1e-6


@dataclass(frozen=True)
class Preprocessor:
    """The preprocessing of one dataset's images for one backbone.

    Attributes:
        scale: value of the images' units that equals 1.0.
        display_range: the reflectances [low, high] that are stretched to [0, 1]; None if there is no stretch.
        mean, std: per band, after scaling and stretching; None if there is no normalisation.
        normalisation: `native` or `dataset`: the source of mean and std.
        resize: `bilinear` (antialiased when shrinking) or `nearest`.
        metadata_keys: further inputs: `location`, `time`.
    """

    input_bands: InputBands
    scale: float
    display_range: tuple[float, float] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    normalisation: str
    resize: str
    metadata_keys: tuple[str, ...]

    def select_bands(self, image: np.ndarray) -> np.ndarray:
        """Select the input bands of images (batch, band, y, x), contiguous, in the images' units and dtype."""
        return np.take(image, self.input_bands.band_indices, axis=1)  # faster than indexing

    def __call__(self, selected: torch.Tensor) -> torch.Tensor:
        """Make the network's input, float32 (batch, band, input_size, input_size), channels last.

        `selected` is the result of `select_bands`, as a tensor on the device that computes.
        """
        # In place after the first step: allocating memory costs more than the arithmetic.
        values = selected.to(torch.float32, copy=True).div_(self.scale)
        if self.display_range:
            low, high = self.display_range
            values.sub_(low).div_(high - low).clamp_(0, 1)
        if self.mean is not None:
            values.sub_(_per_band(self.mean, values.device)).div_(_per_band(self.std, values.device))
        side = self.input_bands.input_size
        if values.shape[-2:] != (side, side):
            if self.resize == "nearest":
                values = functional.interpolate(values, size=(side, side), mode="nearest-exact")
            else:  # antialiasing changes nothing when enlarging, and costs time
                shrinks = max(values.shape[-2:]) > side
                values = functional.interpolate(values, size=(side, side), mode="bilinear", antialias=shrinks)
        return values.contiguous(memory_format=torch.channels_last)

    def metadata(self, images: xr.Dataset, rows: slice | np.ndarray) -> dict[str, np.ndarray]:
        """Read those of `metadata_keys` of samples, float32, as Prithvi takes them.

        `location` (sample, 2) is latitude and longitude in degrees; `time` (sample, 1, 2) is year and day of the year
        from 0.
        """
        arrays = {}
        if "location" in self.metadata_keys:
            arrays["location"] = np.stack([images.lat[rows].values, images.lon[rows].values], axis=1)
        if "time" in self.metadata_keys:
            time = images.time[rows].dt
            arrays["time"] = np.stack([time.year.values, time.dayofyear.values - 1], axis=1)[:, None]
        return {name: values.astype(np.float32) for name, values in arrays.items()}


@lru_cache
def _per_band(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return float32 (band, 1, 1) on the device; cached, since a transfer makes the CPU wait for a GPU."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def chunk_size(images: xr.Dataset) -> int:
    """Return the number of images per file of an images store."""
    return images.image.encoding.get("preferred_chunks", {}).get("sample", 1)


def make_preprocessor(images: xr.Dataset, name: str, backbone: BackboneConfig, spec: BackboneSpec) -> Preprocessor:
    """Make the preprocessing of a dataset's images for the backbone `name`.

    With `normalisation: dataset` this reads the training split. Raises UserError if that is empty, and the errors of
    `match_images`.
    """
    input_bands = match_images(images, name, backbone, spec)
    units = images.attrs["units"]
    is_stretched = spec.input_units == "display" and units not in DISPLAY_UNITS
    available_metadata = [
        key
        for key, coordinates in _METADATA_COORDINATES.items()
        if all(name in images.coords and bool(images[name].notnull().all()) for name in coordinates)
    ]
    preprocessor = Preprocessor(
        input_bands=input_bands,
        scale=full_scale(units),
        display_range=tuple(images.attrs["display"]) if is_stretched else None,
        mean=None,
        std=None,
        normalisation=backbone.normalisation,
        resize=spec.resize,
        metadata_keys=tuple(available_metadata) if spec.uses_location_and_time else (),
    )
    if backbone.normalisation == "dataset":
        mean, std = _training_stats(images, preprocessor)
    elif spec.mean:
        indices = [spec.bands.index(input_name) for input_name in input_bands.input_names]
        mean, std = (tuple(values[index] for index in indices) for values in (spec.mean, spec.std))
    else:
        return preprocessor
    return dataclasses.replace(preprocessor, mean=mean, std=std)


def _training_stats(images: xr.Dataset, preprocessor: Preprocessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation of each band after the stretch, over the training split.

    Each file that has training images is read once.
    """
    is_train = images.split.values == "train"
    if not is_train.any():
        raise UserError(
            "normalisation: dataset needs training samples, and this dataset has none. Add samples to its split "
            "train, or set the backbone's normalisation to native.",
            key="normalisation", value="dataset",
        )  # fmt: skip
    size, n_bands = chunk_size(images), len(preprocessor.input_bands.band_indices)

    def add_up(start: int) -> np.ndarray:
        """Return the sums (2, band) of the values of a file's training images and of their squares."""
        rows = slice(start, start + size)
        batch = preprocessor.select_bands(images.image[rows].values[is_train[rows]])
        sums, values = np.zeros((2, n_bands)), np.empty(batch.shape[1:])
        for image in batch:  # one image at a time stays in the CPU's cache
            np.divide(image, preprocessor.scale, out=values, dtype=np.float64)
            if preprocessor.display_range:
                low, high = preprocessor.display_range
                values -= low
                values /= high - low
                values.clip(0, 1, out=values)
            sums[0] += values.sum(axis=(1, 2))
            sums[1] += np.square(values, out=values).sum(axis=(1, 2))
        return sums

    files = [start for start in range(0, len(is_train), size) if is_train[start : start + size].any()]
    with ThreadPoolExecutor(min(_READ_THREADS, len(os.sched_getaffinity(0)))) as pool:
        # Added in order, so that the result does not depend on the number of threads.
        total, total_squares = sum(pool.map(add_up, files), np.zeros((2, n_bands)))
    n_pixels = int(is_train.sum()) * images.image[0, 0].size
    mean, std = mean_std_from_sums(n_pixels, total, total_squares)
    std[std < _MIN_STD] = 1.0
    # Rounded to nine digits, so that machines whose sums differ by rounding write the same store.
    return tuple(float(f"{value:.9g}") for value in mean), tuple(float(f"{value:.9g}") for value in std)
