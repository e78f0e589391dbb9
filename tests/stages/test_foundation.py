"""A small foundation model in the official file layout, from its weights to a feature store."""

import json
import shutil
import sys

import pytest
import torch
import zarr

from pipeline.data.download import file_sha256

NAME, FILE = "prithvi_tiny", "Prithvi_EO_V2_tiny_TL.pt"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def weights_dir(tmp_path):
    from terratorch.models.backbones.prithvi_vit import _create_prithvi

    torch.save(
        _create_prithvi("prithvi_eo_v2_tiny_tl", num_frames=4, encoder_only=False).state_dict(), tmp_path / FILE
    )
    return tmp_path


@pytest.fixture
def pinned_file(job, weights_dir):
    """Add the model with a pinned file to params.yaml; remove its outputs afterwards."""
    hub = {"repo": "someone/tiny", "file": FILE, "revision": REVISION, "sha256": file_sha256(weights_dir / FILE)}
    backbone = {"family": "prithvi", "variant": "prithvi_eo_v2_tiny_tl", "weights": "pretrained", "input_size": 64}
    with job.changed({"weights_dir": str(weights_dir), "backbones": {NAME: {**backbone, "hub": hub}}}):
        yield hub
    for output in (job.folder / "data").glob(f"*/*/{NAME}*"):
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    shutil.rmtree(job.folder / "data/weights" / NAME, ignore_errors=True)


def fetch(job, fails: bool = False) -> str:
    return job.run(sys.executable, "-m", "stages.fetch", "--backbone", NAME, fails=fails)


def test_extract_pinned_weights_are_recorded_in_the_store(job, pinned_file):
    fetch(job)
    output = job.stage("extract", "--dataset", "sample-landuse-seg", "--backbone", NAME)
    assert all(value in output for value in ("sample-landuse-seg", "prithvi_tiny", "72")), output
    root = zarr.open_group(job.folder / "data/features/sample-landuse-seg" / f"{NAME}.zarr", mode="r")
    weights = root.attrs["weights"]
    assert (weights["source"], weights["revision"]) == ("someone/tiny", REVISION)
    assert weights["file_sha256"] == pinned_file["sha256"]
    assert root.attrs["metadata_inputs"] == ["location", "time"]
    assert root["level3/features"].shape == (72, 192, 4, 4)
    manifest = json.loads((job.folder / "data/manifests/sample-landuse-seg" / f"{NAME}.json").read_text())
    assert manifest["content_sha256"] == root.attrs["content_sha256"]
    assert list(root["pooled"].attrs["vectors"])[-1] == "cls_level3"


def test_fetch_truncated_or_absent_file_is_refused(job, pinned_file, weights_dir):
    content = (weights_dir / FILE).read_bytes()
    (weights_dir / FILE).write_bytes(content[:1000])
    assert pinned_file["sha256"] in fetch(job, fails=True)
    (weights_dir / FILE).unlink()
    job.environment["HF_HUB_OFFLINE"] = "1"
    output = fetch(job, fails=True)
    del job.environment["HF_HUB_OFFLINE"]
    assert f"https://huggingface.co/someone/tiny/resolve/{REVISION}/{FILE}" in output
    assert not (job.folder / "data/weights" / NAME).exists()
