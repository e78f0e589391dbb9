"""Before an extraction: dry run of the network, batch size, estimate of time and disk space."""

import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from cache.codecs import quantize
from cache.schema import StoreSchema
from pipeline.backbones.base import FeaturePyramid
from pipeline.backbones.encoder import Encoder
from pipeline.errors import UserError

# Images of the dry run on a CPU, where a batch may take minutes.
_DRY_RUN_IMAGES = 4
# A relative difference to float32 too large for rounding: a kernel computes wrong values (LAB.md has an example).
_MAX_PRECISION_ERROR = 0.3
# Larger batches are slower on a CPU, since less of a layer's output stays in the cache.
_CPU_BATCH = 4
# Fraction of a GPU's memory that a batch may use; the casts need memory, too.
_GPU_MEMORY_FRACTION = 0.8


@dataclass(frozen=True)
class DryRunResult:
    """Result of encoding a few images.

    Attributes:
        pyramid: their features.
        images_per_second: approximate throughput, of one batch at a time.
        precision_error: relative root mean square difference to float32 of each level; empty in float32.
    """

    pyramid: FeaturePyramid
    images_per_second: float
    precision_error: dict[str, float]


def dry_run(images: xr.Dataset, encoder: Encoder, batch: int) -> DryRunResult:
    """Encode the first images; if the precision is lower than float32, compare a few with float32.

    Raises UserError: non-finite features, features that differ too much from float32, or a network that does not take
    these images.
    """
    rows = slice(0, min(batch if encoder.device != "cpu" else _DRY_RUN_IMAGES, len(images.sample)))
    image, metadata = images.image[rows].values, encoder.preprocessor.metadata(images, rows)
    with translate_errors(encoder, len(image)):
        encoder(image, metadata)  # may compile
        start = time.perf_counter()
        pyramid = encoder(image, metadata)
        images_per_second = len(image) / (time.perf_counter() - start)
    if not all(np.isfinite(array).all() for array in pyramid.arrays().values()):
        hint = "" if encoder.precision == "float32" else ", or set extract.precision to float32"
        raise UserError(
            f"Features in {encoder.precision} are NaN or infinite. Check the images{hint}.",
            key="extract.precision", value=encoder.precision,
        )  # fmt: skip
    errors = {}
    if encoder.precision != "float32":
        few = slice(0, _DRY_RUN_IMAGES)
        float32_encoder = Encoder(encoder.preprocessor, encoder.network, encoder.device, strides=encoder.strides)
        exact = float32_encoder(image[few], {name: values[few] for name, values in metadata.items()}).levels
        for index, level in enumerate(exact):
            error = np.linalg.norm(pyramid.levels[index][few] - level) / np.linalg.norm(level)
            errors[f"level{index}"] = float(error)
    if (largest := max(errors.values(), default=0)) > _MAX_PRECISION_ERROR:
        raise UserError(
            f"Features in {encoder.precision} differ from float32 by {largest:.0%} on {encoder.device}; rounding "
            "does not explain that, so an operation computes wrongly. Set extract.precision to float32.",
            key="extract.precision", value=encoder.precision, allowed=("float32",),
        )  # fmt: skip
    return DryRunResult(pyramid, images_per_second, errors)


