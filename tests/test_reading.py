"""Images read side by side, whatever number of threads this machine or its environment gives torch."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from moss_vl import image_processing_moss_vl as room
from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.image_reading import ProbedImage
from moss_vl.threads import in_threads


@pytest.fixture
def threads(monkeypatch):
    """Sets how many threads images are read on; torch has one in these tests, which would hide every race."""

    def give(limit, torch_threads=None):
        monkeypatch.setattr(room, "IMAGE_THREADS", limit)
        monkeypatch.setattr(torch, "get_num_threads", lambda: limit if torch_threads is None else torch_threads)

    return give


class Watch:
    """How many are inside at once, and at most were."""

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
    """The PIL image, whose every `load` is watched."""

    class Watched(type(image)):
        def load(self):
            with watch:
                return super().load()

    image.__class__ = Watched
    return image


def picture(level, side=64):
    return np.full((side, side, 3), level, np.uint8)


def test_images_are_read_side_by_side(threads):
    """Each waits for the two others: one after the other, none would end."""
    threads(3)
    meeting = threading.Barrier(3, timeout=20)

    def read(level):
        meeting.wait()
        return picture(level)

    seen = [ProbedImage(str(level), 64, 64, lambda level=level: read(level)) for level in (10, 20, 30)]
    found = MossVLImageProcessor().extract(seen)
    assert [int(patches[0, 0]) for patches, _ in found] == [10, 20, 30]


@pytest.mark.parametrize("limit, torch_threads, most", [(2, 8, 2), (8, 2, 2), (1, 8, 1), (8, 1, 1)])
def test_on_no_more_threads_than_either_allows(threads, limit, torch_threads, most):
    threads(limit, torch_threads)
    watch = Watch()

    def read():
        with watch:
            return picture(7)

    MossVLImageProcessor().extract([ProbedImage("x", 64, 64, read) for _ in range(8)])
    assert watch.most <= most


def test_an_image_of_the_caller_is_loaded_by_one_thread_at_a_time(threads):
    """It decodes itself when it is first read, and may stand in a list several times: two threads in it would tear its file."""
    threads(4)
    watch = Watch()
    image = watched(Image.fromarray(picture(50)), watch)
    found = MossVLImageProcessor().extract([image] * 6)
    assert watch.most == 1
    assert all(int(patches.min()) == int(patches.max()) == 50 for patches, _ in found)


def test_an_error_of_one_is_the_error_of_all(threads):
    """The first in order, whoever fails first; those that did not begin are not begun."""
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
def test_order_and_mode_are_those_of_one_thread(count):
    """Several columns; results in their order; inference mode is handed on to every thread."""

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
