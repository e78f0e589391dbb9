"""extract: one frozen backbone sees every image of a dataset once."""

from functools import partial

import zarr

from cache.write import Writer, write_left_out
from pipeline import images, params
from pipeline.backbones import family, spec
from pipeline.bands import left_out
from stages.cli import FEATURES, IMAGES, MANIFESTS, SCRATCH, WEIGHTS, read_json, run, write_json


def extract(dataset: str, backbone: str) -> None:
    """Write data/features/<dataset>/<backbone>.zarr and its manifest."""
    described = params.load()
    described.dataset(dataset)
    chosen = described.backbone(backbone)
    declared = spec(chosen.family, chosen.variant)
    pictures = images.open_images(IMAGES / f"{dataset}.zarr")
    available = pictures.band.values.tolist()
    final, manifest = FEATURES / dataset / f"{backbone}.zarr", MANIFESTS / dataset / f"{backbone}.json"

    if reason := left_out(backbone, declared.bands, available):
        print(f"left out: {reason}")
        write_left_out(final, SCRATCH / f"left-out-{dataset}-{backbone}", reason)
        write_json(manifest, {"backbone": backbone, "left_out": reason})
        return

    # torch is slow to import, and a left-out cell needs none.
    from pipeline import extract as engine
    from pipeline.compute import device

    where = device(described.compute.device)
    weights = read_json(WEIGHTS / backbone / "source.json")
    network = family(chosen.family).build(chosen.variant, chosen.weights, WEIGHTS / backbone, chosen.seed)
    encoder = engine.Encoder(declared, network, available, pictures.attrs, chosen.input_size, where)
    said = engine.provenance(pictures, backbone, chosen, declared, weights, where)
    layout_of = partial(engine.make_layout, pictures, declared, extract=described.extract)
    scratch = engine.scratch_path(SCRATCH / "features" / dataset / backbone, said, described.extract)
    writer_of = partial(Writer, scratch, final=final, provenance=said)
    digest = engine.extract(pictures, encoder, layout_of, writer_of, described.extract.batch).finish()
    arrays = {f"{name}/{key}": list(array.shape) for name, group in zarr.open_group(final, mode="r").groups()
              for key, array in group.arrays()}  # fmt: skip
    write_json(manifest, {**said, "content_sha256": digest, "arrays": arrays, "left_out": None})


if __name__ == "__main__":
    run(extract, "dataset", "backbone")
