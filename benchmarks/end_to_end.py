"""From a video file to the first token and to the 64th:

    python benchmarks/end_to_end.py --json end_to_end.json

`offline_video_generate` on a clip of 100 s in 1080p and one of 61 s in 640x360, one frame per second, with the shipped
checkpoint and with a larger random one with the same tokenizer. Compares, in alternating rounds of one run:
  ours         frames are encoded while others are decoded
  in sequence  the same package, but everything is decoded before it is encoded, as by `processor(...)` and `generate`
  decode       frames alone: read, resized, cut into patches
  encode       the encoder alone, on patches that are in memory
  both         from the file to vision features, as in "ours"
In the table, "side by side" is "both", and "over the larger" divides it by the larger of "decode" and "encode".
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.measuring import ROOT, Clock, alternate, machine, spread, summary, table, write_json
from moss_vl.benchmarks.preprocess import CLIPS, make_media
from moss_vl.benchmarks.random_models import add_model_flags, sizes
from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration
from moss_vl.processing_moss_vl import MossVLProcessor


NANO = ROOT / "checkpoints" / "moss-vl-nano"
PROMPT = "What happens?"


class TokenTimes:
    """A streamer that records when tokens arrive: first the prompt, then each token."""

    def __init__(self):
        self.times = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(name: str, args) -> MossVLForConditionalGeneration:
    """The shipped checkpoint, or a random model with its tokenizer and the sizes of the flags."""
    dtype = getattr(torch, args.dtype)
    if name == "shipped":
        return MossVLForConditionalGeneration.from_pretrained(NANO, dtype=dtype).eval().to(args.device)
    config = MossVLConfig.from_pretrained(NANO).to_dict()
    for derived in ("rope_parameters", "cross_attention_layers"):  # their defaults follow from the sizes
        config["text_config"].pop(derived, None)
    text, vision = sizes(args)
    config["text_config"] |= text
    config["vision_config"] |= vision
    torch.manual_seed(0)
    return MossVLForConditionalGeneration(MossVLConfig(**config)).eval().to(args.device, dtype)


class Runner:
    """The calls to compare, each of which returns the seconds of its parts."""

    def __init__(self, model, processor, path: Path, args):
        self.model, self.processor, self.path, self.clock = model, processor, str(path), Clock(args.device)
        self.options = {
            "video_fps": args.fps,
            "longest_edge": args.longest_edge,
            "num_extract_threads": args.extract_threads,
        }
        self.generate_options = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
        names = {"longest_edge": "max_pixels"}  # the processor's name of an option of the offline methods
        self.videos_kwargs = {names.get(name, name): value for name, value in self.options.items()}
        self.inputs = self.read()

    def calls(self) -> dict:
        return {
            "ours": self.ours,
            "in sequence": self.in_sequence,
            "decode": self.decode_alone,
            "encode": self.encode_alone,
            "both": self.both,
        }

    def read(self, **kwargs):
        """Runs the processor on the clip."""
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": f"<|video|>{PROMPT}"}], tokenize=False, add_generation_prompt=True
        )
        return self.processor(
            text=text,
            videos=[self.path],
            return_tensors="pt",
            do_normalize=False,
            videos_kwargs=self.videos_kwargs,
            **kwargs,
        )

    def ours(self) -> dict[str, float]:
        return self._time_tokens(
            lambda streamer: self.model.offline_video_generate(
                self.processor, PROMPT, self.path, streamer=streamer, **self.options, **self.generate_options
            )
        )

    def in_sequence(self) -> dict[str, float]:
        pad = self.processor.tokenizer.pad_token_id
        return self._time_tokens(
            lambda streamer: self.model.generate(
                **self.read().to(self.model.device), streamer=streamer, pad_token_id=pad, **self.generate_options
            )
        )

    def _time_tokens(self, call) -> dict[str, float]:
        streamer, start = TokenTimes(), time.perf_counter()
        call(streamer)
        return {"first token": streamer.times[1] - start, "last token": streamer.times[-1] - start}

    def decode_alone(self) -> dict[str, float]:
        return {"seconds": self.clock.time(self.read)}

    def encode_alone(self) -> dict[str, float]:
        names = ("pixel_values", "grid_thw", "image_mean", "image_std")
        pixels, grid, (mean,), (std,) = (self.inputs[name] for name in names)
        return {"seconds": self.clock.time(lambda: self.encode(pixels, grid, mean, std))}

    def both(self) -> dict[str, float]:
        return {"seconds": self.clock.time(lambda: self.read(encoder=self.encode))}

    def encode(self, pixels, grid, mean, std) -> torch.Tensor:
        with torch.no_grad():
            return self.model.get_image_features(pixels, grid, None, [mean], [std]).last_hidden_state


def tokens_table(rows: list[dict], tokens: int) -> str:
    lines = []
    for row in rows:
        seconds = row["seconds"]
        larger = max(summary(seconds[part]["seconds"])["median"] for part in ("decode", "encode"))
        first_last = [
            spread(seconds[name][part]) for part in ("first token", "last token") for name in ("ours", "in sequence")
        ]
        lines.append(
            (
                f"{row['model']}, {row['clip']}",
                row["grid"][0][0],
                *(spread(seconds[part]["seconds"]) for part in ("decode", "encode", "both")),
                f"{summary(seconds['both']['seconds'])['median'] / larger:.2f}",
                *first_last,
            )
        )
    head = ("", "frames", "decode, s", "encode, s", "side by side, s", "over the larger", "first token, s")
    return table((*head, "in sequence, s", f"token {tokens}, s", "in sequence, s"), lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--media", type=Path, help="folder for the clips, which keeps them for a later run; default: a temporary one"
    )
    parser.add_argument("--models", nargs="+", choices=("shipped", "random"), default=["shipped", "random"])
    parser.add_argument("--fps", type=float, default=1.0)
    parser.add_argument("--longest-edge", type=int, default=448 * 448, help="most pixels per frame")
    parser.add_argument("--tokens", type=int, default=64)
    add_model_flags(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--extract-threads", type=int, default=4, help="num_extract_threads")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    result = {"machine": machine(args.device, args.threads), "dtype": args.dtype, "rows": []}
    print(result["machine"], flush=True)
    processor = MossVLProcessor.from_pretrained(NANO)
    with tempfile.TemporaryDirectory() as temporary:
        media = make_media(args.media or Path(temporary), list(CLIPS))
        for name in args.models:
            model = load(name, args)
            for clip in reversed(CLIPS):
                runner = Runner(model, processor, media[clip][0], args)
                seconds = alternate(runner.calls(), args.rounds)
                grid = runner.inputs["grid_thw"].tolist()
                result["rows"].append({"model": name, "clip": clip, "grid": grid, "seconds": seconds})
                write_json(args.json, result)
                print(f"{name}, {clip} measured", flush=True)
    print(tokens_table(result["rows"], args.tokens))


if __name__ == "__main__":
    main()
