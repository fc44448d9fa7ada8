"""Where the time of a prefill goes: python benchmarks/parts.py --frames 16 64 256 --json parts.json

The seconds inside each kind of module, each part without those inside it; what is in none is "other". Medians over --rounds; the model
and the frames of model.py.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl import decoder, vision_encoder
from moss_vl import modeling_moss_vl as modeling
from moss_vl.benchmarks.measuring import Clock, machine, summary, table, write_json
from moss_vl.benchmarks.model import add_model_flags, add_prompt_flags, make_config, make_prompt


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
    """Seconds in each part of `PARTS`, by what is entered and left."""

    def __init__(self, model, clock: Clock):
        self.clock, self.entered, self.spans = clock, [], []
        for module in model.modules():
            for name, kind in PARTS.items():
                if isinstance(kind, str):
                    if hasattr(module, kind):
                        setattr(module, kind, self._timed(name, getattr(module, kind)))
                elif isinstance(module, kind):
                    module.forward = self._timed(name, module.forward)

    def _timed(self, name, call):
        def timed(*args, **kwargs):
            begin = self.clock.now()
            out = call(*args, **kwargs)
            self.spans.append((name, begin, self.clock.now()))
            return out

        return timed

    def seconds(self, call) -> dict[str, float]:
        """A span's own seconds are those that no span inside it has: spans end in order, the inner before the outer."""
        self.spans = []
        begin = self.clock.now()
        call()
        self.spans.append(("other", begin, self.clock.now()))
        own, done = defaultdict(float), []  # done: (start, seconds) of the spans that no later one has taken in yet
        for name, first, last in self.spans:
            start, length = self.clock.between(begin, first), self.clock.between(first, last)
            inside = 0.0
            while done and done[-1][0] >= start:
                inside += done.pop()[1]
            own[name] += length - inside
            done.append((start, length))
        return dict(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64, 256])
    add_model_flags(parser)
    add_prompt_flags(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    result, clock = {"machine": machine(args.device, torch.get_num_threads()), "rows": []}, Clock(args.device)
    print(result["machine"], flush=True)
    for dtype in args.dtype:
        torch.manual_seed(0)
        model = (
            modeling.MossVLForConditionalGeneration(make_config(args)).eval().to(args.device, getattr(torch, dtype))
        )
        timer = Timer(model, clock)
        for frames in args.frames:
            prompt = make_prompt(frames, args.side, args.tokens, args.device, model.dtype)

            @torch.no_grad()
            def prefill():
                model(prompt.ids, pixel_values=prompt.pixels, grid_thw=prompt.grid, use_cache=True, logits_to_keep=1)

            rounds = [timer.seconds(prefill) for _ in range(args.rounds + 1)][1:]  # the first warms up
            seconds = {name: summary([one.get(name, 0.0) for one in rounds]) for name in (*PARTS, "other")}
            result["rows"].append({"dtype": dtype, "frames": frames, "seconds": seconds})
            write_json(args.json, result)
    whole = [sum(part["median"] for part in row["seconds"].values()) for row in result["rows"]]
    lines = [
        (
            name,
            *(
                f"{row['seconds'][name]['median']:.3f} ({100 * row['seconds'][name]['median'] / total:.0f} %)"
                for row, total in zip(result["rows"], whole, strict=True)
            ),
        )
        for name in (*PARTS, "other")
    ]
    print(
        table(
            ("seconds", *(f"{row['frames']} frames, {row['dtype']}" for row in result["rows"])),
            [*lines, ("whole", *(f"{total:.2f}" for total in whole))],
        )
    )


if __name__ == "__main__":
    main()
