"""Shared by the benchmarks: clocks, alternating rounds, the limits of this machine, peak memory, tables and JSON."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parent.parent


class Clock:
    """Measures seconds, on CUDA by events of the device; with `cpu_time` those in which the process ran on a core, the
    sum of all cores."""

    def __init__(self, device: str, cpu_time: bool = False):
        self.cuda = device.startswith("cuda")
        self.seconds = time.process_time if cpu_time else time.perf_counter

    def now(self):
        if not self.cuda:
            return self.seconds()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin, end) -> float:
        if not self.cuda:
            return end - begin
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000

    def time(self, call: Callable) -> float:
        begin = self.now()
        call()
        return self.between(begin, self.now())


def alternate(
    calls: dict[str, Callable[[], dict[str, float]]], rounds: int, warm_up: bool = True
) -> dict[str, dict[str, list[float]]]:
    """Runs all calls once per round, each round starting with the next one.

    Args:
        calls: name -> function that returns the seconds of its parts.
        warm_up: whether a round that is not counted comes first.

    Returns:
        name -> part -> seconds of each round.
    """
    names, seconds = list(calls), {name: {} for name in calls}
    for number in range(-1 if warm_up else 0, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for part, value in calls[name]().items():
                if number >= 0:
                    seconds[name].setdefault(part, []).append(value)
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def spread(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """The median, with the least and the most in brackets."""
    low, middle, high = (
        f"{scale * value:.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def read_bandwidth(clock: Clock, device: str, dtype: torch.dtype, rounds: int = 7) -> float:
    """Bytes per second of reading a large tensor once, in the fastest of a few ways."""
    size = 1 << (30 if device.startswith("cuda") else 28)  # bytes, much larger than any cache
    matrix = torch.ones(size // 4096 // dtype.itemsize, 4096, dtype=dtype, device=device)
    vector = torch.ones(4096, dtype=dtype, device=device)
    words = matrix.view(torch.int64 if device == "cpu" else torch.float32)
    ways = (lambda: matrix @ vector, lambda: words.sum(), lambda: matrix.sum(), lambda: words.amax())
    for way in ways:
        way()
    return size / min(clock.time(way) for _ in range(rounds) for way in ways)


def product_rate(clock: Clock, device: str, dtype: torch.dtype, rounds: int = 5) -> float:
    """Floating-point operations per second of the fastest of a few matrix products."""
    best = 0.0
    sizes = (1024, 2048) if device == "cpu" else (4096, 8192)
    for size in sizes:
        for rows in (size, 4 * size):
            a = torch.randn(rows, size, device=device).to(dtype)
            b = torch.randn(size, size, device=device).to(dtype).t()
            a @ b
            best = max(best, 2 * rows * size * size / min(clock.time(lambda: a @ b) for _ in range(rounds)))
    return best


def allocation_peak(call: Callable, device: str = "cpu") -> int:
    """Peak bytes of the tensors that `call` allocates, as recorded by torch."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def resident_peak() -> int:
    """Peak resident bytes of this process since `reset_resident_peak` (VmHWM of Linux)."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def reset_resident_peak() -> int:
    """Resets the peak to the bytes that are resident now, and returns them."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_peak()


def machine(device: str, threads: int) -> dict:
    """The machine and versions of a measurement."""
    import transformers

    name = torch.cuda.get_device_name() if device.startswith("cuda") else processor_name()
    return {"device": name, "threads": threads, "torch": torch.__version__, "transformers": transformers.__version__}


def processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "CPU",
    )


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A table in Markdown."""
    cells = [head, tuple("---" for _ in head), *(tuple(map(str, row)) for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def write_json(path: Path | None, content) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
