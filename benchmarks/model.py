"""Prefill, decode and peak memory over the length of a video:

    python benchmarks/model.py --frames 16 64 128 256 --json model.json

Compares, in alternating rounds of one run:
  ours             this package
  ours, bfloat16   the same in the second of two dtypes (`--dtype float32 bfloat16`)
  plain            the same weights in the plain implementation of plain.py, whose logits must be the same
  qwen3vl          transformers' Qwen3VL with the same vision encoder and self-attention layers; each frame is an
                   image, and all vision tokens are in its context
  qwen3vl video    the same as its checkpoints are: two frames per temporal patch, so half the patches and vision
                   tokens, and the frames as a video
  limit            the lower bound for any implementation of our model: the operations of a prefill at the rate of
                   this machine's matrix products; for a decode step the bytes of the weights, keys and values that
                   it reads at the read bandwidth

The weights are random. The prompt is one video of frames of --side pixels, with --tokens text tokens per frame, one of
which is its `image_pad`. "decode" is one call of the model, "generate" a token in the loop of `generate`. Peak memory
is that of all tensors besides weights and pixels, in a first pass that is not timed; "formula" is `prefill_bytes` of
memory.py. `--released` takes the configuration of the 11B model. `--clock cpu` counts the seconds in which this
process ran on any core, for machines that others use too; with `--threads 1` these are those of an idle machine.
"""

import argparse
import gc
import sys
from functools import partial
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.measuring import (
    Clock,
    allocation_peak,
    alternate,
    machine,
    product_rate,
    read_bandwidth,
    spread,
    summary,
    table,
    write_json,
)
from moss_vl.benchmarks.memory import prefill_bytes
from moss_vl.benchmarks.peers import Ours, Plain, Qwen3VL, Qwen3VLAsShipped, StepTimes
from moss_vl.benchmarks.random_models import (
    PAD,
    Prompt,
    add_clock_flag,
    add_model_flags,
    add_prompt_flags,
    make_clock,
    make_config,
    make_model,
    make_prompt,
)
from moss_vl.configuration_moss_vl import MossVLConfig


TOKEN = 5  # decoded in each step


# The limit


