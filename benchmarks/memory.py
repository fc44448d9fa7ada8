"""Peak memory of a prefill on the CPU, beyond weights and `pixel_values`, beside what it cannot do without.

    python benchmarks/memory.py --frames 256

The peak is that of the bytes in tensors, from torch's own record of every allocation, so it is the same in every run. "One chunk"
is the same figure for the vision encoder over one chunk of frames by itself. Beside it, the growth of resident memory as Linux
sees it (VmHWM), which swings with the allocator.
"""

import argparse
import multiprocessing
from pathlib import Path

from measuring import allocation_peak, load_package, reset_resident_peak, resident_peak, write_json


def measure(frames: int, options: dict, queue) -> None:
    load_package()
    import torch
    from moss_vl.configuration_moss_vl import MossVLConfig
    from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration

    side, layers, width, chunk = options["side"] // 16, options["layers"], options["width"], options["chunk"]
    config = MossVLConfig(
        text_config={
            "vocab_size": 1000, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
            "num_attention_heads": width // 64, "num_key_value_heads": 2, "head_dim": 64,
        },
        vision_config={
            "depth": 6, "hidden_size": 256, "intermediate_size": 1024, "num_heads": 4, "out_hidden_size": width,
            "deepstack_visual_indexes": [1, 3],
        },
        image_token_id=990, video_token_id=991, vision_start_token_id=992, vision_end_token_id=993,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MossVLForConditionalGeneration(config).eval().to(getattr(torch, options["dtype"]))
    pixels = torch.randn(frames * side * side, 768)
    ids = torch.randint(0, 900, (1, frames * options["tokens"]))
    ids[:, options["tokens"] - 1 :: options["tokens"]] = 990
    grid = torch.tensor([[frames, side, side]])
    first, outs = min(chunk, frames), []

    def prefill():
        outs[:] = [model(ids, pixel_values=pixels, grid_thw=grid, use_cache=True, logits_to_keep=1, vision_chunked_length=chunk)]

    with torch.no_grad():
        one_chunk = allocation_peak(
            lambda: model.model.visual(pixels[: first * side * side], [[first, side, side]], chunk)
        )
        before = reset_resident_peak()
        prefill()
        resident = resident_peak() - before
        outs.clear()
        most = allocation_peak(prefill)
    out = outs[0]
    cross = [out.past_key_values.layers[index] for index in config.text_config.cross_attention_layers]
    tokens = cross[0].keys.shape[-2]
    caches = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in out.past_key_values.layers)
    states = tokens * width * out.logits.element_size()
    queue.put(
        {
            "frames": frames, "vision_tokens": tokens, "text_tokens": ids.shape[1], "peak": most, "resident": resident, "vision_states": states,
            "caches": caches, "one_chunk": one_chunk, "ratio": most / (states + caches + one_chunk),
        }
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--side", type=int, default=448, help="pixels of a frame's side")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64, help="vision_chunked_length")
    parser.add_argument("--tokens", type=int, default=10, help="text tokens a frame")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = vars(parser.parse_args())
    rows, context = [], multiprocessing.get_context("spawn")
    print("frames  vision tokens  resident MB  peak MB = x times (states + caches + one chunk) MB")
    for frames in options.pop("frames"):
        queue = context.Queue()
        process = context.Process(target=measure, args=(frames, options, queue))
        process.start()
        rows.append(row := queue.get())
        process.join()
        parts = " + ".join(f"{row[name] / 1e6:.0f}" for name in ("vision_states", "caches", "one_chunk"))
        print(f"{frames:6}  {row['vision_tokens']:13}  {row['resident'] / 1e6:11.0f}  {row['peak'] / 1e6:7.0f} = {row['ratio']:.2f} x ({parts})", flush=True)
    write_json(options["json"], rows)


if __name__ == "__main__":
    main()
