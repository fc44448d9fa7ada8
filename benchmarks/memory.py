"""Memory of a prompt beyond the weights, by formula and measured:

    python benchmarks/memory.py --frames 64 128 256 --json memory.json

`prefill_bytes` is the formula of docs/performance.md. The first table compares it, for the model of model.py, with the
peak bytes of tensors as recorded by torch. The second applies it to the 11B model of config.json.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.measuring import ROOT, allocation_peak, machine, table, write_json
from moss_vl.benchmarks.random_models import add_model_flags, add_prompt_flags, make_config
from moss_vl.cache_layers import TEXT_BUFFER
from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.decoder import CPU_VISION_PIECE, GPU_VISION_PIECE
from moss_vl.int8_states import SCALE_DTYPE
from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration
from moss_vl.vision_encoder import CPU_PATCHES, DEFAULT_VISION_CHUNK, GPU_PATCHES, MLP_ROWS


def prefill_bytes(
    config: MossVLConfig,
    frames: int,
    rows: int,
    columns: int,
    text_tokens: int,
    dtype: torch.dtype,
    *,
    chunk: int = DEFAULT_VISION_CHUNK,
    device: str = "cpu",
    int8: bool = False,
) -> dict[str, int]:
    """Bytes besides weights and pixels that a prefill needs, with sdpa or flash-attention.

    Args:
        frames, rows, columns: `frames` frames of `rows` x `columns` patches.
        text_tokens: tokens of the text.
        chunk: `vision_chunked_length`.
        int8: whether `vision_cache_dtype` is "int8".

    Returns:
        states: vision states, freed after the prompt.
        caches: keys and values, kept for decoding.
        encoder: the encoder's tensors for a chunk of frames.
        text: the decoder's tensors for the text.
        peak: the most at one time: states with either the encoder, or caches and text.
    """
    text, vision, size = config.text_config, config.vision_config, dtype.itemsize
    tokens = frames * (rows * columns // vision.spatial_merge_size**2 + 1)
    max_patches = CPU_PATCHES if device == "cpu" else GPU_PATCHES
    patches = min(frames, chunk, max(1, max_patches // (rows * columns))) * rows * columns

    width, features = vision.hidden_size, len(vision.deepstack_visual_indexes) + 1
    # Besides the inputs of the merger: norm, qkv, query, and the key while it is rotated in float32; or norm, output
    # and MLP.
    attention = (features + 5) * width * size + (3 if size == 4 else 4) * width * 4
    mlp = (features + 2) * width * size + min(1, MLP_ROWS / patches) * 2 * vision.intermediate_size * size
    merger = 3 * features * width * size
    out = 2 * text.hidden_size * size / vision.spatial_merge_size**2  # without separators, and with them
    encoder = int(patches * (max(attention, mlp, merger) + out))

    cross_layers = len(text.cross_attention_layers)
    per_token = 2 * text.num_key_value_heads * text.head_dim * size  # key and value at one layer
    # In 8 bits a number is a byte, and each token and head has a scale.
    per_vision_token = 2 * text.num_key_value_heads * (text.head_dim + SCALE_DTYPE.itemsize) if int8 else per_token
    buffer = text_tokens + max(TEXT_BUFFER, text_tokens // 8)
    states = tokens * text.hidden_size * size
    caches = per_vision_token * cross_layers * tokens + per_token * (text.num_hidden_layers - cross_layers) * buffer
    vision_rotary = 2 * tokens * text.head_dim * size
    rounding = 4 * text.num_key_value_heads * text.head_dim if int8 else 0  # keys or values in float32
    piece = min(CPU_VISION_PIECE if device == "cpu" else GPU_VISION_PIECE, tokens)
    new_keys_values = piece * (per_token + rounding)
    decoder = (
        vision_rotary + new_keys_values + 3 * text_tokens * (text.intermediate_size + 2 * text.hidden_size) * size
    )
    return {
        "states": states,
        "caches": caches,
        "encoder": encoder,
        "text": decoder,
        "peak": states + max(encoder, caches + decoder),
    }


@torch.no_grad()
def measured_bytes(
    model,
    frames: int,
    rows: int,
    columns: int,
    text_tokens: int,
    chunk: int = DEFAULT_VISION_CHUNK,
    int8: bool = False,
) -> int:
    """The same peak as recorded by torch, for a text whose `image_pad` tokens are evenly spaced."""
    generator, vision = torch.Generator().manual_seed(0), model.config.vision_config
    ids = torch.ones(1, text_tokens, dtype=torch.long)
    ids[0, torch.linspace(0, text_tokens - 1, frames).long()] = model.config.image_token_id
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(frames * rows * columns, values, generator=generator).to(model.device, model.dtype)
    inputs = {"pixel_values": pixels, "grid_thw": [[frames, rows, columns]], "vision_chunked_length": chunk}
    inputs["vision_cache_dtype"] = "int8" if int8 else None
    ids, outputs = ids.to(model.device), []  # the outputs are kept, and with them the cache
    return allocation_peak(
        lambda: outputs.append(model(ids, **inputs, use_cache=True, logits_to_keep=1)), str(model.device)
    )


def released_table(frame_counts=(64, 256, 1024)) -> str:
    """The formula for the 11B model in bfloat16 on a GPU, in GB."""
    config = MossVLConfig.from_pretrained(ROOT)
    with torch.device("meta"):
        model = MossVLForConditionalGeneration(config)
    weights = 2 * model.num_parameters()
    lines = []
    for side in (448, 896):
        for frames in frame_counts:
            parts = prefill_bytes(config, frames, side // 16, side // 16, 10 * frames, torch.bfloat16, device="cuda")
            numbers = (*parts.values(), weights + parts["peak"])
            tokens = frames * ((side // 32) ** 2 + 1)
            lines.append((f"{frames} of {side}x{side}", tokens, *(f"{number / 1e9:.1f}" for number in numbers)))
    names = ("states", "caches", "encoder", "text", "peak beyond weights", f"with {weights / 1e9:.1f} of weights")
    return table(("frames", "vision tokens", *names), lines)


DRIVER = 0.07  # share of the memory of a GPU that is left to its driver


def frames_that_fit(config: MossVLConfig, free: float, int8: bool = False, chunk: int = DEFAULT_VISION_CHUNK) -> int:
    """The most frames of 448x448 with 10 text tokens each whose prefill on a GPU needs at most `free` bytes."""
    fitting, too_many = 1, 1 << 16
    while too_many - fitting > 1:
        frames = (fitting + too_many) // 2
        sizes, options = (frames, 28, 28, 10 * frames), {"chunk": chunk, "device": "cuda", "int8": int8}
        parts = prefill_bytes(config, *sizes, torch.bfloat16, **options)
        fitting, too_many = (frames, too_many) if parts["peak"] <= free else (fitting, frames)
    return fitting


def fitting_table() -> str:
    """`frames_that_fit` beside the weights of the 11B model, rounded down to tens."""
    config = MossVLConfig.from_pretrained(ROOT)
    lines = []
    for memory, bits, weights in ((80, "bfloat16", 22.7), (24, "8 bits", 12.6), (24, "4 bits", 8.2)):
        free = (memory * (1 - DRIVER) - weights) * 1e9
        counts = (frames_that_fit(config, free, int8) // 10 * 10 for int8 in (False, True))
        lines.append((f"{memory} GB", f"{bits}, {weights} GB", *(f"{count:,}" for count in counts)))
    return table(("memory", "weights", "frames of 448x448", 'with `vision_cache_dtype="int8"`'), lines)


def measured_table(rows: list[dict]) -> str:
    """Formula and measurement of each row, in MB."""
    lines = [
        (
            row["dtype"],
            row["frames"],
            *(f"{number / 1e6:.0f}" for number in (*row["formula"].values(), row["measured"])),
            f"{row['formula']['peak'] / row['measured']:.2f}",
        )
        for row in rows
    ]
    names = ("states", "caches", "encoder", "text", "formula", "measured", "formula / measured")
    return table(("dtype", "frames", *names), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--chunk", type=int, default=DEFAULT_VISION_CHUNK, help="vision_chunked_length")
    add_model_flags(parser)
    add_prompt_flags(parser)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    result = {"machine": machine(args.device, torch.get_num_threads()), "rows": []}
    print(result["machine"], flush=True)
    for dtype in args.dtype:
        torch.manual_seed(0)
        config = make_config(args)
        model = MossVLForConditionalGeneration(config).eval().to(args.device, getattr(torch, dtype))
        for frames in args.frames:
            sizes = (frames, args.side // 16, args.side // 16, args.tokens * frames)
            parts = prefill_bytes(config, *sizes, model.dtype, chunk=args.chunk, device=args.device)
            peak = measured_bytes(model, *sizes, chunk=args.chunk)
            result["rows"].append({"dtype": dtype, "frames": frames, "formula": parts, "measured": peak})
            write_json(args.json, result)
    print(f"\nMB besides weights and pixels\n\n{measured_table(result['rows'])}")
    print("\nThe 11B model in bfloat16 on a GPU with 10 text tokens per frame, by the formula, GB")
    print(f"\n{released_table()}")
    print(f"\nFrames that fit\n\n{fitting_table()}")


if __name__ == "__main__":
    main()
