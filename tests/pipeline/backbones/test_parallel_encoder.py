import threading
import time
from types import SimpleNamespace

import pytest
import torch

from pipeline.backbones.base import FeaturePyramid
from pipeline.backbones.encoder import Encoder, ParallelEncoder


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
def encoder():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    preprocessor = SimpleNamespace(input_bands=SimpleNamespace(input_size=4))
    yield Encoder(preprocessor, StatefulNetwork().eval(), "cpu")
    torch.set_num_threads(n_threads)


def encode_number(encoder, number):
    return encoder.forward(torch.full((1, 1, 4, 4), float(number)), {}).levels[0]


@pytest.mark.parametrize("shares_network", [False, True])
def test_parallel_encoder_keeps_batches_apart_by_clones(encoder, shares_network):
    """Forward passes through one network would mix them."""
    if shares_network:
        encoder.clone_sharing_weights = lambda: encoder
    with ParallelEncoder(encoder) as parallel:
        futures = [parallel.submit(encode_number, number) for number in range(12)]
        is_right = [bool((future.result() == number).all()) for number, future in enumerate(futures)]
    assert all(is_right) != shares_network


def test_clone_sharing_weights_copies_no_weights(encoder):
    weights, clone_weights = (e.network.layer.weight for e in (encoder, encoder.clone_sharing_weights()))
    assert clone_weights.data_ptr() == weights.data_ptr()


def test_parallel_encoder_divides_the_threads_between_two_batches(encoder):
    barrier = threading.Barrier(2)

    def get_threads(_):
        barrier.wait(timeout=60)
        return torch.get_num_threads()

    with ParallelEncoder(encoder) as parallel:
        assert [future.result() for future in [parallel.submit(get_threads) for _ in range(4)]] == [1] * 4
    assert torch.get_num_threads() == 2


def test_parallel_encoder_raises_the_error_of_an_earlier_batch(encoder):
    def submit_many():
        with ParallelEncoder(encoder) as parallel:
            for _ in range(100):
                parallel.submit(lambda _: 1 / 0)
                time.sleep(0.001)

    with pytest.raises(ZeroDivisionError):
        submit_many()
