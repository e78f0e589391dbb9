"""Backbones: specification, input bands, feature pyramids, and the registry of families.

A backbone is one network with its weights and its preprocessing. Networks that share code are a family, such as
`hiera`. To add a family inside this package, write one module with `create_network`, and add it to `FAMILIES` in
catalog.py and its variants to catalog.yaml. From outside, call `register_family`.

torch is not imported here: stages that skip a backbone, or only fetch its weights, need its specification alone.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cache.schema import level_array, pooled_array
from pipeline.bands import DISPLAY_UNITS, Band, band_index, sensor
from pipeline.config import BackboneConfig, HubFile
from pipeline.data import image_store
from pipeline.data.download import PinnedWheel
from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch
    import xarray as xr


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """Specification of a backbone: its expected input and its output.

    Attributes:
        bands: common names of the input bands in the network's order; None if it takes any bands.
        input_units: `reflectance` (0 to 1), `display` (an RGB image in [0, 1]) or `any` of them.
        mean, std: normalisation of pretraining, per input band, in `input_units`; None if there is none.
        strides: input pixels per cell of each level, finest first; empty if only the network defines them.
        layers: names of the levels within the network.
        required: input bands without which it cannot run; None if it needs all of `bands`.
        substitutes: for an input band, the common name of another that replaces it if the images lack it.
        wavelengths: for a network that takes any bands, the wavelengths in micrometres that replace the images' own,
            by common name, by sensor (`pipeline.bands.sensor`) or name of the table. Of a known sensor, it takes
            these bands in this order.
        requires_dataset_stats: it has no statistics of pretraining; params.yaml must set `normalisation: dataset`.
        resize: `bilinear` (antialiased when shrinking) or `nearest`.
        uses_location_and_time: whether it also takes latitude, longitude and time.
        weights: source of the pretrained weights; None if none are published.
        layer_indices: indices of the network's blocks or outputs that become the levels, where it needs them.
        options: arguments of the network's constructor, from params.yaml.
    """

    bands: tuple[str, ...] | None = None
    input_units: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    strides: tuple[int, ...] = ()
    layers: tuple[str, ...]
    required: tuple[str, ...] | None = None
    substitutes: Mapping[str, str] = field(default_factory=dict)
    wavelengths: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    requires_dataset_stats: bool = False
    resize: str = "bilinear"
    uses_location_and_time: bool = False
    weights: PinnedWheel | HubFile | None = None
    layer_indices: tuple[int, ...] = ()
    options: Mapping = field(default_factory=dict)

    @property
    def weights_file(self) -> str | None:
        """Name of the file of pretrained weights after fetching."""
        if isinstance(self.weights, PinnedWheel):
            return Path(self.weights.members[0]).name
        return Path(self.weights.file).name if self.weights else None


@dataclass(frozen=True)
class FeaturePyramid:
    """Features of one batch.

    Attributes:
        levels: tensors (batch, channel, y, x), finest first.
        pooled: tensors (batch, channel) by name, shallowest first.
    """

    levels: list
    pooled: dict

    @classmethod
    def from_maps(cls, levels: "Sequence[torch.Tensor]") -> "FeaturePyramid":
        """Make a pyramid of maps (batch, channel, y, x) and their spatial means, named `mean_level<i>`."""
        means = {f"mean_level{index}": level.mean(dim=(2, 3)) for index, level in enumerate(levels)}
        return cls(list(levels), means)

    @classmethod
    def from_outputs(
        cls, outputs: "Sequence[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]", input_size: int
    ) -> "FeaturePyramid":
        """Make a pyramid of a network's outputs: maps, means, and class tokens `cls_level<i>`.

        Args:
            outputs: each is a map (batch, channel, y, x); a map and its class token (batch, channel); or tokens
                (batch, token, channel), patches of a square grid in reading order, which one class token may precede.
            input_size: side of the network's input in pixels.

        Raises UserError: any other number of tokens.
        """
        pairs = [_separate_class_token(output, input_size) for output in outputs]
        pyramid = cls.from_maps([level for level, _ in pairs])
        pyramid.pooled.update({f"cls_level{i}": token for i, (_, token) in enumerate(pairs) if token is not None})
        return pyramid

    def arrays(self) -> dict:
        """Return all tensors by the names of their arrays in a feature store, levels first."""
        levels = {level_array(index): level for index, level in enumerate(self.levels)}
        return levels | {pooled_array(name): vector for name, vector in self.pooled.items()}


def _separate_class_token(output, input_size: int) -> "tuple[torch.Tensor, torch.Tensor | None]":
    """Return an output of `FeaturePyramid.from_outputs` as a map and its class token."""
    if isinstance(output, tuple):
        return output
    if output.ndim != 3:
        return output, None
    n_tokens = output.shape[1]
    side = math.isqrt(n_tokens)
    n_class_tokens = n_tokens - side * side
    if n_class_tokens > 1 or input_size % side:
        raise UserError(
            f"The network returned {n_tokens} tokens for an input of {input_size} px. Expected: one token per patch "
            "of a square grid, with at most one class token before them, and no register tokens. Use this network "
            "from the family timm, or choose another.",
            key="layers", value=tuple(output.shape),
        )  # fmt: skip
    level = output[:, n_class_tokens:].transpose(1, 2).unflatten(2, (side, side))
    return level, output[:, 0] if n_class_tokens else None


@dataclass(frozen=True)
class InputBands:
    """Bands of a dataset that a backbone takes, in the network's order, and its input size in pixels.

    Attributes:
        input_names: the network's names of its input bands.
        band_indices: index of each input band among the images' bands.
        wavelengths: of each input band in micrometres, as the network takes it; None if the band is not optical.
    """

    input_names: tuple[str, ...]
    band_indices: tuple[int, ...]
    wavelengths: tuple[float | None, ...]
    input_size: int


class MissingBandsError(UserError):
    """A backbone cannot run on these images, since they lack its bands or its units; it is skipped."""


def match_bands(
    name: str, spec: BackboneSpec, image_bands: Sequence[Band], input_size: int,
    requested: Sequence[str | float] = (), wavelengths: str = "pretraining",
) -> InputBands:  # fmt: skip
    """Match the input bands of the backbone `name` to the images' bands.

    An absent optional band is dropped; a network that takes any bands gets those that it was trained with, or all
    optical ones of an unknown sensor. Bands `requested` in params.yaml, by name or wavelength, replace the backbone's
    own. They are assigned to the network's inputs by name if it has all of them, else in order. `wavelengths` is that
    of `BackboneConfig`.

    Raises:
        MissingBandsError: a required or requested band is absent, or no band of the images is an input.
        UserError: the requested bands do not fit the network's inputs.
    """
    pretraining = spec.wavelengths.get(sensor(image_bands), {})
    table = pretraining if wavelengths == "pretraining" else spec.wavelengths.get(wavelengths, {})
    if requested:
        indices = [band_index(query, image_bands) for query in requested]
        required = input_names = requested
        if None not in indices:
            input_names = _order_custom_bands(name, spec, [image_bands[index] for index in indices], requested)
    else:
        input_names = spec.bands or [*pretraining] or [band.common_name for band in image_bands if band.is_optical]
        required = input_names if spec.required is None else spec.required
        indices = [_index_or_substitute(input_name, spec, image_bands) for input_name in input_names]
    pairs = list(zip(input_names, indices, strict=True))
    missing = [str(input_name) for input_name, index in pairs if index is None and input_name in required]
    matches = [(str(input_name), index) for input_name, index in pairs if index is not None]
    if missing or not matches:
        missing, available = missing or [*map(str, input_names)], [band.common_name for band in image_bands]
        message = f"{name} needs {', '.join(missing) or 'optical bands'}; these images have {', '.join(available)}."
        raise MissingBandsError(message, key=f"backbones.{name}.bands", value=missing, allowed=available)
    if spec.bands:
        matches.sort(key=lambda match: spec.bands.index(match[0]))
    matched_bands = [image_bands[index] for _, index in matches]
    return InputBands(
        input_names=tuple(input_name for input_name, _ in matches),
        band_indices=tuple(index for _, index in matches),
        wavelengths=tuple(
            table.get(band.common_name, float(band.wavelength) if band.is_optical else None) for band in matched_bands
        ),
        input_size=input_size,
    )


def _index_or_substitute(input_name: str, spec: BackboneSpec, image_bands: Sequence[Band]) -> int | None:
    index = band_index(input_name, image_bands)
    if index is None and input_name in spec.substitutes:
        return band_index(spec.substitutes[input_name], image_bands)
    return index


def _order_custom_bands(
    name: str, spec: BackboneSpec, bands: Sequence[Band], requested: Sequence[str | float]
) -> Sequence[str]:
    """Return the network's input of each requested band: by name if it has all of them, else in order."""
    if spec.bands is None:
        return [band.common_name for band in bands]
    inputs_by_name = {input_name: input_name for input_name in spec.bands}
    inputs_by_name |= {substitute: input_name for input_name, substitute in spec.substitutes.items()}
    by_name = [inputs_by_name[band.common_name] for band in bands if band.common_name in inputs_by_name]
    is_complete = len(bands) == len(spec.bands)
    if len(set(by_name)) == len(bands) and (is_complete or spec.required is not None):
        return by_name
    if is_complete:
        return spec.bands
    raise UserError(
        f"{name} takes the bands {', '.join(spec.bands)}{'' if spec.required is None else ' or some of them'}; its "
        f"bands in params.yaml are {', '.join(map(str, requested))}. Name as many bands as it takes.",
        key=f"backbones.{name}.bands", value=requested, allowed=spec.bands,
    )  # fmt: skip


