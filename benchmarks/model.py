"""Prefill, decode and peak memory over the length of a video:

    python benchmarks/model.py --frames 16 64 128 256 --json model.json

Compares, in alternating rounds of one run:
  ours      this package
  plain     the same weights in the plain implementation of plain.py, whose logits must be the same
  qwen3vl   transformers' Qwen3VL with the same vision encoder and self-attention layers, on the same frames; all
            vision tokens are in its context
  limit     the lower bound for any implementation: the operations of a prefill at the rate of this machine's matrix
            products; for a decode step the bytes of weights and caches at its read bandwidth

The weights are random. The prompt is one video of frames of --side pixels, with --tokens text tokens per frame, one of
which is its `image_pad`. Peak memory is that of all tensors besides weights and pixels.
"""

import argparse
import gc
import sys
from dataclasses import dataclass
from functools import partial
from inspect import signature
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
from moss_vl.benchmarks.plain import PlainMossVL
from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.modeling_moss_vl import CACHE, MossVLForConditionalGeneration


VOCABULARY, PAD, START, END = 1000, 990, 992, 993
WORDS = 900  # smaller ids are words


@dataclass(frozen=True)
class Prompt:
    """A text with one video: pixels [P, values], ids [1, T], `columns` x `columns` patches per frame."""

    frames: int
    columns: int
    pixels: torch.Tensor
    ids: torch.Tensor

    @property
    def grid(self) -> list[list[int]]:
        return [[self.frames, self.columns, self.columns]]

    @property
    def tokens_per_frame(self) -> int:
        """Without the separator."""
        return self.columns**2 // 4

    @property
    def vision_tokens(self) -> int:
        return self.frames * (self.tokens_per_frame + 1)


def make_prompt(frames: int, side: int, tokens: int, device: str, dtype: torch.dtype) -> Prompt:
    generator, columns = torch.Generator().manual_seed(0), side // 16
    ids = torch.randint(0, WORDS, (1, frames * tokens), generator=generator)
    ids[:, tokens - 1 :: tokens] = PAD
    pixels = torch.randn(frames * columns**2, 768, generator=generator)
    return Prompt(frames, columns, pixels.to(device, dtype), ids.to(device))


def make_config(args) -> MossVLConfig:
    text, vision = sizes(args)
    ids = {"image_token_id": PAD, "video_token_id": 991, "vision_start_token_id": START, "vision_end_token_id": END}
    return MossVLConfig(text_config={"vocab_size": VOCABULARY, **text}, vision_config=vision, **ids)


