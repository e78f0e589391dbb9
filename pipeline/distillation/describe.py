"""What a student is made for: its shape and what student.json says, from the images store."""

import xarray as xr

from pipeline import config
from pipeline.data import image_store
from pipeline.distillation.student_files import StudentSpec


def make_spec(store: xr.Dataset, student: config.StudentConfig) -> StudentSpec:
    """What decides a student's tensors."""
    task, dense = store.attrs["task"], store.attrs["task"] == "segmentation"
    side = student.mask_size if dense else student.chip_size
    return StudentSpec(student.network, store.sizes["band"], len(store.attrs["classes"]), task, side)


def student_metadata(store: xr.Dataset, dataset: str, variant: str, weights: str, teacher: str | None) -> dict:
    """What is kept beside a student's tensors (pipeline/distillation)."""
    columns = zip(store.band_name.values.tolist(), store.band.values.tolist(), store.wavelength.values, strict=True)
    return {
        "dataset": dataset,
        "task": store.attrs["task"],
        "classes": list(store.attrs["classes"]),
        "ignore": image_store.IGNORE if store.attrs["task"] == "segmentation" else None,
        "bands": [
            {"name": name, "common_name": common, "wavelength": float(length) if length == length else None}
            for name, common, length in columns
        ],
        "units": store.attrs["units"],
        "gsd": float(store.attrs["gsd"]),
        "size": [store.sizes["y"], store.sizes["x"]],
        "variant": variant,
        "weights": weights,
        "teacher": teacher,
    }
