"""Mistakes of a user at the command line: one paragraph, and no half-written files."""

import os
import shutil

import pytest

from tests.stages.conftest import Job

STUDENT = {"network": "test_resnet", "weights": "random", "chip_size": 32, "mask_size": 32}


def error_paragraph(output: str) -> str:
    """Return the one line that starts with "error: "."""
    paragraphs = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(paragraphs) == 1, output[-2000:]
    assert "Traceback" not in output
    return paragraphs[0]


def test_repro_invalid_params_stops_before_any_other_stage(fresh_clone):
    fresh_clone.change({"train": {"sedes": 3}})
    paragraph = error_paragraph(fresh_clone.run("dvc", "repro", fails=True))
    assert all(value in paragraph for value in ("params.yaml", "sedes", "seeds")), paragraph
    assert {path.name for path in (fresh_clone.folder / "data").iterdir()} <= {"archives", "scratch"}
    assert (fresh_clone.folder / "params.schema.json").exists()


@pytest.mark.parametrize(
    ("change", "key", "value", "mentions"),
    [
        ({"heads": {"levels": [-1, 4]}}, "heads.levels", 4, ["lite0"]),
        ({"heads": {"segmentation": "unet"}}, "heads.segmentation", "unet", ["upernet", "fcn"]),
        ({"heads": {"fusion": "sum"}}, "heads.fusion", "sum", ["concat", "average", "film", "dot"]),
        ({"grid": {"students": ["teacher"]}, "students": {"teacher": STUDENT}}, "grid.students", "teacher", []),
        ({"students": {"small": {"network": "resnet1"}}}, "students.small.network", "resnet1", ["resnet18"]),
    ],
)
def test_validate_value_that_only_networks_know_is_refused(job, change, key, value, mentions):
    with job.changed(change):
        error = job.stage_error("validate")
    assert (error.key, error.value) == (key, value)
    assert all(name in str(error) for name in mentions), error


@pytest.mark.parametrize(
    ("stage", "arguments", "key", "value"),
    [
        *((stage, "--dataset x", "datasets", "x") for stage in ("prepare", "teacher", "cost", "compose", "resolve")),
        *((stage, "--dataset x --model lite0", "datasets", "x") for stage in ("tune", "train", "finetune")),
        ("export", "--dataset x --student small", "datasets", "x"),
        ("export", "--dataset sample-trees --student tiny", "students", "tiny"),
        ("extract", "--dataset sample-trees --backbone y", "backbones", "y"),
        ("tune", "--dataset sample-trees --model lite0+z", "backbones", "z"),
        ("distill", "--dataset sample-trees --student tiny", "students", "tiny"),
        ("finetune", "--dataset sample-trees --model x", "backbones", "x"),
        ("finetune", "--dataset sample-trees --model raw+lite0", "grid.models", "raw+lite0"),
    ],
)
def test_stage_unknown_name_is_refused(job, stage, arguments, key, value):
    error = job.stage_error(stage, *arguments.split())
    assert (error.key, error.value) == (key, value)
    assert value in str(error)
    assert not (job.folder / "results/finetune/sample-trees").exists()


@pytest.mark.parametrize("arguments", [[], ["--model", "raw", "--selected"]])
def test_train_needs_either_a_model_or_selected(job, arguments):
    with pytest.raises(AssertionError, match="2"):  # argparse exits with status 2
        job.stage("train", "--dataset", "sample-trees", *arguments)


def test_extract_cuda_without_gpu_is_refused(job, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with job.changed({"compute": {"device": "cuda"}}):
        error = job.stage_error("extract", "--dataset", "sample-trees", "--backbone", "lite0")
    assert (error.key, error.value, error.allowed) == ("compute.device", "cuda", ("auto", "cpu"))


def test_fetch_corrupted_archive_is_refused(fresh_clone):
    from pipeline.data.sources.neon_trees import ARCHIVE

    archives = fresh_clone.folder / "data/archives"
    archives.unlink()
    archives.mkdir()
    (archives / ARCHIVE.filename).write_bytes(b"PK\x03\x04 not the wheel")
    error = fresh_clone.stage_error("fetch", "--dataset", "sample-trees")
    assert ARCHIVE.filename in str(error)
    assert not (fresh_clone.folder / "data/raw").exists()


def test_extract_missing_images_names_the_stage(job, tmp_path):
    shutil.move(job.folder / "data/images/sample-trees.zarr", tmp_path / "moved")
    error = job.stage_error("extract", "--dataset", "sample-trees", "--backbone", "raw")
    shutil.move(tmp_path / "moved", job.folder / "data/images/sample-trees.zarr")
    assert "prepare@sample-trees" in str(error)


# Mounts a small file system over data/ in a namespace of its own, with links to what a stage reads.
FULL_DISK = """
set -e
mkdir -p {real}
mount --bind {folder}/data {real}
mount -t tmpfs -o size={size} small {folder}/data
for name in {inputs}; do ln -s {real}/$name {folder}/data/$name; done
cd {folder}
{command} || status=$?
ls data/raw data/images data/features/sample-trees 2>/dev/null | sed 's/^/present: /'
ls data/scratch | grep -v lock$ | sed 's/^/scratch: /' || true
exit ${{status:-0}}
"""


@pytest.mark.parametrize(
    ("size", "stage", "inputs", "unfinished"),
    [
        ("6m", "fetch", "archives", "sample-trees"),
        ("8m", "prepare", "archives raw", "sample-trees.zarr"),
        # Enough for the arrays, but not for their files; less would be refused before the extraction starts.
        ("336k", "extract --backbone lite0", "archives raw images weights", "lite0.zarr"),
    ],
)
def test_stage_full_disk_leaves_no_unfinished_result(job: Job, size, stage, inputs, unfinished):
    script = FULL_DISK.format(
        folder=job.folder, real=job.folder.parent / "real", size=size, inputs=inputs,
        command=f"python -m stages.{stage} --dataset sample-trees",
    )  # fmt: skip
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    output = job.run(*namespace, "sh", "-c", script, fails=True)
    paragraph = error_paragraph(output)
    assert " MB " in paragraph
    assert str(job.folder / "data") in paragraph
    assert "Warning" not in output
    assert "scratch: images" not in output
    # Links to inputs are present too; results of a fetch have no suffix, other results are stores.
    present = [line for line in output.splitlines() if stage == "fetch" or ".zarr" in line]
    assert f"present: {unfinished}" not in present
