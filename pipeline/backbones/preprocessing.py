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
# Images per read, and threads that read, for the statistics of the training split.
_READ_BATCH, _READ_THREADS = 64, 8
# Values per step on a CPU: few enough to stay in a core's cache between operations.
_BLOCK_VALUES = 2**18
# Output columns per matrix product of the resize.
_RESIZE_COLUMNS = 32
# A band with a smaller standard deviation is constant; dividing by it would amplify noise.
_MIN_STD = 1e-6


@dataclass(frozen=True)
class Preprocessor:
    """The preprocessing of one dataset's images for one backbone.

    Attributes:
        input_bands: bands and size of the input.
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
        """Make the network's input.

        Args:
            selected: result of `select_bands`, as a tensor on the device that computes.

        Returns:
            float32 (batch, band, input_size, input_size), channels last.
        """
        if selected.is_cuda:
            return self._transform(selected).contiguous(memory_format=torch.channels_last)
        side, n_bands = self.input_bands.input_size, selected.shape[1]
        result = torch.empty((len(selected), n_bands, side, side), memory_format=torch.channels_last)
        step = max(1, _BLOCK_VALUES // (n_bands * max(side**2, selected[0, 0].numel())))
        for start in range(0, len(selected), step):
            result[start : start + step] = self._transform(selected[start : start + step])
        return result

    def _transform(self, selected: torch.Tensor) -> torch.Tensor:
        """Scale, stretch, normalise and resize; in any memory format."""
        # In place after the first step: allocating memory costs more than the arithmetic.
        values = selected.to(torch.float32, copy=True).div_(self.scale)
        if self.display_range:
            low, high = self.display_range
            values.sub_(low).div_(high - low).clamp_(0, 1)
        if self.mean is not None:
            values.sub_(_per_band(self.mean, values.device)).div_(_per_band(self.std, values.device))
        side = self.input_bands.input_size
        if values.shape[-2:] == (side, side):
            return values
        if self.resize == "nearest":
            return functional.interpolate(values, size=(side, side), mode="nearest-exact")
        if values.is_cuda:
            # Antialiasing changes nothing when enlarging, and costs time.
            shrinks = max(values.shape[-2:]) > side
            return functional.interpolate(values, size=(side, side), mode="bilinear", antialias=shrinks)
        return resize_bilinear(values, side)

    def metadata(self, images: xr.Dataset, rows: slice | np.ndarray) -> dict[str, np.ndarray]:
        """Read location and time of samples, as Prithvi takes them.

        Returns:
            float32 arrays of those in `metadata_keys`: `location` (sample, 2), latitude and longitude in degrees;
            `time` (sample, 1, 2), year and day of the year from 0.
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


def make_preprocessor(images: xr.Dataset, name: str, backbone: BackboneConfig, spec: BackboneSpec) -> Preprocessor:
    """Make the preprocessing of a dataset's images for a backbone.

    With `normalisation: dataset` this reads the training split.

    Args:
        images: an images store.
        name: the backbone's name, for messages.

    Raises:
        MissingBandsError: the backbone cannot run on these images.
        UserError: see `match_images`; or statistics of an empty training split.
    """
    input_bands = match_images(images, name, backbone, spec)
    units, is_native = images.attrs["units"], backbone.normalisation == "native"
    is_stretched = spec.input_units == "display" and units not in DISPLAY_UNITS
    preprocessor = Preprocessor(
        input_bands=input_bands,
        scale=full_scale(units),
        display_range=tuple(images.attrs["display"]) if is_stretched else None,
        mean=None,
        std=None,
        normalisation=backbone.normalisation,
        resize=spec.resize,
        metadata_keys=_available_metadata(images) if spec.uses_location_and_time else (),
    )
    if not is_native:
        mean, std = _training_stats(images, preprocessor)
    elif spec.mean:
        mean, std = _native_stats(spec, input_bands)
    else:
        return preprocessor
    return dataclasses.replace(preprocessor, mean=mean, std=std)


def _available_metadata(images: xr.Dataset) -> tuple[str, ...]:
    """Return the metadata inputs that every sample has."""
    return tuple(
        key
        for key, coordinates in _METADATA_COORDINATES.items()
        if all(name in images.coords and bool(images[name].notnull().all()) for name in coordinates)
    )


def _native_stats(spec: BackboneSpec, input_bands: InputBands) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the pretraining's mean and standard deviation of the input bands that are used."""
    indices = [spec.bands.index(input_name) for input_name in input_bands.input_names]
    return tuple(spec.mean[index] for index in indices), tuple(spec.std[index] for index in indices)


