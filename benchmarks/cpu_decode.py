"""What a decode step on a CPU takes, and what of it is matrix products:

    python benchmarks/cpu_decode.py --frames 16 128 --compiled --json cpu_decode.json

Compares, in alternating steps of one run:
  step         a decode step of this package
  compiled     the same after `compile_decode()`
  int8         the same with the decoder's linear layers in 8 bits (torchao, weights alone)
  products     the linear layers of such a step alone, one call each
  fused        the same with q, k and v in one matrix, and gate and up in another
  limit        the bytes of weights, keys and values that a step reads, at the read bandwidth of this machine

Weights are random. int8 needs torchao (requirements-quantize.txt).
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.host import steps_of
from moss_vl.benchmarks.measuring import Clock, machine, read_bandwidth, spread, summary, table, write_json
from moss_vl.benchmarks.model import bytes_per_step
from moss_vl.benchmarks.random_models import (
    add_clock_flag,
    add_model_flags,
    add_prompt_flags,
    make_config,
    make_model,
    make_prompt,
)
from moss_vl.modeling_moss_vl import CACHE


def decoding(model, prompt) -> Callable[[], None]:
    """A decode step after the prompt."""
    cache = model(prompt.ids, pixel_values=prompt.pixels, grid_thw=prompt.grid, use_cache=True)[CACHE]
    return steps_of(model, cache)


def in_8_bits(model):
    """The model with the decoder's linear layers in 8 bits. Embeddings and vision encoder stay as they are."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.language_model.layers, Int8WeightOnlyConfig(version=2))
    quantize_(model.lm_head, Int8WeightOnlyConfig(version=2))
    return model


def weights_of_step(model, fused: bool) -> list[torch.Tensor]:
    """The matrices of a step's products in their order. Cross-attention computes no keys and values in a step."""
    weights = []
    for layer in model.language_model.layers:
        if hasattr(layer, "self_attn"):
            attention, first = layer.self_attn, ("q_proj", "k_proj", "v_proj")
        else:
            attention, first = layer.cross_attn, ("q_proj",)
        groups = [
            [getattr(attention, name).weight for name in first],
            [attention.o_proj.weight],
            [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight],
            [layer.mlp.down_proj.weight],
        ]
        weights += [torch.cat(group) for group in groups] if fused else sum(groups, [])
    return [*weights, model.lm_head.weight]


def products(weights: list[torch.Tensor]) -> Callable[[], None]:
    rows = {weight.shape[1]: torch.randn(1, 1, weight.shape[1], dtype=weight.dtype) for weight in weights}

    def run() -> None:
        for weight in weights:
            F.linear(rows[weight.shape[1]], weight)

    return run


def make_calls(args, frames: int, dtype: torch.dtype, result: dict) -> dict[str, Callable[[], None]]:
    """name -> one step. Adds the bytes of a step to `result`."""
    config, prompt = make_config(args), make_prompt(frames, args.side, args.tokens, "cpu", dtype)
    make = partial(make_model, config, "cpu", dtype)
    model = make()
    weights, caches = bytes_per_step(config, model, prompt)
    result |= {"bytes of weights": weights, "bytes of caches": caches}
    calls = {
        "step": decoding(model, prompt),
        "products": products(weights_of_step(model, False)),
        "fused": products(weights_of_step(model, True)),
    }
    if args.int8:
        calls["int8"] = decoding(in_8_bits(make()), prompt)
    if args.compiled:
        compiled = make()
        compiled.compile_decode()
        calls["compiled"] = decoding(compiled, prompt)
    return calls


@torch.no_grad()
def measure(calls: dict[str, Callable[[], None]], clock: Clock, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, in alternating rounds after three that are not counted."""
    seconds = {name: [] for name in calls}
    for number in range(-3, rounds):
        for name, call in calls.items():
            value = clock.time(call)
            if number >= 0:
                seconds[name].append(value)
    return seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[16])
    add_model_flags(parser)
    add_prompt_flags(parser)
    add_clock_flag(parser)
    parser.set_defaults(vision_depth=4)  # a step does not use the encoder
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compiled", action="store_true", help="also compiled, which takes minutes")
    parser.add_argument("--no-int8", dest="int8", action="store_false")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock, rows, results = Clock("cpu", args.clock == "cpu"), [], []
    for name in args.dtype:
        bandwidth = read_bandwidth(clock, "cpu", getattr(torch, name))
        for frames in args.frames:
            result = {"dtype": name, "frames": frames, "reading": bandwidth}
            result["seconds"] = measure(make_calls(args, frames, getattr(torch, name), result), clock, args.rounds)
            result["limit"] = limit = (result["bytes of weights"] + result["bytes of caches"]) / bandwidth
            results.append(result)
            for call, seconds in result["seconds"].items():
                rows.append((name, frames, call, spread(seconds, 1e3), f"{summary(seconds)['median'] / limit:.2f}"))
            rows.append((name, frames, "limit", f"{limit * 1e3:.2f}", "1.00"))
            print(rows[-1], flush=True)
            write_json(args.json, {"machine": machine("cpu", torch.get_num_threads()), "results": results})
    print(table(("dtype", "frames", "", "ms", "over the limit"), rows))


if __name__ == "__main__":
    main()
