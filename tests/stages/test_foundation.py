"""A foundation model's file, laid out as the official one is, from a folder of weights to a feature store."""

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
def params(job, weights_dir):
    """params.yaml with the model in it, its file pinned; whatever it leaves behind is removed."""
    pinned = {"repo": "someone/tiny", "file": FILE, "revision": REVISION, "sha256": file_sha256(weights_dir / FILE)}
    backbone = {"family": "prithvi", "variant": "prithvi_eo_v2_tiny_tl", "weights": "pretrained", "input_size": 64}
    with job.changed({"weights_dir": str(weights_dir), "backbones": {NAME: {**backbone, "hub": pinned}}}):
        yield pinned
    for left in (job.folder / "data").glob(f"*/*/{NAME}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.rmtree(job.folder / "data/weights" / NAME, ignore_errors=True)


def fetch(job, **given) -> str:
    return job.run(sys.executable, "-m", "stages.fetch", "--backbone", NAME, **given)


def test_from_a_folder_of_weights_to_a_store_that_names_them(job, params):
    fetch(job)
    said = job.stage("extract", "--dataset", "sample-landuse-seg", "--backbone", NAME)
    assert "sample-landuse-seg x prithvi_tiny: 72 samples at" in said
    root = zarr.open_group(job.folder / "data/features/sample-landuse-seg" / f"{NAME}.zarr", mode="r")
    weights = root.attrs["weights"]
    assert (weights["source"], weights["revision"]) == ("someone/tiny", REVISION)
    assert weights["file_sha256"] == params["sha256"]
    assert root.attrs["metadata_inputs"] == ["location", "time"]
    assert root["level3/features"].shape == (72, 192, 4, 4)
    manifest = json.loads((job.folder / "data/manifests/sample-landuse-seg" / f"{NAME}.json").read_text())
    assert manifest["content_sha256"] == root.attrs["content_sha256"]
    assert list(root["pooled"].attrs["vectors"])[-1] == "cls_level3"


def test_a_truncated_file_is_refused_and_an_absent_one_asked_for(job, params, weights_dir):
    whole = (weights_dir / FILE).read_bytes()
    (weights_dir / FILE).write_bytes(whole[:1000])
    assert "is pinned: it is damaged or not the same file" in fetch(job, fails=True)
    (weights_dir / FILE).unlink()
    job.environment["HF_HUB_OFFLINE"] = "1"
    said = fetch(job, fails=True)
    del job.environment["HF_HUB_OFFLINE"]
    assert f"Download https://huggingface.co/someone/tiny/resolve/{REVISION}/{FILE}, put it at" in said
    assert not (job.folder / "data/weights" / NAME).exists()
