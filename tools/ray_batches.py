"""`infer.py --batch --ray`: answers queries on the machines of a Ray cluster, with Ray Data.

Each worker is an actor that loads the checkpoint once, and answers groups of lines, which `map_batches` gives to it.
The driver, the process of the command, writes the results as they come. If a worker dies, Ray starts another one and
gives the group to it again. A `Ledger` beside the driver knows which lines were being answered at that time: they are
repeated one by one, and a line during which workers die again and again gets an error.
"""

import argparse
import json
import logging
import math
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from moss_vl.tools.batch_answers import LineAnswers, batch_size_of
from moss_vl.tools.command_line import above_0, at_least, message_of


TRIES = 3  # how many workers may die while they answer one line, or one worker while it loads the checkpoint
GROUP_BATCHES = 2  # batches of the model in a group of lines, which a worker answers before it reports


# the command line


def add_ray_arguments(group) -> None:
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="",
        help="answer them on a Ray cluster: HOST:PORT, or local, which starts Ray on this machine (default: the "
        "cluster of RAY_ADDRESS or of this machine, else local)",
    )
    group.add_argument(
        "--ray-workers",
        metavar="N",
        type=at_least(int, 1),
        help="models on the cluster (default: one per GPU or machine)",
    )
    group.add_argument(
        "--ray-gpus", metavar="N", type=above_0, help="GPUs of a worker (default: 1 if the cluster has GPUs)"
    )


def check_ray_usage(parser: argparse.ArgumentParser, args) -> None:
    """Exits if options contradict each other."""
    for name in ("ray_workers", "ray_gpus"):
        if getattr(args, name) is not None and args.ray is None:
            parser.error(f"--{name.replace('_', '-')} goes with --ray")
    if (args.ray or "").startswith("ray://"):
        parser.error("--ray takes no ray:// address: run the command on a machine of the cluster, with HOST:PORT")
    if args.ray_gpus is not None and args.ray_gpus > 1 and args.ray_gpus % 1:
        parser.error(f"--ray-gpus must be a whole number if it is above 1, got {args.ray_gpus}")
    if args.ray_gpus is not None and args.device == "cpu":
        parser.error("--ray-gpus has no effect with --device cpu")


# the driver


def answer_with_ray(args, lines: list[tuple[int, str]]) -> Iterator[dict]:
    """Yields the results of (index, line), not in order.

    Raises:
        ImportError: without Ray.
        ValueError: if the cluster has too few machines or GPUs.
        OSError: if no cluster can be reached, or the workers cannot load the checkpoint.
    """
    with _cluster(args.ray) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        plan = plan_workers(nodes, args.ray_workers, 0 if args.device == "cpu" else args.ray_gpus)
        group = min(
            GROUP_BATCHES * batch_size_of(args), math.ceil(len(lines) / plan.workers)
        )  # a short file is shared
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        ledger = ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote()
        data = ray.data.from_items(
            [{"index": index, "line": line} for index, line in lines],
            override_num_blocks=math.ceil(len(lines) / group),
        )
        answers = data.map_batches(
            Worker,
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=plan.workers, max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(_arguments_for_workers(args), ledger, plan.threads),
            memory=1,  # by default, Ray Data reserves gigabytes per CPU
            **plan.resources,
        )
        try:
            for batch in answers.iter_batches(batch_size=None, prefetch_batches=0):
                yield from _results_of(batch["result"])
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise OSError(f"the workers on the Ray cluster failed: {reason}") from error


@dataclass(frozen=True)
class Plan:
    """How many workers there are, the threads of each, and the resources that Ray reserves for it."""

    workers: int
    threads: int
    resources: dict


