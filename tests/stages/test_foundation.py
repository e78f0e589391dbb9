"""A small foundation model in the official file layout, from its weights to a feature store."""

import json
import shutil

import pytest
import torch
import zarr

from pipeline.data.download import file_sha256

NAME, FILE = "prithvi_tiny", "Prithvi_EO_V2_tiny_TL.pt"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def pinned_file(job, tmp_path):
    """A file of weights, pinned in params.yaml as those of the model; its outputs are removed afterwards."""
    from terratorch.models.backbones.prithvi_vit import _create_prithvi

    network = _create_prithvi("prithvi_eo_v2_tiny_tl", num_frames=4, encoder_only=False)
    torch.save(network.state_dict(), tmp_path / FILE)
    hub = {"repo": "someone/tiny", "file": FILE, "revision": REVISION, "sha256": file_sha256(tmp_path / FILE)}
    backbone = {"family": "prithvi", "variant": "prithvi_eo_v2_tiny_tl", "weights": "pretrained", "input_size": 64}
    with job.changed({"weights_dir": str(tmp_path), "backbones": {NAME: {**backbone, "hub": hub}}}):
        yield tmp_path / FILE
    for output in (job.folder / "data").glob(f"*/*/{NAME}*"):
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    shutil.rmtree(job.folder / "data/weights" / NAME, ignore_errors=True)


def test_extract_pinned_weights_are_recorded_in_the_store_and_others_are_refused(job, pinned_file, monkeypatch):
    digest = file_sha256(pinned_file)
    job.stage("fetch", "--backbone", NAME)
    job.stage("extract", "--dataset", "sample-landuse-seg", "--backbone", NAME)
    root = zarr.open_group(job.folder / "data/features/sample-landuse-seg" / f"{NAME}.zarr", mode="r")
    weights = root.attrs["weights"]
    assert (weights["source"], weights["revision"], weights["file_sha256"]) == ("someone/tiny", REVISION, digest)
    assert root.attrs["metadata_inputs"] == ["location", "time"]
    assert root["level3/features"].shape == (72, 192, 4, 4)
    manifest = json.loads((job.folder / "data/manifests/sample-landuse-seg" / f"{NAME}.json").read_text())
    assert manifest["content_sha256"] == root.attrs["content_sha256"]
    assert list(root["pooled"].attrs["vectors"])[-1] == "cls_level3"

    shutil.rmtree(job.folder / "data/weights" / NAME)
    pinned_file.write_bytes(pinned_file.read_bytes()[:1000])
    assert digest in str(job.stage_error("fetch", "--backbone", NAME))
    pinned_file.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = job.stage_error("fetch", "--backbone", NAME)
    assert f"https://huggingface.co/someone/tiny/resolve/{REVISION}/{FILE}" in str(error)
    assert not (job.folder / "data/weights" / NAME).exists()
