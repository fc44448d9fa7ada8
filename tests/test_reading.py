"""Images are read in parallel, with any number of torch threads."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from moss_vl import image_processing_moss_vl
from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.image_reading import ProbedImage, Rows
from moss_vl.threads import in_threads


@pytest.fixture
def threads(monkeypatch):
    """Sets the number of threads for reading images; torch has one in these tests, which would hide every race."""

    def give(limit, torch_threads=None):
        monkeypatch.setattr(image_processing_moss_vl, "IMAGE_THREADS", limit)
        monkeypatch.setattr(torch, "get_num_threads", lambda: limit if torch_threads is None else torch_threads)

    return give


class Watch:
    """Counts how many threads are inside at once."""

    def __init__(self):
        self.lock, self.inside, self.most = threading.Lock(), 0, 0

    def __enter__(self):
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.005)

    def __exit__(self, *error):
        with self.lock:
            self.inside -= 1


def watched(image, watch):
    """The PIL image, with every `load` counted by `watch`."""

    class Watched(type(image)):
        def load(self):
            with watch:
                return super().load()

    image.__class__ = Watched
    return image


def picture(value, side=64):
    return np.full((side, side, 3), value, np.uint8)


def test_images_are_read_in_parallel(threads):
    """Each waits for the two others: in sequence, none would end."""
    threads(3)
    meeting = threading.Barrier(3, timeout=20)

    def read(value):
        meeting.wait()
        return picture(value)

    probed = [
        ProbedImage(str(value), 64, 64, lambda _, value=value: Rows.of_array(read(value))) for value in (10, 20, 30)
    ]
    found = MossVLImageProcessor().extract(probed)
    assert [int(patches[0, 0]) for patches, _ in found] == [10, 20, 30]


@pytest.mark.parametrize("limit, torch_threads, most", [(2, 8, 2), (8, 2, 2), (1, 8, 1), (8, 1, 1)])
def test_neither_limit_of_threads_is_exceeded(threads, limit, torch_threads, most):
    threads(limit, torch_threads)
    watch = Watch()

    def read():
        with watch:
            return picture(7)

    MossVLImageProcessor().extract([ProbedImage("x", 64, 64, lambda _: Rows.of_array(read())) for _ in range(8)])
    assert watch.most <= most


def test_an_image_of_the_caller_is_loaded_by_one_thread_at_a_time(threads):
    """It decodes itself on first use and may be in a list several times; two threads would disturb each other's
    reads."""
    threads(4)
    watch = Watch()
    image = watched(Image.fromarray(picture(50)), watch)
    found = MossVLImageProcessor().extract([image] * 6)
    assert watch.most == 1
    assert all(int(patches.min()) == int(patches.max()) == 50 for patches, _ in found)


def test_the_first_error_in_order_is_raised(threads):
    """Also if a later item fails earlier; items that have not started are cancelled."""
    begun, gate = [], threading.Event()

    def work(number):
        begun.append(number)
        if number == 0:
            gate.wait(20)
            raise ValueError("the first")
        if number == 1:
            gate.set()
            raise KeyError("the second")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="the first"):
        in_threads(2, work, range(200))
    assert len(begun) < 200


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_order_and_inference_mode_are_those_of_one_thread(count):
    """Results are in order, and every thread has the inference mode of the caller."""

    def work(one, other):
        time.sleep(0.002 * (3 - one))
        return one * other, torch.is_inference_mode_enabled()

    for mode in (False, True):
        with torch.inference_mode(mode):
            assert in_threads(count, work, [0, 1, 2, 3], [5, 6, 7, 8]) == [
                (0, mode),
                (6, mode),
                (14, mode),
                (24, mode),
            ]
    assert in_threads(count, work, [], []) == []
