"""Write small copies of the twelve GEO-Bench 1.0 sets from real pixels, in the format of the release.

Folders, keys, sizes, dtypes, sample names and pickled attributes follow the converters in GEO-Bench's repository.
Pixels are cropped from the sample scenes and scaled as in the set; labels come from the land-use polygons. The faults
of the release are included: wrong band names of m-eurosat and m-brick-kiln, swapped latitude and longitude,
placeholder dates, and a missing label_map.json.
"""

import collections
import contextlib
import datetime
import json
import pickle
import struct
import sys
import types
from pathlib import Path

import h5py
import numpy as np
import rasterio
from rasterio.crs import CRS

S2 = ("01 - Coastal aerosol", "02 - Blue", "03 - Green", "04 - Red", "05 - Vegetation Red Edge",
      "06 - Vegetation Red Edge", "07 - Vegetation Red Edge", "08 - NIR", "08A - Vegetation Red Edge",
      "09 - Water vapour", "10 - SWIR - Cirrus", "11 - SWIR", "12 - SWIR")  # fmt: skip
S1 = ("01 - VH.Real", "02 - VH.Imaginary", "03 - VV.Real", "04 - VV.Imaginary", "05 - VH.LEE Filtered",
      "06 - VV.LEE Filtered", "07 - VH.LEE Filtered.Real", "08 - VV.LEE Filtered.Imaginary")  # fmt: skip
L8 = ("04 - Red", "03 - Green", "02 - Blue", "05 - NIR", "06 - SWIR1", "07 - SWIR2")
RGB = ("Red", "Green", "Blue")
NO_CIRRUS = tuple(key for key in S2 if "Cirrus" not in key)
# Index of the scene's band (B01 ... B08, B8A, B09 ... B12) under each key of S2.
EUROSAT = (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 8)
BRICK = [0, 1, 2, 3, 4, 6, 8, 7, 11, 12]  # then red, green and blue in 8 bits
SEGMENTATION = ("m-pv4ger-seg", "m-chesapeake-landcover", "m-cashew-plantation", "m-SA-crop-type", "m-nz-cattle",
                "m-NeonTree")  # fmt: skip
GEOREFERENCED = ("m-brick-kiln", "m-pv4ger", "m-pv4ger-seg", "m-nz-cattle", "m-forestnet", "m-SA-crop-type")
CLASSIFICATION = ("m-bigearthnet", "m-so2sat", "m-brick-kiln", "m-forestnet", "m-eurosat", "m-pv4ger")
SIZE = {"m-bigearthnet": 120, "m-so2sat": 32, "m-brick-kiln": 64, "m-forestnet": 332, "m-eurosat": 64,
        "m-pv4ger": 320, "m-pv4ger-seg": 320, "m-chesapeake-landcover": 256, "m-cashew-plantation": 256,
        "m-SA-crop-type": 256, "m-nz-cattle": 500, "m-NeonTree": 400}  # fmt: skip
CLASSES = {"m-bigearthnet": 43, "m-so2sat": 17, "m-brick-kiln": 2, "m-forestnet": 12, "m-eurosat": 10, "m-pv4ger": 2,
           "m-pv4ger-seg": 2, "m-chesapeake-landcover": 7, "m-cashew-plantation": 7, "m-SA-crop-type": 10,
           "m-nz-cattle": 2, "m-NeonTree": 2}  # fmt: skip
# Folder names in terratorch and in the archives.
FOLDER = {"m-chesapeake-landcover": "m-chesapeake", "m-cashew-plantation": "m-cashew-plant"}
FRACTIONS = (0.01, 0.02, 0.05, 0.10, 0.20, 0.50, 1.00)


def write(name: str, root: Path, scene: np.ndarray, photo: np.ndarray, mask: np.ndarray, counts=(6, 4, 4)) -> Path:
    """Write one set below `root` as if unpacked from the hub, and return its folder.

    `scene` is Sentinel-2 (13, y, x) in DN, from B01 to B08, B8A, B09 to B12; `photo` is aerial RGB (3, y, x), 8-bit.
    `mask` is the land-use class of every pixel of `scene`, 255 for none; `counts` are of train, valid and test.
    """
    parent = "segmentation_v1.0" if name in SEGMENTATION else "classification_v1.0"
    folder = root / parent / FOLDER.get(name, name)
    folder.mkdir(parents=True)
    generator = np.random.default_rng(sum(name.encode()))
    partition, labels = {"train": [], "valid": [], "test": []}, {}
    for number, split in enumerate(np.repeat(list(partition), counts).tolist()):
        sample = _name(name, number)
        bands, infos, label = _sample(name, number, scene, photo, mask, generator)
        attributes = ({} if label is None else {"label": label}) | infos | {"bands_order": list(bands)}
        with h5py.File(folder / f"{sample}.hdf5", "w") as file:
            for key, values in bands.items():
                file.create_dataset(name=key, data=values)
            file.attrs["pickle"] = str(dumps(attributes))
        partition[split].append(sample)
        labels[sample] = label
    _write_lists(name, folder, partition, labels)
    _write_band_stats(folder)
    return folder


