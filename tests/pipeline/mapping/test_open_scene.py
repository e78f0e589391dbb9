import numpy as np
import pytest
import rasterio
import rioxarray
import xarray as xr

from pipeline.data.sources import osm_landuse
from pipeline.errors import UserError
from pipeline.mapping.open_scene import open_scene
from pipeline.mapping.scene import match_scene_bands
from pipeline.mapping.predictors import Signature
from tests.pipeline.mapping.conftest import BANDS

YAML = """
folder: {folder}
images: "*_B??.jp2"
units: dn
time: "2017-02-16T10:21:01"
bands:
{bands}
"""


@pytest.fixture
def described_scene(raw_folder, tmp_path):
    bands = "".join(
        f"  - {{name: {b.name}, common_name: {b.common_name}, wavelength: {b.wavelength}}}\n"
        for b in osm_landuse.BANDS
    )
    path = tmp_path / "scene.yaml"
    path.write_text(YAML.format(folder=raw_folder("osm_landuse"), bands=bands))
    return path


def test_a_scene_of_a_file_a_band_is_what_the_source_reads(described_scene, raw_folder):
    scene = open_scene(described_scene)
    image, transform, crs = osm_landuse.read_scene(raw_folder("osm_landuse"))
    assert (scene.height, scene.width) == image.shape[1:]
    assert scene.transform == tuple(transform)[:6]
    assert rasterio.CRS.from_wkt(scene.crs) == crs
    values, valid = scene.read_window((100, 900, 64, 48), [12, 0, 7])
    assert (values == image[[12, 0, 7], 100:164, 900:948]).all()
    assert valid.all()
    assert scene.time == osm_landuse.TIME
    lat, lon = scene.latlon(np.array(0.0), np.array(0.0))
    assert 52 < lat < 54
    assert 12 < lon < 15
    assert scene.gsd == pytest.approx(10, rel=0.01)


def test_a_zarr_store_and_a_geotiff_of_the_same_pixels_are_the_same_scene(raw_folder, tmp_path):
    image, transform, crs = osm_landuse.read_scene(raw_folder("osm_landuse"))
    some = image[[1, 7], 50:150, 30:250]
    moved = transform @ rasterio.Affine.translation(30, 50)
    array = xr.DataArray(some, dims=("band", "y", "x"), coords={"band": ["blue", "nir"]}, attrs={"units": "dn"})
    placed = rioxarray.raster_array.RasterArray(array)
    array = placed.write_crs(crs).rio.write_transform(moved)
    array.to_dataset(name="reflectance").to_zarr(tmp_path / "scene.zarr", zarr_format=3)
    path = tmp_path / "scene.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=100, width=220, count=2, dtype="uint16", crs=crs, transform=moved
    ) as file:
        file.write(some)
        file.descriptions = ["blue", "nir"]
        file.update_tags(units="dn")
    one, other = open_scene(tmp_path / "scene.zarr"), open_scene(path)
    assert (one.height, one.width, one.units) == (other.height, other.width, other.units) == (100, 220, "dn")
    assert one.transform == other.transform
    assert rasterio.CRS.from_wkt(one.crs) == rasterio.CRS.from_wkt(other.crs)
    assert [band.common_name for band in one.bands] == [band.common_name for band in other.bands]
    for window in ((0, 0, 100, 220), (10, 20, 5, 7)):
        (values, valid), (others, also) = one.read_window(window, [1, 0]), other.read_window(window, [1, 0])
        assert (values == others).all()
        assert valid.all()
        assert also.all()


def test_a_raster_that_says_nothing_of_itself(raw_folder, tmp_path):
    picture = next(raw_folder("neon_trees").glob("*.png"))
    with pytest.raises(UserError, match="does not say what its 3 bands are. Describe it in a YAML file"):
        open_scene(picture)
    (tmp_path / "trees.yaml").write_text(
        f"folder: {picture.parent}\nimages: {picture.name}\nunits: uint8\nbands:\n"
        "  - {name: R, common_name: red}\n  - {name: G, common_name: green}\n  - {name: B, common_name: blue}\n"
    )
    scene = open_scene(tmp_path / "trees.yaml")
    assert scene.crs == ""
    assert np.isnan(scene.gsd)
    assert scene.read_window((5, 6, 4, 4), [0, 1, 2])[0].shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("bands:", "bands: ]"), "is not valid YAML"),
        (("units: dn", "units: metres"), "units 'metres' are not known"),
        (("images:", "imgs:"), "unknown key: imgs"),
        (("*_B??.jp2", "*.tif"), "has no file like"),
        (("name: B05", "name: B55"), "Band B55 should be in the name of one file"),
        (("2017-02-16T10:21:01", "in winter"), "time is 'in winter'"),
    ],
)
def test_a_description_that_cannot_be(described_scene, change, words):
    described_scene.write_text(described_scene.read_text().replace(*change))
    with pytest.raises(UserError, match=words):
        open_scene(described_scene)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no scene at"):
        open_scene(tmp_path / "x.tif")
    (tmp_path / "y.tif").write_bytes(b"II*\0 not a raster")
    with pytest.raises(UserError, match="cannot be read"):
        open_scene(tmp_path / "y.tif")


def test_small_pixels_are_measured(tmp_path):
    path = tmp_path / "trees.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=8, width=8, count=1, dtype="uint8", crs="EPSG:32612",
        transform=rasterio.Affine(0.1, 0, 528000, 0, -0.1, 4978000),
    ) as file:  # fmt: skip
        file.write(np.ones((1, 8, 8), np.uint8))
        file.descriptions = ["red"]
        file.update_tags(units="uint8")
    assert open_scene(path).gsd == pytest.approx(0.1, rel=0.01)


def test_a_band_of_the_same_name_and_another_wavelength_is_another_band(described_scene):
    wanted = Signature("segmentation", ("a", "b"), tuple(BANDS), "dn", 10.0, (32, 32))
    assert match_scene_bands(open_scene(described_scene), wanted) == [1, 7, 11]
    text = described_scene.read_text()
    described_scene.write_text(
        text.replace("common_name: nir, wavelength: 0.833", "common_name: nir, wavelength: 0.865")
    )
    with pytest.raises(UserError, match=r"lacks the bands nir.*nir \(0.865 µm\)"):
        match_scene_bands(open_scene(described_scene), wanted)
