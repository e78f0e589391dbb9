"""plan: estimate the size and time of every stage of the grid before any of it runs."""

import shutil
from pathlib import Path

from pipeline import config
from pipeline.data.image_store import image_bands, open_images
from pipeline.data.sources import DatasetSize, get_source
from stages import cli


def plan() -> None:
    """Print a table of estimates. Networks with random weights are timed on this machine."""
    params = config.load()
    print(f"Planning {len(params.grid.datasets)} datasets, {len(params.grid.backbones)} backbones and "
          f"{len(params.grid.models)} models. Networks are timed one by one.", flush=True)  # fmt: skip
    sizes, unknown, download_bytes = {}, [], 0.0
    for name in params.grid.datasets:
        section = params.dataset(name)
        if cli.images_path(name).exists():
            images = open_images(cli.images_path(name))
            sizes[name] = DatasetSize(
                images.sizes["sample"], tuple(image_bands(images)), images.attrs["task"],
                len(images.attrs["classes"]), images.image.shape[-2:], bytes_per_image=0,
            )  # fmt: skip
        elif estimate := get_source(section.source).estimate_size(section, params):
            sizes[name], to_download = estimate
            download_bytes += to_download
            download = f"about {to_download / 1e9:.2f} GB to download" if to_download else "present"
            print(f"fetch  {name}: {download}", flush=True)
        else:
            unknown.append(name)

    # torch takes 3 s to import; sizes of downloads are printed before that
    from pipeline import plan as planning
    from pipeline.device import resolve_device

    device = resolve_device(params.compute.device)
    estimates = planning.plan(params, sizes, device)
    print(planning.format_table(estimates))
    print(f"\n{planning.METHOD}")
    required = sum(estimate.gigabytes for estimate in estimates) + download_bytes / 1e9
    free = shutil.disk_usage(Path()).free / 1e9
    print(f"\nDisk: {required:.1f} GB are needed, {free:.1f} GB are free. Times are for this machine's {device}.")
    if unknown:
        print(f"Datasets without an estimate, because they are not prepared yet: {', '.join(unknown)}.")
    if required > free:
        print("The disk is too small: free some space, choose an extract.codec or use fewer datasets.")


if __name__ == "__main__":
    cli.run(plan)
