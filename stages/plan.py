"""plan: what params.yaml's grid will take: sizes, disk and expected time of every stage, before any of it runs."""

import shutil
from pathlib import Path

from pipeline import config
from pipeline.data import image_store
from pipeline.data.sources import get_source
from stages.cli import IMAGES, run


def plan() -> None:
    """Print the plan of the grid; networks are built with random weights and timed on this machine."""
    described = config.load()
    sets, unknown, fetched = {}, [], 0.0
    for name in described.grid.datasets:
        block = described.dataset(name)
        module, store = get_source(block.source), IMAGES / f"{name}.zarr"
        if store.exists():
            sets[name] = _stored(store)
        elif hasattr(module, "expect"):
            sets[name], there = module.expect(block, described)
            fetched += there
            print(f"fetch  {name}: " + (f"about {there / 1e9:.2f} GB to download" if there else "is there"))
        else:
            unknown.append(name)

    from pipeline import plan as planning
    from pipeline.device import resolve_device

    where = resolve_device(described.compute.device)
    lines = planning.plan(described, sets, where)
    print(planning.format_table(lines))
    needs = sum(line.gigabytes for line in lines) + fetched / 1e9
    free = shutil.disk_usage(Path()).free / 1e9
    print(f"\nDisk: {needs:.1f} GB are needed, {free:.1f} GB are free. Times are of this machine's {where}, roughly.")
    if unknown:
        print(f"Not known before they are prepared: {', '.join(unknown)}.")
    if needs > free:
        print("The disk cannot hold it: free some space, or choose an extract.codec or fewer datasets.")


def _stored(store: Path):
    from pipeline.backbones.preprocessing import image_bands
    from pipeline.plan import DatasetSize

    opened = image_store.open_images(store)
    return DatasetSize(
        opened.sizes["sample"], tuple(image_bands(opened)), opened.attrs["task"], len(opened.attrs["classes"]), 0
    )


if __name__ == "__main__":
    run(plan)