def plan_workers(nodes: list[dict], workers: int | None, gpus: float | None) -> Plan:
    """Shares the machines of a cluster between workers.

    Args:
        nodes: the resources of each machine, as Ray names them ("CPU", "GPU").
        workers: how many; None for as many as there are GPUs for, or without GPUs for one per machine.
        gpus: GPUs of each; None for 1 if there are any, else 0.

    Raises:
        ValueError: if the cluster has no space for them.
    """
    nodes = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    if gpus is None:
        gpus = int(any(on_node for _, on_node in nodes))
    if gpus:
        spaces = [min(cpus, int(on_node // gpus if gpus > 1 else on_node * (1 // gpus))) for cpus, on_node in nodes]
    else:
        spaces = [cpus for cpus, _ in nodes]
    used = [(cpus, space) for (cpus, _), space in zip(nodes, spaces, strict=True) if space]
    most = sum(spaces)
    wanted = (most if gpus else len(used)) if workers is None else workers
    if not 0 < wanted <= most:
        each = f"{gpus:g} GPUs" if gpus else "a CPU"
        total_cpus, total_gpus = map(sum, zip(*nodes, strict=True)) if nodes else (0, 0)
        raise ValueError(
            f"--ray-workers {max(1, wanted)}: the Ray cluster has space for {most} workers with {each} each: its "
            f"{len(nodes)} machines have {total_cpus} CPUs and {total_gpus} GPUs; change --ray-workers or --ray-gpus, "
            "or add machines"
        )
    if gpus:
        return Plan(wanted, min(max(1, cpus // space) for cpus, space in used), {"num_gpus": gpus})
    share = max(1, min(cpus for cpus, _ in used) // math.ceil(wanted / len(used)))
    return Plan(wanted, share, {"num_cpus": share})


@contextmanager
def _cluster(address: str):
    """The module ray, connected to a cluster whose workers import the code of this process."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"--ray needs Ray (pip install -r requirements-ray.txt): {error}") from error
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        # Ray prints to stdout what workers die of. The notes of the results say it, and the logs of Ray.
        stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        stack.callback(lambda: [logger.setLevel(level) for logger, level in zip(loggers, levels, strict=True)])
        stack.callback(ray.shutdown)
        _connect(ray, address)
        loggers[1].setLevel(logging.CRITICAL)
        _configure(ray.data.DataContext.get_current())
        yield ray


def _connect(ray, address: str) -> None:
    """Connects to a cluster, or starts one, and sends it the code."""
    wanted = address or os.environ.get("RAY_ADDRESS", "")
    host, _, port = wanted.rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()  # Ray itself tries for minutes
        with tempfile.TemporaryDirectory(prefix="moss-vl-") as folder:
            environment = {"py_modules": [str(copy_package(Path(folder)))]}
            with _environment({"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}):
                ray.init(
                    address or None,
                    runtime_env=environment,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise OSError(f"no Ray cluster at {wanted or 'this machine'} (--ray): {message_of(error)}") from error


def _configure(context) -> None:
    """Sets what Ray Data does in this run."""
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a group of long videos may take long
    context.max_consecutive_actor_init_deaths = TRIES - 1


@contextmanager
def _environment(defaults: dict[str, str]):
    """Sets environment variables that are not set, for the processes that are started meanwhile."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def copy_package(folder: Path) -> Path:
    """Copies the code of this process into `folder`, in the form of the installed package: a megabyte that Ray sends
    to all machines. So they run the same code, whether and whatever version they have installed."""
    import moss_vl

    (root,), package = map(Path, moss_vl.__path__), folder / "moss_vl"
    (package / "tools").mkdir(parents=True)
    for file in (*root.glob("*.py"), *root.glob("*.json"), Path(moss_vl.__file__)):
        if file.name != "setup.py" and (file.name != "__init__.py" or file == Path(moss_vl.__file__)):
            shutil.copyfile(file, package / file.name)
    for file in (root / "tools").glob("*.py"):
        shutil.copyfile(file, package / "tools" / file.name)
    return package


def _arguments_for_workers(args) -> argparse.Namespace:
    """The arguments with absolute paths, as workers run in other folders."""
    checkpoint = os.path.abspath(args.checkpoint) if os.path.exists(args.checkpoint) else args.checkpoint
    return argparse.Namespace(**{**vars(args), "batch": args.batch.absolute(), "checkpoint": checkpoint})


def _results_of(rows) -> Iterator[dict]:
    """The results in what a worker returns. Tells the user its notes, and raises OSError if the worker gave up."""
    from tqdm import tqdm

    for kind, content in map(json.loads, rows):
        if kind == "failure":
            raise OSError(content)
        if kind == "note":
            tqdm.write(f"infer.py: {content}", file=sys.stderr)
        else:
            yield content


# beside the driver


class Ledger:
    """An actor that knows which lines the workers have begun. It outlives them.

    A line that was begun and not ended when its group is taken again was being answered when its worker died.
    """

    def __init__(self):
        self.begun, self.deaths, self.results, self.loading = set(), Counter(), {}, Counter()

    def take(self, indices: list[int]) -> list[tuple[int, dict | None]]:
        """For each line of a group, how many workers died while they answered it, and its result if it has one."""
        died = self.begun.intersection(indices)
        self.deaths.update(died)
        self.begun -= died
        return [(self.deaths[index], self.results.get(index)) for index in indices]

    def begin(self, indices: list[int]) -> None:
        self.begun.update(indices)

    def end(self, indices: list[int], result: dict | None = None) -> None:
        """Ends lines. `result` is kept: that of a line of a group that may be taken again."""
        self.begun.difference_update(indices)
        if result is not None:
            self.results[result["index"]] = result

    def begin_loading(self, worker: str) -> int:
        """How often the process of a worker died while it loaded the checkpoint. Ray starts it again each time."""
        self.loading[worker] += 1
        return self.loading[worker] - 1

    def end_loading(self, worker: str) -> None:
        self.loading[worker] = 0


# on the machines of the cluster


class Worker:
    """An actor that loads the checkpoint once, and answers groups of lines.

    If loading fails, each group gets the reason in place of results: Ray would try it again for ever.
    """

    def __init__(self, args, ledger, threads: int):
        import ray
        import torch

        self.ledger, self.failure = ledger, None
        torch.set_num_threads(threads)
        me, host = ray.get_runtime_context().get_actor_id(), socket.gethostname()
        if self._ask("begin_loading", me) >= TRIES:
            self.failure = f"{TRIES} workers on {host} died while they loaded {args.checkpoint}; is memory short?"
        else:
            try:
                from moss_vl.infer import load

                self.answers = LineAnswers(args, *load(args))
            except Exception as error:
                self.failure = f"a worker on {host} cannot load {args.checkpoint}: {message_of(error)}"
        self._ask("end_loading", me)

    def __call__(self, group: dict) -> dict:
        if self.failure is not None:
            return {"result": [json.dumps(("failure", self.failure))]}
        lines = list(zip(group["index"].tolist(), group["line"].tolist(), strict=True))
        try:
            rows = self._answer(lines)
        except RuntimeError as error:  # the device is broken: only another process can use it again
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        return {"result": list(map(json.dumps, rows))}

    def _answer(self, lines: list[tuple[int, str]]) -> list[tuple[str, object]]:
        """The results of lines as ("result", dict), after a ("note", text) to the user if a worker died."""
        indices = [index for index, _ in lines]
        known = self._ask("take", indices)
        if not any(deaths for deaths, _ in known):
            self._ask("begin", indices)
            results = list(self.answers(lines))
            self._ask("end", indices)
            return [("result", result) for result in results]
        rows = [("note", f"a worker died; queries {indices[0]} to {indices[-1]} are answered again, one by one")]
        for line, (deaths, result) in zip(lines, known, strict=True):
            rows.append(("result", result or self._answer_alone(line, deaths)))
        return rows

    def _answer_alone(self, line: tuple[int, str], deaths: int) -> dict:
        if deaths >= TRIES:
            return self.answers.refuse(line, f"{deaths} workers died while they answered this query")
        self._ask("begin", [line[0]])
        [result] = self.answers([line])
        self._ask("end", [line[0]], result)
        return result

    def _ask(self, method: str, *arguments):
        import ray

        return ray.get(getattr(self.ledger, method).remote(*arguments))