def match_images(images: "xr.Dataset", name: str, backbone: BackboneConfig, spec: BackboneSpec) -> InputBands:
    """Match a backbone's input bands and units to an images store.

    Raises:
        MissingBandsError: a band is missing, or the network needs reflectance and these are RGB images.
        UserError: the network needs RGB images and the dataset declares no stretch, or its bands do not fit.
    """
    bands = image_store.image_bands(images)
    input_bands = match_bands(name, spec, bands, backbone.input_size, backbone.bands, backbone.wavelengths)
    units, is_display = images.attrs["units"], images.attrs["units"] in DISPLAY_UNITS
    if spec.input_units == "reflectance" and is_display and backbone.normalisation == "native":
        raise MissingBandsError(
            f"{name} needs reflectance, and these images are 8-bit RGB photographs ('{units}'). Set its "
            "normalisation to dataset to use them as they are.",
            key=f"backbones.{name}.normalisation", value=backbone.normalisation, allowed=("dataset",),
        )  # fmt: skip
    if spec.input_units == "display" and not is_display and not images.attrs.get("display"):
        raise UserError(
            f"{name} needs RGB images, and these images are in '{units}' without a declared stretch. Set 'display' "
            "(the reflectances shown as black and white) in the dataset's source.",
            key="display", value=images.attrs.get("display"),
        )  # fmt: skip
    return input_bands


