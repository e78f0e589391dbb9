"""fetch: pinned files, checked by SHA-256: a dataset's raw files or a backbone's weights."""

import hashlib
import inspect
from pathlib import Path

from cache.durable import building
from pipeline import archives, hub, params
from pipeline.archives import Archive
from pipeline.backbones import family, spec
from pipeline.datasets import source
from stages.cli import ARCHIVES, RAW, SCRATCH, WEIGHTS, run, write_json


def fetch(dataset: str | None, backbone: str | None) -> None:
    """Fetch a dataset's raw files, or a backbone's weights."""
    described = params.load()
    if dataset:
        chosen = described.dataset(dataset)
        module, target = source(chosen.source), RAW / dataset
        origin, name, weights = getattr(module, "ARCHIVE", None), None, None
    else:
        chosen = described.backbone(backbone)
        module, target, weights = family(chosen.family), WEIGHTS / backbone, chosen.weights
        declared = spec(chosen)
        origin, name = (declared.weights if weights == "pretrained" else None), declared.weights_file
    # The file's own code decides what is made of the raw bytes, so its digest travels with them: later
    # stages depend on this folder, and an edited family or source touches its own stores alone.
    record = {"code_sha256": _code(module)}
    if dataset and not origin:  # raw files that stay where they are
        record |= module.fetch(chosen, described)
    if weights:
        record["weights"] = weights if weights != "random" else f"random, seed {chosen.seed}"
    with building(SCRATCH / f"fetch-{target.parent.name}-{target.name}", target) as folder:
        if isinstance(origin, Archive):
            archives.unpack(origin, archives.fetch(origin, ARCHIVES), folder)
            record |= {"source": origin.source, "licence": origin.licence, "archive_sha256": origin.sha256}
        elif origin:
            hub.fetch(origin, Path(described.weights_dir).expanduser(), folder)
            record |= {"source": origin.repo, "revision": origin.revision, "licence": origin.licence}
        if origin and name:
            record["file_sha256"] = archives.digest(folder / name)
        write_json(folder / "source.json", record)


def _code(module) -> str:
    """Digest of a module's file, or of all files of one that is a folder."""
    path = Path(inspect.getfile(module))
    files = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    digests = [archives.digest(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


if __name__ == "__main__":
    run(fetch, "dataset", "backbone", either=True)
