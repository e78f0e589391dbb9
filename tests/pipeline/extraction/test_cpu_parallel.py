import threading
import time

import pytest
import torch

from pipeline.backbones.base import FeaturePyramid
from pipeline.backbones.encoder import Encoder
from pipeline.extraction.cpu_parallel import ParallelEncoder


class Forgetful(torch.nn.Module):
    """A network that keeps its input in itself for a while, as those with feature hooks keep their maps."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)

    def forward(self, image):
        self.kept = image
        time.sleep(0.02)
        return FeaturePyramid([self.layer(self.kept)], {})


class Small:
    """Inputs of which only the size is asked."""

    class seen:
        input_size = 4


@pytest.fixture
def encoder():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield Encoder(Small, Forgetful().eval(), "cpu")
    torch.set_num_threads(threads)


def level(encoder, number):
    return encoder.forward(torch.full((1, 1, 4, 4), float(number)), {}).levels[0]


def test_forwards_side_by_side_are_not_mixed_up(encoder):
    with ParallelEncoder(encoder) as lanes:
        running = [lanes.submit(level, number) for number in range(12)]
        for number, one in enumerate(running):
            assert (one.result() == number).all()


def test_through_one_network_they_would_be(encoder):
    """What the twins are for."""
    encoder.twin = lambda: encoder
    with ParallelEncoder(encoder) as lanes:
        running = [lanes.submit(level, number) for number in range(12)]
        assert not all((one.result() == number).all() for number, one in enumerate(running))


def test_a_twin_takes_no_memory_for_weights(encoder):
    ours, theirs = encoder.network.layer.weight, encoder.twin().network.layer.weight
    assert theirs.data_ptr() == ours.data_ptr()


def test_two_at_once_with_the_threads_shared_out(encoder):
    together = threading.Barrier(2)

    def threads(_):
        together.wait(timeout=60)
        return torch.get_num_threads()

    with ParallelEncoder(encoder) as lanes:
        assert [one.result() for one in [lanes.submit(threads) for _ in range(4)]] == [1] * 4
    assert torch.get_num_threads() == 2
    with ParallelEncoder(encoder) as lanes:
        assert lanes.submit(lambda _: torch.get_num_threads()).result() == 1


def test_one_thread_needs_no_other(encoder):
    torch.set_num_threads(1)
    with ParallelEncoder(encoder) as lanes:
        assert lanes.submit(lambda own: (own, threading.current_thread())).result() == (
            encoder,
            threading.current_thread(),
        )


def test_an_error_ends_the_run(encoder):
    def fail(_):
        raise ValueError("broken")

    def work():
        with ParallelEncoder(encoder) as lanes:
            for _ in range(100):
                lanes.submit(fail)
                time.sleep(0.001)

    with pytest.raises(ValueError, match="broken"):
        work()
