"""Find the files of a set in a local folder, or download them once from the Hugging Face hub."""

import hashlib
import itertools
import os
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from cache.atomic import publish
from pipeline.data.download import file_sha256
from pipeline.data.sources.geobench.catalog import GeoBenchSet
from pipeline.errors import UserError

# The first files may be damaged; this many are tried to find the dtypes that all files share.
MAX_PROBED_FILES = 100
# An unpacked archive is up to twice as large as the archive, which is removed afterwards.
DISK_SPACE_FACTOR = 3
REPO = "recursix/geo-bench-1.0"
# Revision, and SHA-256 of the classification sets, as pinned by torchgeo-bench.
REVISION = "1e5754337032f097396db62cc15a5ff88f4618e8"
SHA256 = {
    "m-bigearthnet": "a72d3b7a60ec8fec67b5c4143d18ad7e10858d9633621b1f5db82e955d77f658",
    "m-brick-kiln": "53cacc65013b74c6fb9c447486830111ed4a2a83dbb7c27c579fe417b309e265",
    "m-eurosat": "ea1d66258e7a789b24e9f7cfdf7498f3c12129f7725e4710a73547db72329804",
    "m-forestnet": "7ae883180a5e64b0e30849419fc04f13cbef840f5dcc7dbddf63ac02027e7994",
    "m-pv4ger": "b7f2ebb77e543b3bb7c38f498180976b64d72d541ec712c853e39e5d33e01dca",
    "m-so2sat": "ec4d7cefeea4a326afe3c0f10333a565377d9b0004bcb780949d384e7eaf0704",
}


def describe_files(spec: GeoBenchSet, partition: str, root: Path) -> dict:
    """Find a set in `root` (`geobench_dir`) or download it there, and describe its files for source.json.

    The record has a SHA-256 of the names and sizes of all samples and of the content of all JSON files.

    Raises:
        UserError: the set is not in `root` and cannot be downloaded.
    """
    folder = local_folder(spec, root) or download_set(spec, root)
    listing, n_files, n_bytes = hashlib.sha256(), 0, 0
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.endswith(".hdf5"):
                size = entry.stat().st_size
                n_files, n_bytes = n_files + 1, n_bytes + size
                listing.update(f"{entry.name} {size}\n".encode())
            elif entry.name.endswith(".json"):
                listing.update(f"{entry.name} {file_sha256(Path(entry))}\n".encode())
    return {
        "source": f"GEO-Bench 1.0, {spec.name} ({REPO})",
        "licence": spec.licence,
        "folder": str(folder),
        "partition": partition,
        "files": n_files,
        "bytes": n_bytes,
        "listing_sha256": listing.hexdigest(),
    }


def local_folder(spec: GeoBenchSet, root: Path) -> Path | None:
    """Return the set's folder below `root`, with or without GEO-Bench's folder in between; None if absent."""
    folders = [parent / name for parent in (root / spec.archive_folder, root) for name in spec.folder_names]
    return next((folder for folder in folders if any(folder.glob("*_partition.json"))), None)


def existing_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return at most `MAX_PROBED_FILES` files of samples that exist; UserError if there are none."""
    existing = (path for name in names if (path := folder / f"{name}.hdf5").exists())
    if not (paths := list(itertools.islice(existing, MAX_PROBED_FILES))):
        raise UserError(
            f"{folder} has none of the files that its partition lists. Restore them, or delete the folder and run "
            "again to download the set.",
            path=folder,
        )
    return paths


def download_set(spec: GeoBenchSet, root: Path) -> Path:
    """Download a set's archive into `root`, or resume that, and unpack it; return the folder.

    Raises:
        UserError: the hub cannot be reached, the archive differs from the pinned one, or the disk is too small.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # huggingface_hub reads this variable when it is imported, and takes 0.3 s; local sets need neither.
    from huggingface_hub import HfApi, hf_hub_download

    names = [f"{spec.archive_folder}/{name}.zip" for name in spec.folder_names]
    try:
        archives = HfApi().get_paths_info(REPO, names, repo_type="dataset", revision=REVISION)
        if not archives:
            raise FileNotFoundError(f"{REPO} has none of {', '.join(names)}")
        archive = archives[0]
        _check_disk_space(root, archive.size)
        path = Path(hf_hub_download(REPO, archive.path, repo_type="dataset", revision=REVISION, local_dir=root))
    except UserError:
        raise
    except Exception as error:  # the client raises its own errors and those of requests and the system
        reason = (str(error).splitlines() or ["no message"])[0][:150]
        folder = root / spec.archive_folder / spec.folder_names[0]
        raise UserError(
            f"{spec.name} is not in {root} and could not be downloaded from {REPO} ({type(error).__name__}: "
            f"{reason}). Put its folder at {folder}, or set geobench_dir in params.yaml to the folder of your sets, "
            "and run again. A partial download is resumed.",
            key="geobench_dir", value=str(root), path=folder,
        ) from None  # fmt: skip
    expected = SHA256.get(spec.name) or (archive.lfs.sha256 if archive.lfs else None)
    if expected and (actual := file_sha256(path)) != expected:
        raise UserError(
            f"{path} has the SHA-256 {actual}; expected {expected}. Delete it and run again.",
            value=actual, allowed=(expected,), path=path,
        )  # fmt: skip
    return _unpack(path, root / spec.archive_folder / spec.folder_names[0])


def _check_disk_space(root: Path, archive_bytes: int) -> None:
    """Refuse a disk that cannot hold an archive and its unpacked files."""
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free, required = shutil.disk_usage(existing).free, DISK_SPACE_FACTOR * archive_bytes
    if free < required:
        raise UserError(
            f"The archive has {archive_bytes / 1e9:.1f} GB and needs about {required / 1e9:.1f} GB while it is "
            f"unpacked, but {free / 1e9:.1f} GB are free at {existing}. Free some space, or set another geobench_dir "
            "in params.yaml.",
            key="geobench_dir", value=str(root), path=existing,
        )  # fmt: skip


def _unpack(path: Path, folder: Path) -> Path:
    """Unpack an archive into `folder`, which appears only when it is complete, and remove the archive."""
    scratch = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _extract_files(path, scratch)
        if not any(scratch.glob("*_partition.json")):
            raise UserError(f"{path} contains no GEO-Bench partition file. Delete it and run again.", path=path)
        publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    path.unlink()
    return folder


def _extract_files(path: Path, folder: Path) -> None:
    """Extract the HDF5 and JSON files of an archive into one folder."""
    extracted = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                # Without its folders, a member's name cannot lead out of the folder.
                name = Path(member.filename).name
                if member.is_dir() or Path(name).suffix not in (".hdf5", ".json"):
                    continue
                content = (member.CRC, member.file_size)
                if extracted.setdefault(name, content) != content:
                    raise UserError(
                        f"{path} contains two files named {name}. Delete it and run again.", value=name, path=path
                    )
                with archive.open(member) as source, open(folder / name, "wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
    # zipfile has no common error class: wrong or missing bytes raise the first three, passwords and unknown
    # compression methods raise RuntimeError.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a readable zip archive ({error}). Delete it and run again.", path=path
        ) from None
