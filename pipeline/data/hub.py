"""Weights from a model hub at a pinned revision, or from a local folder that holds the same files."""

import os
import shutil
from pathlib import Path

from pipeline.config import HubFile
from pipeline.data.download import file_sha256
from pipeline.errors import UserError


def fetch(wanted: HubFile, weights_dir: Path, folder: Path) -> Path:
    """The file in `folder`, copied from `weights_dir` if it is there and downloaded if not, its digest checked.

    `weights_dir` may hold it as <file> or as <repository's name>/<file>.

    Raises:
        UserError: no such file and no hub in reach, a revision that is not pinned, or other bytes than the pinned.
    """
    places = [weights_dir / wanted.repo.rpartition("/")[2] / wanted.file, weights_dir / Path(wanted.file).name]
    local = next((place for place in places if place.is_file()), None)
    path = folder / Path(wanted.file).name
    shutil.copyfile(local or _download(wanted, places[0]), path)
    if wanted.sha256 and (found := file_sha256(path)) != wanted.sha256:
        path.unlink()
        raise UserError(
            f"{local or wanted.address} has SHA-256 {found}, but {wanted.sha256} is pinned: it is damaged or not the "
            "same file, and is not used. Delete it and fetch it again."
        )
    return path


def _download(wanted: HubFile, place: Path) -> str:
    if len(wanted.revision) != 40:
        raise UserError(
            f"The revision '{wanted.revision}' of {wanted.repo} is not a commit of 40 hexadecimal digits, and a "
            f"branch may change. Name the commit in params.yaml, or put the file at {place}."
        )
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision)
    except Exception as error:  # the hub's client raises its own, requests' and the system's
        reason = (str(error).splitlines() or ["no message"])[0][:150]
        size = f", {wanted.size / 1e9:.2f} GB" if wanted.size else ""
        raise UserError(
            f"{wanted.file} could not be downloaded ({type(error).__name__}: {reason}). "
            f"Download {wanted.address}{size}, put it at {place} and run again; or set weights: random, which every "
            "report will say."
        ) from None
