"""Damages media files of many kinds and reports what the video and image processors do with them.

    python tests/fuzz_media.py --files 2000 --seed 0 --backend pyav

Each damaged file is processed in a worker process with a limit of time and memory. Outcomes:

    ok           frames, without a warning
    warned       frames, with a warning
    named error  ValueError or FileNotFoundError whose message names the file
    raw error    any other error
    timeout, memory, crash
    silent       frames without a warning that a sequential decode of the same damaged file, by PyAV or for animated
                 images by Pillow, does not give, or gives at another distance from the first of them

Files that end in an outcome after "named error" are kept in `--keep`.
"""

import argparse
import collections
import io
import logging
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from make_media import X264_CLOSED, X264_OPEN, X265_OPEN, copy_packets, draw, write_video  # noqa: E402


FRAMES, SECONDS, MEMORY = 20, 20.0, 3 << 30  # of a seed; for one file
BAD = ("raw error", "timeout", "memory", "crash", "silent")
MUTATIONS = ("truncate", "flip", "zero", "splice", "header")


# seeds


def _video(name, **options):
    return name, lambda path: write_video(path, count=FRAMES, **options)


def _copied(name, source, **options):
    def make(path):
        first = path.with_name(f"source_{path.name}{source}")
        return copy_packets(write_video(first, count=FRAMES, **options), path)

    return name, make


def _still(name, mode="RGB", **options):
    return name, lambda path: Image.fromarray(draw(5)).convert(mode).save(path, **options)


def _animation(name, mode="RGB", **options):
    def make(path):
        frames = [Image.fromarray(draw(number)).convert(mode) for number in range(FRAMES)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)

    return name, make


