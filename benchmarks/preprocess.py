"""From files to patches:

    python benchmarks/preprocess.py --json preprocess.json

A clip of 61 s in 640x360 and one of 100 s in 1080p at one frame per second, a JPEG of 4000x3000, and 32 pictures.
Compares the package's processors with a plain pipeline, which returns the same tensors except for Pillow's rounding:
PyAV decodes from the start, Pillow resizes, numpy scales, normalises and cuts patches, each for a whole clip at once.
The package keeps uint8 pixels, as in the offline methods; "float32" is the same with the default `do_normalize`.

Measures, in alternating rounds of one run: everything; decoding alone; the rest, on decoded frames; and resize and
patches as parts of the rest, frame by frame. Peak memory is the growth of resident memory in a process per
measurement.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.measuring import (
    Clock,
    alternate,
    machine,
    reset_resident_peak,
    resident_peak,
    spread,
    summary,
    table,
    write_json,
)
from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.patches import patchify
from moss_vl.resizing import resize_uint8
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor
from moss_vl.video_reading import open_video


CLIPS = {"61 s of 640x360": (61, 640, 360), "100 s of 1080p": (100, 1920, 1080)}
PICTURE, PICTURES = "a 4000x3000 JPEG", "32 pictures"


# Media


def texture(width: int, height: int, seed: int) -> np.ndarray:
    """uint8 [height, width, 3], smooth shapes with fine grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)


def write_clip(path: Path, seconds: int, width: int, height: int, fps: int = 30) -> None:
    """h264 with the defaults of x264 (a keyframe at least every 250 frames). A scene moves sideways, and changes every
    7 s."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * fps):
            if number % (7 * fps) == 0:
                scene = texture(width + 256, height, number)
            left = number % (7 * fps) % 256
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[:, left : left + width]), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())


def make_media(folder: Path, names=(*CLIPS, PICTURE, PICTURES)) -> dict[str, list[Path]]:
    """Name -> files in the folder, which is made if needed. Existing files are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: [folder / f"{seconds}s-{width}x{height}.mp4"] for name, (seconds, width, height) in CLIPS.items()}
    files |= {
        PICTURE: [folder / "4000x3000.jpg"],
        PICTURES: [folder / f"picture-{number}.jpg" for number in range(32)],
    }
    for name in names:
        for number, path in enumerate(files[name]):
            if path.exists():
                continue
            if name in CLIPS:
                write_clip(path, *CLIPS[name])
            else:
                width, height = (4000, 3000) if name == PICTURE else (640 + 32 * (number % 5), 480 + 16 * (number % 7))
                Image.fromarray(texture(width, height, number)).save(path, quality=90)
    return {name: files[name] for name in names}


# The plain pipeline


def plain_decode(path: Path, numbers: list[int]) -> list[np.ndarray]:
    """RGB frames by number. FFmpeg decodes all frames up to the last of them, with its default number of threads."""
    import av

    frames, wanted = [], set(numbers)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
            if number == numbers[-1]:
                break
    return frames


