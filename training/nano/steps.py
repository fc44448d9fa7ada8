"""The optimizer steps of train_nano.py. On a GPU they are recorded as CUDA graphs, one for each shape of inputs,
because the host would take longer to launch the many small operations of a step than the GPU to compute them.
"""

import gc
import time
from collections import defaultdict

import torch

from moss_vl.training.nano.facts import IGNORED


ROOM = 1.25  # space of lists in a recorded step, relative to the first one


def is_list(name: str) -> bool:
    """Whether the last axis of a tensor of `collation.collate` ("frame_facts": the first) is a list of any length."""
    names = ("pads", "frame_facts", "learned", "targets", "weights", "answer", "answer_tasks")
    return name in names or name.startswith("points")


def list_length(name: str, tensor: torch.Tensor) -> int:
    return tensor.shape[0 if name == "frame_facts" else -1]


class EagerSteps:
    """Computes each step at once.

    Args:
        compute: (tensors of a step) -> what `CountsLog` adds; the whole step with its update.
        note: prints a line.
    """

    def __init__(self, compute, device, note):
        self.compute, self.device, self.log = compute, device, CountsLog()

    def __call__(self, step: dict) -> None:
        moved = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in step.items()
        }
        self.log.add(self.compute(moved))

    def __str__(self):
        return "all computed at once"


class GraphSteps:
    """Records a step as a CUDA graph when a shape occurs for the first time, and replays it for later steps.

    If recording fails, all further steps are computed at once.
    """

    def __init__(self, compute, device, note):
        self.compute, self.device, self.note, self.log = compute, device, note, CountsLog()
        self.recorded: dict[tuple, Recorded] = {}
        self.pool, self.failed = torch.cuda.graph_pool_handle(), None
        self.replays = 0
        self.dropped: list[Recorded] = []  # of too little space; freeing them would wait for the GPU

    def __call__(self, step: dict) -> None:
        tensors = {name: value for name, value in step.items() if isinstance(value, torch.Tensor)}
        lengths = {name: list_length(name, value) for name, value in tensors.items() if is_list(name)}
        fixed = tuple((name, value.shape) for name, value in tensors.items() if name not in lengths)
        key = (step["kind"], fixed, tuple(lengths))
        known = self.recorded.get(key)
        if known is not None and known.fits(lengths):
            known.fill(tensors)
            if known.graph is not None:
                self.replays += 1
                return known.replay(self.log)
        else:
            if known is not None:
                self.dropped.append(known)
                lengths = {name: max(length, known.space[name]) for name, length in lengths.items()}
            known = self.recorded[key] = Recorded(step, tensors, lengths, self.device)
            known.fill(tensors)
        began = time.monotonic()
        self.log.add(self.compute(known.inputs))
        computed = time.monotonic()
        if self.failed is None:
            try:
                known.record(self.compute, self.pool)
                took = f"{computed - began:.2f} s to launch, {time.monotonic() - computed:.2f} s to record"
                shapes = [
                    tuple(known.inputs[name].shape) for name in ("pixels", "ids", "vision_index") if name in step
                ]
                self.note(f"shape {len(self.recorded)}: {step['kind']} {shapes}, {took}")
            except Exception as error:
                known.graph, self.failed = None, repr(error)
                self.note(f"steps are not recorded: {self.failed}")
                torch.cuda.synchronize()

    def __str__(self):
        state = f"not recorded: {self.failed}" if self.failed else f"{self.replays} steps replayed"
        return f"{len(self.recorded)} shapes recorded, {len(self.dropped)} replaced, {state}"


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
