"""Before an extraction starts: a first look at the network, what it will take, and whether the disk can hold it."""

import shutil
import time
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from cache.schema import StoreSchema
from pipeline.backbones.base import FeaturePyramid
from pipeline.backbones.encoder import Encoder
from pipeline.errors import UserError
from pipeline.extraction.cpu_parallel import ParallelEncoder

# Images of the first look at a network on a CPU, where a batch may take minutes.
_LOOK = 4
# A relative difference to float32 that rounding does not explain: some kernel is wrong (LAB.md has one).
_WRONG = 0.3


@dataclass(frozen=True)
class DryRunResult:
    """What a first look at a network tells.

    Attributes:
        pyramid: features of a few images.
        rate: images a second, roughly.
        precision_error: of each level, what lower precision changes: relative root mean square difference to float32.
    """

    pyramid: FeaturePyramid
    images_per_second: float
    precision_error: dict[str, float]


def dry_run(images: xr.Dataset, encoder: Encoder, batch: int) -> DryRunResult:
    """Encode the first images, a few of them in float32 too if the forward is in lower precision.

    Raises:
        UserError: features that are no numbers, or far from those in float32, or a network that these images do not
            fit.
    """
    rows = slice(0, min(batch if encoder.device != "cpu" else _LOOK, len(images.sample)))
    image, known = images.image[rows].values, encoder.preprocessor.metadata(images, rows)
    with translate_errors(encoder, len(image)):
        pyramid = encoder(image, known)
    rate = _rate(encoder, image, known)
    if not all(np.isfinite(each).all() for each in [*pyramid.levels, *pyramid.pooled.values()]):
        other = "" if encoder.precision == "float32" else ", or set extract.precision to float32"
        raise UserError(f"Features in {encoder.precision} are not finite numbers. Check the images{other}.")
    if encoder.precision == "float32":
        return DryRunResult(pyramid, rate, {})
    few = {name: values[:_LOOK] for name, values in known.items()}
    exact = Encoder(encoder.preprocessor, encoder.network, encoder.device, strides=encoder.strides)(image[:_LOOK], few)
    pairs = zip((level[:_LOOK] for level in pyramid.levels), exact.levels, strict=True)
    errors = [float(np.linalg.norm(lower - level) / np.linalg.norm(level)) for lower, level in pairs]
    if max(errors, default=0) > _WRONG:
        raise UserError(
            f"Features in {encoder.precision} differ from those in float32 by {max(errors):.0%} on {encoder.device}: "
            "something computes wrongly there. Set extract.precision to float32."
        )
    return DryRunResult(pyramid, rate, {f"level{index}": error for index, error in enumerate(errors)})


def _rate(encoder: Encoder, image: np.ndarray, known: Mapping[str, np.ndarray]) -> float:
    """Images a second, encoded side by side as the engine does: the threads of one forward wait for one another."""
    with ParallelEncoder(encoder) as beside:
        for _ in range(2):  # the first compiles, if it is to be compiled
            begun = time.perf_counter()
            for one in [beside.submit(Encoder.__call__, image, known) for _ in range(beside.count)]:
                one.result()
        return beside.count * len(image) / (time.perf_counter() - begun)


@contextmanager
def translate_errors(encoder: Encoder, count: int):
    """Around the first forwards, of so many images, where a network shows what it does not take."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"{encoder.device} has no memory for {count} images at once. Set extract.batch to fewer than that, or "
            "see what else uses it."
        ) from None
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        seen = encoder.preprocessor.input_bands
        raise UserError(
            f"The network does not take {len(seen.input_names)} bands ({', '.join(map(str, seen.input_names))}) of "
            f"{seen.input_size} px: {str(error).strip().splitlines()[0]}. Check the backbone's bands, input_size and "
            "options in params.yaml."
        ) from error


def format_estimate(layout: StoreSchema, seen: DryRunResult, folder: Path, what: str) -> str:
    """A line on what an extraction, or what is left of it, will take.

    Args:
        folder: where its writers share what they have of it.

    Raises:
        UserError: the disk of `folder` cannot hold it.
    """
    needs = max(0, round(nbytes(layout) * _compressed(layout, seen.pyramid)) - _bytes_in(folder))
    place = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(place).free
    safe = len(list(folder.glob("shards/*.json"))) * layout.shard_size
    seconds = max(0, len(layout.sample) - safe) * max(1, len(layout.views)) / seen.images_per_second
    size = f"{needs / 1e9:.2f} GB" + ("" if layout.codec.name == "none" else f" as {layout.codec.label}")
    line = (
        f"{what}: {len(layout.sample)} samples at {seen.images_per_second:.1f} images/s take this process about "
        f"{seconds / 60:.1f} min and {size}; {free / 1e9:.1f} GB are free"
    )
    if needs > free:
        raise UserError(f"The disk cannot hold it. {line} at {place}. Free some space, or choose an extract.codec.")
    return line


def _compressed(layout: StoreSchema, pyramid: FeaturePyramid) -> float:
    """The share of a level's bytes that the codec leaves, by the features of the first images."""
    if layout.codec.name == "none" or not layout.levels:
        return 1.0
    before = after = 0
    for level in pyramid.levels:
        limit = np.finfo(layout.dtype).max  # what is beyond it is refused where it is stored
        stored, scale = layout.codec.quantize(np.clip(level[:_LOOK], -limit, limit).astype(layout.dtype, order="C"))
        before += stored.size * np.dtype(layout.dtype).itemsize
        after += sum(len(layout.codec.compress(one)) for one in stored)
        after += 0 if scale is None else scale.nbytes
    return after / before


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another worker renames its files
            total += path.stat().st_size
    return total


def nbytes(layout: StoreSchema) -> int:
    """Bytes of a store's arrays before compression."""
    sizes = {name: int(np.prod(shape)) for name, shape in layout.shapes().items()}
    return len(layout.sample) * sum(sizes.values()) * np.dtype(layout.dtype).itemsize
