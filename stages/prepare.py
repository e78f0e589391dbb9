"""prepare: a dataset's raw files become one images store."""

from pipeline import images, params
from pipeline.datasets import source
from stages.cli import IMAGES, RAW, SCRATCH, run


def prepare(dataset: str) -> None:
    """Write data/images/<dataset>.zarr."""
    described = params.load().dataset(dataset)
    prepared = source(described.source).prepare(RAW / dataset, described)
    images.write(prepared, SCRATCH / f"images-{dataset}", IMAGES / f"{dataset}.zarr")
    counts = {split: list(prepared.split).count(split) for split in ("train", "val", "test")}
    print(f"{dataset}: {counts} of {prepared.image.shape[1:]}, classes {', '.join(prepared.classes)}")


if __name__ == "__main__":
    run(prepare, "dataset")
