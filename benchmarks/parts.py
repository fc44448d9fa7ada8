"""Where the time of a prefill goes:

    python benchmarks/parts.py --frames 16 64 256 --json parts.json

Measures the seconds in each kind of module, each without those of modules inside it. The rest is "other". Model and
frames are those of model.py; figures are medians of --rounds.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl import decoder, vision_encoder
from moss_vl import modeling_moss_vl as modeling
from moss_vl.benchmarks.measuring import Clock, machine, summary, table, write_json
from moss_vl.benchmarks.random_models import (
    add_clock_flag,
    add_model_flags,
    add_prompt_flags,
    make_clock,
    make_config,
    make_prompt,
)


PARTS = {
    "patches": vision_encoder.MossVLVisionPatchEmbed,
    "encoder attention": vision_encoder.MossVLVisionAttention,
    "encoder MLP": vision_encoder.MossVLVisionMLP,
    "encoder norms": torch.nn.LayerNorm,
    "merger": vision_encoder.MossVLVisionMerger,
    "encoder, rest": vision_encoder.MossVLVisionModel,
    "vision keys and values": "vision_keys_values",
    "cross-attention": decoder.MossVLCrossAttention,
    "self-attention": decoder.MossVLSelfAttention,
    "decoder MLP": decoder.MossVLTextMLP,
}


class Timer:
    """Measures the seconds in each part of `PARTS`, by wrapping the calls of their modules."""

    def __init__(self, model, clock: Clock):
        self.clock = clock
        self.spans = []  # (part, start, end) of each call, in the order of their ends
        for module in model.modules():
            for name, kind in PARTS.items():
                if isinstance(kind, str):
                    if hasattr(module, kind):
                        setattr(module, kind, self._timed(name, getattr(module, kind)))
                elif isinstance(module, kind):
                    module.forward = self._timed(name, module.forward)

    def _timed(self, name: str, call: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = self.clock.now()
            out = call(*args, **kwargs)
            self.spans.append((name, start, self.clock.now()))
            return out

        return timed

    def seconds(self, call: Callable) -> dict[str, float]:
        """Seconds of each part in `call`, without the parts inside it."""
        self.spans = []
        begin = self.clock.now()
        call()
        self.spans.append(("other", begin, self.clock.now()))
        # A call ends after the calls inside it, so these are the latest spans that start after it.
        seconds = defaultdict(float)
        outermost = []  # (start, seconds) of the spans so far that are inside no other
        for name, span_start, span_end in self.spans:
            start, length = self.clock.between(begin, span_start), self.clock.between(span_start, span_end)
            inside = 0.0
            while outermost and outermost[-1][0] >= start:
                inside += outermost.pop()[1]
            seconds[name] += length - inside
            outermost.append((start, length))
        return dict(seconds)


def measure(model, timer: Timer, frames: int, args) -> dict[str, dict[str, float]]:
    """Part -> median, least and most seconds."""
    prompt = make_prompt(frames, args.side, args.tokens, args.device, model.dtype)

    @torch.no_grad()
    def prefill():
        model(prompt.ids, pixel_values=prompt.pixels, grid_thw=prompt.grid, use_cache=True, logits_to_keep=1)

    rounds = [timer.seconds(prefill) for _ in range(args.rounds + 1)][1:]  # the first is a warm-up
    return {name: summary([one.get(name, 0.0) for one in rounds]) for name in (*PARTS, "other")}


def parts_table(rows: list[dict]) -> str:
    """A column per row of the results, with the share of each part."""
    totals = [sum(part["median"] for part in row["seconds"].values()) for row in rows]
    lines = []
    for name in (*PARTS, "other"):
        medians = [row["seconds"][name]["median"] for row in rows]
        shares = [100 * seconds / total for seconds, total in zip(medians, totals, strict=True)]
        lines.append((name, *(f"{x:.3f} ({share:.0f} %)" for x, share in zip(medians, shares, strict=True))))
    lines.append(("whole", *(f"{total:.2f}" for total in totals)))
    return table(("seconds", *(f"{row['frames']} frames, {row['dtype']}" for row in rows)), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64, 256])
    add_model_flags(parser)
    add_prompt_flags(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    add_clock_flag(parser)
    args = parser.parse_args()
    clock = make_clock(args)
    result = {"machine": machine(args.device, torch.get_num_threads()), "rows": []}
    print(result["machine"], flush=True)
    for dtype in args.dtype:
        torch.manual_seed(0)
        model = modeling.MossVLForConditionalGeneration(make_config(args))
        model = model.eval().to(args.device, getattr(torch, dtype))
        timer = Timer(model, clock)
        for frames in args.frames:
            seconds = measure(model, timer, frames, args)
            result["rows"].append({"dtype": dtype, "frames": frames, "seconds": seconds})
            write_json(args.json, result)
    print(parts_table(result["rows"]))


if __name__ == "__main__":
    main()
