"""The eight symmetries of a square, and images that are read under them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.bands import Band
from pipeline.data.augmentation import SHAPE_PRESERVING, VIEWS, AugmentedImages
from pipeline.data.image_store import ImageDataset
from pipeline.tasks import IGNORE, NO_CLASS

COUNT, SIDE = 24, 16
SPLIT = ["train", "val", "train", "test"] * (COUNT // 4)
LABEL = np.arange(COUNT) % 3


@pytest.fixture
def image():
    """Images (sample, band, y, x): the first band is 100 times the class of `mask`, the second one grows."""
    noise = np.random.default_rng(1).normal(size=(COUNT, 2, SIDE, SIDE))
    offset = np.linspace(100, 200, COUNT)[:, None, None]
    return (np.stack([100.0 * mask(), offset + 0 * mask()], axis=1) + noise).astype(np.float32)


def mask() -> np.ndarray:
    return np.random.default_rng(0).integers(3, size=(COUNT, 4, 4)).repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture
def write_images(open_images):
    """From images, labels and splits to an opened images store; by default of three classes of chips."""

    def write(image, label=LABEL, task="classification", split=SPLIT):
        dataset = ImageDataset(
            image=image, label=label, sample=[f"s{i:03d}" for i in range(len(image))], split=split,
            bands=[Band("B1", "red", 0.665, 1.0), Band("B2", "nir", 0.8, 1.0)], classes=["a", "b", "c"], task=task,
            units="dn", gsd=1.0, licence="none", source="test",
        )  # fmt: skip
        return open_images(dataset)

    return write


@pytest.fixture
def masks(write_images, image):
    """An opened images store with masks, of which the left columns are not labelled."""
    return write_images(image, np.where(np.arange(SIDE) < 2, IGNORE, mask()).astype(np.uint8), "segmentation")


def load(images, max_gb: float = 1.0) -> AugmentedImages:
    return AugmentedImages.load(Path(images.encoding["source"]), max_gb)


def test_views_of_a_square_are_eight_different_symmetries():
    image = np.arange(12).reshape(1, 3, 4)[..., :3]
    views = {name: transform(image) for name, transform in VIEWS.items()}
    assert len({values.tobytes() for values in map(np.ascontiguousarray, views.values())}) == 8
    expected_corner = {"identity": (0, 2), "flip_x": (0, 0), "flip_y": (2, 2), "rot90": (0, 0), "rot180": (2, 0),
                       "rot270": (2, 2), "transpose": (2, 0), "antitranspose": (0, 2)}  # fmt: skip
    assert {name: views[name][0][corner] for name, corner in expected_corner.items()} == dict.fromkeys(views, 2)


@pytest.mark.parametrize("how", ["read_from_store", "copied_to_file"])
def test_augmented_images_outside_memory_equal_those_in_memory(masks, tmp_path, how):
    in_memory, rows = load(masks), np.array([7, 3, 3, 20])
    other = load(masks, 0.0) if how == "read_from_store" else AugmentedImages.copy_to_file(masks, tmp_path / "x.npy")
    views = ["rot90", "identity", "flip_x", "flip_y"]
    for a, b in ((in_memory.image(rows, views), other.image(rows, views)),
                 (in_memory.label(rows, views), other.label(rows, views)),
                 (in_memory.image(rows), masks.image.values[rows])):  # fmt: skip
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert (in_memory.mean, in_memory.std) == (other.mean, other.std)


def test_augmented_images_tensors_are_float32_and_int64(write_images, image):
    images = load(write_images(image.clip(0).astype(np.uint16)))
    rows, views = np.arange(3), ["rot90", "flip_x", "identity"]
    tensor, label = images.image_tensor(rows, views), images.label_tensor(rows, views)
    assert (tensor.dtype, label.dtype, images.image(rows).dtype) == (torch.float32, torch.int64, np.uint16)
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(tensor.numpy(), images.image(rows, views))


def test_band_statistics_use_the_training_split_and_std_1_for_a_constant_band(write_images, image):
    training = image[np.isin(SPLIT, "train")].astype(np.float64)
    images = load(write_images(image))
    np.testing.assert_allclose(images.mean, training.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(images.std, training.std(axis=(0, 2, 3)), rtol=1e-4)
    assert abs(images.mean[1] - image[:, 1].mean()) > 0.1, "the splits must differ for this test"
    image[:, 1] = 7000
    images = load(write_images(image))
    assert images.std[1] == 1
    assert images.std[0] > 10


def test_views_of_images_that_are_not_square_keep_their_shape(write_images, image):
    images = load(write_images(image[:, :, :8]))
    assert images.views == SHAPE_PRESERVING
    assert images.image(np.arange(4), images.views).shape == (4, 2, 8, SIDE)


def test_batch_draws_all_views_and_leaves_the_stored_images_unchanged(masks, tmp_path):
    masks = masks.load()
    masks["image"] = masks.image.copy(data=np.stack([masks.label.values] * 2, axis=1))
    images = AugmentedImages.copy_to_file(masks, tmp_path / "images.npy")
    rows, generator, distinct = np.arange(8), np.random.default_rng(0), set()
    for _ in range(20):
        image, label = images.batch(rows, generator)
        np.testing.assert_array_equal(image[:, 0], label)
        distinct.add(image[0].tobytes())
    assert len(distinct) == 8
    for values in (images.batch(rows)[0][:, 0], images.batch(rows)[1]):
        np.testing.assert_array_equal(values, masks.label.values[:8])


def test_copy_to_file_excludes_unlabelled_samples(write_images, image, tmp_path):
    label = np.append(LABEL[:-4], [NO_CLASS] * 4)
    opened = write_images(image, label, split=[*SPLIT[:-4], *["unlabelled"] * 4])
    images = AugmentedImages.copy_to_file(opened, tmp_path / "images.npy")
    assert len(images.sample) == len(images.split) == len(np.load(tmp_path / "images.npy")) == COUNT - 4
    assert len(load(opened).sample) == COUNT