class FamilyModule(Protocol):
    """Interface of a family's module."""

    @staticmethod
    def create_network(
        backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
    ) -> "torch.nn.Module":
        """Build a module from images (batch, band, y, x), float32, to a `FeaturePyramid`.

        A network whose spec sets `uses_location_and_time` also takes `location` (batch, 2), latitude and longitude in
        degrees, and `time` (batch, 1, 2), year and day of the year from 0, as keywords; either may be missing.

        Args:
            backbone: with `variant` and `weights` (`pretrained`, `random` or `none`); torch's generator is seeded.
            weights_dir: folder with the file `spec.weights_file`, if the weights are pretrained.
        """


@dataclass(frozen=True)
class BackboneFamily:
    """One family of backbones: its variants, and the module that builds them.

    Attributes:
        module: dotted name of a `FamilyModule`, imported when a network is built.
        variants: specification by variant; empty if params.yaml describes them.
        spec_from_config: makes the specification of a variant that params.yaml describes.
        has_weights: False if the networks have no parameters; params.yaml then sets `weights: none`.
    """

    module: str
    variants: Mapping[str, BackboneSpec] = field(default_factory=dict)
    spec_from_config: Callable[[BackboneConfig], BackboneSpec] | None = None
    has_weights: bool = True


_FAMILIES: dict[str, BackboneFamily] = {}


