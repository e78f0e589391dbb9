"""fetch: pinned archives, checked by SHA-256 and unpacked: a dataset's raw files or a backbone's weights."""

import inspect
from pathlib import Path

from cache.durable import building
from pipeline import archives, params
from pipeline.backbones import family, spec
from pipeline.datasets import source
from pipeline.errors import UserError
from stages.cli import ARCHIVES, RAW, SCRATCH, WEIGHTS, run, write_json


def fetch(dataset: str | None, backbone: str | None) -> None:
    """Fetch a dataset's raw files, or a backbone's weights."""
    described = params.load()
    if dataset:
        module, target = source(described.dataset(dataset).source), RAW / dataset
        archive, name, weights = module.ARCHIVE, None, None
    else:
        chosen = described.backbone(backbone)
        module, target = family(chosen.family), WEIGHTS / backbone
        declared = spec(chosen.family, chosen.variant)
        archive = declared.archive if chosen.weights == "pretrained" else None
        name, weights = declared.weights_file, chosen.weights
        if weights == "pretrained" and archive is None:
            raise UserError(f"Backbone '{backbone}' has no trained weights. Set its weights to 'none'.")
    # The file's own code decides what is made of the raw bytes, so its digest travels with them: later
    # stages depend on this folder, and an edited family or source touches its own stores alone.
    record = {"code_sha256": archives.digest(Path(inspect.getfile(module)))}
    if weights:
        record["weights"] = weights if weights != "random" else f"random, seed {chosen.seed}"
    if archive:
        record |= {"source": archive.source, "licence": archive.licence, "archive_sha256": archive.sha256}
    with building(SCRATCH / f"fetch-{target.parent.name}-{target.name}", target) as folder:
        if archive:
            archives.unpack(archive, archives.fetch(archive, ARCHIVES), folder)
            if name:
                record["file_sha256"] = archives.digest(folder / name)
        write_json(folder / "source.json", record)


if __name__ == "__main__":
    run(fetch, "dataset", "backbone", either=True)
