"""Where a set's files are: a folder that is there already, or the hub, from which one is filled once."""

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
from pipeline.data.sources.geobench.spec import GeoBenchSet
from pipeline.errors import UserError

# Files that are looked into for what all have in common, where the first are damaged.
_FEW = 100
REPO = "recursix/geo-bench-1.0"
# The revision and the SHA-256 of the classification sets are those that torchgeo-bench pins.
REVISION = "1e5754337032f097396db62cc15a5ff88f4618e8"
SHA256 = {
    "m-bigearthnet": "a72d3b7a60ec8fec67b5c4143d18ad7e10858d9633621b1f5db82e955d77f658",
    "m-brick-kiln": "53cacc65013b74c6fb9c447486830111ed4a2a83dbb7c27c579fe417b309e265",
    "m-eurosat": "ea1d66258e7a789b24e9f7cfdf7498f3c12129f7725e4710a73547db72329804",
    "m-forestnet": "7ae883180a5e64b0e30849419fc04f13cbef840f5dcc7dbddf63ac02027e7994",
    "m-pv4ger": "b7f2ebb77e543b3bb7c38f498180976b64d72d541ec712c853e39e5d33e01dca",
    "m-so2sat": "ec4d7cefeea4a326afe3c0f10333a565377d9b0004bcb780949d384e7eaf0704",
}


def describe_files(declared: GeoBenchSet, partition: str, root: Path) -> dict:
    """What is to be remembered of a set: where it is, and a digest of its files' names and sizes and of its lists.

    Raises:
        UserError: it is not in `root`, and no hub is in reach.
    """
    folder = local_folder(declared, root) or download(declared, root)
    listing, count, total = hashlib.sha256(), 0, 0
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            if entry.name.endswith(".hdf5"):
                size = entry.stat().st_size
                count, total = count + 1, total + size
                listing.update(f"{entry.name} {size}\n".encode())
            elif entry.name.endswith(".json"):
                listing.update(f"{entry.name} {file_sha256(Path(entry))}\n".encode())
    return {
        "source": f"GEO-Bench 1.0, {declared.name} ({REPO})",
        "licence": declared.licence,
        "folder": str(folder),
        "partition": partition,
        "files": count,
        "bytes": total,
        "listing_sha256": listing.hexdigest(),
    }


def local_folder(declared: GeoBenchSet, root: Path) -> Path | None:
    """The set's folder in `root`, as GEO-Bench lays it out or without the folder between."""
    places = [place / name for place in (root / declared.archive_folder, root) for name in declared.folder_names]
    return next((place for place in places if any(place.glob("*_partition.json"))), None)


def existing_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The samples' files that are there; the first few, since one that can be read is enough.

    Raises:
        UserError: none is.
    """
    there = (path for name in names if (path := folder / f"{name}.hdf5").exists())
    if not (found := list(itertools.islice(there, _FEW))):
        raise UserError(f"{folder} has none of the files that its partition lists.")
    return found


def download(declared: GeoBenchSet, root: Path) -> Path:
    """Fetch a set's archive from the hub into `root`, going on where an earlier attempt ended, and unpack it there.

    Raises:
        UserError: no hub in reach, other bytes than the pinned, or a disk that cannot hold it.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, hf_hub_download

    names = [f"{declared.archive_folder}/{name}.zip" for name in declared.folder_names]
    try:
        offered = HfApi().get_paths_info(REPO, names, repo_type="dataset", revision=REVISION)
        if not offered:
            raise FileNotFoundError(f"{REPO} has none of {', '.join(names)}")
        archive = offered[0]
        _room(root, archive.size)
        path = Path(hf_hub_download(REPO, archive.path, repo_type="dataset", revision=REVISION, local_dir=root))
    except UserError:
        raise
    except Exception as error:  # the hub's client raises its own, requests' and the system's
        reason = (str(error).splitlines() or ["no message"])[0][:150]
        place = root / declared.archive_folder / declared.folder_names[0]
        raise UserError(
            f"{declared.name} is not in {root}, and could not be downloaded from {REPO} ({type(error).__name__}: "
            f"{reason}). Put its folder at {place}, or name yours as geobench_dir in params.yaml, and run again; "
            "what was downloaded so far is kept."
        ) from None
    wanted = SHA256.get(declared.name) or (archive.lfs.sha256 if archive.lfs else None)
    if wanted and (found := file_sha256(path)) != wanted:
        raise UserError(f"{path} has SHA-256 {found}, but {wanted} is known for it. Delete it and run again.")
    return _unpack(path, root / declared.archive_folder / declared.folder_names[0])


def _room(root: Path, size: int) -> None:
    """Refuse a disk that cannot hold an archive and what is in it, which is up to twice as large."""
    place = next(one for one in (root, *root.absolute().parents) if one.exists())
    free = shutil.disk_usage(place).free
    if free < 3 * size:
        raise UserError(
            f"The archive has {size / 1e9:.1f} GB and needs about {3 * size / 1e9:.1f} GB while it is unpacked; "
            f"{free / 1e9:.1f} GB are free at {place}. Free some space, or name another geobench_dir in params.yaml."
        )


def _unpack(path: Path, folder: Path) -> Path:
    """Unpack an archive flat into `folder`, which appears whole, and remove the archive.

    Raises:
        UserError: it is damaged, has two files of a name, or is of something else.
    """
    scratch = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _flat(path, scratch)
        if not any(scratch.glob("*_partition.json")):
            raise UserError(f"{path} has no partition of GEO-Bench's within. Delete it and run again.")
        publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    path.unlink()
    return folder


def _flat(path: Path, folder: Path) -> None:
    """The files of an archive, all in one folder."""
    unpacked = {}
    try:
        with zipfile.ZipFile(path) as packed:
            for member in packed.infolist():
                # Only the last part of a name is used: a member cannot climb out of the folder.
                name = Path(member.filename).name
                if member.is_dir() or Path(name).suffix not in (".hdf5", ".json"):
                    continue
                if unpacked.setdefault(name, (member.CRC, member.file_size)) != (member.CRC, member.file_size):
                    raise UserError(f"{path} has two files named {name}. Delete it and run again.")
                with packed.open(member) as source, open(folder / name, "wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
    # zipfile has no error in common for what it cannot read: bytes that do not fit or end too soon are the first
    # three; a password, or a compression that it does not know, are RuntimeErrors.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(f"{path} is no readable archive ({error}). Delete it and run again.") from None