def register_family(name: str, family: BackboneFamily) -> None:
    """Make a family available to params.yaml under `name`, in this process and those that it forks.

    Raises ValueError: the name belongs to another family.
    """
    if _FAMILIES.setdefault(name, family) is not family:
        raise ValueError(f"There is a backbone family '{name}' already: {_FAMILIES[name].module}")


def get_family(name: str) -> BackboneFamily:
    """Return a registered family; UserError for an unknown name."""
    if name not in _FAMILIES:
        message = f"Unknown backbone family '{name}'. Known families: {', '.join(_FAMILIES)}."
        raise UserError(message, key="family", value=name, allowed=_FAMILIES)
    return _FAMILIES[name]


def get_spec(backbone: BackboneConfig) -> BackboneSpec:
    """Return the specification of a backbone that params.yaml names.

    Raises UserError: unknown family or variant, or keys of params.yaml that do not fit it.
    """
    family = get_family(backbone.family)
    if family.spec_from_config:
        spec = family.spec_from_config(backbone)
    elif backbone.variant in family.variants:
        spec = family.variants[backbone.variant]
        for key in ("input_units", "layers", "options"):
            if value := getattr(backbone, key):
                message = f"Family '{backbone.family}' defines its own {key}; remove {key} from params.yaml."
                raise UserError(message, key=key, value=value)
        if backbone.hub:
            spec = dataclasses.replace(spec, weights=backbone.hub)
    else:
        variants = ", ".join(family.variants)
        message = f"Unknown variant '{backbone.variant}' of family '{backbone.family}'. Known variants: {variants}."
        raise UserError(message, key="variant", value=backbone.variant, allowed=family.variants)
    _check_spec(spec, backbone, family)
    return spec


def create_backbone(
    backbone: BackboneConfig, spec: BackboneSpec, input_bands: InputBands, weights_dir: Path
) -> "torch.nn.Module":
    """Build the frozen network, with the weights in `weights_dir` or with random ones drawn from the seed."""
    import torch  # takes 3 s

    module = importlib.import_module(get_family(backbone.family).module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(backbone.seed)
        network = module.create_network(backbone, spec, input_bands, weights_dir)
    return network.eval().requires_grad_(False)


def _check_spec(spec: BackboneSpec, backbone: BackboneConfig, family: BackboneFamily) -> None:
    def refuse(key: str, problem: str, allowed: tuple[str, ...] | None = None) -> None:
        value, choices = getattr(backbone, key), f" Set it to {' or '.join(allowed)}." if allowed else ""
        message = f"{backbone.variant} has {key}: {value}; {problem}.{choices}"
        raise UserError(message, key=key, value=value, allowed=allowed)

    multiple = max(spec.strides, default=1)
    if backbone.input_size % multiple:
        refuse("input_size", f"it must be a multiple of {multiple}, the stride of its deepest level")
    if backbone.normalisation == "native" and spec.requires_dataset_stats:
        refuse("normalisation", "it has no normalisation of its own", ("dataset",))
    if backbone.wavelengths != "pretraining" and not spec.wavelengths:
        refuse("wavelengths", "it does not take wavelengths", ("pretraining",))
    allowed_weights = ("pretrained", "random") if family.has_weights else ("none",)
    if backbone.weights not in allowed_weights:
        refuse("weights", "this family takes others", allowed_weights)
    if backbone.weights == "pretrained" and spec.weights is None:
        refuse("weights", "none are published", ("random",))