def encoder_operations(config: MossVLConfig, prompt: Prompt) -> int:
    """Floating-point operations of the encoder."""
    vision, patches = config.vision_config, prompt.frames * prompt.columns**2
    width, inner = vision.hidden_size, vision.intermediate_size
    block = 2 * patches * (4 * width * width + 2 * width * inner) + 4 * patches * prompt.columns**2 * width
    merged = 4 * width * (len(vision.deepstack_visual_indexes) + 1)
    return (
        2 * patches * 768 * width
        + vision.depth * block
        + 2 * (patches // 4) * merged * (merged + vision.out_hidden_size)
    )


def decoder_operations(config: MossVLConfig, prompt: Prompt) -> int:
    """Floating-point operations of the decoder, of attention only those for visible tokens."""
    text, length, vision = config.text_config, prompt.ids.shape[1], prompt.vision_tokens
    d, heads, kv = text.head_dim, text.num_attention_heads, text.num_key_value_heads
    pads = (prompt.ids[0] == PAD).cumsum(0)
    visible = int(pads.sum()) * (prompt.tokens_per_frame + 1)  # pairs of a row and a vision token
    total = 2 * text.hidden_size * text.vocab_size
    for index in range(text.num_hidden_layers):
        crosses = index in text.cross_attention_layers
        total += 2 * length * text.hidden_size * (2 * heads * d + 3 * text.intermediate_size)
        total += 2 * (vision if crosses else length) * text.hidden_size * 2 * kv * d
        total += 4 * heads * d * (visible if crosses else length * (length + 1) // 2)
    return total


def bytes_per_step(config: MossVLConfig, model, prompt: Prompt) -> tuple[int, int]:
    """Bytes that a decode step reads: weights of the decoder; keys and values of the text and of the visible vision
    tokens, without free space in their buffers."""
    text, size = config.text_config, model.lm_head.weight.element_size()
    weights = sum(
        parameter.numel() for parameter in [*model.language_model.layers.parameters(), *model.lm_head.parameters()]
    )
    crossing = len(text.cross_attention_layers)
    seen = int((prompt.ids[0] == PAD).sum()) * (prompt.tokens_per_frame + 1)
    tokens = crossing * seen + (text.num_hidden_layers - crossing) * prompt.ids.shape[1]
    return weights * size, tokens * 2 * text.num_key_value_heads * text.head_dim * size


# Measuring


@torch.no_grad()
def first_pass(implementations: dict, prompt: Prompt, device: str) -> tuple[dict[str, int], list[float]]:
    """Warms up.

    Returns:
        name -> peak bytes of a prefill; and the largest differences between our logits and those of the plain
        implementation, in their standard deviations, after the prompt and after one more token.

    Raises:
        SystemExit: if these are too large for the same weights.
    """
    token, peaks, logits = torch.full((1, 1), TOKEN, device=device), {}, {}
    for name, one in implementations.items():
        one.prepare(prompt)
        gc.collect()
        first = []
        peaks[name] = allocation_peak(lambda one=one, first=first: first.append(one.prefill()), device)
        logits[name] = [*first, one.decode(token)]
        one.forget()
    if "plain" not in logits:
        return peaks, []
    pairs = zip(logits["ours"], logits["plain"], strict=True)
    different = [((one - other).abs().max() / other.std()).item() for one, other in pairs]
    if max(different) > (0.01 if prompt.pixels.dtype == torch.float32 else 0.3):
        raise SystemExit(f"The plain implementation has other logits: they differ by {different} standard deviations.")
    return peaks, different


@torch.no_grad()
def measure(implementations: dict, device: str, args, clock: Clock) -> dict:
    """name -> part (prefill, encoder, decoder, decode, generate) -> seconds of each round."""

    def seconds_of(implementation) -> dict[str, float]:
        seconds = {"prefill": clock.time(implementation.prefill)}
        if isinstance(implementation, Ours):
            seconds["encoder"] = implementation.encoder_seconds
            seconds["decoder"] = seconds["prefill"] - seconds["encoder"]
        token = torch.full((1, 1), TOKEN, device=device)
        steps = [clock.time(lambda: implementation.decode(token)) for _ in range(args.steps)]
        seconds["decode"] = summary(steps)["median"]
        if implementation.generate is not None:
            times = StepTimes(clock)
            implementation.generate(token.expand(1, args.steps + 1), args.steps + 1, times)
            seconds["generate"] = summary(times.seconds())["median"]
        implementation.forget()
        return seconds

    calls = {name: partial(seconds_of, one) for name, one in implementations.items()}
    return alternate(calls, args.rounds, warm_up=False)


def make_implementations(args, config: MossVLConfig, clock: Clock) -> dict:
    dtype, *others = (getattr(torch, name) for name in args.dtype)
    model = make_model(config, args.device, dtype)
    made = {"ours": Ours(model, clock)}
    made |= {f"ours, {str(other)[6:]}": Ours(make_model(config, args.device, other), clock) for other in others}
    peers = {
        "plain": lambda: Plain(model),
        "qwen3vl": lambda: Qwen3VL(config, args.device, dtype),
        "qwen3vl video": lambda: Qwen3VLAsShipped(config, args.device, dtype),
    }
    return made | {name: make() for name, make in peers.items() if name not in args.without}


def run(args, result: dict) -> None:
    """Measures all lengths, adds a row for each to `result`, and prints the tables."""
    dtype, clock = getattr(torch, args.dtype[0]), make_clock(args)
    config = make_config(args)
    implementations = make_implementations(args, config, clock)
    model = implementations["ours"].model
    rate, bandwidth = product_rate(clock, args.device, dtype), read_bandwidth(clock, args.device, dtype)
    result["rates"] = {"products": rate, "reading": bandwidth, "parameters": model.num_parameters()}
    print(
        f"\n{args.dtype[0]}: products {rate / 1e9:.0f} GFLOP/s, reading {bandwidth / 1e9:.1f} GB/s, "
        f"{model.num_parameters() / 1e6:.1f} M parameters",
        flush=True,
    )
    for frames in args.frames:
        prompt = make_prompt(frames, args.side, args.tokens, args.device, dtype)
        peaks, different = first_pass(implementations, prompt, args.device)
        sizes = (frames, prompt.columns, prompt.columns, prompt.ids.shape[1])
        weights, caches = bytes_per_step(config, model, prompt)
        row = {
            "dtype": args.dtype[0],
            "frames": frames,
            "vision tokens": prompt.vision_tokens,
            "text tokens": prompt.ids.shape[1],
            "differences": different,
            "seconds": measure(implementations, args.device, args, clock),
            "memory": peaks,
            "formula": prefill_bytes(config, *sizes, dtype, device=args.device)["peak"],
            "limit": {
                "encoder": encoder_operations(config, prompt) / rate,
                "decoder": decoder_operations(config, prompt) / rate,
                "decode": (weights + caches) / bandwidth,
                "bytes of weights": weights,
                "bytes of caches": caches,
            },
        }
        result["rows"].append(row)
        write_json(args.json, result)
        print(f"{frames} frames measured", flush=True)
    for title, text in tables(result["rows"]).items():
        print(f"\n{title}\n\n{text}", flush=True)


# Tables, of rows of one run


def tables(rows: list[dict]) -> dict[str, str]:
    """Title -> table."""
    return {
        "Prefill, s: median (least to most)": prefill_table(rows),
        "Decode, ms per token": decode_table(rows, "decode"),
        "The loop of `generate`, ms per token": decode_table(rows, "generate"),
        "Peak memory of prefill, MB": memory_table(rows),
    }


def names_of(rows: list[dict], part: str) -> list[str]:
    """The implementations that have a part, ours first."""
    return [name for name, seconds in rows[0]["seconds"].items() if part in seconds]


def median(row: dict, name: str, part: str) -> float:
    return summary(row["seconds"][name][part])["median"]


def times_ours(row: dict, names: list[str], part: str) -> list[str]:
    """Seconds of each peer divided by ours."""
    return [f"{median(row, name, part) / median(row, 'ours', part):.2f}" for name in names[1:]]


def over_limit(row: dict, part: str, limit: str) -> str:
    """Our seconds divided by the limit."""
    return f"{median(row, 'ours', part) / row['limit'][limit]:.2f}"


def ratios(names: list[str]) -> list[str]:
    return [f"{name} / ours" for name in names[1:]]


def prefill_table(rows: list[dict]) -> str:
    names, counts = names_of(rows, "prefill"), ("frames", "vision tokens", "text tokens")
    parts = ("ours, encoder", "over the limit", "ours, rest", "over the limit")
    lines = [
        (
            *(row[name] for name in counts),
            *(spread(row["seconds"][name]["prefill"]) for name in names),
            *times_ours(row, names, "prefill"),
            spread(row["seconds"]["ours"]["encoder"]),
            over_limit(row, "encoder", "encoder"),
            spread(row["seconds"]["ours"]["decoder"]),
            over_limit(row, "decoder", "decoder"),
        )
        for row in rows
    ]
    return table((*counts, *names, *ratios(names), *parts), lines)


def decode_table(rows: list[dict], part: str) -> str:
    names, lines = names_of(rows, part), []
    for row in rows:
        weights, caches = row["limit"]["bytes of weights"], row["limit"]["bytes of caches"]
        lines.append(
            (
                row["frames"],
                *(spread(row["seconds"][name][part], 1e3) for name in names),
                *times_ours(row, names, part),
                f"{1e3 * row['limit']['decode']:.2f}",
                over_limit(row, part, "decode"),
                f"{caches / 1e6:.0f} of {(weights + caches) / 1e6:.0f}",
            )
        )
    return table(("frames", *names, *ratios(names), "limit", "ours over the limit", "MB of caches"), lines)


def memory_table(rows: list[dict]) -> str:
    names = names_of(rows, "prefill")
    lines = [
        (
            row["frames"],
            *(f"{row['memory'][name] / 1e6:.0f}" for name in names),
            *(f"{row['memory'][name] / row['memory']['ours']:.2f}" for name in names[1:]),
            f"{row['formula'] / 1e6:.0f}",
            f"{row['formula'] / row['memory']['ours']:.2f}",
        )
        for row in rows
    ]
    return table(("frames", *names, *ratios(names), "formula", "formula / ours"), lines)


# Command line


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--released", action="store_true", help="the 11B configuration; the sizes have no effect")
    add_model_flags(parser)
    add_prompt_flags(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded per round; their median counts")
    parser.add_argument("--without", nargs="+", choices=("plain", "qwen3vl", "qwen3vl video"), default=[])
    add_clock_flag(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args(given)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    result = {
        "machine": machine(args.device, args.threads),
        "options": {k: v for k, v in vars(args).items() if k != "json"},
        "rows": [],
    }
    print(result["machine"])
    run(args, result)


if __name__ == "__main__":
    main()
