"""Find the files of a set in a local folder, or download them once from the Hugging Face hub."""

import hashlib
import os
import shutil
import zipfile
import zlib
from pathlib import Path

import huggingface_hub

from cache.atomic import atomic_dir
from pipeline.data.download import file_sha256
from pipeline.data.sources.geobench.catalog import GeoBenchSet
from pipeline.data.sources.geobench.partitions import read_score_range
from pipeline.errors import UserError

# An unpacked archive is up to twice as large as the archive, which is removed afterwards.
DISK_SPACE_FACTOR = 3
REPO = "recursix/geo-bench-1.0"
# As pinned by torchgeo-bench.
REVISION = "1e5754337032f097396db62cc15a5ff88f4618e8"


def describe_files(spec: GeoBenchSet, partition: str, root: Path) -> dict:
    """Find a set in `root` (`geobench_dir`) or download it there, and describe its files for source.json.

    The record has a SHA-256 of the names and sizes of all samples and of the content of all JSON files, and
    `read_score_range`.

    Raises UserError: the set is not in `root` and cannot be downloaded.
    """
    folder = local_folder(spec, root) or _download_set(spec, root)
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
        "score_range": read_score_range(folder, spec),
    }


def local_folder(spec: GeoBenchSet, root: Path) -> Path | None:
    """Return the set's folder below `root`, with or without GEO-Bench's folder in between; None if absent."""
    folders = [parent / name for parent in (root / spec.archive_folder, root) for name in spec.folder_names]
    return next((folder for folder in folders if any(folder.glob("*_partition.json"))), None)


def _download_set(spec: GeoBenchSet, root: Path) -> Path:
    """Download a set's archive into `root`, or resume that, and unpack it; return the folder.

    Raises UserError: the hub cannot be reached, the archive is not the pinned one, or the disk is too small.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's client is used first
    folder = root / spec.archive_folder / spec.name
    names = [f"{spec.archive_folder}/{name}.zip" for name in spec.folder_names]
    try:
        hub = huggingface_hub.HfApi()
        archives = hub.get_paths_info(REPO, names, repo_type="dataset", revision=REVISION)
        if not archives:
            raise FileNotFoundError(f"{REPO} has none of {', '.join(names)}")
        archive = archives[0]
        _check_disk_space(root, archive.size)
        path = Path(hub.hf_hub_download(REPO, archive.path, repo_type="dataset", revision=REVISION, local_dir=root))
    except UserError:
        raise
    except Exception as error:  # the client raises its own errors and those of requests and the system
        reason = (str(error).splitlines() or ["no message"])[0][:150]
        raise UserError(
            f"{spec.name} is not in {root} and could not be downloaded from {REPO} ({type(error).__name__}: "
            f"{reason}). Put its folder at {folder}, or set geobench_dir in params.yaml to the folder of your sets, "
            "and run again. A partial download is resumed.",
            key="geobench_dir", value=str(root), path=folder,
        ) from None  # fmt: skip
    expected = spec.archive_sha256 or (archive.lfs.sha256 if archive.lfs else None)
    if expected and (actual := file_sha256(path)) != expected:
        message = f"{path} has the SHA-256 {actual}; expected {expected}. Delete it and run again."
        raise UserError(message, value=actual, allowed=(expected,), path=path)
    _unpack(path, folder)
    return folder


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


def _unpack(path: Path, folder: Path) -> None:
    """Unpack an archive into `folder`, which appears only when it is complete, and remove the archive."""
    with atomic_dir(folder.with_name(f".{folder.name}.unpacking"), folder) as scratch:
        _extract_files(path, scratch)
        if not any(scratch.glob("*_partition.json")):
            raise UserError(f"{path} contains no GEO-Bench partition file. Delete it and run again.", path=path)
    path.unlink()


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
                    message = f"{path} contains two files named {name}. Delete it and run again."
                    raise UserError(message, value=name, path=path)
                with archive.open(member) as source, open(folder / name, "wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
    # zipfile has no common error class: wrong or missing bytes raise the first three, passwords and unknown
    # compression methods raise RuntimeError.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        message = f"{path} is not a readable zip archive ({error}). Delete it and run again."
        raise UserError(message, path=path) from None
