"""prepare: convert a dataset's raw files to one images store."""

from dataclasses import replace

from pipeline import config
from pipeline.data import image_writer
from pipeline.data.sources import get_source, validate
from pipeline.errors import UserError
from stages.cli import IMAGES, RAW, SCRATCH, run


def prepare(dataset: str, skip_bad: bool) -> None:
    """Write data/images/<dataset>.zarr."""
    config_block = config.load().dataset(dataset)
    if skip_bad:
        if get_source(config_block.source).Options is None:
            raise UserError(
                f"Source '{config_block.source}' reads all files at once; it cannot skip samples. Omit --skip-bad.",
                key="skip_bad",
            )
        config_block = replace(config_block, options={**config_block.options, "skip_bad": True})
    validate(dataset, config_block)
    image_dataset = get_source(config_block.source).prepare(RAW / dataset, config_block)
    skip = bool(config_block.options.get("skip_bad"))
    summary = image_writer.write(
        image_dataset, SCRATCH / f"images-{dataset}", IMAGES / f"{dataset}.zarr", skip_bad=skip
    )
    for note in image_dataset.notes:
        print(f"{dataset}: {note}")
    for name, reason in summary.skipped.items():
        print(f"skipped {name}: {reason}")
    shape = getattr(image_dataset, "shape", None) or image_dataset.image.shape[1:]
    print(f"{dataset}: {summary.counts} of {shape}, classes {', '.join(image_dataset.classes)}")


if __name__ == "__main__":
    run(prepare, "dataset", flags={"skip_bad": "skip samples that cannot be read, and list them"})
