"""extract: encode every image of a dataset by one frozen backbone."""

from pathlib import Path

import zarr

from cache.writer import write_skipped
from pipeline import config
from pipeline.backbones import get_spec
from pipeline.backbones.base import MissingBandsError, match_images
from pipeline.data import image_store
from stages.cli import FEATURES, IMAGES, MANIFESTS, SCRATCH, WEIGHTS, read_json, run, write_json


def extract(dataset: str, backbone: str) -> None:
    """Write data/features/<dataset>/<backbone>.zarr and its manifest.

    Where the images lack bands that the backbone needs, both files only state the reason.
    """
    params = config.load()
    params.dataset(dataset)
    backbone_config = params.backbone(backbone)
    images = image_store.open_images(IMAGES / f"{dataset}.zarr")
    final, manifest = FEATURES / dataset / f"{backbone}.zarr", MANIFESTS / dataset / f"{backbone}.json"
    try:
        match_images(images, backbone, backbone_config, get_spec(backbone_config))
    except MissingBandsError as reason:
        print(f"skipped: {reason}")
        write_skipped(final, SCRATCH / f"skipped-{dataset}-{backbone}", str(reason))
        write_json(manifest, {"backbone": backbone, "skipped": str(reason)})
        return

    read_json(WEIGHTS / backbone / "source.json")  # fails before torch is imported if fetch has not run
    # torch takes 3 s to import; a skipped dataset needs none of it
    from pipeline.extraction import launch

    job = launch.ExtractionJob(
        backbone, backbone_config, params.extract, params.compute.device,
        images_path=(IMAGES / f"{dataset}.zarr").resolve(), weights_dir=(WEIGHTS / backbone).resolve(),
        scratch=(SCRATCH / "features" / dataset / backbone).resolve(), final=Path.cwd() / final,
    )  # fmt: skip
    manifest_entries = launch.launch(job, params.compute)
    arrays = {f"{name}/{key}": list(array.shape) for name, group in zarr.open_group(final, mode="r").groups()
              for key, array in group.arrays()}  # fmt: skip
    write_json(manifest, {**manifest_entries, "arrays": arrays, "skipped": None})


if __name__ == "__main__":
    run(extract, "dataset", "backbone")
