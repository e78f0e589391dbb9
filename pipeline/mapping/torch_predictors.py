"""Models that map scenes with torch: trained students and frozen ensembles."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
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
    """Load a trained student from its folder."""
    student, metadata = load_student(folder)
    student = student.to(device).eval()

    @torch.inference_mode()
    def predict_logits(chips, _):
        return student(torch.from_numpy(chips).to(device)).float().cpu().numpy()

    name = f"{metadata['dataset']}, {metadata['architecture']} ({metadata['variant']})"
    digest = fingerprint([(folder / file).read_bytes() for file in (TENSORS_FILE, METADATA_FILE)])
    return Predictor(name, digest, parse_signature(metadata, folder / METADATA_FILE), predict_logits)


def load_ensemble(
    params: Params, device: str, *, head_path: Path, images_path: Path, features_dir: Path, weights_dir: Path
) -> Predictor:
    """Load the backbones and the trained head of an ensemble; its bands are those that any backbone uses.

    The images store is that of the training; the feature stores record how its images were normalized. UserError if
    a file is missing, or params.yaml has changed since the head was trained.
    """
    head, images, extract = checkpoint.load(head_path, device), open_images(images_path), params.extract
    preprocessors = {}
    for name in head.backbones:
        backbone = params.backbone(name)
        preprocessors[name] = make_preprocessor(images, name, backbone, get_spec(backbone))
        _check_unchanged(FeatureStore(features_dir / f"{name}.zarr"), preprocessors[name], name)
    used_bands = sorted(set().union(*(entry.input_bands.band_indices for entry in preprocessors.values())))
    encoders, sources = [], []
    for name, preprocessor in preprocessors.items():
        source = weights_dir / name / "source.json"
        if not source.exists():
            raise UserError(
                f"There are no weights of {name} at {source.parent}. Run: dvc repro fetch_weights@{name}",
                value=name, path=source.parent,
            )  # fmt: skip
        sources.append(source.read_bytes())
        # The preprocessor for images that have only the used bands.
        band_indices = tuple(used_bands.index(index) for index in preprocessor.input_bands.band_indices)
        preprocessor = replace(preprocessor, input_bands=replace(preprocessor.input_bands, band_indices=band_indices))
        backbone, spec = params.backbone(name), get_spec(params.backbone(name))
        network = create_backbone(backbone, spec, preprocessor.input_bands, source.parent)
        encoders.append(Encoder(preprocessor, network, device, extract.precision, extract.compiled, spec.strides))

    @torch.inference_mode()
    def predict_logits(chips: np.ndarray, metadata: Mapping[str, np.ndarray]) -> np.ndarray:
        features = []
        for encoder, array_names in zip(encoders, head.array_names, strict=True):
            arrays = encoder.forward(encoder.prepare(chips), _metadata_tensors(encoder, metadata)).arrays()
            features.append({name: arrays[name] for name in array_names})
        return head.logits(features).float().cpu().numpy()

    bands, gsd = image_bands(images), images.attrs["gsd"]
    signature = Signature(
        task=get_task(head.task),
        class_names=head.class_names,
        bands=tuple(bands[index] for index in used_bands),
        units=images.attrs["units"],
        gsd=math.nan if gsd is None else gsd,
        size=(images.sizes["y"], images.sizes["x"]),
        metadata_keys=tuple(sorted({key for encoder in encoders for key in encoder.preprocessor.metadata_keys})),
    )
    settings = [(encoder.preprocessor, encoder.precision) for encoder in encoders]
    digest = fingerprint(head_path.read_bytes(), sources, settings)
    return Predictor(head.model, digest, signature, predict_logits)


def _check_unchanged(store: FeatureStore, preprocessor: Preprocessor, name: str) -> None:
    """Refuse a backbone whose input size, wavelengths or normalization changed since extraction."""
    recorded, input_bands = dict(store.attributes), preprocessor.input_bands
    recorded |= recorded["normalisation"]
    current = {
        "statistics": preprocessor.normalisation, "mean": preprocessor.mean, "std": preprocessor.std,
        "input_size": input_bands.input_size, "wavelengths_micrometre": input_bands.wavelengths,
    }  # fmt: skip
    current = json.loads(json.dumps(current))  # tuples become lists
    if any(recorded[key] != current[key] for key in current):
        raise UserError(
            f"The input size, wavelengths or normalisation of {name} has changed since {store.location} was written. "
            "Run: dvc repro",
            key=f"backbones.{name}", path=store.location,
        )  # fmt: skip


def _metadata_tensors(encoder: Encoder, metadata: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Convert location and time to a backbone's inputs, as for stored images."""
    lat, lon = metadata["location"].T
    columns = {"lat": lat, "lon": lon, "time": metadata["time"]}
    chips = xr.Dataset({name: ("sample", values) for name, values in columns.items()})
    arrays = encoder.preprocessor.metadata(chips, slice(None))
    return {name: torch.from_numpy(values).to(encoder.device) for name, values in arrays.items()}
