"""What a backbone eats and what it gives: plain records shared by every family."""

from dataclasses import dataclass

from pipeline.archives import Archive


@dataclass(frozen=True)
class Spec:
    """A backbone's declaration, readable without importing torch.

    Attributes:
        bands: common names in the order the network wants; None takes all bands of the images.
        eats: `reflectance` (0 to 1), `display` (a picture in [0, 1]) or `unit` (either, whatever is there).
        mean, std: the normalisation it was trained with, per band, after that scaling; None leaves it out.
        resize: `bilinear` (antialiased when shrinking) or `nearest`.
        strides: input pixels per cell of each level, finest first.
        layers: the network's own names of the levels.
        archive, weights_file: where trained weights come from; None if there are none.
    """

    bands: tuple[str, ...] | None
    eats: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    strides: tuple[int, ...]
    layers: tuple[str, ...]
    resize: str = "bilinear"
    archive: Archive | None = None
    weights_file: str | None = None


@dataclass(frozen=True)
class Pyramid:
    """One batch of features.

    Attributes:
        levels: tensors (batch, channel, y, x), finest first.
        pooled: tensors (batch, channel) by name, shallowest first.
    """

    levels: list
    pooled: dict
