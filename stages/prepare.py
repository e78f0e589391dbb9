"""prepare: a dataset's raw files become one images store."""

from dataclasses import replace

from pipeline import config
from pipeline.data import image_writer
from pipeline.data.sources import get_source, validate
from pipeline.errors import UserError
from stages.cli import IMAGES, RAW, SCRATCH, run


def prepare(dataset: str, skip_bad: bool) -> None:
    """Write data/images/<dataset>.zarr."""
    described = config.load().dataset(dataset)
    if skip_bad:
        if not hasattr(get_source(described.source), "Options"):
            raise UserError(f"Source '{described.source}' reads its files at once; it has no samples to skip.")
        described = replace(described, options={**described.options, "skip_bad": True})
    validate(dataset, described)
    prepared = get_source(described.source).prepare(RAW / dataset, described)
    skip = bool(described.options.get("skip_bad"))
    written = image_writer.write(prepared, SCRATCH / f"images-{dataset}", IMAGES / f"{dataset}.zarr", skip_bad=skip)
    for note in prepared.notes:
        print(f"{dataset}: {note}")
    for name, reason in written.skipped.items():
        print(f"left out {name}: {reason}")
    shape = getattr(prepared, "shape", None) or prepared.image.shape[1:]
    print(f"{dataset}: {written.counts} of {shape}, classes {', '.join(prepared.classes)}")


if __name__ == "__main__":
    run(prepare, "dataset", flags={"skip_bad": "leave out samples that cannot be read, and list them"})
