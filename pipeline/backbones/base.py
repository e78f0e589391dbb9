"""What a backbone eats and what it gives: plain records shared by every family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.data.download import PinnedWheel
from pipeline.data.hub import HubFile


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone's declaration, readable without importing torch.

    Attributes:
        bands: common names in the order the network wants; None takes all bands of the images.
        needs: those of `bands` without which it cannot work; None for all of them.
        instead: for a band, another that may take its place where the images lack it.
        eats: `reflectance` (0 to 1), `display` (a picture in [0, 1]) or `unit` (either, whatever is there).
        mean, std: the normalisation it was trained with, per band, after that scaling; None if it has none.
        standardise: it has none, and must be given the dataset's.
        strides: input pixels per cell of each level, finest first; empty if only the network knows.
        layers: the network's own names of the levels.
        resize: `bilinear` (antialiased when shrinking) or `nearest`.
        context: it also takes latitude, longitude and time.
        weights: the file or archive that trained weights come from; None if there are none.
        weights_file: the file's name once it is fetched.
        layer_indices, options: of families that params.yaml describes: which outputs, and what to build with.
    """

    bands: tuple[str, ...] | None
    input_units: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    strides: tuple[int, ...]
    layers: tuple[str, ...]
    needs: tuple[str, ...] | None = None
    instead: Mapping[str, str] = field(default_factory=dict)
    standardise: bool = False
    resize: str = "bilinear"
    context: bool = False
    weights: PinnedWheel | HubFile | None = None
    weights_file: str | None = None
    layer_indices: tuple[int, ...] = ()
    options: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class InputBands:
    """What a backbone sees of a dataset's images.

    Attributes:
        slots: the network's own names of its input bands, in order.
        positions: each one's place among the images' bands.
        wavelengths: in micrometres; None of a band that is not optical.
        input_size: side in pixels.
    """

    slots: tuple[str, ...]
    positions: tuple[int, ...]
    wavelengths: tuple[float | None, ...]
    input_size: int


@dataclass(frozen=True)
class FeaturePyramid:
    """One batch of features.

    Attributes:
        levels: tensors (batch, channel, y, x), finest first.
        pooled: tensors (batch, channel) by name, shallowest first.
    """

    levels: list
    pooled: dict


def from_maps(levels: Sequence) -> FeaturePyramid:
    """A pyramid of maps (batch, channel, y, x) and their means."""
    return FeaturePyramid(list(levels), {f"mean_level{i}": level.mean(dim=(2, 3)) for i, level in enumerate(levels)})


def from_tokens(outputs: Sequence) -> FeaturePyramid:
    """A pyramid of a vision transformer's outputs (batch, token, channel): maps, their means, and class tokens.

    The patches are a square grid in reading order; one token more is a class token and comes first.
    """
    count = outputs[0].shape[1]
    side = int(count**0.5)
    extra = count - side * side
    if extra not in (0, 1):
        raise ValueError(f"{count} tokens are neither a square grid nor one with a class token")
    pyramid = from_maps([tokens[:, extra:].transpose(1, 2).unflatten(2, (side, side)) for tokens in outputs])
    if extra:
        pyramid.pooled.update({f"cls_level{i}": tokens[:, 0] for i, tokens in enumerate(outputs)})
    return pyramid