@contextmanager
def translate_errors(encoder: Encoder, n_images: int):
    """Translate torch's errors of a first forward pass, of `n_images`, to UserErrors."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"{encoder.device} has not enough memory for {n_images} images at a time. Set extract.batch to a lower "
            "number, or end other programs that use it.",
            key="extract.batch", value=n_images,
        ) from None  # fmt: skip
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        input_bands = encoder.preprocessor.input_bands
        names = ", ".join(map(str, input_bands.input_names))
        raise UserError(
            f"The network does not take {len(input_bands.input_names)} bands ({names}) of {input_bands.input_size} "
            f"px: {str(error).strip().splitlines()[0]}. Check the backbone's bands, input_size and options in "
            "params.yaml.",
            key="bands", value=input_bands.input_names,
        ) from error  # fmt: skip


def find_batch_size(images: xr.Dataset, encoder: Encoder, maximum: int, n_views: int = 1) -> int:
    """Choose a batch size for `extract.batch: 0`: a small one on a CPU, on a GPU a power of two that fits.

    The floating-point rounding of the features depends on it. On a GPU the limit is its total memory minus the
    network, even if other processes use some of it, so that all workers on GPUs of one kind choose the same.
    `n_views` copies of each image are in memory together.

    Raises UserError: a network that does not take these images, or too little memory for one.
    """
    if encoder.device == "cpu":
        return min(_CPU_BATCH, maximum)
    # Not compiled: it would compile again for every size.
    eager = Encoder(encoder.preprocessor, encoder.network, encoder.device, encoder.precision, strides=encoder.strides)
    total_bytes = torch.cuda.get_device_properties(encoder.device).total_memory
    budget = _GPU_MEMORY_FRACTION * (total_bytes - torch.cuda.memory_allocated(encoder.device))
    batch = _largest_power_of_two(maximum, budget, lambda batch: _forward_bytes(images, eager, batch, n_views))
    torch.cuda.empty_cache()
    return batch


def _largest_power_of_two(maximum: int, budget: float, measure_bytes: Callable[[int], float]) -> int:
    """Double the batch up to `maximum`, while twice its bytes are within the budget."""
    batch = 1
    while 2 * batch <= maximum and 2 * measure_bytes(batch) <= budget:
        batch *= 2
    return batch


def _forward_bytes(images: xr.Dataset, encoder: Encoder, batch: int, n_views: int) -> int:
    """Measure the GPU memory of a batch.

    It is the larger of one view's forward pass with the other views' features, and all features with their stack.
    """
    rows = np.zeros(batch, int)
    image, metadata = images.image[rows].values, encoder.preprocessor.metadata(images, rows)
    torch.cuda.reset_peak_memory_stats(encoder.device)
    before = torch.cuda.memory_allocated(encoder.device)
    with translate_errors(encoder, batch):
        pyramid = encoder(image, metadata)
    forward = torch.cuda.max_memory_allocated(encoder.device) - before
    feature_bytes = sum(array.nbytes for array in pyramid.arrays().values())
    return max(forward + (n_views - 1) * feature_bytes, 2 * n_views * feature_bytes)


def format_estimate(schema: StoreSchema, result: DryRunResult, folder: Path, description: str) -> str:
    """Describe in one line the time and disk space of an extraction, or of its remaining shards.

    Raises UserError: the disk of `folder`, where its workers write the store, is too small.
    """
    n_samples = len(schema.sample)
    n_remaining = max(0, n_samples - len(list(folder.glob("shards/*.json"))) * schema.shard_size)
    needed_bytes = nbytes(schema) * _compression_ratio(schema, result.pyramid) * n_remaining / n_samples
    minutes = n_remaining * max(1, len(schema.views)) / result.images_per_second / 60
    existing_folder = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing_folder).free
    codec = "" if schema.codec.name == "none" else f" as {schema.codec.name}"
    line = (
        f"{description}: {n_samples} samples at {result.images_per_second:.1f} images/s take this process about "
        f"{minutes:.1f} min and {needed_bytes / 1e9:.2f} GB{codec}; {free_bytes / 1e9:.1f} GB are free"
    )
    if needed_bytes > free_bytes:
        raise UserError(
            f"The disk is too small. {line} at {existing_folder}. Free some space, or choose an extract.codec.",
            key="extract.codec", value=schema.codec.name, path=existing_folder,
        )  # fmt: skip
    return line


def _compression_ratio(schema: StoreSchema, pyramid: FeaturePyramid) -> float:
    """Estimate compressed / uncompressed bytes of the levels from the features of the dry run."""
    if schema.codec.name == "none" or not schema.levels:
        return 1.0
    n_before = n_after = 0
    for level in pyramid.levels:
        limit = np.finfo(schema.dtype).max  # larger values are refused when they are stored
        clipped = np.clip(level[:_DRY_RUN_IMAGES], -limit, limit).astype(schema.dtype, order="C")
        stored, scale = quantize(clipped) if schema.codec.has_scale else (clipped, None)
        n_before += stored.size * np.dtype(schema.dtype).itemsize
        n_after += sum(len(schema.codec.compress(sample)) for sample in stored)
        n_after += 0 if scale is None else scale.nbytes
    return n_after / n_before


def nbytes(schema: StoreSchema) -> int:
    """Return the bytes of a store's arrays before compression."""
    values_per_sample = sum(int(np.prod(shape)) for shape in schema.shapes().values())
    return len(schema.sample) * values_per_sample * np.dtype(schema.dtype).itemsize