def sizes(args) -> tuple[dict, dict]:
    """The flags of `add_model_flags` as arguments of the text and the vision configuration."""
    text = {
        "hidden_size": args.width,
        "intermediate_size": 3 * args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": sections(args.head_dim)},
    }
    vision = {
        "depth": args.vision_depth,
        "hidden_size": args.vision_width,
        "intermediate_size": 4 * args.vision_width,
        "num_heads": args.vision_width // 64,
        "out_hidden_size": args.width,
        "deepstack_visual_indexes": [1, args.vision_depth // 2],
    }
    return text, vision


def sections(head_dim: int) -> list[int]:
    """`mrope_section`: frequencies for t, h, w that sum to head_dim / 2."""
    third = head_dim // 6
    return [head_dim // 2 - 2 * third, third, third]


# Implementations: `prefill` returns the logits [1, 1, vocab] of the last token, `decode` those after one more token


class Ours:
    def __init__(self, model, clock: Clock):
        self.model, self.clock = model, clock
        self.encoder_start, self.encoder_seconds = None, 0.0  # of the last prefill
        model.model.visual.register_forward_pre_hook(self._start_encoder)
        model.model.visual.register_forward_hook(self._end_encoder)

    def _start_encoder(self, *args) -> None:
        self.encoder_start = self.clock.now()

    def _end_encoder(self, *args) -> None:
        self.encoder_seconds = self.clock.between(self.encoder_start, self.clock.now())

    def prefill(self, prompt: Prompt) -> torch.Tensor:
        self.cache = None
        out = self.model(
            prompt.ids, pixel_values=prompt.pixels, grid_thw=prompt.grid, use_cache=True, logits_to_keep=1
        )
        self.cache = out[CACHE]
        return out.logits

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        return self.model(token, **{CACHE: self.cache}).logits


class Plain:
    def __init__(self, model):
        self.plain = PlainMossVL(model)

    def prefill(self, prompt: Prompt) -> torch.Tensor:
        self.plain.past = {}
        return self.plain.prefill(prompt.ids, prompt.pixels, prompt.frames, prompt.columns, prompt.columns)

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        return self.plain.decode(token)


class Qwen3VL:
    """transformers' Qwen3VL with the sizes of `config`, without its cross-attention layers."""

    def __init__(self, config: MossVLConfig, device: str, dtype: torch.dtype):
        from transformers import Qwen3VLForConditionalGeneration

        self.model = (
            Qwen3VLForConditionalGeneration._from_config(qwen3vl_config(config), dtype=dtype).eval().to(device)
        )
        self.ids_of = {}  # of each number of frames

    def prefill(self, prompt: Prompt) -> torch.Tensor:
        """Each frame is an image: a `vision_start` and its vision tokens replace its one `image_pad`."""
        if prompt.frames not in self.ids_of:
            ids = []
            for token in prompt.ids[0].tolist():
                ids += [START, *[PAD] * prompt.tokens_per_frame] if token == PAD else [token]
            self.ids_of[prompt.frames] = torch.tensor([ids], device=prompt.ids.device)
        ids, self.cache = self.ids_of[prompt.frames], None
        grid = torch.tensor([[1, prompt.columns, prompt.columns]] * prompt.frames, device=ids.device)
        kinds = {}
        if "mm_token_type_ids" in signature(self.model.forward).parameters:  # transformers 5
            kinds = {"mm_token_type_ids": (ids == PAD).int()}
        out = self.model(
            input_ids=ids, pixel_values=prompt.pixels, image_grid_thw=grid, use_cache=True, logits_to_keep=1, **kinds
        )
        self.cache, self.length = out[CACHE], ids.shape[1]
        return out.logits

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        offset = torch.tensor([self.length], device=token.device)
        position = (offset + self.model.model.rope_deltas).view(1, 1, 1).expand(3, 1, 1)
        self.length += 1
        return self.model(input_ids=token, position_ids=position, cache_position=offset, **{CACHE: self.cache}).logits


def qwen3vl_config(config: MossVLConfig):
    from transformers import Qwen3VLConfig

    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters
    text_config = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "num_hidden_layers": text.num_hidden_layers - len(text.cross_attention_layers),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": rope["mrope_section"],
        },
    }
    names = (
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "out_hidden_size",
        "deepstack_visual_indexes",
        "num_position_embeddings",
        "patch_size",
        "spatial_merge_size",
        "temporal_patch_size",
    )
    return Qwen3VLConfig(
        text_config=text_config,
        vision_config={name: getattr(vision, name) for name in names},
        image_token_id=PAD,
        video_token_id=991,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


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


def bytes_per_step(model, cache) -> tuple[int, int]:
    """Bytes that a decode step reads: weights of the decoder, keys and values."""
    size = model.lm_head.weight.element_size()
    weights = sum(
        parameter.numel() for parameter in [*model.language_model.layers.parameters(), *model.lm_head.parameters()]
    )
    return weights * size, sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)


# Measuring