def _training_stats(images: xr.Dataset, preprocessor: Preprocessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation of each band after the stretch, over the training split."""
    rows = np.flatnonzero(images.split.values == "train")
    if not len(rows):
        raise UserError(
            "normalisation: dataset needs training samples, and this dataset has none. Add samples to its split "
            "train, or set the backbone's normalisation to native.",
            key="normalisation",
            value="dataset",
        )
    n_bands = len(preprocessor.input_bands.band_indices)

    def add_up(start: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the number of pixels, and the sums of their values and squares by band."""
        batch = preprocessor.select_bands(images.image[rows[start : start + _READ_BATCH]].values)
        sums, squares, values = np.zeros(n_bands), np.zeros(n_bands), np.empty(batch.shape[1:])
        for image in batch:  # one image at a time stays in the CPU's cache
            np.divide(image, preprocessor.scale, out=values, dtype=np.float64)
            if preprocessor.display_range:
                low, high = preprocessor.display_range
                values -= low
                values /= high - low
                values.clip(0, 1, out=values)
            sums += values.sum(axis=(1, 2))
            squares += np.square(values, out=values).sum(axis=(1, 2))
        return batch.size // n_bands, sums, squares

    n_pixels, total, total_squares = 0, np.zeros(n_bands), np.zeros(n_bands)
    with ThreadPoolExecutor(min(_READ_THREADS, len(os.sched_getaffinity(0)))) as pool:
        # Added in order, so that the result does not depend on the number of threads.
        for count, sums, squares in pool.map(add_up, range(0, len(rows), _READ_BATCH)):
            n_pixels += count
            total += sums
            total_squares += squares
    mean, std = mean_std_from_sums(n_pixels, total, total_squares)
    std[std < _MIN_STD] = 1.0
    # Rounded to nine digits, so that machines whose sums differ by rounding write the same store.
    return tuple(float(f"{value:.9g}") for value in mean), tuple(float(f"{value:.9g}") for value in std)


# Bilinear resize on a CPU, antialiased when shrinking, several times faster than torch's for float images. Each
# output row or column is a weighted sum of a few neighbouring ones. Rows are summed by `embedding_bag`. Columns are
# summed by matrix products, a few output columns each, so that each product has few input columns.


def resize_bilinear(values: torch.Tensor, side: int) -> torch.Tensor:
    """Resize images (sample, band, y, x), float32 and contiguous, to (sample, band, side, side).

    The result equals torch's `interpolate` with `antialias=True` up to the rounding of its weights to float32.
    """
    if values.shape[2] > side:  # shrink before enlarging: less work for the second step
        return _resize_columns(_resize_rows(values, side), side)
    return _resize_rows(_resize_columns(values, side), side)


def _resize_rows(values: torch.Tensor, side: int) -> torch.Tensor:
    """Resize (sample, band, y, x) to (sample, band, side, x)."""
    *shape, height, width = values.shape
    source_rows, first, weights = _row_weights(height, side)
    image_number = torch.arange(shape[0] * shape[1])[:, None]
    resized = functional.embedding_bag(
        (source_rows + height * image_number).flatten(),
        values.reshape(-1, width),
        (first + len(source_rows) * image_number).flatten(),
        mode="sum",
        per_sample_weights=weights.repeat(len(image_number)),
    )
    return resized.view(*shape, side, width)


def _resize_columns(values: torch.Tensor, side: int) -> torch.Tensor:
    """Resize (sample, band, y, x) to (sample, band, y, side)."""
    lines = values.reshape(-1, values.shape[-1])
    resized = values.new_empty(len(lines), side)
    for target, source, weights in _column_weights(values.shape[-1], side):
        torch.mm(lines[:, source], weights, out=resized[:, target])
    return resized.view(*values.shape[:-1], side)


@lru_cache
def _row_weights(old: int, new: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the source rows of all new rows, the position of each new row's first one, and their weights."""
    weights = _interpolation_weights(old, new)
    new_rows, source_rows = np.nonzero(weights)
    first = np.searchsorted(new_rows, np.arange(new))
    nonzero = weights[new_rows, source_rows].astype(np.float32)
    return torch.from_numpy(source_rows), torch.from_numpy(first), torch.from_numpy(nonzero)


@lru_cache
def _column_weights(old: int, new: int) -> list[tuple[slice, slice, torch.Tensor]]:
    """Return blocks of new columns, their source columns, and weights float32 (source, new)."""
    weights, products = _interpolation_weights(old, new), []
    for start in range(0, new, _RESIZE_COLUMNS):
        block = weights[start : start + _RESIZE_COLUMNS]
        used = np.flatnonzero(block.any(axis=0))
        source = slice(used[0], used[-1] + 1)
        block_weights = np.ascontiguousarray(block[:, source].T, dtype=np.float32)
        products.append((slice(start, start + len(block)), source, torch.from_numpy(block_weights)))
    return products


def _interpolation_weights(old: int, new: int) -> np.ndarray:
    """Return the weights of old positions in new ones, float64 (new, old).

    Each row is a triangle around the new position's centre; its half-width is one old or one new position, whichever
    is larger.
    """
    centre = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(old) - centre) / max(1, old / new))
    return weights / weights.sum(axis=1, keepdims=True)
