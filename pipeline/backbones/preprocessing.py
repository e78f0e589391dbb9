"""From stored images to the exact tensor that a backbone is given: bands → units → stretch → normalise → resize."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xarray as xr

from pipeline.backbones.base import BackboneSpec, InputBands
from pipeline.bands import DISPLAY_UNITS, Band, MissingBandsError, full_scale, match_bands
from pipeline.config import BackboneConfig
from pipeline.errors import UserError

_CONTEXT = {"place": ("lat", "lon"), "time": ("time",)}
# Images read at once, by each of so many threads, while their mean and standard deviation are taken.
_STEP, _THREADS = 64, 8
# Values made at once on a processor.
_BLOCK = 2**18


@dataclass(frozen=True)
class Preprocessor:
    """How one dataset's images become one backbone's input.

    Attributes:
        seen: which bands, and the size.
        scale: of the images' units that make 1.0.
        display: the [low, high] reflectance that is stretched to [0, 1], or None.
        mean, std: per band, after scaling and stretching, or None.
        normalisation: `native` or `dataset`: whose they are.
        resize: `bilinear` (antialiased when shrinking) or `nearest`.
        context: what else goes in: `place` (latitude and longitude), `time`.
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
        """The bands that are used, contiguous, in the images' own units and dtype: (batch, band, y, x)."""
        return np.take(image, self.input_bands.band_indices, axis=1)  # faster than indexing

    def __call__(self, selected):
        """The tensor that reaches the network, float32 (batch, band, input_size, input_size), channels last.

        Args:
            selected: a tensor of what `select` gave, on the device that is to compute.
        """
        import torch

        if selected.is_cuda:
            return self._transform(selected).contiguous(memory_format=torch.channels_last)
        side, bands = self.input_bands.input_size, selected.shape[1]
        made = torch.empty((len(selected), bands, side, side), memory_format=torch.channels_last)
        # What a processor's cache keeps from one pass to the next.
        step = max(1, _BLOCK // (bands * max(side**2, selected[0, 0].numel())))
        for first in range(0, len(selected), step):
            made[first : first + step] = self._transform(selected[first : first + step])
        return made

    def _transform(self, selected):
        """Some of what `tensor` makes, in any memory format."""
        import torch
        from torch.nn import functional

        # In place from here on: fresh memory costs more than the arithmetic.
        values = selected.to(torch.float32, copy=True).div_(self.scale)
        if self.display_range:
            low, high = self.display_range
            values.sub_(low).div_(high - low).clamp_(0, 1)
        if self.mean is not None:
            values.sub_(_per_band(self.mean, values.device)).div_(_per_band(self.std, values.device))
        size = (self.input_bands.input_size,) * 2
        if values.shape[-2:] == size:
            return values
        if self.resize == "nearest":
            return functional.interpolate(values, size=size, mode="nearest-exact")
        if values.is_cuda:
            # Enlarged, it is the same with and without, and faster without.
            shrinks = max(values.shape[-2:]) > size[0]
            return functional.interpolate(values, size=size, mode="bilinear", antialias=shrinks)
        from pipeline.backbones.resize import bilinear

        return bilinear(values, self.input_bands.input_size)

    def metadata(self, images: xr.Dataset, rows: slice) -> dict[str, np.ndarray]:
        """Where and when samples were taken, as Prithvi wants it, float32; nothing that is not known.

        Returns:
            `place` (sample, 2): latitude and longitude in degrees; `time` (sample, 1, 2): year, and its day from 0.
        """
        found = {}
        if "place" in self.metadata_keys:
            found["place"] = np.stack([images.lat[rows].values, images.lon[rows].values], axis=1)
        if "time" in self.metadata_keys:
            taken = images.time[rows].dt
            found["time"] = np.stack([taken.year.values, taken.dayofyear.values - 1], axis=1)[:, None]
        return {name: values.astype(np.float32) for name, values in found.items()}


@lru_cache
def _per_band(values: tuple[float, ...], device):
    """Float32 (band, 1, 1), kept on the device: bringing it there makes the processor wait for a GPU."""
    import torch

    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def make_preprocessor(images: xr.Dataset, name: str, backbone: BackboneConfig, spec: BackboneSpec) -> Preprocessor:
    """What a backbone is given of a dataset.

    Raises:
        Unseen: it cannot see these images: a band is missing, or their units are none that it was trained on.
        UserError: reflectances without a declared stretch for a model of pictures, or unfitting bands.
    """
    seen = match_bands(name, spec, image_bands(images), backbone.input_size, backbone.bands)
    units, display, own = images.attrs["units"], images.attrs.get("display"), backbone.normalisation == "native"
    if spec.input_units == "reflectance" and units in DISPLAY_UNITS and own:
        raise MissingBandsError(
            f"{name} wants reflectance, and these images are 8-bit photographs; normalisation: dataset would let it "
            "see them as they are."
        )
    stretched = spec.input_units == "display" and units not in DISPLAY_UNITS
    if stretched and not display:
        raise UserError(
            f"{name} wants a picture, and the images are in '{units}' without a declared stretch. "
            "Declare 'display' (the reflectances shown as black and white) in the dataset's source."
        )
    made = Preprocessor(
        input_bands=seen,
        scale=full_scale(units),
        display_range=tuple(display) if stretched else None,
        mean=None,
        std=None,
        normalisation=backbone.normalisation,
        resize=spec.resize,
        metadata_keys=tuple(name for name, axes in _CONTEXT.items() if spec.uses_location_and_time and _known(images, axes)),
    )
    mean, std = (_of_inputs(spec, seen) if own else _moments(images, made)) if spec.mean or not own else (None, None)
    return Preprocessor(**{**vars(made), "mean": mean, "std": std})


def image_bands(images: xr.Dataset) -> list[Band]:
    """The bands of an images store, in order."""
    columns = (images[key].values.tolist() for key in ("band_name", "band", "wavelength"))
    return [Band(*one, gsd=images.attrs["gsd"]) for one in zip(*columns, strict=True)]


def _known(images: xr.Dataset, axes: Sequence[str]) -> bool:
    return all(axis in images.coords and bool(images[axis].notnull().all()) for axis in axes)


def _of_inputs(spec: BackboneSpec, seen: InputBands) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The network's own mean and standard deviation of the inputs that are used."""
    places = [spec.bands.index(slot) for slot in seen.input_names]
    return tuple(spec.mean[place] for place in places), tuple(spec.std[place] for place in places)


def _moments(images: xr.Dataset, made: Preprocessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each band over the training split, in float64, as the network would see it."""
    rows = np.flatnonzero(images.split.values == "train")

    def sums(start: int) -> tuple[int, np.ndarray, np.ndarray]:
        some = made.select_bands(images.image[rows[start : start + _STEP]].values)
        total, squares, values = 0.0, 0.0, np.empty(some.shape[1:])
        for image in some:  # one after another stays in the processor's cache
            np.divide(image, made.scale, out=values, dtype=np.float64)
            if made.display_range:
                low, high = made.display_range
                values -= low
                values /= high - low
                values.clip(0, 1, out=values)
            total = total + values.sum(axis=(1, 2))
            squares = squares + np.square(values, out=values).sum(axis=(1, 2))
        return some.size // some.shape[1], total, squares

    with ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0)))) as pool:
        # Added up in order, so that the number of threads decides no digit.
        count, total, squares = map(sum, zip(*pool.map(sums, range(0, len(rows), _STEP)), strict=True))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    # A band that never changes says nothing; dividing by its spread would make noise of it.
    std[std < 1e-6] = 1.0
    # Rounded, so that machines of other kinds agree on what the store is made with.
    return tuple(float(f"{one:.9g}") for one in mean), tuple(float(f"{one:.9g}") for one in std)