VPX = {"g": "10", "deadline": "realtime", "cpu-used": "8"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
STAMPS = [number * 40 + number % 3 * 11 for number in range(FRAMES)]
SEEDS = dict(
    [
        _video("h264.mp4", options=X264_CLOSED),
        _video("h264_open.mp4", options=X264_OPEN),
        _video("h264_plain.mov", options={"bf": "0", "g": "5"}),
        _video("h264_10bit.mp4", pixels="yuv420p10le", options=X264_CLOSED),
        _video("h265.mp4", codec="libx265", options=X265_OPEN),
        _video("h265_10bit.mkv", codec="libx265", pixels="yuv420p10le", options=X265_OPEN),
        _video("fragments.mp4", options=X264_OPEN, muxer=FRAGMENTS),
        _video("variable.mp4", options=X264_OPEN, stamps=STAMPS, time_base=Fraction(1, 1000)),
        _video("variable.mkv", options=X264_OPEN, stamps=STAMPS, time_base=Fraction(1, 1000)),
        _video("sound.mp4", options=X264_CLOSED, sound=True),
        _video("h264.mkv", options=X264_OPEN),
        _video("h264.flv", options=X264_CLOSED),
        _video("h264.ts", options=X264_CLOSED),
        _video("h264.avi", options=X264_CLOSED),
        _video("h264.nut", options=X264_CLOSED),
        _video("raw.h264", options=X264_CLOSED),
        _copied("h265.ts", ".mp4", codec="libx265", options=X265_OPEN),
        _video("vp8.webm", codec="libvpx", options=VPX),
        _video("vp9.webm", codec="libvpx-vp9", options=VPX),
        _video("vp9.ivf", codec="libvpx-vp9", options=VPX),
        _video("av1.mp4", codec="libsvtav1", options={"g": "10", "preset": "12"}),
        _video("av1.mkv", codec="libsvtav1", options={"g": "10", "preset": "12"}),
        _video("mpeg4.avi", codec="mpeg4", options={"bf": "2", "g": "10"}),
        _video("mpeg4.mp4", codec="mpeg4", options={"bf": "2", "g": "10"}),
        _video("mpeg2.mpg", codec="mpeg2video", options={"bf": "2", "g": "10"}),
        _video("mpeg2.ts", codec="mpeg2video", options={"bf": "2", "g": "10"}),
        _video("mjpeg.avi", codec="mjpeg", pixels="yuvj420p"),
        _video("mjpeg.mov", codec="mjpeg", pixels="yuvj420p"),
        _video("wmv2.asf", codec="wmv2"),
        _video("flv1.flv", codec="flv"),
        _video("ffv1.mkv", codec="ffv1"),
        _video("prores.mov", codec="prores_ks", pixels="yuv422p10le"),
        _video("raw.y4m", codec="wrapped_avframe"),
        _animation("anim.gif"),
        _animation("anim.webp"),
        _animation("anim.png", mode="RGBA"),
        _still("still.jpg"),
        _still("progressive.jpg", progressive=True),
        _still("still.png", mode="RGBA"),
        _still("palette.png", mode="P"),
        _still("still.webp"),
        _still("still.bmp"),
        _still("still.tiff", compression="tiff_lzw"),
        _still("still.ppm"),
    ]
)
STILLS = tuple(name for name in SEEDS if name.startswith(("still", "progressive", "palette")))


def make_seeds(folder: Path) -> dict[str, bytes]:
    """Name -> content of the undamaged files. Kinds whose encoder this build lacks are left out."""
    seeds = {}
    for name, make in SEEDS.items():
        try:
            make(folder / name)
            seeds[name] = (folder / name).read_bytes()
        except Exception as error:
            print(f"no seed {name}: {type(error).__name__}: {error}", file=sys.stderr)
    return seeds


def mutate(data: bytes, kind: str, rng: random.Random, other: bytes) -> bytes:
    """`data` with one kind of damage; a splice takes bytes of `other`."""
    out, size = bytearray(data), len(data)
    if kind == "truncate":
        return bytes(out[: rng.randrange(1, size)])
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 4, 32))):
            out[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        start = rng.randrange(size)
        end = min(size, start + rng.choice((1, 8, 64, 512, 4096)))
        out[start:end] = bytes(end - start)
    elif kind == "splice":
        start, length, source = rng.randrange(size), rng.choice((4, 64, 1024)), rng.randrange(len(other))
        out[start : start + rng.choice((0, length))] = other[source : source + length]
    else:  # a field of 1, 2, 4 or 8 bytes in the first 1024 or last 2048 bytes, where headers are
        width = rng.choice((1, 2, 4, 8))
        start = rng.randrange(min(1024, size)) if rng.random() < 0.6 else rng.randrange(max(0, size - 2048), size)
        value = rng.choice((0, 1, (1 << 8 * width) - 1, (1 << 8 * width - 1) - 1, rng.getrandbits(8 * width)))
        out[start : start + width] = value.to_bytes(width, rng.choice(("big", "little")))
    return bytes(out)


# one file


def sequential(path: str) -> list[tuple[float | None, np.ndarray]]:
    """(seconds, frame) of a plain decode from the start, on one thread, as far as it goes."""
    import av

    if path.endswith(("anim.gif", "anim.webp", "anim.png")):
        return _sequential_animation(path)
    frames = []
    try:
        with av.open(path, metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            failures = 0
            while failures < 16 and len(frames) < 10 * FRAMES:
                try:
                    for packet in container.demux(stream):
                        try:
                            frames += [(frame.time, frame.to_ndarray(format="rgb24")) for frame in packet.decode()]
                        except av.error.FFmpegError:
                            pass
                    break
                except av.error.FFmpegError:
                    failures += 1
    except Exception:
        pass
    return frames


def _sequential_animation(path: str) -> list[tuple[None, np.ndarray]]:
    frames = []
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                frame = frame.convert("RGBA")
                white = Image.new("RGBA", frame.size, "white")
                frames.append((None, np.array(Image.alpha_composite(white, frame).convert("RGB"))))
    except Exception:
        pass
    return frames


def difference(images: dict[int, np.ndarray], times: np.ndarray, truth: list) -> str | None:
    """What differs between frames by number, with the times of all frames, and a sequential decode."""
    by_content = collections.defaultdict(list)
    for time_of_frame, image in truth:
        by_content[image.shape, image.tobytes()].append(time_of_frame)
    found = {number: by_content.get((image.shape, image.tobytes())) for number, image in images.items()}
    wrong = [number for number, at in found.items() if not at]
    if wrong:
        return f"frames {wrong} of {list(images)} are not among the {len(truth)} decoded"
    unique = {number: at[0] for number, at in found.items() if len(at) == 1 and at[0] is not None}
    if len(unique) > 1 and [t for t, _ in truth] == sorted(t if t is not None else -1 for t, _ in truth):
        first = min(unique)
        for number, at in unique.items():
            expected, got = at - unique[first], float(times[number] - times[first])
            if abs(expected - got) > 0.06:
                return f"frame {number} is {got:.3f} s after frame {first}, expected {expected:.3f}"
    return None


def process(path: str, backend: str) -> tuple[str, str]:
    """(outcome, detail) of one file in this process."""
    from moss_vl.image_processing_moss_vl import MossVLImageProcessor
    from moss_vl.video_files import UntrueKeyframes
    from moss_vl.video_processing_moss_vl import MossVLVideoProcessor
    from moss_vl.video_reading import open_video

    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    for name in [name for name in logging.root.manager.loggerDict if "moss_vl" in name]:
        logging.getLogger(name).addHandler(handler)
    try:
        if path.endswith(STILLS):
            MossVLImageProcessor().preprocess([path])
            return "ok", ""
        processor = MossVLVideoProcessor(size={"shortest_edge": 1024, "longest_edge": 1 << 20})
        clip = processor.extract(path, num_frames=7, num_extract_threads=2, video_backend=backend)[0]
        if warnings:
            return "warned", warnings[0]
        numbers = clip.metadata.frames_indices
        video = open_video(path, backend=backend)
        try:
            images = {number: image for number, _, image in video.frames(sorted(set(numbers)), [])}
        except UntrueKeyframes:  # as the processor does
            images = {number: image for number, _, image in video.frames(sorted(set(numbers)), [], from_start=True)}
    except MemoryError as error:
        return "memory", str(error)
    except (ValueError, FileNotFoundError) as error:
        plain = type(error) in (ValueError, FileNotFoundError) and Path(path).name in str(error)
        return ("named error" if plain else "raw error"), f"{type(error).__name__}: {error}"
    except Exception as error:
        return "raw error", f"{type(error).__name__}: {error}"
    truth = sequential(path)
    if len(truth) == 0:
        return "ok", "no sequential decode"
    found = difference(images, video.times, truth)
    return ("silent", found) if found else ("ok", "")


def _work(path: str, backend: str, pipe) -> None:
    """Processes one file in a forked worker. The limit is on what this file adds to the address space."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    pipe.send(process(path, backend))
    pipe.close()


def run_one(path: str, backend: str, seconds: float = SECONDS) -> tuple[str, str]:
    """(outcome, detail) of one file, in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(path, backend, there))
    worker.start()
    there.close()
    try:
        if not here.poll(seconds):
            return "timeout", f"over {seconds:g} s"
        return here.recv()
    except EOFError:
        worker.join(5)
        return "crash", f"exit code {worker.exitcode}"
    finally:
        here.close()
        worker.join(0.5)
        if worker.is_alive():
            worker.kill()
            worker.join()


# all files


def run(files: int, seed: int, backend: str, keep: Path | None = None, limit: float = float("inf"), damage=True):
    """Counts outcomes of `files` damaged files, or as many as fit `limit` seconds: (Counter of (kind of damage,
    outcome), list of (name, outcome, detail) of the bad ones)."""
    import torch

    import moss_vl.image_processing_moss_vl
    import moss_vl.video_processing_moss_vl  # noqa: F401 - imported before the forks

    torch.set_num_threads(1)  # a fork must not inherit threads
    counts, bad, start = collections.Counter(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seeds = make_seeds(Path(folder))
        names = list(seeds)
        for number in range(files if damage else len(names)):
            if time.monotonic() - start > limit:
                break
            rng = random.Random(f"{seed}/{number}")
            name, kind = names[number % len(names)], MUTATIONS[number // len(names) % len(MUTATIONS)]
            data = mutate(seeds[name], kind, rng, seeds[rng.choice(names)]) if damage else seeds[name]
            path = Path(folder) / f"{seed}_{number}_{kind}_{name}"
            path.write_bytes(data)
            outcome, detail = run_one(str(path), backend)
            counts[kind, outcome] += 1
            if outcome in BAD:
                bad.append((path.name, outcome, detail))
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / path.name).write_bytes(data)
            path.unlink()
    return counts, bad


def table(counts: collections.Counter) -> str:
    outcomes = ("ok", "warned", "named error", *BAD)
    text = io.StringIO()
    print(f"{'damage':10}", *(f"{outcome:>12}" for outcome in outcomes), file=text)
    for kind in (*MUTATIONS, "all"):
        row = [sum(n for (k, o), n in counts.items() if o == outcome and kind in (k, "all")) for outcome in outcomes]
        print(f"{kind:10}", *(f"{n:12}" for n in row), file=text)
    return text.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=200, help="number of damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("pyav", "decord"), default="pyav")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no file is begun")
    parser.add_argument("--undamaged", action="store_true", help="process each seed once, as it is")
    parser.add_argument("--keep", type=Path, help="folder for files with a bad outcome")
    args = parser.parse_args()
    if args.undamaged:
        args.files = len(SEEDS)
    counts, bad = run(args.files, args.seed, args.backend, args.keep, args.limit, not args.undamaged)
    print(table(counts))
    for name, outcome, detail in bad:
        print(f"{outcome:10} {name}: {detail[:200]}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
