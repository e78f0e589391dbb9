"""An ensemble of frozen backbones and its trained head as a predictor: tile → pyramids → the head."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from cache.reader import FeatureStore
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.encoder import Encoder
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.heads import checkpoint
from pipeline.mapping.signature import Predictor, Signature


@dataclasses.dataclass(frozen=True)
class EnsemblePaths:
    """Where an ensemble's parts lie.

    Attributes:
        head: the trained one's file.
        images: that it was trained on.
        features: the folder of its backbones' stores, which tell how their inputs were made.
        weights: the folder of the backbones' weights.
    """

    head: Path
    images: xr.Dataset
    features: Path
    weights: Path


def load_ensemble(described: Params, places: EnsemblePaths, device: str) -> Predictor:
    """The ensemble of a trained head.

    Raises:
        UserError: something that it consists of is not there, or was changed since the head was trained.
    """
    head = checkpoint.load(places.head, device)
    given = {name: _given(described, places, name) for name in head.backbones}
    used = sorted({place for one in given.values() for place in one.input_bands.band_indices})
    encoders = [_encoder(described, places, name, among(one, used), device) for name, one in given.items()]
    signature = _signature(head, places.images, used, encoders)

    @torch.inference_mode()
    def logits(chips: np.ndarray, known: Mapping[str, np.ndarray]) -> np.ndarray:
        features = []
        for encoder, names in zip(encoders, head.array_names, strict=True):
            pyramid = encoder.forward(encoder.prepare(chips), _told(encoder, known))
            features.append({name: _array(pyramid, name) for name in names})
        return head.logits(features).float().cpu().numpy()

    return Predictor(head.model, _digest(places, head.backbones, encoders), signature, logits)


def among(given: preprocessing.Preprocessor, used: Sequence[int]) -> preprocessing.Preprocessor:
    """The same inputs for images that have only the bands `used`, in that order."""
    positions = tuple(used.index(place) for place in given.input_bands.band_indices)
    return dataclasses.replace(given, seen=dataclasses.replace(given.input_bands, positions=positions))


def _given(described: Params, places: EnsemblePaths, name: str) -> preprocessing.Preprocessor:
    backbone = described.backbone(name)
    given = preprocessing.make_preprocessor(places.images, name, backbone, get_spec(backbone))
    _unchanged(FeatureStore(places.features / f"{name}.zarr"), given, name)
    return given


def _encoder(
    described: Params, places: EnsemblePaths, name: str, given: preprocessing.Preprocessor, device: str
) -> Encoder:
    backbone, folder, extract = described.backbone(name), places.weights / name, described.extract
    declared = get_spec(backbone)
    if not (folder / "source.json").exists():
        raise UserError(f"There are no weights of {name} at {folder}. Run: dvc repro fetch_weights@{name}")
    network = create_backbone(backbone, declared, given.input_bands, folder)
    return Encoder(given, network, device, extract.precision, extract.compiled, strides=declared.strides)


def _unchanged(store: FeatureStore, given: preprocessing.Preprocessor, name: str) -> None:
    """Refuse a backbone that is described otherwise now than when its features were computed.

    Raises:
        UserError: its input, or how that is normalised, differs.
    """
    then, now = store.attributes["normalisation"], {"of": given.normalisation, "mean": given.mean, "std": given.std}
    now = json.loads(json.dumps(now))
    if store.attributes["input_size"] != given.input_bands.input_size or any(then[key] != now[key] for key in now):
        raise UserError(f"params.yaml describes {name} otherwise than when {store.location} was made. Run: dvc repro")


def _signature(
    head: checkpoint.TrainedHead, images: xr.Dataset, used: Sequence[int], encoders: list[Encoder]
) -> Signature:
    """Of an ensemble: of the images' bands those that any of its members sees."""
    gsd = images.attrs["gsd"]
    return Signature(
        head.task, head.class_names, tuple(preprocessing.image_bands(images)[place] for place in used), images.attrs["units"],
        math.nan if gsd is None else gsd, (images.sizes["y"], images.sizes["x"]),
        tuple(sorted({name for encoder in encoders for name in encoder.preprocessor.metadata_keys})),
    )  # fmt: skip


def _told(encoder: Encoder, known: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Where and when, as `Inputs.where_and_when` tells it of the images of a store."""
    told = {}
    if "place" in encoder.preprocessor.metadata_keys:
        told["place"] = known["place"]
    if "time" in encoder.preprocessor.metadata_keys:
        days = known["time"].astype("datetime64[D]")
        years = days.astype("datetime64[Y]")
        told["time"] = np.stack([years.astype(int) + 1970, (days - years).astype(int)], axis=1)[:, None]
    return {name: torch.from_numpy(values.astype(np.float32)).to(encoder.device) for name, values in told.items()}


def _array(pyramid, name: str) -> torch.Tensor:
    """An array of the store by its name, as `level2/features` or `pooled/mean_level3`."""
    group, field = name.split("/")
    return pyramid.pooled[field] if group == "pooled" else pyramid.levels[int(group.removeprefix("level"))]


def _digest(places: EnsemblePaths, backbones: list[str], encoders: list[Encoder]) -> str:
    """Of the head, and of what its backbones were told and have learnt."""
    digest = hashlib.sha256(places.head.read_bytes())
    for name, encoder in zip(backbones, encoders, strict=True):
        digest.update((places.weights / name / "source.json").read_bytes())
        digest.update(repr(encoder.preprocessor).encode() + encoder.precision.encode())
    return digest.hexdigest()
