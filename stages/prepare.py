"""prepare: convert a dataset's raw files to one images store."""

from dataclasses import replace

from pipeline import config
from pipeline.data import image_writer
from pipeline.data.sources import get_source, validate
from pipeline.errors import UserError
from stages import cli


def prepare(dataset: str, skip_bad: bool) -> None:
    """Write data/images/<dataset>.zarr; with --skip-bad, skip samples that cannot be read, and list them."""
    section = config.load().dataset(dataset)
    source = get_source(section.source)
    if skip_bad:
        if source.Options is None:
            raise UserError(
                f"Source '{section.source}' reads all files at once; it cannot skip samples. Omit --skip-bad.",
                key="skip_bad",
            )
        section = replace(section, options={**section.options, "skip_bad": True})
    validate(dataset, section)
    images, skip = source.prepare(cli.RAW / dataset, section), bool(section.options.get("skip_bad"))
    scratch = cli.SCRATCH / f"images-{dataset}"
    summary = image_writer.write(images, scratch, cli.images_path(dataset), skip_bad=skip)
    for note in images.notes:
        print(f"{dataset}: {note}")
    for name, reason in summary.skipped.items():
        print(f"skipped {name}: {reason}")
    shape = getattr(images, "shape", None) or images.image.shape[1:]
    print(f"{dataset}: {summary.counts} of {shape}, classes {', '.join(images.classes)}")


if __name__ == "__main__":
    cli.run(prepare)
