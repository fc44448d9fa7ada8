"""What a prompt needs beyond the weights, by formula and as measured: python benchmarks/memory.py --frames 64 128 256 --json memory.json

`prefill_bytes` is the formula of docs/performance.md. The first table holds it against the most bytes that tensors hold at once, by
torch's own record of every allocation, for the model of model.py; the second applies it to the 11B model of config.json.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.measuring import ROOT, allocation_peak, machine, table, write_json
from moss_vl.benchmarks.model import add_model_flags, add_prompt_flags, make_config
from moss_vl.cache_layers import TEXT_BUFFER
from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.decoder import VISION_ROWS
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
) -> dict[str, int]:
    """Bytes beyond weights and pixels that a prefill of `frames` frames of `rows` x `columns` patches and `text_tokens` tokens of text
    needs, with sdpa or flash-attention. `chunk`: `vision_chunked_length`.

    Returns:
        states: of the vision tokens, until the prompt is read. caches: keys and values, which stay. encoder: of the encoder, for a
        chunk of frames. text: of the decoder, for the rows of the text. peak: the most at once: states and encoder, or states,
        caches and text.
    """
    text, vision, size = config.text_config, config.vision_config, dtype.itemsize
    tokens = frames * (rows * columns // vision.spatial_merge_size**2 + 1)
    at_once = CPU_PATCHES if device == "cpu" else GPU_PATCHES
    patches = min(frames, chunk, max(1, at_once // (rows * columns))) * rows * columns
    width, features = vision.hidden_size, len(vision.deepstack_visual_indexes) + 1
    # Beside the features kept: norm, qkv and query, and the key being rotated, in float32; or norm, output and the wide layer.
    attention = (features + 5) * width * size + (3 if size == 4 else 4) * width * 4
    mlp = (features + 2) * width * size + min(1, MLP_ROWS / patches) * 2 * vision.intermediate_size * size
    merger = 3 * features * width * size
    out = 2 * text.hidden_size * size / vision.spatial_merge_size**2  # without separators, and with them
    crosses = len(text.cross_attention_layers)
    of_head = 2 * text.num_key_value_heads * text.head_dim * size  # key and value of a token at one layer
    room = text_tokens + max(TEXT_BUFFER, text_tokens // 8)
    states = tokens * text.hidden_size * size
    caches = of_head * (crosses * tokens + (text.num_hidden_layers - crosses) * room)
    encoder = int(patches * (max(attention, mlp, merger) + out))
    tables = (
        2 * tokens * text.head_dim * size + min(VISION_ROWS, tokens) * of_head
    )  # rotations, and a piece of keys and values
    reading = tables + 3 * text_tokens * (text.intermediate_size + 2 * text.hidden_size) * size
    return {
        "states": states,
        "caches": caches,
        "encoder": encoder,
        "text": reading,
        "peak": states + max(encoder, caches + reading),
    }


@torch.no_grad()
def measured_bytes(
    model, frames: int, rows: int, columns: int, text_tokens: int, chunk: int = DEFAULT_VISION_CHUNK
) -> int:
    """The same peak as torch records it; one `image_pad` a frame, at even distances."""
    generator, vision = torch.Generator().manual_seed(0), model.config.vision_config
    ids = torch.ones(1, text_tokens, dtype=torch.long)
    ids[0, torch.linspace(0, text_tokens - 1, frames).long()] = model.config.image_token_id
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(frames * rows * columns, values, generator=generator).to(model.device, model.dtype)
    inputs = {"pixel_values": pixels, "grid_thw": [[frames, rows, columns]], "vision_chunked_length": chunk}
    ids, outs = ids.to(model.device), []
    return allocation_peak(
        lambda: outs.append(model(ids, **inputs, use_cache=True, logits_to_keep=1)), str(model.device)
    )


def released_table(frame_counts=(64, 256, 1024)) -> str:
    """GB of the 11B model."""
    config = MossVLConfig.from_pretrained(ROOT)
    with torch.device("meta"):
        model = MossVLForConditionalGeneration(config)
    weights = 2 * model.num_parameters()
    rows = []
    for side in (448, 896):
        for frames in frame_counts:
            parts = prefill_bytes(config, frames, side // 16, side // 16, 10 * frames, torch.bfloat16, device="cuda")
            numbers = (
                parts["states"],
                parts["caches"],
                parts["encoder"],
                parts["text"],
                parts["peak"],
                weights + parts["peak"],
            )
            rows.append(
                (
                    f"{frames} of {side}x{side}",
                    frames * ((side // 32) ** 2 + 1),
                    *(f"{number / 1e9:.1f}" for number in numbers),
                )
            )
    head = (
        "frames",
        "vision tokens",
        "states",
        "caches",
        "encoder",
        "text",
        "peak beyond weights",
        f"with {weights / 1e9:.1f} of weights",
    )
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--chunk", type=int, default=DEFAULT_VISION_CHUNK, help="vision_chunked_length")
    add_model_flags(parser)
    add_prompt_flags(parser)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    result, lines = {"machine": machine(args.device, torch.get_num_threads()), "rows": []}, []
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
            lines.append(
                (
                    dtype,
                    frames,
                    *(f"{parts[name] / 1e6:.0f}" for name in parts),
                    f"{peak / 1e6:.0f}",
                    f"{parts['peak'] / peak:.2f}",
                )
            )
    print("\nMB beyond weights and pixels\n")
    print(
        table(
            ("dtype", "frames", "states", "caches", "encoder", "text", "formula", "measured", "formula / measured"),
            lines,
        )
    )
    print(
        f"\nGB of the 11B model in bfloat16, on a GPU, 10 tokens of text a frame, by the formula\n\n{released_table()}"
    )


if __name__ == "__main__":
    main()