def plain_resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def plain_cut(resized: list[np.ndarray]) -> torch.Tensor:
    """Resized RGB frames -> float32 [P, 768]."""
    height, width, _ = resized[0].shape
    pixels = (np.stack(resized).astype(np.float32) / 255 - 0.5) / 0.5
    blocks = pixels.transpose(0, 3, 1, 2).reshape(len(resized), 3, height // 32, 2, 16, width // 32, 2, 16)
    # [n, c, Y, my, py, X, mx, px] -> [n, Y, X, my, mx, c, py, px]
    return torch.from_numpy(np.ascontiguousarray(blocks.transpose(0, 2, 5, 3, 6, 1, 4, 7)).reshape(-1, 768))


def plain_patches(frames: list[np.ndarray], height: int, width: int) -> torch.Tensor:
    """RGB frames -> float32 [P, 768]."""
    return plain_cut([plain_resize(frame, height, width) for frame in frames])


def plain_pictures(paths: list[Path], sizes: list[tuple[int, int]]) -> torch.Tensor:
    return torch.cat(
        [
            plain_patches([np.asarray(Image.open(path).convert("RGB"))], *size)
            for path, size in zip(paths, sizes, strict=True)
        ]
    )


# Measuring


class Task:
    """One medium, or the 32 pictures, with the steps of both pipelines."""

    def __init__(self, name: str, paths: list[Path], threads: int):
        self.name, self.paths, self.threads, self.is_clip = name, paths, threads, name in CLIPS
        if self.is_clip:
            self.processor = MossVLVideoProcessor(video_fps=1.0, num_extract_threads=threads)
            plan = self.processor.plan([str(paths[0])])[0]
            self.numbers, self.sizes = plan.indices.tolist(), [(plan.height, plan.width)]
        else:
            self.processor = MossVLImageProcessor()
            grids = [grid for _, grid in self.processor.extract([str(path) for path in paths])]
            self.sizes = [(16 * h, 16 * w) for _, h, w in grids]

    # From files

    def ours(self, do_normalize: bool = False) -> torch.Tensor:
        if self.is_clip:
            media, name = str(self.paths[0]), "pixel_values_videos"
        else:
            media, name = [str(path) for path in self.paths], "pixel_values"
        return self.processor(media, return_tensors="pt", do_normalize=do_normalize)[name]

    def float32(self) -> torch.Tensor:
        return self.ours(do_normalize=True)

    def plain(self) -> torch.Tensor:
        if self.is_clip:
            return plain_patches(plain_decode(self.paths[0], self.numbers), *self.sizes[0])
        return plain_pictures(self.paths, self.sizes)

    # Decoding

    def our_decoding(self) -> None:
        """The package's decoding of a clip, on its threads."""
        if not self.is_clip:
            return
        video = open_video(str(self.paths[0]))

        def decode(numbers) -> None:
            for _ in video.frames(numbers, []):
                pass

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(decode, video.chunks(self.numbers, self.threads)))

    def plain_decoding(self) -> list[np.ndarray]:
        if self.is_clip:
            return plain_decode(self.paths[0], self.numbers)
        return [np.asarray(Image.open(path).convert("RGB")) for path in self.paths]

    # From decoded frames

    def our_rest(self, frames: list[np.ndarray]) -> torch.Tensor:
        if not self.is_clip:
            return self.processor(list(frames), do_normalize=False)["pixel_values"]
        metadata = {"timestamps": [float(i) for i in range(len(frames))]}
        options = {"video_metadata": metadata, "num_frames": len(frames)}
        return self.processor(list(frames), do_normalize=False, **options)["pixel_values_videos"]

    def plain_rest(self, frames: list[np.ndarray]) -> torch.Tensor:
        if self.is_clip:
            return plain_patches(frames, *self.sizes[0])
        return torch.cat([plain_patches([frame], *size) for frame, size in zip(frames, self.sizes, strict=True)])

    def resize(self, frames: list[np.ndarray], resize_one: Callable) -> list:
        """`resize_one(frame, height, width)` of each frame."""
        sizes = self.sizes * len(frames) if self.is_clip else self.sizes
        return [resize_one(frame, *size) for frame, size in zip(frames, sizes, strict=True)]

    def plain_cut(self, resized: list[np.ndarray]) -> list[torch.Tensor]:
        return [plain_cut(frames) for frames in ([resized] if self.is_clip else [[frame] for frame in resized])]


def compare(task: Task) -> dict[str, float]:
    """How much the tensors of both pipelines differ.

    Raises:
        SystemExit: if they differ by more than rounding.
    """
    ours, plain = task.float32(), task.plain()
    if ours.shape != plain.shape:
        raise SystemExit(f"{task.name}: the plain pipeline returns another shape: {plain.shape}, not {ours.shape}")
    difference = (ours - plain).abs().mul_(255 / 2).round_()  # in uint8 pixels
    share, most = (difference > 0).float().mean().item(), difference.max().item()
    if share > 0.01 or most > 2:
        raise SystemExit(
            f"{task.name}: the plain pipeline returns other tensors: {100 * share:.1f} % differ, by up to {most:.0f} "
            "of 255"
        )
    return {"share that differs": share, "levels apart": most}


