"""Prefill, decode and peak memory over the length of a video: python benchmarks/model.py --frames 16 64 128 256 --json model.json

Beside this package stand, in turns and in one run:
  plain     the same weights in the plain implementation of plain.py, which has to give the same logits
  qwen3vl   transformers' Qwen3VL with the same vision encoder and self-attention layers, fed the same frames: every vision token stands
            in its context
  limit     what no implementation undercuts: the operations of the prefill at the rate of this machine's matrix products; for a token,
            the weights and caches that it has to read, at the bandwidth with which this machine reads

Random weights, one video of frames of --side pixels, --tokens text tokens a frame, one of which stands for it. Peak memory is that of
the bytes in tensors beyond weights and pixels.
"""

import argparse
import gc
import sys
from dataclasses import dataclass
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
WORDS = 900  # ids below stand for words


@dataclass(frozen=True)
class Prompt:
    """One video in text: pixels [P, values], ids [1, T], `columns` x `columns` patches a frame."""

    frames: int
    columns: int
    pixels: torch.Tensor
    ids: torch.Tensor

    @property
    def grid(self) -> list[list[int]]:
        return [[self.frames, self.columns, self.columns]]

    @property
    def tokens_a_frame(self) -> int:
        """Without the separator."""
        return self.columns**2 // 4

    @property
    def vision_tokens(self) -> int:
        return self.frames * (self.tokens_a_frame + 1)


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
    """What the flags of `add_model_flags` say of decoder and encoder, by the names of their configurations."""
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
    """Frequencies for t, h, w, of head_dim / 2 in all."""
    third = head_dim // 6
    return [head_dim // 2 - 2 * third, third, third]


# Contestants: `prefill` gives the last token's logits [1, 1, vocab], `decode` those behind one token more


class Ours:
    def __init__(self, model, clock: Clock):
        self.model, self.clock, self.encoding = model, clock, 0.0
        self.begun = None
        model.model.visual.register_forward_pre_hook(lambda *args: setattr(self, "begun", clock.now()))
        model.model.visual.register_forward_hook(self._encoded)

    def _encoded(self, *args):
        self.encoding = self.clock.between(self.begun, self.clock.now())

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
    """transformers' Qwen3VL with the sizes of `config`, its cross-attention layers left out."""

    def __init__(self, config: MossVLConfig, device: str, dtype: torch.dtype):
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        text, vision = config.text_config, config.vision_config
        names = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
        rope = {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": text.rope_parameters["mrope_section"],
        }
        layers = text.num_hidden_layers - len(text.cross_attention_layers)
        text_config = {name: getattr(text, name) for name in names} | {
            "num_hidden_layers": layers,
            "rope_theta": text.rope_parameters["rope_theta"],
            "rope_scaling": rope,
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
        sizes = Qwen3VLConfig(
            text_config=text_config,
            vision_config={name: getattr(vision, name) for name in names},
            image_token_id=PAD,
            video_token_id=991,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )
        self.model = Qwen3VLForConditionalGeneration._from_config(sizes, dtype=dtype).eval().to(device)
        self.ids_of = {}

    def prefill(self, prompt: Prompt) -> torch.Tensor:
        """Each frame is an image; its tokens stand where its one `image_pad` stood, a `vision_start` before them."""
        if prompt.frames not in self.ids_of:
            ids = []
            for token in prompt.ids[0].tolist():
                ids += [START, *[PAD] * prompt.tokens_a_frame] if token == PAD else [token]
            self.ids_of[prompt.frames] = torch.tensor([ids], device=prompt.ids.device)
        ids, self.cache = self.ids_of[prompt.frames], None
        grid = torch.tensor([[1, prompt.columns, prompt.columns]] * prompt.frames, device=ids.device)
        kinds = (
            {"mm_token_type_ids": (ids == PAD).int()}
            if "mm_token_type_ids" in signature(self.model.forward).parameters
            else {}
        )
        out = self.model(
            input_ids=ids, pixel_values=prompt.pixels, image_grid_thw=grid, use_cache=True, logits_to_keep=1, **kinds
        )
        self.cache, self.length = out[CACHE], ids.shape[1]
        return out.logits

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        at = torch.tensor([self.length], device=token.device)
        position = (at + self.model.model.rope_deltas).view(1, 1, 1).expand(3, 1, 1)
        self.length += 1
        return self.model(input_ids=token, position_ids=position, cache_position=at, **{CACHE: self.cache}).logits


# The limit


def encoder_operations(config, prompt: Prompt) -> int:
    vision, patches = config.vision_config, prompt.frames * prompt.columns**2
    width, inner = vision.hidden_size, vision.intermediate_size
    block = 2 * patches * (4 * width * width + 2 * width * inner) + 4 * patches * prompt.columns**2 * width
    merged = 4 * width * (len(vision.deepstack_visual_indexes) + 1)
    return (
        2 * patches * 768 * width
        + vision.depth * block
        + 2 * (patches // 4) * merged * (merged + vision.out_hidden_size)
    )


def decoder_operations(config, prompt: Prompt) -> int:
    """Of the visible part of attention alone."""
    text, length, vision = config.text_config, prompt.ids.shape[1], prompt.vision_tokens
    d, heads, kv = text.head_dim, text.num_attention_heads, text.num_key_value_heads
    pads = (prompt.ids[0] == PAD).cumsum(0)
    seen = int(pads.sum()) * (prompt.tokens_a_frame + 1)  # pairs of a row and a vision token
    total = 2 * text.hidden_size * text.vocab_size
    for index in range(text.num_hidden_layers):
        crosses = index in text.cross_attention_layers
        total += 2 * length * text.hidden_size * (2 * heads * d + 3 * text.intermediate_size)
        total += 2 * (vision if crosses else length) * text.hidden_size * 2 * kv * d
        total += 4 * heads * d * (seen if crosses else length * (length + 1) // 2)
    return total


def bytes_of_a_token(model, cache) -> tuple[int, int]:
    """What a decode step reads: weights of the decoder, and keys and values."""
    size = model.lm_head.weight.element_size()
    weights = sum(
        parameter.numel() for parameter in [*model.language_model.layers.parameters(), *model.lm_head.parameters()]
    )
    return weights * size, sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)


# Measuring


@torch.no_grad()
def measure(contestants: dict, prompt: Prompt, args, clock: Clock) -> dict:
    """Name -> what (prefill, encoder, decode) -> seconds of each round."""
    token = torch.full((1, 1), 5, device=prompt.ids.device)

    def run(contestant):
        def once():
            seconds = {"prefill": clock.time(lambda: contestant.prefill(prompt))}
            if isinstance(contestant, Ours):
                seconds["encoder"], seconds["decoder"] = contestant.encoding, seconds["prefill"] - contestant.encoding
            steps = sorted(clock.time(lambda: contestant.decode(token)) for _ in range(args.steps))
            seconds["decode"] = steps[len(steps) // 2]
            contestant.cache = None
            return seconds

        return once

    return alternate({name: run(contestant) for name, contestant in contestants.items()}, args.rounds)


@torch.no_grad()
def differences(ours: Ours, plain: Plain, prompt: Prompt) -> list[float]:
    """How far apart the logits are, in their standard deviations, behind the prompt and behind one token more."""
    token, out = torch.full((1, 1), 5, device=prompt.ids.device), []
    for one, other in ((ours.prefill(prompt), plain.prefill(prompt)), (ours.decode(token), plain.decode(token))):
        out.append(((one - other).abs().max() / other.std()).item())
    return out


def run(dtype: torch.dtype, args) -> list[dict]:
    torch.manual_seed(0)
    config, clock, rows = make_config(args), Clock(args.device), []
    model = MossVLForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():  # a new model's gates are closed
        if name.endswith("_gate"):
            torch.nn.init.ones_(parameter)
    model = model.to(args.device, dtype)
    contestants = {"ours": Ours(model, clock), "plain": Plain(model), "qwen3vl": Qwen3VL(config, args.device, dtype)}
    contestants = {name: contestant for name, contestant in contestants.items() if name not in args.without}
    rate, bandwidth = product_rate(args.device, dtype), read_bandwidth(args.device, dtype)
    print(
        f"\n{str(dtype).removeprefix('torch.')}: products {rate / 1e9:.0f} GFLOP/s, reading {bandwidth / 1e9:.1f} GB/s, "
        f"{model.num_parameters() / 1e6:.1f} M parameters",
        flush=True,
    )
    for frames in args.frames:
        prompt = make_prompt(frames, args.side, args.tokens, args.device, dtype)
        row = {
            "dtype": str(dtype).removeprefix("torch."),
            "frames": frames,
            "vision tokens": prompt.vision_tokens,
            "text tokens": prompt.ids.shape[1],
        }
        if "plain" in contestants:
            row["differences"] = differences(contestants["ours"], contestants["plain"], prompt)
            tolerance = 0.01 if dtype == torch.float32 else 0.3
            if max(row["differences"]) > tolerance:
                raise SystemExit(
                    f"the plain implementation gives other logits: {row['differences']} standard deviations apart"
                )
        row["seconds"] = measure(contestants, prompt, args, clock)
        row["memory"] = {}
        for name, contestant in contestants.items():
            with torch.no_grad():
                contestant.cache = None
                gc.collect()
                row["memory"][name] = allocation_peak(lambda: contestant.prefill(prompt), args.device)
            if name == "ours":
                weights, caches = bytes_of_a_token(model, contestant.cache)
            contestant.cache = None
            if name == "plain":
                contestant.plain.past = {}
        row["limit"] = {
            "encoder": encoder_operations(config, prompt) / rate,
            "decoder": decoder_operations(config, prompt) / rate,
            "decode": (weights + caches) / bandwidth,
            "bytes of weights": weights,
            "bytes of caches": caches,
        }
        rows.append(row)
        print(f"{frames} frames measured", flush=True)
    for title, text in tables(rows, list(contestants)).items():
        print(f"\n{title}\n\n{text}", flush=True)
    return rows


def tables(rows: list[dict], names: list[str]) -> dict[str, str]:
    """Title -> table, of rows of one dtype."""
    peers = [name for name in names if name != "ours"]

    def times(row, name, what="prefill"):
        ours = summary(row["seconds"]["ours"][what])["median"]
        return f"{summary(row['seconds'][name][what])['median'] / ours:.2f}"

    def over(row, what):
        return f"{summary(row['seconds']['ours'][what])['median'] / row['limit'][what]:.2f}"

    prefill = [
        (
            row["frames"],
            row["vision tokens"],
            row["text tokens"],
            spread(row["seconds"]["ours"]["prefill"]),
            *(spread(row["seconds"][name]["prefill"]) for name in peers),
            *(times(row, name) for name in peers),
            spread(row["seconds"]["ours"]["encoder"]),
            over(row, "encoder"),
            spread(row["seconds"]["ours"]["decoder"]),
            over(row, "decoder"),
        )
        for row in rows
    ]
    decode = [
        (
            row["frames"],
            spread(row["seconds"]["ours"]["decode"], 1e3),
            *(spread(row["seconds"][name]["decode"], 1e3) for name in peers),
            *(times(row, name, "decode") for name in peers),
            f"{1e3 * row['limit']['decode']:.2f}",
            over(row, "decode"),
            f"{row['limit']['bytes of caches'] / 1e6:.0f} of {(row['limit']['bytes of weights'] + row['limit']['bytes of caches']) / 1e6:.0f}",
        )
        for row in rows
    ]
    memory = [
        (
            row["frames"],
            *(f"{row['memory'][name] / 1e6:.0f}" for name in names),
            *(f"{row['memory'][name] / row['memory']['ours']:.2f}" for name in peers),
        )
        for row in rows
    ]
    ratios = [f"{name} / ours" for name in peers]
    return {
        "Prefill, s: median (least to most)": table(
            (
                "frames",
                "vision tokens",
                "text tokens",
                *names,
                *ratios,
                "ours, encoder",
                "over the limit",
                "ours, rest",
                "over the limit",
            ),
            prefill,
        ),
        "Decode, ms a token": table(
            ("frames", *names, *ratios, "limit", "ours over the limit", "MB of caches"), decode
        ),
        "Peak memory of prefill, MB": table(("frames", *names, *ratios), memory),
    }


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes of the model, and where it runs."""
    parser.add_argument("--layers", type=int, default=8, help="one in four is a cross-attention layer")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vision-depth", type=int, default=6)
    parser.add_argument("--vision-width", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes of the frames of a prompt, and the dtypes it is measured in."""
    parser.add_argument("--side", type=int, default=448, help="pixels of a frame's side, a multiple of 32")
    parser.add_argument("--tokens", type=int, default=10, help="text tokens a frame")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64, 128, 256])
    add_model_flags(parser)
    add_prompt_flags(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded a round, of which the median counts")
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
        result["rows"] += run(getattr(torch, dtype), args)
        write_json(args.json, result)


if __name__ == "__main__":
    main()
