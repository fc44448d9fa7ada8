"""The optimizer steps of train_nano.py. On a GPU they are recorded as CUDA graphs, one for each shape of inputs,
because the host would take longer to launch the many small operations of a step than the GPU to compute them.
"""

import gc
import time
from collections import defaultdict

import torch

from moss_vl.training.nano.facts import IGNORED


ROOM = 1.25  # space of lists in a recorded step, relative to the longest one before
FIRST_STEPS = 30  # which are not recorded
LONGEST_RECORDING = 5.0  # seconds
MOST_SCORES = 1 << 25  # per head and layer; larger steps keep the GPU busy without being recorded, and much memory


def is_list(name: str) -> bool:
    """Whether the last axis of a tensor of `collation.collate` ("frame_facts": the first) is a list of any length."""
    names = ("pads", "frame_facts", "learned", "targets", "weights", "answer", "answer_tasks")
    return name in names or name.startswith("points")


def scores_of(tensors: dict[str, torch.Tensor]) -> int:
    """The number of attention scores of text to vision tokens, of a head in a layer."""
    return tensors["ids"].numel() * tensors["vision_index"].shape[1] if "ids" in tensors else 0


def list_length(name: str, tensor: torch.Tensor) -> int:
    return tensor.shape[0 if name == "frame_facts" else -1]


class EagerSteps:
    """Computes each step at once.

    Args:
        compute: (tensors of a step) -> what `CountsLog` adds; the whole step with its update.
    """

    def __init__(self, compute):
        self.compute, self.log, self.failed = compute, CountsLog(), None

    def __call__(self, step: dict) -> None:
        self.log.add(self.compute(step))

    def __str__(self):
        return "all computed at once"


class GraphSteps:
    """Records the steps of a shape as a CUDA graph when the shape occurs again, and replays it for later ones.

    The first steps are computed at once. If recording fails or takes long, no more steps are recorded.
    """

    def __init__(self, compute, device, note):
        self.compute, self.device, self.note, self.log = compute, device, note, CountsLog()
        self.recorded: dict[tuple, Recorded] = {}
        self.seen: dict[tuple, dict[str, int]] = {}  # longest lists of each shape
        self.pool, self.failed = torch.cuda.graph_pool_handle(), None
        self.computed = self.replays = 0
        self.replaced: list[Recorded] = []  # of too little space; freeing them would wait for the GPU

    def __call__(self, step: dict) -> None:
        tensors = {name: value for name, value in step.items() if isinstance(value, torch.Tensor)}
        lengths = {name: list_length(name, value) for name, value in tensors.items() if is_list(name)}
        fixed = tuple((name, value.shape) for name, value in tensors.items() if name not in lengths)
        key = (step["kind"], fixed, tuple(lengths))
        known = self.recorded.get(key)
        if known is not None and known.fits(lengths):
            known.fill(tensors)
            self.replays += 1
            known.replay(self.log)
            return
        self.computed += 1
        again, longest = key in self.seen, self.seen.get(key, lengths)
        lengths = self.seen[key] = {name: max(length, longest[name]) for name, length in lengths.items()}
        if not again or self.failed or self.computed <= FIRST_STEPS or scores_of(tensors) > MOST_SCORES:
            self.log.add(self.compute(step))
            return
        began = time.monotonic()
        new = Recorded(step, tensors, lengths, self.device)
        new.fill(tensors)
        self.log.add(self.compute(new.inputs))
        self.record(key, new)
        state = f"; no more: {self.failed}" if self.failed else ""
        shapes = [tuple(tensors[name].shape) for name in ("pixels", "ids", "vision_index") if name in tensors]
        seconds = time.monotonic() - began
        self.note(f"recorded {len(self.recorded)}: {step['kind']} {shapes} in {seconds:.2f} s{state}")

    def record(self, key: tuple, new: "Recorded") -> None:
        """Records a step that was computed before with the same inputs."""
        torch.cuda.synchronize()
        began = time.monotonic()
        try:
            new.record(self.compute, self.pool)
        except Exception as error:
            self.failed = repr(error)
            torch.cuda.synchronize()
            return
        if key in self.recorded:
            self.replaced.append(self.recorded[key])
        self.recorded[key] = new
        if time.monotonic() - began > LONGEST_RECORDING:
            self.failed = f"recording took {time.monotonic() - began:.1f} s"

    def __str__(self):
        state = f", stopped: {self.failed}" if self.failed else ""
        return f"{self.computed} computed, {self.replays} replayed of {len(self.recorded)} shapes{state}"


class Recorded:
    """Inputs of one shape on the device, and the graph of the step that reads them."""

    def __init__(self, step: dict, tensors: dict, lengths: dict[str, int], device):
        self.space = {name: -(-int(length * ROOM) // 64) * 64 for name, length in lengths.items()}
        self.inputs, self.graph, self.counts = dict(step), None, None
        for name, value in tensors.items():
            shape = list(value.shape)
            if name in self.space:
                shape[0 if name == "frame_facts" else -1] = self.space[name]
            self.inputs[name] = torch.empty(shape, dtype=value.dtype, device=device)

    def fits(self, lengths: dict[str, int]) -> bool:
        return all(self.space[name] >= length for name, length in lengths.items())

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies the inputs of a step. The rest of lists has index 0, which no loss counts."""
        for name, value in tensors.items():
            room = self.inputs[name]
            if name in self.space:
                room.fill_(IGNORED if name == "frame_facts" else 0)
                room = room[: len(value)] if name == "frame_facts" else room[..., : value.shape[-1]]
            room.copy_(value, non_blocking=True)

    def record(self, compute, pool) -> None:
        """Records the step without computing it."""
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # it could free tensors of the GPU meanwhile
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self.counts = compute(self.inputs)
            finally:
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        self.graph = graph

    def replay(self, log: "CountsLog") -> None:
        self.graph.replay()
        log.add(self.counts)


class CountsLog:
    """Sums of what steps log, on the device, by name."""

    def __init__(self):
        self.sums: dict[tuple[str, ...], torch.Tensor] = {}

    def add(self, counts) -> None:
        """`counts`: (names, [2, names]), sums and the numbers of their summands."""
        names, values = counts
        if names in self.sums:
            self.sums[names].add_(values)
        else:
            self.sums[names] = values.clone()

    def take(self) -> dict[str, tuple[float, float]]:
        """name -> (sum, number) since the last call. Waits for the device."""
        out = defaultdict(lambda: (0.0, 0.0))
        for names, values in self.sums.items():
            for name, total, number in zip(names, *values.tolist(), strict=True):
                out[name] = out[name][0] + total, out[name][1] + number
        self.sums.clear()
        return dict(out)
