import numpy as np
import pytest
import rasterio
import rioxarray
import xarray as xr
from rasterio.windows import Window

from pipeline.bands import FULL_SCALE
from pipeline.data.sources import osm_landuse
from pipeline.errors import UserError
from pipeline.mapping.predictors import Signature
from pipeline.mapping.scene import match_scene, open_scene
from pipeline.tasks import Segmentation
from tests.conftest import ROOT
from tests.errors import raises
from tests.pipeline.mapping.conftest import BANDS, GRID


@pytest.fixture
def scene_yaml(raw_folder, tmp_path):
    """Path of a copy of the scene of sample-landuse-seg, with its files."""
    text = (ROOT / "scenes/sample-landuse-seg.yaml").read_text()
    path = tmp_path / "scene.yaml"
    path.write_text(text.replace("../data/raw/sample-landuse-seg", str(raw_folder("osm_landuse"))))
    return path


def test_open_scene_one_file_per_band_equals_the_source(scene_yaml, raw_folder):
    scene = open_scene(scene_yaml)
    image, transform, crs = osm_landuse.read_scene(raw_folder("osm_landuse"))
    assert (scene.height, scene.width) == image.shape[1:]
    assert scene.transform == tuple(transform)[:6]
    assert rasterio.CRS.from_wkt(scene.crs) == crs
    values, is_valid = scene.read_window(Window(900, 100, 48, 64), [12, 0, 7])
    assert (values == image[[12, 0, 7], 100:164, 900:948]).all()
    assert is_valid.all()
    assert scene.time == osm_landuse.TIME
    lat, lon = scene.latlon(np.array(0.0), np.array(0.0))
    assert 52 < lat < 54
    assert 12 < lon < 15
    assert scene.gsd == pytest.approx(10, rel=0.01)


def test_open_scene_zarr_and_geotiff_of_the_same_pixels_are_equal(write_geotiff, tmp_path):
    pixels = np.random.default_rng(0).integers(1, 5000, (2, 100, 220)).astype(np.uint16)
    array = xr.DataArray(pixels, dims=("band", "y", "x"), coords={"band": ["blue", "nir"]}, attrs={"units": "dn"})
    array = rioxarray.raster_array.RasterArray(array).write_crs("EPSG:32633").rio.write_transform(GRID)
    array.to_dataset(name="reflectance").to_zarr(tmp_path / "scene.zarr", zarr_format=3)
    zarr_scene = open_scene(tmp_path / "scene.zarr")
    tiff_scene = open_scene(write_geotiff(pixels, band_names=["blue", "nir"]))
    for field in ("height", "width", "units", "transform", "bands"):
        assert str(getattr(zarr_scene, field)) == str(getattr(tiff_scene, field))
    assert rasterio.CRS.from_wkt(zarr_scene.crs) == rasterio.CRS.from_wkt(tiff_scene.crs)
    for window in (Window(0, 0, 220, 100), Window(20, 10, 7, 5)):
        for scene in (zarr_scene, tiff_scene):
            values, is_valid = scene.read_window(window, [1, 0])
            assert (values == pixels[[1, 0]][:, *window.toslices()]).all()
            assert is_valid.all()


def test_open_scene_raster_without_band_names_needs_a_yaml_file(raw_folder, tmp_path):
    photo = next(raw_folder("neon_trees").glob("*.png"))
    with raises(UserError, key="bands", value=(None, None, None), path=photo):
        open_scene(photo)
    (tmp_path / "trees.yaml").write_text(
        f"folder: {photo.parent}\nimages: {photo.name}\nunits: uint8\nbands:\n"
        "  - {name: R, common_name: red}\n  - {name: G, common_name: green}\n  - {name: B, common_name: blue}\n"
    )
    scene = open_scene(tmp_path / "trees.yaml")
    assert scene.crs == ""
    assert np.isnan(scene.gsd)
    assert scene.read_window(Window(6, 5, 4, 4), [0, 1, 2])[0].shape == (3, 4, 4)


@pytest.mark.parametrize("units", ["", "metres"])
def test_open_scene_raster_without_known_units_is_refused(write_geotiff, units):
    path = write_geotiff(np.ones((3, 8, 8), np.uint16), units=units)
    with raises(UserError, key="units", allowed=FULL_SCALE, path=path):
        open_scene(path)


@pytest.mark.parametrize(
    ("old", "new", "mentions"),
    [
        ("bands:", "bands: ]", ()),
        ("images:", "imgs:", ("imgs",)),
        ("*_B??.jp2", "*.tif", ("*.tif",)),
        ("name: B05", "name: B55", ("B55",)),
        ("2017-02-16T10:21:01", "in winter", ("in winter",)),
    ],
)
def test_open_scene_invalid_yaml_is_refused(scene_yaml, old, new, mentions):
    scene_yaml.write_text(scene_yaml.read_text().replace(old, new))
    with raises(UserError, *mentions):
        open_scene(scene_yaml)


def test_open_scene_missing_or_unreadable_file_is_refused(tmp_path):
    missing, damaged = tmp_path / "x.tif", tmp_path / "y.tif"
    with raises(UserError, path=missing):
        open_scene(missing)
    damaged.write_bytes(b"II*\0 not a raster")
    with raises(UserError, damaged):
        open_scene(damaged)


def test_scene_gsd_of_small_pixels(write_geotiff):
    transform = rasterio.Affine(0.1, 0, 528000, 0, -0.1, 4978000)
    path = write_geotiff(np.ones((3, 8, 8), np.uint8), crs="EPSG:32612", transform=transform)
    assert open_scene(path).gsd == pytest.approx(0.1, rel=0.01)


def test_match_scene_same_name_with_another_wavelength_is_refused(scene_yaml):
    signature = Signature(Segmentation, ("a", "b"), tuple(BANDS), "dn", 10.0, (32, 32))
    assert match_scene(open_scene(scene_yaml), signature) == [1, 7, 11]
    text = scene_yaml.read_text()
    scene_yaml.write_text(text.replace("common_name: nir, wavelength: 0.833", "common_name: nir, wavelength: 0.865"))
    with raises(UserError, "nir (0.865 µm)", key="bands", value=["nir"]):
        match_scene(open_scene(scene_yaml), signature)
