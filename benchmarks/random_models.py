"""Random models and prompts of the benchmarks. By default the widths are an eighth of those of the 11B model, and the
numbers of layers are the same, so that each part has about its share of the work."""

import argparse
from dataclasses import dataclass

import torch

from moss_vl.benchmarks.measuring import ROOT, Clock
from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration


PAD, VIDEO_PAD, START, END = 990, 991, 992, 993
WORDS = 900  # smaller ids are words
VOCABULARY, WIDTH = 151936, 4096  # of the 11B model
VISION_INNER, VISION_WIDTH = 4304, 1152


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
    """A video of frames of `side` pixels, with `tokens` text tokens per frame, the last an `image_pad`."""
    generator, columns = torch.Generator().manual_seed(0), side // 16
    ids = torch.randint(0, WORDS, (1, frames * tokens), generator=generator)
    ids[:, tokens - 1 :: tokens] = PAD
    generator = torch.Generator(device).manual_seed(0)
    pixels = torch.randn(frames * columns**2, 768, generator=generator, device=device, dtype=dtype)
    return Prompt(frames, columns, pixels, ids.to(device))


def make_config(args) -> MossVLConfig:
    """The configuration of the 11B model with `--released`, else that of the flags."""
    ids = {
        "image_token_id": PAD,
        "video_token_id": VIDEO_PAD,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    if getattr(args, "released", False):
        return MossVLConfig.from_pretrained(ROOT, **ids)
    text, vision = sizes(args)
    vocabulary = VOCABULARY * args.width // WIDTH
    return MossVLConfig(text_config={"vocab_size": vocabulary, **text}, vision_config=vision, **ids)


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
    kept = max(1, 3 * args.vision_depth // 10)  # blocks between those whose output the merger takes
    vision = {
        "depth": args.vision_depth,
        "hidden_size": args.vision_width,
        "intermediate_size": VISION_INNER * args.vision_width // VISION_WIDTH // 8 * 8,
        "num_heads": args.vision_heads,
        "out_hidden_size": args.width,
        "deepstack_visual_indexes": [kept, 2 * kept, 3 * kept],
    }
    return text, vision


def sections(head_dim: int) -> list[int]:
    """`mrope_section`: frequencies for t, h, w that sum to head_dim / 2."""
    third = head_dim // 6
    return [head_dim // 2 - 2 * third, third, third]


def make_model(config: MossVLConfig, device: str, dtype: torch.dtype) -> MossVLForConditionalGeneration:
    """A model with random weights, made on the device, whose cross-attention has an effect."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MossVLForConditionalGeneration._from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.ones_(parameter)  # a new model's gates are 0
    return model


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes and device of the model."""
    parser.add_argument("--layers", type=int, default=48, help="one in four is a cross-attention layer")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vision-depth", type=int, default=27)
    parser.add_argument("--vision-width", type=int, default=144)
    parser.add_argument("--vision-heads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes of the prompt, and dtypes to measure."""
    parser.add_argument("--side", type=int, default=448, help="pixels per side of a frame, a multiple of 32")
    parser.add_argument("--tokens", type=int, default=10, help="text tokens per frame")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])


def add_clock_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds on all cores")


def make_clock(args) -> Clock:
    """The clock of the flags. Raises SystemExit for CPU time of a model on another device."""
    if args.clock == "cpu" and args.device != "cpu":
        raise SystemExit(f"--clock cpu measures models on the CPU; --device is {args.device}")
    return Clock(args.device, args.clock == "cpu")