def dumps(attributes: dict) -> bytes:
    """Pickle as geobench did: protocol 4, its classes in geobench.dataset, numpy's in numpy.core."""
    with classes() as module:
        pickled = {}
        for key, value in attributes.items():
            if isinstance(value, dict) and "band_info" in value:
                class_name, band = value["band_info"]
                info = object.__new__(getattr(module, class_name))
                info.name, info.alt_names, info.spatial_resolution, info.wavelength = band, (), 10, 0.5
                value = {**value, "band_info": info}
            pickled[key] = value
        return _with_numpy_1_names(pickle.dumps(pickled, protocol=4))


def _with_numpy_1_names(data: bytes) -> bytes:
    """Replace numpy 2's module name numpy._core by numpy 1's, and adapt the pickle's frame length."""
    old, new = b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
    changed = data.replace(old, new)
    if changed != data:
        assert data[2:3] == b"\x95"
        assert len(data) == 11 + struct.unpack("<Q", data[3:11])[0], "one frame"
        changed = changed[:3] + struct.pack("<Q", len(changed) - 11) + changed[11:]
    return changed


@contextlib.contextmanager
def classes():
    """Provide the module geobench.dataset while pickles are written; the reader must not need it."""
    package, module = types.ModuleType("geobench"), types.ModuleType("geobench.dataset")
    for class_name in ("SpectralBand", "Sentinel1", "Sentinel2", "Landsat8", "CloudProbability", "ElevationBand",
                 "HyperSpectralBands", "SegmentationClasses"):  # fmt: skip
        setattr(module, class_name, type(class_name, (), {"__module__": "geobench.dataset"}))
    sys.modules |= {"geobench": package, "geobench.dataset": module}
    try:
        yield module
    finally:
        del sys.modules["geobench"], sys.modules["geobench.dataset"]


def _name(name: str, number: int) -> str:
    if name == "m-forestnet":
        return f"{-1.5 - number / 100:.4f}_{113.25 + number / 100:.4f}_{_date(name, number).replace('-', '_')}"
    if name in ("m-pv4ger", "m-pv4ger-seg"):
        lat, lon = f"{51.2 + number / 1000:.6f}", f"{6.8 + number / 1000:.6f}"
        return f"{lon},{lat}" if number % 3 == 1 else f"{lat},{lon}"
    if name == "m-nz-cattle":
        return f"{number:04d}_Waikato_[2018-19]_{175.3 + number / 1000:.6f},{-38.1 - number / 1000:.6f}_500"
    if name == "m-brick-kiln":
        return f"examples_{100 + number // 4}_{number}"
    names = {"m-cashew-plantation": f"sample_{number}", "m-NeonTree": f"2018_SJER_{number:03d}_image_00_00"}
    return names.get(name, f"id_{number:04d}")


def _date(name: str, number: int) -> str:
    if name == "m-forestnet":
        return f"{2013 + number % 4}-01-01" if number % 4 == 0 else f"{2013 + number % 4}-06-{number % 27 + 1:02d}"
    return {"m-nz-cattle": "2019-01-01", "m-cashew-plantation": f"2020-02-{number % 27 + 1:02d}"}.get(name, "")


def _sample(name, number, scene, photo, mask, generator):
    """Return the bands and mask by key, their pickled metadata by key, and the label attribute."""
    size, classes, date = SIZE[name], CLASSES[name], _date(name, number)
    rows, columns = (side - size + 1 for side in mask.shape)
    row, column = generator.integers(rows), generator.integers(columns)
    window = (slice(row, row + size), slice(column, column + size))
    optical = scene[:, *window]
    top, left = (generator.integers(photo.shape[1] - size + 1), generator.integers(photo.shape[2] - size + 1))
    aerial = photo[:, top : top + size, left : left + size]
    bands = _bands(name, optical, aerial, generator)
    if date and name != "m-forestnet":
        bands = {f"{key}_{date}": values for key, values in bands.items()}
    georeferenced = name in GEOREFERENCED
    transform = rasterio.Affine(1e-4, 0, 6.8, 0, -1e-4, 51.2) if georeferenced else None

    def info(key: str) -> dict:
        class_name = "Sentinel1" if key in S1 else "Sentinel2" if key in S2 else "SpectralBand"
        day = datetime.date.fromisoformat(date) if date else None
        return {
            "date": day, "date_id": day, "spatial_resolution": np.float64(10.0), "band_info": (class_name, key),
            "meta_info": {"location": "here"} if name == "m-nz-cattle" else None, "transform": transform,
            "crs": CRS.from_epsg(32634) if name == "m-SA-crop-type" else "EPSG:4326" if georeferenced else None,
        }  # fmt: skip

    land_use, infos = mask[window], {key: info(key) for key in bands}
    if name in SEGMENTATION:
        pixels = np.where(land_use == 255, 0, land_use + 1) % classes
        if name == "m-NeonTree":
            pixels = (aerial[1] > aerial[1].mean()).astype(np.uint8)
        dtype = {"m-chesapeake-landcover": np.int64, "m-cashew-plantation": np.int64, "m-SA-crop-type": np.int16}
        key = f"label_{date}" if name == "m-nz-cattle" else "label"
        infos[key] = {**info(next(iter(bands))), "band_info": ("SegmentationClasses", "label")}
        bands[key] = pixels.astype(dtype.get(name, np.uint8))
        return bands, infos, None
    if name == "m-bigearthnet":
        multi_hot = np.zeros(classes, np.int64)
        multi_hot[[5 * number % classes, *np.unique(land_use[land_use != 255])]] = 1
        return bands, infos, multi_hot
    return bands, infos, (number * 7) % classes


