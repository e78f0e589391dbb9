"""extract: one frozen backbone sees every image of a dataset once."""

from pathlib import Path

import zarr

from cache.writer import write_skipped
from pipeline import config
from pipeline.backbones import get_spec, preprocessing
from pipeline.bands import MissingBandsError
from pipeline.data import image_store
from stages.cli import FEATURES, IMAGES, MANIFESTS, SCRATCH, WEIGHTS, read_json, run, write_json


def extract(dataset: str, backbone: str) -> None:
    """Write data/features/<dataset>/<backbone>.zarr and its manifest."""
    described = config.load()
    described.dataset(dataset)
    chosen = described.backbone(backbone)
    pictures = image_store.open_images(IMAGES / f"{dataset}.zarr")
    final, manifest = FEATURES / dataset / f"{backbone}.zarr", MANIFESTS / dataset / f"{backbone}.json"
    try:
        preprocessing.make_preprocessor(pictures, backbone, chosen, get_spec(chosen))
    except MissingBandsError as reason:
        print(f"left out: {reason}")
        write_skipped(final, SCRATCH / f"left-out-{dataset}-{backbone}", str(reason))
        write_json(manifest, {"backbone": backbone, "skipped": str(reason)})
        return

    read_json(WEIGHTS / backbone / "source.json")  # or say which stage writes it
    # torch is slow to import, and a left-out cell needs none.
    from pipeline.extraction import launch

    task = launch.ExtractionJob(
        backbone, chosen, described.extract, described.compute.device,
        images=(IMAGES / f"{dataset}.zarr").resolve(), weights=(WEIGHTS / backbone).resolve(),
        scratch=(SCRATCH / "features" / dataset / backbone).resolve(), final=Path.cwd() / final,
    )  # fmt: skip
    said = launch.launch(task, described.compute)
    arrays = {f"{name}/{key}": list(array.shape) for name, group in zarr.open_group(final, mode="r").groups()
              for key, array in group.arrays()}  # fmt: skip
    write_json(manifest, {**said, "arrays": arrays, "skipped": None})


if __name__ == "__main__":
    run(extract, "dataset", "backbone")
