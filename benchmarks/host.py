"""Host time of a decode step, which bounds the speed of large models on GPUs:

    python benchmarks/host.py --json host.json

Models of width 64 compute nearly nothing, so their step takes the time that the host needs to issue it. Compares, in
alternating steps of one run, by CPU time of one thread:
  ours      this package, 48 layers, 12 of them cross-attention, after 16 frames
  compiled  the same after `compile_decode()`
  llama     transformers' Llama with 48 layers
  qwen3vl   the text model of transformers' Qwen3VL with 36 layers, as many as our self-attention layers
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.measuring import machine, spread, summary, table, write_json
from moss_vl.benchmarks.model import add_model_flags, make_config, make_prompt, qwen3vl_config
from moss_vl.modeling_moss_vl import CACHE, MossVLForConditionalGeneration


LLAMA_LAYERS = 48


def steps_of(model, cache, **kwargs) -> Callable[[], None]:
    """A function that adds one token to a cache."""
    token = torch.tensor([[5]])
    return lambda: model(token, **{CACHE: cache}, use_cache=True, **kwargs)


def ours(args, dtype: torch.dtype, compiles: bool) -> Callable[[], None]:
    model = MossVLForConditionalGeneration._from_config(make_config(args), dtype=dtype).eval()
    prompt = make_prompt(16, 64, 4, "cpu", dtype)
    cache = model(prompt.ids, pixel_values=prompt.pixels, grid_thw=prompt.grid, use_cache=True)[CACHE]
    if compiles:
        model.compile_decode()
    return steps_of(model, cache)


def llama(args, dtype: torch.dtype) -> Callable[[], None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=LLAMA_LAYERS,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
    )
    model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    return steps_of(model, model(torch.arange(64)[None], use_cache=True)[CACHE])


def qwen3vl(args, dtype: torch.dtype) -> Callable[[], None]:
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration._from_config(qwen3vl_config(make_config(args)), dtype=dtype).eval()
    return steps_of(model, model(input_ids=torch.arange(64)[None], use_cache=True)[CACHE])


def measure(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each step, in alternating rounds after ten that are not counted."""
    seconds = {name: [] for name in calls}
    for number in range(-10, rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number >= 0:
                seconds[name].append(time.process_time() - start)
    return seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.set_defaults(layers=48, width=64, heads=8, kv_heads=2, head_dim=16, vision_depth=4, vision_width=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--compiled", action="store_true", help="also compiled, which takes minutes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    layers = {"ours": args.layers, "llama": LLAMA_LAYERS, "qwen3vl": args.layers - args.layers // 4}
    calls = {"ours": ours(args, dtype, False), "llama": llama(args, dtype), "qwen3vl": qwen3vl(args, dtype)}
    if args.compiled:
        calls["compiled"], layers["compiled"] = ours(args, dtype, True), args.layers
    seconds = measure(calls, args.rounds)
    per_layer = {name: [value / layers[name] for value in values] for name, values in seconds.items()}
    base = summary(per_layer["llama"])["median"]
    rows = [
        (
            name,
            layers[name],
            spread(seconds[name], 1e3),
            f"{summary(values)['median'] * 1e6:.0f}",
            f"{summary(values)['median'] / base:.2f}",
        )
        for name, values in per_layer.items()
    ]
    print(table(("", "layers", "step, ms of CPU time", "us per layer", "per layer / llama"), rows))
    write_json(args.json, {"machine": machine("cpu", 1), "dtype": args.dtype, "seconds": seconds})


if __name__ == "__main__":
    main()