def _bands(name, scene, aerial, generator) -> dict[str, np.ndarray]:
    rgb = dict(zip(RGB, aerial, strict=True))
    if name in ("m-pv4ger", "m-pv4ger-seg", "m-nz-cattle"):
        return rgb
    if name == "m-chesapeake-landcover":
        channels = rgb | {"NearInfrared": 255 - rgb["Red"]}
        return {key: (values / 255).astype(np.float32) for key, values in channels.items()}
    if name == "m-NeonTree":
        height = generator.gamma(2, 3, (40, 40, 1)).astype(np.float32)
        cube = generator.integers(0, 5000, (40, 40, 369)).astype(np.int16)
        return rgb | {"Canopy Height Model": height, "Neon": cube}
    if name == "m-so2sat":
        radar = {key: generator.normal(0, 0.3, scene.shape[1:]).astype(np.float32) for key in S1}
        indices = [*range(1, 9), 11, 12]
        return radar | {S2[index]: (scene[index] / 10000).astype(np.float32) for index in indices}
    if name == "m-forestnet":
        bands = dict(zip(L8, (3, 2, 1, 8, 11, 12), strict=True))
        return {key: np.clip(scene[index] / 12, 0, 255).astype(np.uint8) for key, index in bands.items()}
    if name == "m-eurosat":
        return {key: scene[index].astype(np.int16) for key, index in zip(S2, EUROSAT, strict=True)}
    if name == "m-brick-kiln":
        true_colour = [np.clip(scene[index] / 3000 * 255, 0, 255) for index in (3, 2, 1)]
        return dict(zip(S2, [*scene[BRICK].astype(np.float64), *true_colour], strict=True))
    optical = {key: scene[S2.index(key)] for key in NO_CIRRUS}
    if name == "m-bigearthnet":
        return {key: values.astype(np.float32) for key, values in optical.items()}
    clouds = {"Cloud Probability": generator.integers(0, 100, scene.shape[1:])}
    if name == "m-cashew-plantation":
        return {key: values.astype(np.float32) for key, values in (optical | clouds).items()}
    scaled = {key: np.clip(values / 20, 0, 255) for key, values in optical.items()}
    return {key: values.astype(np.int16) for key, values in (scaled | clouds).items()}


def _write_lists(name, folder: Path, partition: dict, labels: dict) -> None:
    (folder / "default_partition.json").write_text(json.dumps(partition, indent=2))
    for fraction in FRACTIONS:
        keep = max(1, round(fraction * len(partition["train"])))
        fewer = {**partition, "train": partition["train"][:keep]}
        (folder / f"{fraction:.2f}x_train_partition.json").write_text(json.dumps(fewer, indent=2))
    if name == "m-bigearthnet":
        stats = {sample: label.tolist() for sample, label in labels.items()}
        (folder / "label_stats.json").write_text(json.dumps(stats))
    elif name in ("m-brick-kiln", "m-forestnet", "m-pv4ger"):  # some releases of m-so2sat and m-eurosat have none
        samples_of_class = collections.defaultdict(list)
        for sample, label in labels.items():
            samples_of_class[str(label)].append(sample)
        (folder / "label_map.json").write_text(json.dumps(samples_of_class, indent=4))
    (folder / "task_specs.pkl").write_bytes(b"\x80\x04cos\nsystem\n\x8c\x04true\x85R.")  # must never be read


def _write_band_stats(folder: Path) -> None:
    """Write band_stats.json: statistics of the training samples, as GEO-Bench's bandstats.py does."""
    values = collections.defaultdict(list)
    for sample in json.loads((folder / "default_partition.json").read_text())["train"]:
        with h5py.File(folder / f"{sample}.hdf5") as file:
            for key in file:
                values[key.split("_20")[0]].append(file[key][...].ravel()[::7])
    pixels = {key: np.concatenate(parts).astype(np.float64) for key, parts in values.items()}
    stats = {key: {"min": band.min(), "max": band.max(), "mean": band.mean(), "median": float(np.median(band)),
                   "std": band.std()} for key, band in pixels.items()}  # fmt: skip
    (folder / "band_stats.json").write_text(json.dumps(stats, indent=4, sort_keys=True))
