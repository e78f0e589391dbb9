"""Models that map scenes with torch: trained students and frozen ensembles."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from cache.checksums import fingerprint
from cache.reader import FeatureStore
from pipeline.backbones import create_backbone, get_spec
from pipeline.backbones.encoder import Encoder
from pipeline.backbones.preprocessing import Preprocessor, make_preprocessor
from pipeline.config import Params
from pipeline.data.image_store import image_bands, open_images
from pipeline.distillation.student import METADATA_FILE, TENSORS_FILE, load_student
from pipeline.errors import UserError
from pipeline.heads import checkpoint
from pipeline.mapping.predictors import Predictor, Signature, parse_signature
from pipeline.tasks import get_task


def load_torch_student(folder: Path, device: str) -> Predictor:
    """Load a trained student from its folder.

    Raises:
        UserError: the folder has no student.
    """
    folder = Path(folder)
    student, metadata = load_student(folder)
    student = student.to(device).eval()

    @torch.inference_mode()
    def predict_logits(chips, metadata):
        return student(torch.from_numpy(chips).to(device)).float().cpu().numpy()

    name = f"{metadata['dataset']}, {metadata['architecture']} ({metadata['variant']})"
    digest = fingerprint([(folder / file).read_bytes() for file in (TENSORS_FILE, METADATA_FILE)])
    return Predictor(name, digest, parse_signature(metadata, folder / METADATA_FILE), predict_logits)


@dataclasses.dataclass(frozen=True)
class EnsemblePaths:
    """Files of an ensemble.

    Attributes:
        head: the trained head.
        images: the images store that it was trained on.
        features: the folder of its backbones' feature stores, which record how the inputs were normalized.
        weights: the folder of the backbones' weights.
    """

    head: Path
    images: Path
    features: Path
    weights: Path


def load_ensemble(params: Params, paths: EnsemblePaths, device: str) -> Predictor:
    """Load the backbones and the trained head of an ensemble.

    Raises:
        UserError: a file is missing, or params.yaml has changed since the head was trained.
    """
    head, images = checkpoint.load(paths.head, device), open_images(paths.images)
    preprocessors = {name: _make_preprocessor(params, paths, images, name) for name in head.backbones}
    used_bands = sorted(
        {index for preprocessor in preprocessors.values() for index in preprocessor.input_bands.band_indices}
    )
    encoders = [
        _make_encoder(params, paths, name, restrict_bands(preprocessor, used_bands), device)
        for name, preprocessor in preprocessors.items()
    ]

    @torch.inference_mode()
    def predict_logits(chips: np.ndarray, metadata: Mapping[str, np.ndarray]) -> np.ndarray:
        features = []
        for encoder, array_names in zip(encoders, head.array_names, strict=True):
            arrays = encoder.forward(encoder.prepare(chips), _metadata_tensors(encoder, metadata)).arrays()
            features.append({name: arrays[name] for name in array_names})
        return head.logits(features).float().cpu().numpy()

    signature = _ensemble_signature(head, images, used_bands, encoders)
    return Predictor(head.model, _ensemble_digest(paths, head.backbones, encoders), signature, predict_logits)


def restrict_bands(preprocessor: Preprocessor, used_bands: Sequence[int]) -> Preprocessor:
    """Return the same preprocessor for images that have only the bands `used_bands`, in that order."""
    band_indices = tuple(used_bands.index(index) for index in preprocessor.input_bands.band_indices)
    input_bands = dataclasses.replace(preprocessor.input_bands, band_indices=band_indices)
    return dataclasses.replace(preprocessor, input_bands=input_bands)


def _make_preprocessor(params: Params, paths: EnsemblePaths, images: xr.Dataset, name: str) -> Preprocessor:
    backbone = params.backbone(name)
    preprocessor = make_preprocessor(images, name, backbone, get_spec(backbone))
    _check_unchanged(FeatureStore(paths.features / f"{name}.zarr"), preprocessor, name)
    return preprocessor


def _make_encoder(
    params: Params, paths: EnsemblePaths, name: str, preprocessor: Preprocessor, device: str
) -> Encoder:
    backbone, folder, extract = params.backbone(name), paths.weights / name, params.extract
    spec = get_spec(backbone)
    if not (folder / "source.json").exists():
        raise UserError(
            f"There are no weights of {name} at {folder}. Run: dvc repro fetch_weights@{name}",
            value=name,
            path=folder,
        )
    network = create_backbone(backbone, spec, preprocessor.input_bands, folder)
    return Encoder(preprocessor, network, device, extract.precision, extract.compiled, strides=spec.strides)


def _check_unchanged(store: FeatureStore, preprocessor: Preprocessor, name: str) -> None:
    """Refuse a backbone whose configuration has changed since its features were computed.

    Raises:
        UserError: input size or normalization differ.
    """
    recorded = store.attributes["normalisation"]
    current = {"statistics": preprocessor.normalisation, "mean": preprocessor.mean, "std": preprocessor.std}
    current = json.loads(json.dumps(current))
    has_other_size = store.attributes["input_size"] != preprocessor.input_bands.input_size
    if has_other_size or any(recorded[key] != current[key] for key in current):
        raise UserError(
            f"The input size or normalisation of {name} in params.yaml has changed since {store.location} was "
            "written. Run: dvc repro",
            key=f"backbones.{name}",
            path=store.location,
        )


def _ensemble_signature(
    head: checkpoint.TrainedHead, images: xr.Dataset, used_bands: Sequence[int], encoders: list[Encoder]
) -> Signature:
    """Build the signature of an ensemble: its bands are those that any of its backbones uses."""
    bands, gsd = image_bands(images), images.attrs["gsd"]
    return Signature(
        task=get_task(head.task),
        class_names=head.class_names,
        bands=tuple(bands[index] for index in used_bands),
        units=images.attrs["units"],
        gsd=math.nan if gsd is None else gsd,
        size=(images.sizes["y"], images.sizes["x"]),
        metadata_keys=tuple(sorted({key for encoder in encoders for key in encoder.preprocessor.metadata_keys})),
    )


def _metadata_tensors(encoder: Encoder, metadata: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Convert location and time to a backbone's inputs, as `Preprocessor.metadata` does for images."""
    arrays = {}
    if "location" in encoder.preprocessor.metadata_keys:
        arrays["location"] = metadata["location"]
    if "time" in encoder.preprocessor.metadata_keys:
        days = metadata["time"].astype("datetime64[D]")
        years = days.astype("datetime64[Y]")
        arrays["time"] = np.stack([years.astype(int) + 1970, (days - years).astype(int)], axis=1)[:, None]
    return {name: torch.from_numpy(values.astype(np.float32)).to(encoder.device) for name, values in arrays.items()}


def _ensemble_digest(paths: EnsemblePaths, backbones: list[str], encoders: list[Encoder]) -> str:
    """Fingerprint of the head, the weights and the preprocessing."""
    return fingerprint(
        paths.head.read_bytes(),
        [
            ((paths.weights / name / "source.json").read_bytes(), encoder.preprocessor, encoder.precision)
            for name, encoder in zip(backbones, encoders, strict=True)
        ],
    )
