"""From a video file to the first token and to the 64th: python benchmarks/end_to_end.py --json end_to_end.json

A clip of 100 s in 1080p and one of 61 s in 640x360, a frame a second, asked by `offline_video_generate` about the shipped checkpoint,
and about a larger random one with the same tokenizer. In turns and in one run:
  ours         frames are encoded while others are decoded
  in sequence  the same package with everything decoded first, then encoded, as `processor(...)` and `generate` do it
  decode       the frames alone: read, resized, cut into patches
  encode       the encoder alone, on patches that are there
"Side by side" is the time from the file to vision features, with frames encoded while others are decoded; "over the larger" is that over the
larger of decoding and encoding alone.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.measuring import ROOT, Clock, alternate, machine, spread, summary, table, write_json
from moss_vl.benchmarks.model import add_model_flags, sizes
from moss_vl.benchmarks.preprocess import CLIPS, make_media
from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration
from moss_vl.processing_moss_vl import MossVLProcessor


NANO = ROOT / "checkpoints" / "moss-vl-nano"
PROMPT = "What happens?"


class Ticks:
    """A streamer that notes when tokens come: the prompt first, then one by one."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def load(name: str, args):
    if name == "shipped":
        return (
            MossVLForConditionalGeneration.from_pretrained(NANO, dtype=getattr(torch, args.dtype))
            .eval()
            .to(args.device)
        )
    config = MossVLConfig.from_pretrained(NANO).to_dict()
    for derived in ("rope_parameters", "cross_attention_layers"):  # from the sizes
        config["text_config"].pop(derived, None)
    text, vision = sizes(args)
    config["text_config"] |= text
    config["vision_config"] |= vision
    torch.manual_seed(0)
    return MossVLForConditionalGeneration(MossVLConfig(**config)).eval().to(args.device, getattr(torch, args.dtype))


class Runner:
    def __init__(self, model, processor, path: Path, args):
        self.model, self.processor, self.path, self.clock = model, processor, str(path), Clock(args.device)
        self.knobs = {
            "video_fps": args.fps,
            "longest_edge": args.longest_edge,
            "num_extract_threads": args.extract_threads,
        }
        self.generate = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
        names = {"longest_edge": "max_pixels"}  # what the processor calls the offline method's knob
        self.media = {"videos_kwargs": {names.get(name, name): value for name, value in self.knobs.items()}}
        self.inputs = self.read()

    def read(self, **more):
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": f"<|video|>{PROMPT}"}], tokenize=False, add_generation_prompt=True
        )
        return self.processor(
            text=text, videos=[self.path], return_tensors="pt", do_normalize=False, **self.media, **more
        )

    def _ticks(self, call) -> dict[str, float]:
        ticks, begin = Ticks(), time.perf_counter()
        call(ticks)
        return {"first token": ticks.times[1] - begin, "last token": ticks.times[-1] - begin}

    def ours(self) -> dict[str, float]:
        return self._ticks(
            lambda ticks: self.model.offline_video_generate(
                self.processor, PROMPT, self.path, streamer=ticks, **self.knobs, **self.generate
            )
        )

    def in_sequence(self) -> dict[str, float]:
        pad = self.processor.tokenizer.pad_token_id
        return self._ticks(
            lambda ticks: self.model.generate(
                **self.read().to(self.model.device), streamer=ticks, pad_token_id=pad, **self.generate
            )
        )

    def encode(self, levels, grid, mean, std) -> torch.Tensor:
        with torch.no_grad():
            return self.model.get_image_features(levels, grid, None, [mean], [std]).last_hidden_state

    def decode_alone(self):
        return {"seconds": self.clock.time(self.read)}

    def encode_alone(self):
        levels, grid, (mean,), (std,) = (
            self.inputs[name] for name in ("pixel_values", "grid_thw", "image_mean", "image_std")
        )
        return {"seconds": self.clock.time(lambda: self.encode(levels, grid, mean, std))}

    def both(self):
        return {"seconds": self.clock.time(lambda: self.read(encoder=self.encode))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--media",
        type=Path,
        help="folder in which the clips are made, or lie from an earlier run; default: a temporary one",
    )
    parser.add_argument("--models", nargs="+", choices=("shipped", "random"), default=["shipped", "random"])
    parser.add_argument("--fps", type=float, default=1.0)
    parser.add_argument("--longest-edge", type=int, default=448 * 448, help="most pixels of a frame")
    parser.add_argument("--tokens", type=int, default=64)
    add_model_flags(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--extract-threads", type=int, default=4, help="num_extract_threads")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"machine": machine(args.device, args.threads), "dtype": args.dtype, "rows": []}
    print(result["machine"], flush=True)
    processor, rows = MossVLProcessor.from_pretrained(NANO), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.media or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        media = make_media(folder, list(CLIPS))
        for name in args.models:
            model = load(name, args)
            for clip in reversed(CLIPS):
                runner = Runner(model, processor, media[clip][0], args)
                calls = {
                    "ours": runner.ours,
                    "in sequence": runner.in_sequence,
                    "decode": runner.decode_alone,
                    "encode": runner.encode_alone,
                    "both": runner.both,
                }
                row = {
                    "model": name,
                    "clip": clip,
                    "grid": runner.inputs["grid_thw"].tolist(),
                    "seconds": alternate(calls, args.rounds),
                }
                result["rows"].append(row)
                write_json(args.json, result)
                seconds = row["seconds"]
                larger = max(summary(seconds[part]["seconds"])["median"] for part in ("decode", "encode"))
                rows.append(
                    (
                        f"{name}, {clip}",
                        runner.inputs["grid_thw"][0, 0].item(),
                        *(spread(seconds[part]["seconds"]) for part in ("decode", "encode", "both")),
                        f"{summary(seconds['both']['seconds'])['median'] / larger:.2f}",
                        *(
                            spread(seconds[which][what])
                            for what in ("first token", "last token")
                            for which in ("ours", "in sequence")
                        ),
                    )
                )
                print(f"{name}, {clip} measured", flush=True)
    print(
        table(
            (
                "",
                "frames",
                "decode, s",
                "encode, s",
                "side by side, s",
                "over the larger",
                "first token, s",
                "in sequence, s",
                f"token {args.tokens}, s",
                "in sequence, s",
            ),
            rows,
        )
    )


if __name__ == "__main__":
    main()
