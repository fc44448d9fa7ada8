"""Draws the frames of a video that an answer names, with the answer below them.

    python tools/draw_answer.py data/sample_b.mp4 -p "What happens?" -o docs/answer.png

The answer names times. The frames on screen at these times are drawn side by side, each above its part of the answer.
"""

import argparse
import re
import sys
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForCausalLM, AutoProcessor


ROOT = Path(__file__).resolve().parents[1]
FRAME, MARGIN, INK, PAPER = 216, 16, "#1b1f24", "#ffffff"


def ask(checkpoint: Path, video: Path, question: str) -> str:
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    query = {"videos": [str(video)], "prompt": question}
    return model.offline_batch_generate(processor, [query])["results"][0]["text"]


def split_answer(answer: str) -> list[tuple[float, str]]:
    """ "at 0.0 seconds a ring; at 2.3 seconds ..." -> [(0.0, "a ring"), (2.3, "..."), ...]; [] if no time is named."""
    parts = re.split(r"at (\d+\.\d+) seconds ", answer)[1:]
    return [(float(time), text.strip(" ;")) for time, text in zip(parts[::2], parts[1::2], strict=True)]


def frames_at(video: Path, times: list[float]) -> list[Image.Image]:
    """The frames on screen at these times, in seconds; an answer rounds times to tenths."""
    with av.open(str(video)) as container:
        decoded = [(frame.time, frame.to_image()) for frame in container.decode(video=0)]
    return [[image for start, image in decoded if start <= time + 0.05][-1] for time in times]


def wrap(text: str, font, width: int) -> list[str]:
    """Lines of whole words, each at most `width` pixels wide unless one word is wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw(question: str, parts: list[tuple[float, str]], frames: list[Image.Image]) -> Image.Image:
    heading, font, small = (ImageFont.load_default(size) for size in (22, 17, 15))
    captions = [wrap(text, font, FRAME) for _, text in parts]
    frames = [frame.resize((FRAME, round(FRAME * frame.height / frame.width))) for frame in frames]
    top = 2 * MARGIN + 30
    height = top + max(frame.height for frame in frames) + 28 + 22 * max(map(len, captions)) + MARGIN
    picture = Image.new("RGB", (MARGIN + len(parts) * (FRAME + MARGIN), height), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN), question, INK, heading)
    for column, ((time, _), frame, lines) in enumerate(zip(parts, frames, captions, strict=True)):
        left = MARGIN + column * (FRAME + MARGIN)
        picture.paste(frame, (left, top))
        pen.text((left, top + frame.height + 6), f"{time:.1f} s", "#6a737d", small)
        for number, line in enumerate(lines):
            pen.text((left, top + frame.height + 28 + 22 * number), line, INK, font)
    return picture.quantize(64)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("-p", "--prompt", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "moss-vl-nano")
    args = parser.parse_args(argv)
    answer = ask(args.checkpoint, args.video, args.prompt)
    parts = split_answer(answer)
    if not parts:
        parser.error(f"the answer names no time: {answer!r}; ask what happens in the video")
    draw(args.prompt, parts, frames_at(args.video, [time for time, _ in parts])).save(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