@torch.no_grad()
def measure(implementations: dict, prompt: Prompt, args, clock: Clock) -> dict:
    """name -> part (prefill, encoder, decoder, decode) -> seconds of each round."""
    token = torch.full((1, 1), 5, device=prompt.ids.device)

    def seconds_of(implementation) -> dict[str, float]:
        seconds = {"prefill": clock.time(lambda: implementation.prefill(prompt))}
        if isinstance(implementation, Ours):
            seconds["encoder"] = implementation.encoder_seconds
            seconds["decoder"] = seconds["prefill"] - seconds["encoder"]
        steps = sorted(clock.time(lambda: implementation.decode(token)) for _ in range(args.steps))
        seconds["decode"] = steps[len(steps) // 2]
        implementation.cache = None
        return seconds

    return alternate({name: partial(seconds_of, one) for name, one in implementations.items()}, args.rounds)


@torch.no_grad()
def differences(ours: Ours, plain: Plain, prompt: Prompt) -> list[float]:
    """Largest differences of the logits, in their standard deviations, after the prompt and after one more token.

    Raises:
        SystemExit: if they are too large for the same weights.
    """
    token, out = torch.full((1, 1), 5, device=prompt.ids.device), []
    for one, other in ((ours.prefill(prompt), plain.prefill(prompt)), (ours.decode(token), plain.decode(token))):
        out.append(((one - other).abs().max() / other.std()).item())
    if max(out) > (0.01 if prompt.pixels.dtype == torch.float32 else 0.3):
        raise SystemExit(f"The plain implementation has other logits: they differ by {out} standard deviations.")
    return out


@torch.no_grad()
def memory_of(implementations: dict, prompt: Prompt, device: str) -> tuple[dict[str, int], tuple[int, int]]:
    """name -> peak bytes of a prefill; and `bytes_per_step` of ours."""
    peaks, step = {}, (0, 0)
    for name, one in implementations.items():
        one.cache = None
        gc.collect()
        peaks[name] = allocation_peak(lambda: one.prefill(prompt), device)
        if name == "ours":
            step = bytes_per_step(one.model, one.cache)
        one.cache = None
        if name == "plain":
            one.plain.past = {}
    return peaks, step


def make_implementations(args, dtype: torch.dtype, clock: Clock) -> dict:
    torch.manual_seed(0)
    config = make_config(args)
    model = MossVLForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.ones_(parameter)  # a new model's gates are 0, and cross-attention has no effect
    model = model.to(args.device, dtype)
    all_of_them = {"ours": Ours(model, clock), "plain": Plain(model), "qwen3vl": Qwen3VL(config, args.device, dtype)}
    return {name: one for name, one in all_of_them.items() if name not in args.without}


def run(dtype_name: str, args) -> list[dict]:
    """Measures all lengths in one dtype, prints the tables, and returns a row per length."""
    dtype, clock, rows = getattr(torch, dtype_name), Clock(args.device), []
    implementations = make_implementations(args, dtype, clock)
    model = implementations["ours"].model
    rate, bandwidth = product_rate(args.device, dtype), read_bandwidth(args.device, dtype)
    print(
        f"\n{dtype_name}: products {rate / 1e9:.0f} GFLOP/s, reading {bandwidth / 1e9:.1f} GB/s, "
        f"{model.num_parameters() / 1e6:.1f} M parameters",
        flush=True,
    )
    for frames in args.frames:
        prompt = make_prompt(frames, args.side, args.tokens, args.device, dtype)
        row = {
            "dtype": dtype_name,
            "frames": frames,
            "vision tokens": prompt.vision_tokens,
            "text tokens": prompt.ids.shape[1],
        }
        if "plain" in implementations:
            row["differences"] = differences(implementations["ours"], implementations["plain"], prompt)
        row["seconds"] = measure(implementations, prompt, args, clock)
        row["memory"], (weights, caches) = memory_of(implementations, prompt, args.device)
        row["limit"] = {
            "encoder": encoder_operations(model.config, prompt) / rate,
            "decoder": decoder_operations(model.config, prompt) / rate,
            "decode": (weights + caches) / bandwidth,
            "bytes of weights": weights,
            "bytes of caches": caches,
        }
        rows.append(row)
        print(f"{frames} frames measured", flush=True)
    for title, text in tables(rows, list(implementations)).items():
        print(f"\n{title}\n\n{text}", flush=True)
    return rows


# Tables, of rows of one dtype


def tables(rows: list[dict], names: list[str]) -> dict[str, str]:
    """Title -> table."""
    peers = [name for name in names if name != "ours"]
    return {
        "Prefill, s: median (least to most)": prefill_table(rows, names, peers),
        "Decode, ms per token": decode_table(rows, names, peers),
        "Peak memory of prefill, MB": memory_table(rows, names, peers),
    }


def median(row: dict, name: str, part: str) -> float:
    return summary(row["seconds"][name][part])["median"]


def times_ours(row: dict, peers: list[str], part: str) -> list[str]:
    """Seconds of each peer divided by ours."""
    return [f"{median(row, name, part) / median(row, 'ours', part):.2f}" for name in peers]


def over_limit(row: dict, part: str) -> str:
    """Our seconds divided by the limit."""
    return f"{median(row, 'ours', part) / row['limit'][part]:.2f}"


def ratios(peers: list[str]) -> list[str]:
    return [f"{name} / ours" for name in peers]


def prefill_table(rows: list[dict], names: list[str], peers: list[str]) -> str:
    counts = ("frames", "vision tokens", "text tokens")
    parts = ("ours, encoder", "over the limit", "ours, rest", "over the limit")
    lines = [
        (
            *(row[name] for name in counts),
            *(spread(row["seconds"][name]["prefill"]) for name in names),
            *times_ours(row, peers, "prefill"),
            spread(row["seconds"]["ours"]["encoder"]),
            over_limit(row, "encoder"),
            spread(row["seconds"]["ours"]["decoder"]),
            over_limit(row, "decoder"),
        )
        for row in rows
    ]
    return table((*counts, *names, *ratios(peers), *parts), lines)


def decode_table(rows: list[dict], names: list[str], peers: list[str]) -> str:
    lines = []
    for row in rows:
        weights, caches = row["limit"]["bytes of weights"], row["limit"]["bytes of caches"]
        lines.append(
            (
                row["frames"],
                *(spread(row["seconds"][name]["decode"], 1e3) for name in names),
                *times_ours(row, peers, "decode"),
                f"{1e3 * row['limit']['decode']:.2f}",
                over_limit(row, "decode"),
                f"{caches / 1e6:.0f} of {(weights + caches) / 1e6:.0f}",
            )
        )
    return table(("frames", *names, *ratios(peers), "limit", "ours over the limit", "MB of caches"), lines)


def memory_table(rows: list[dict], names: list[str], peers: list[str]) -> str:
    lines = [
        (
            row["frames"],
            *(f"{row['memory'][name] / 1e6:.0f}" for name in names),
            *(f"{row['memory'][name] / row['memory']['ours']:.2f}" for name in peers),
        )
        for row in rows
    ]
    return table(("frames", *names, *ratios(peers)), lines)


# Command line


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes and device of the model."""
    parser.add_argument("--layers", type=int, default=8, help="one in four is a cross-attention layer")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vision-depth", type=int, default=6)
    parser.add_argument("--vision-width", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes of the prompt, and dtypes to measure."""
    parser.add_argument("--side", type=int, default=448, help="pixels per side of a frame, a multiple of 32")
    parser.add_argument("--tokens", type=int, default=10, help="text tokens per frame")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64, 128, 256])
    add_model_flags(parser)
    add_prompt_flags(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded per round; their median counts")
    parser.add_argument("--without", nargs="+", choices=("plain", "qwen3vl"), default=[])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "machine": machine(args.device, args.threads),
        "options": {k: v for k, v in vars(args).items() if k != "json"},
        "rows": [],
    }
    print(result["machine"])
    for dtype in args.dtype:
        result["rows"] += run(dtype, args)
        write_json(args.json, result)


if __name__ == "__main__":
    main()
