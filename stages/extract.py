"""extract: encode every image of a dataset by one frozen backbone."""

from pathlib import Path

import zarr

from cache.writer import write_skipped
from pipeline.backbones import get_spec
from pipeline.backbones.base import MissingBandsError, match_images
from pipeline.data import image_store
from stages import cli


def extract(dataset: str, backbone: str) -> None:
    """Write data/features/<dataset>/<backbone>.zarr and its manifest.

    Where the images lack bands that the backbone needs, both files only state the reason.
    """
    params = cli.load_params(dataset)
    backbone_config, images_path = params.backbone(backbone), cli.images_path(dataset)
    images = image_store.open_images(images_path)
    final, manifest = cli.FEATURES / dataset / f"{backbone}.zarr", cli.MANIFESTS / dataset / f"{backbone}.json"
    try:
        match_images(images, backbone, backbone_config, get_spec(backbone_config))
    except MissingBandsError as reason:
        print(f"skipped: {reason}")
        write_skipped(final, cli.SCRATCH / f"skipped-{dataset}-{backbone}", str(reason))
        cli.write_json(manifest, {"backbone": backbone, "skipped": str(reason)})
        return

    cli.read_json(cli.WEIGHTS / backbone / "source.json")  # fails before torch is imported if fetch has not run
    # torch takes 3 s to import; a skipped dataset needs none of it
    from pipeline.extraction import launch

    job = launch.ExtractionJob(
        backbone, backbone_config, params.extract, params.compute.device,
        images_path=images_path.resolve(), weights_dir=(cli.WEIGHTS / backbone).resolve(),
        scratch=(cli.SCRATCH / "features" / dataset / backbone).resolve(), final=Path.cwd() / final,
    )  # fmt: skip
    entries = launch.launch(job, params.compute)
    groups = zarr.open_group(final, mode="r").groups()
    arrays = {f"{name}/{key}": list(array.shape) for name, group in groups for key, array in group.arrays()}
    cli.write_json(manifest, {**entries, "arrays": arrays, "skipped": None})


if __name__ == "__main__":
    cli.run(extract)
