import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.backbones.base import FeaturePyramid
from pipeline.backbones.encoder import Encoder, ParallelEncoder, device_threads
from pipeline.errors import UserError
from tests.errors import raises


@pytest.fixture(scope="module")
def encoder(images, make_encoder, weights_folder):
    return make_encoder(images, "efficientnet", "lite0", 64, weights_folder("lite0"))


def test_encoder_features_do_not_depend_on_the_batch_even_after_terratorch_lowers_the_precision(encoder, images):
    torch.set_float32_matmul_precision("medium")  # as importing terratorch does
    together = encoder(images.image[:5].values).pooled["mean_level3"]
    alone = np.concatenate([encoder(images.image[i : i + 1].values).pooled["mean_level3"] for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_encoder_in_bfloat16_differs_from_float32_by_rounding(encoder, images):
    lower = Encoder(encoder.preprocessor, encoder.network, "cpu", precision="bfloat16")
    exact, rounded = (each_encoder(images.image[:3].values).levels[2] for each_encoder in (encoder, lower))
    assert rounded.dtype == np.float32
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.2  # eight bits of mantissa


def test_encoder_compiled_compiles_the_network(encoder, images, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    compiled_encoder = Encoder(encoder.preprocessor, encoder.network, "cpu", compiled=True)
    image = images.image[:2].values
    np.testing.assert_array_equal(compiled_encoder(image).levels[1], encoder(image).levels[1])
    assert compiled == [encoder.network]


def test_encoder_refuses_shapes_that_the_spec_does_not_state(encoder, images):
    other = Encoder(encoder.preprocessor, encoder.network, "cpu", strides=(4, 8, 16, 16))
    with raises(UserError, "(1, 320, 2, 2)", 64, "4x4", key="strides", value=(1, 320, 2, 2)):
        other(images.image[:1].values)


class StatefulNetwork(torch.nn.Module):
    """A network that stores its input in itself, as networks with feature hooks store their maps."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)

    def forward(self, image):
        self.image = image
        time.sleep(0.02)
        return FeaturePyramid([self.layer(self.image)], {})


@pytest.fixture
def stateful_encoder():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    preprocessor = SimpleNamespace(input_bands=SimpleNamespace(input_size=4))
    yield Encoder(preprocessor, StatefulNetwork().eval(), "cpu")
    torch.set_num_threads(n_threads)


def encode_number(encoder, number):
    return encoder.forward(torch.full((1, 1, 4, 4), float(number)), {}).levels[0]


@pytest.mark.parametrize("shares_network", [False, True])
def test_parallel_encoder_keeps_batches_apart_by_clones(stateful_encoder, shares_network):
    """Forward passes through one network would mix them; the clones share the weights in memory."""
    clone = stateful_encoder.clone_sharing_weights()
    assert clone.network.layer.weight.data_ptr() == stateful_encoder.network.layer.weight.data_ptr()
    if shares_network:
        stateful_encoder.clone_sharing_weights = lambda: stateful_encoder
    with ParallelEncoder(stateful_encoder) as parallel:
        futures = [parallel.submit(encode_number, number) for number in range(12)]
        is_right = [bool((future.result() == number).all()) for number, future in enumerate(futures)]
    assert all(is_right) != shares_network


def test_parallel_encoder_divides_the_threads_between_two_batches_and_raises_an_earlier_error(stateful_encoder):
    barrier = threading.Barrier(2)

    def get_threads(_):
        barrier.wait(timeout=60)
        return torch.get_num_threads()

    with ParallelEncoder(stateful_encoder) as parallel:
        assert [future.result() for future in [parallel.submit(get_threads) for _ in range(4)]] == [1] * 4
        # The error of an earlier batch is raised.
        parallel.submit(lambda _: 1 / 0).exception()
        with pytest.raises(ZeroDivisionError):
            parallel.submit(lambda _: 1)
    assert torch.get_num_threads() == 2


def test_device_threads_do_not_take_the_number_of_torch_threads_of_another_thread(stateful_encoder):
    """Resumed extractions differed in rounding when a reader's thread started just after an encoder's."""
    with device_threads(1, "cpu", 1) as pool:
        pool.submit(int).result()  # starts the thread
        torch.set_num_threads(2)
        assert pool.submit(torch.get_num_threads).result() == 1
