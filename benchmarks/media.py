"""Time from files to patches in this checkout and in another one:

    git worktree add /tmp/before COMMIT
    python benchmarks/media.py --other /tmp/before

Ordinary clips (those in data/, and made ones of h264, h265 and vp9) and JPEG photos, opened, decoded, resized and cut
into patches. One process per checkout; the two take turns file by file, and the order changes each round. Ratios are
this checkout by the other one: of the least times, as the median over the rounds, and of the least CPU times of all
threads, which other work on the machine disturbs less.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ((1920, 1080), (4000, 3000), (8256, 5504))
CLIPS = (  # name, seconds, width, height, codec
    ("h264 360p", 60, 640, 360, "libx264"),
    ("h264 720p", 60, 1280, 720, "libx264"),
    ("h264 1080p", 60, 1920, 1080, "libx264"),
    ("h265 720p", 20, 1280, 720, "libx265"),
    ("vp9 360p", 20, 640, 360, "libvpx-vp9"),
)
OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "23"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}


def make_media(folder: Path) -> dict[str, Path]:
    """Name -> file; those that are there already are kept."""
    import av
    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(ROOT))
    from moss_vl.benchmarks.preprocess import texture

    folder.mkdir(parents=True, exist_ok=True)
    files = {path.name: path for path in sorted((ROOT / "data").iterdir()) if path.suffix in (".mp4", ".jpg")}
    for name, seconds, width, height, codec in CLIPS:
        path = files[name] = folder / f"{name.replace(' ', '_')}.{'webm' if codec == 'libvpx-vp9' else 'mp4'}"
        if path.exists():
            continue
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, options=OPTIONS[codec])
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for number in range(25 * seconds):
                if number % 125 == 0:
                    scene = texture(width + 256, height, number)
                left = 2 * number % 256
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[:, left : left + width]), "rgb24")
                frame.pts = number
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
            container.mux(stream.encode())
    for width, height in PHOTOS:
        path = files[f"jpeg {width} x {height}"] = folder / f"{width}x{height}.jpg"
        if not path.exists():
            Image.fromarray(texture(width, height, 0)).save(path, quality=90)
    return files


def serve(checkout: str) -> None:
    """Reads lines "backend<TAB>file" and answers each with the seconds and CPU seconds that the processor took."""
    sys.path.insert(0, checkout)
    from moss_vl.image_processing_moss_vl import MossVLImageProcessor
    from moss_vl.video_processing_moss_vl import MossVLVideoProcessor

    images, videos = MossVLImageProcessor(), MossVLVideoProcessor(num_extract_threads=2)
    for line in sys.stdin:
        backend, path = line.rstrip("\n").split("\t")
        begin = time.perf_counter(), time.process_time()
        if path.endswith(".jpg"):
            images.extract(path)
        else:
            videos.extract(path, video_backend=backend)
        print(json.dumps([time.perf_counter() - begin[0], time.process_time() - begin[1]]), flush=True)


class Checkout:
    """A process that has loaded one checkout."""

    def __init__(self, folder: Path):
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")

    def seconds(self, backend: str, path: Path) -> list[float]:
        self._process.stdin.write(f"{backend}\t{path}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--media", type=Path, default=Path("/tmp/moss_vl_media"), help="folder of the made files")
    parser.add_argument("--backend", default="pyav", choices=("pyav", "decord"))
    parser.add_argument("--only", default="", help="take only files whose name holds this")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    if args.other is None:
        parser.error("--other names the folder of the other checkout")
    files = {name: path for name, path in make_media(args.media).items() if args.only in name}
    ours, other = Checkout(ROOT), Checkout(args.other.resolve())
    print(f"| {args.backend} | this, ms | other, ms | ratio | median ratio | CPU ratio |\n|---|---|---|---|---|---|")
    for name, path in files.items():
        mine, theirs = [], []
        for number in range(-1, args.rounds):
            order = [(ours, mine), (other, theirs)]
            for checkout, seconds in order if number % 2 else order[::-1]:
                took = checkout.seconds(args.backend, path)
                if number >= 0:
                    seconds.append(took)
        middle = statistics.median(a[0] / b[0] for a, b in zip(mine, theirs, strict=True))
        (a, a_cpu), (b, b_cpu) = ([min(column) for column in zip(*took, strict=True)] for took in (mine, theirs))
        ratios = f"{a / b:.3f} | {middle:.3f} | {a_cpu / b_cpu:.3f}"
        print(f"| {name} | {1e3 * a:.1f} | {1e3 * b:.1f} | {ratios} |", flush=True)
    ours.close()
    other.close()


if __name__ == "__main__":
    main()