def measure(task: Task, rounds: int) -> dict:
    """Differences and seconds of both pipelines."""
    result = compare(task)
    clock, frames = Clock("cpu"), task.plain_decoding()
    ours, plain = task.resize(frames, resize_uint8), task.resize(frames, plain_resize)
    calls = {
        "ours": lambda: {"total": clock.time(task.ours), "float32": clock.time(task.float32)},
        "plain": lambda: {"total": clock.time(task.plain)},
        "decoding": lambda: {"plain": clock.time(task.plain_decoding), "ours": clock.time(task.our_decoding)},
        "rest": lambda: {
            "ours": clock.time(lambda: task.our_rest(frames)),
            "plain": clock.time(lambda: task.plain_rest(frames)),
        },
        "resize": lambda: {
            "ours": clock.time(lambda: task.resize(frames, resize_uint8)),
            "plain": clock.time(lambda: task.resize(frames, plain_resize)),
        },
        "patches": lambda: {
            "ours": clock.time(lambda: [patchify(frame[None], 16, 2) for frame in ours]),
            "plain": clock.time(lambda: task.plain_cut(plain)),
        },
    }
    return {**result, "seconds": alternate(calls, rounds)}


def resident_memory(name: str, paths: list[Path], args) -> dict[str, int]:
    """Pipeline -> growth of resident memory in a process of its own."""
    context, memory = multiprocessing.get_context("spawn"), {}
    for pipeline in ("ours", "plain"):
        queue = context.Queue()
        arguments = (pipeline, name, paths, args.extract_threads, args.threads, queue)
        process = context.Process(target=report_memory, args=arguments)
        process.start()
        memory[pipeline] = queue.get()
        process.join()
    return memory


def report_memory(pipeline: str, name: str, paths: list[Path], threads: int, torch_threads: int, queue) -> None:
    """Runs in the process."""
    torch.set_num_threads(torch_threads)
    task = Task(name, paths, threads)
    before = reset_resident_peak()
    getattr(task, pipeline)()
    queue.put(resident_peak() - before)


def files_table(rows: list[dict]) -> str:
    both, lines = ("ours", "plain"), []
    for row in rows:
        seconds, memory = row["seconds"], row["memory"]
        medians = {
            call: {part: summary(values)["median"] for part, values in parts.items()}
            for call, parts in seconds.items()
        }
        fastest_decoding = min(
            value for value in medians["decoding"].values() if value > 1e-4
        )  # pictures: plain's alone
        lines.append(
            (
                row["name"],
                spread(seconds["ours"]["total"]),
                spread(seconds["ours"]["float32"]),
                spread(seconds["plain"]["total"]),
                f"{medians['plain']['total'] / medians['ours']['total']:.2f}",
                *(spread(seconds["decoding"][which]) for which in both),
                f"{medians['ours']['total'] / fastest_decoding:.2f}",
                *(spread(seconds["rest"][which], digits=3) for which in both),
                f"{medians['rest']['plain'] / medians['rest']['ours']:.2f}",
                *(f"{medians[part][which]:.3f}" for part in ("resize", "patches") for which in both),
                *(f"{memory[which] / 1e6:.0f}" for which in both),
                f"{memory['ours'] / memory['plain']:.2f}",
            )
        )
    head = ("", "ours, s", "float32, s", "plain, s", "plain / ours", "our decoding, s", "plain decoding, s")
    head += (
        "ours / fastest decoding",
        "our rest, s",
        "plain rest, s",
        "plain / ours",
        "our resize, s",
        "plain resize, s",
    )
    head += ("our patches, s", "plain patches, s", "our peak, MB", "plain peak, MB", "ours / plain")
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--media", type=Path, help="folder for the media, which keeps them for a later run; default: a temporary one"
    )
    parser.add_argument("--only", nargs="+", choices=(*CLIPS, PICTURE, PICTURES), default=[*CLIPS, PICTURE, PICTURES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--extract-threads", type=int, default=4, help="num_extract_threads")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"machine": machine("cpu", args.threads), "rows": []}
    print(result["machine"], flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        media = make_media(args.media or Path(temporary), args.only)
        for name in args.only:
            row = {"name": name, **measure(Task(name, media[name], args.extract_threads), args.rounds)}
            row["memory"] = resident_memory(name, media[name], args)
            result["rows"].append(row)
            print(f"{name} measured", flush=True)
            write_json(args.json, result)
    print(files_table(result["rows"]))


if __name__ == "__main__":
    main()
