"""extract: one frozen backbone sees every image of a dataset once."""

from pathlib import Path

import zarr

from cache.write import write_left_out
from pipeline import params
from pipeline.backbones import spec
from pipeline.bands import Unseen
from pipeline.encoding import inputs
from pipeline.imagery import images
from stages.cli import FEATURES, IMAGES, MANIFESTS, SCRATCH, WEIGHTS, read_json, run, write_json


def extract(dataset: str, backbone: str) -> None:
    """Write data/features/<dataset>/<backbone>.zarr and its manifest."""
    described = params.load()
    described.dataset(dataset)
    chosen = described.backbone(backbone)
    pictures = images.open_images(IMAGES / f"{dataset}.zarr")
    final, manifest = FEATURES / dataset / f"{backbone}.zarr", MANIFESTS / dataset / f"{backbone}.json"
    try:
        inputs.describe(pictures, backbone, chosen, spec(chosen))
    except Unseen as reason:
        print(f"left out: {reason}")
        write_left_out(final, SCRATCH / f"left-out-{dataset}-{backbone}", str(reason))
        write_json(manifest, {"backbone": backbone, "left_out": str(reason)})
        return

    read_json(WEIGHTS / backbone / "source.json")  # or say which stage writes it
    # torch is slow to import, and a left-out cell needs none.
    from pipeline.extraction import workers

    task = workers.Extraction(
        backbone, chosen, described.extract, described.compute.device,
        images=(IMAGES / f"{dataset}.zarr").resolve(), weights=(WEIGHTS / backbone).resolve(),
        scratch=(SCRATCH / "features" / dataset / backbone).resolve(), final=Path.cwd() / final,
    )  # fmt: skip
    said = workers.run(task, described.compute)
    arrays = {f"{name}/{key}": list(array.shape) for name, group in zarr.open_group(final, mode="r").groups()
              for key, array in group.arrays()}  # fmt: skip
    write_json(manifest, {**said, "arrays": arrays, "left_out": None})


if __name__ == "__main__":
    run(extract, "dataset", "backbone")
