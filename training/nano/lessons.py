"""Batches of the drawn world for train_nano.py: random pictures and clips, with several questions about each.

Beside the rows of text (rows.py), a batch holds the targets of auxiliary losses: facts (facts.py), and the tokens that
attention heads should attend to (attention_targets.py).

Axes: B rows, T text tokens, P patches, media in their order in the text.
"""

import io
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from moss_vl.training.nano.attention_targets import AttentionTargets, FrameView
from moss_vl.training.nano.facts import clip_facts, fact_rows, frame_facts, ink_patches, token_facts
from moss_vl.training.nano.questions import (
    CLIP_TASKS,
    PICTURE_TASKS,
    Question,
    ask_clip,
    ask_images,
    ask_picture,
    sampled_times,
)
from moss_vl.training.nano.rows import RowText, choose, join, stream_text
from moss_vl.training.nano.streams import Player, QuickProtocol, random_budgets
from moss_vl.training.nano.watching import random_script, watched_clip
from moss_vl.training.nano.world import (
    Scene,
    draw_background,
    draw_scene,
    draw_with_ink,
    random_canvas,
    random_clip,
    random_crowd,
    random_picture,
)


KINDS = ("look", "pictures", "images", "clips", "streams")
LATE = 2 / 3  # progress from which clips may be long, and parts of longer ones: earlier it harms (README.md)
LATEST = 20.0  # latest start, in seconds, of a clip as part of a longer one
LATER = 0.5  # share of clips that are parts of longer ones
LONG = 0.1  # share of batches with long clips
LONG_SECONDS = (18, 42)
STREAM_SECONDS = ((6, 10), (8, 14), (12, 20))  # of watched clips; before LATE the last is rarer
LONG_STREAM_SECONDS = ((20, 32), (32, 46), (46, 60))
LONG_STREAMS = 0.25  # share of batches of streams that are long
SCRIPTS = 2  # per watched clip
SILENCE_WEIGHTS = (0.2, 0.8)  # of silence about nothing, at the beginning and the end; other decisions weigh 1
LEAPING = 0.5  # share of those clips whose frames leap to later positions than their text gives them
FURTHEST = 600  # largest leap, in positions
SAME_SIZE = 8  # pictures of one size in a batch: kernels are prepared per shape, and equal grids are encoded together
WIDE_LIMITS = (4096, 1 << 24)  # pixels, as in released checkpoints


def compressed(rng: random.Random, picture: Image.Image) -> Image.Image:
    """The picture after JPEG compression of a random quality."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=rng.randint(60, 95))
    return Image.open(file).convert("RGB")


@dataclass(frozen=True)
class Drawn:
    """The frames of a clip, each distinct picture drawn once.

    Attributes:
        pixels: uint8 [pictures, patches, values].
        grid: patch rows and columns.
        moments: for each frame the index of its picture.
    """

    pixels: torch.Tensor
    grid: tuple[int, int]
    moments: list[int]

    @property
    def merged(self) -> tuple[int, int]:
        return self.grid[0] // 2, self.grid[1] // 2


@dataclass(frozen=True)
class Clip:
    """A row about a clip."""

    text: RowText
    drawn: Drawn
    leaps: list[int]  # per frame, how much later its position is than its text gives
    facts: torch.Tensor
    frames: list[FrameView]


def random_leaps(rng: random.Random, frames: int) -> list[int]:
    """How far each frame of a clip leaps ahead, with one to three leaps in all.

    Short clips thus teach positions of long ones (Ruoss et al., Randomized Positional Encodings, 2023).
    """
    leaps = [0] * frames
    for _ in range(rng.randint(1, 3)):
        frame, leap = rng.randrange(frames), rng.randint(1, FURTHEST // 3)
        leaps = [*leaps[:frame], *(earlier + leap for earlier in leaps[frame:])]
    return leaps


class Lessons:
    """The batches of a run: the same for the same seed and arguments, in any process.

    Args:
        size: pictures per batch, a multiple of 8; batches of other kinds cost about as much.
    """

    def __init__(self, processor, seed: int, size: int = 16):
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.protocol = QuickProtocol(processor, len(processor.tokenizer))
        self.picture_limits = (self.image_processor.min_pixels, self.image_processor.max_pixels)
        self.frame_limits = (processor.video_processor.min_pixels, processor.video_processor.max_pixels)
        self.seed, self.size = seed, size

    def batch(self, step: int, kind: str, progress: float, rank: int = 0) -> dict:
        """One of several batches of a step, whose pictures have equal sizes and whose rows similar lengths.

        Args:
            kind: one of KINDS.
            progress: share of the run before this batch, 0 to 1.

        Returns:
            uint8 `pixel_values` [P, values] of distinct pictures with their `picture_grids`, and if there is text:
            `grid_thw` of the media of the rows, and `gather`, which for each of their vision tokens, without
            separators, is the index of that of a picture.
        """
        draw = self._kinds().get(kind)
        if draw is None:
            raise ValueError(f"no kind of batch named {kind!r}; expected one of {', '.join(KINDS)}")
        rng, sizes = random.Random(f"{self.seed} {step} {rank}"), random.Random(f"{self.seed} {step}")
        return {"kind": kind, **draw(rng, sizes, progress)}

    def _kinds(self) -> dict:
        return dict(zip(KINDS, (self.look, self.pictures, self.images, self.clips, self.streams), strict=True))

    def random_limits(self, sizes: random.Random) -> tuple[int, int]:
        """Pixel limits: mostly those of pictures, sometimes those of frames or wide ones, which users may set."""
        return sizes.choices((self.picture_limits, self.frame_limits, WIDE_LIMITS), (0.66, 0.2, 0.14))[0]

    def pixels(self, pictures, limits) -> tuple[torch.Tensor, list[list[int]]]:
        """uint8 pixel_values [P, 768] and grids (t, h, w) of pictures at these limits."""
        inputs = self.image_processor.preprocess(
            pictures, min_pixels=limits[0], max_pixels=limits[1], do_normalize=False, return_tensors="pt"
        )
        return inputs["pixel_values"], inputs["image_grid_thw"].tolist()

    def render(self, rng, scenes: list[Scene], limits) -> tuple[dict, list[tuple[int, int]]]:
        """Pixels, grids, token facts and ink of pictures; and the merged grids."""
        pictures, inks = zip(*map(draw_with_ink, scenes), strict=True)
        pictures = [compressed(rng, picture) if rng.random() < 0.3 else picture for picture in pictures]
        pixel_values, grids = self.pixels(pictures, limits)
        merged = [(h // 2, w // 2) for _, h, w in grids]
        facts = [
            token_facts(scene.things, scene.signs, (scene.width, scene.height), grid)
            for scene, grid in zip(scenes, merged, strict=True)
        ]
        ink = [ink_patches(ink, grid) for ink, grid in zip(inks, merged, strict=True)]
        inputs = {
            "pixel_values": pixel_values,
            "picture_grids": grids,
            "token_facts": torch.from_numpy(np.concatenate(facts)),
            "ink": torch.from_numpy(np.concatenate(ink)),
        }
        return inputs, merged

    def canvases(self, rng, limits) -> list[tuple[int, int]]:
        """The canvas of each picture of a batch: more pictures if they are smaller."""
        number = self.size if limits is not self.frame_limits else self.size * 2
        canvases = [random_canvas(rng) for _ in range(number // SAME_SIZE)]
        canvases.sort(key=lambda canvas: canvas[0] / canvas[1])  # equal grids follow each other
        return [canvas for canvas in canvases for _ in range(SAME_SIZE)]

    def look(self, rng, sizes, progress) -> dict:
        """Crowded pictures without text."""
        limits = self.frame_limits if sizes.random() < 0.3 else self.random_limits(sizes)
        crowded, count = rng.random() < 0.7, rng.choice((3, 4, 4))
        scenes = [
            random_crowd(rng, canvas) if crowded else random_picture(rng, count, 0.7, canvas)
            for canvas in self.canvases(rng, limits)
        ]
        return self.render(rng, scenes, limits)[0]

    def pictures(self, rng, sizes, progress) -> dict:
        """Pictures, each with questions."""
        limits = self.random_limits(sizes)
        scenes = [random_picture(rng, None, 0.5, canvas) for canvas in self.canvases(rng, limits)]
        rows, attention = [], AttentionTargets()
        inputs, grids = self.render(rng, scenes, limits)
        for scene, grid in zip(scenes, grids, strict=True):
            row = RowText(self.tokenizer, rng.random() < 0.5, "<|image_pad|>", [grid])
            tasks = [task for task in PICTURE_TASKS if task != "text" or scene.sign is None and rng.random() < 0.4]
            questions = choose(rng, tasks, lambda task, plain: ask_picture(task, scene, rng, plain))
            if scene.sign is not None:
                questions.append(ask_picture("text", scene, rng))
            row.add_all(questions)
            attention.add(len(rows), row, [FrameView.of(scene, grid)])
            rows.append(row)
        facts = [frame_facts(scene.numbered_at(0.0)) for scene in scenes]
        return {**inputs, **self.text_inputs(rows, facts, attention, [1] * len(scenes), inputs["picture_grids"])}

    def images(self, rng, sizes, progress) -> dict:
        """Several pictures per row, and questions which of them shows a thing."""
        limits = sizes.choices((self.picture_limits, self.frame_limits), (0.6, 0.4))[0]
        groups, questions = self.picture_groups(rng, limits)
        inputs, grids = self.render(rng, [scene for group in groups for scene in group], limits)
        rows, remaining, attention = [], iter(grids), AttentionTargets()
        for group, asked in zip(groups, questions, strict=True):
            group_grids = [next(remaining) for _ in group]
            row = RowText(self.tokenizer, rng.random() < 0.5, "<|image_pad|>" * len(group), group_grids)
            row.add_all(asked)
            frames = [FrameView.of(scene, grid) for scene, grid in zip(group, group_grids, strict=True)]
            attention.add(len(rows), row, frames)
            rows.append(row)
        facts = [frame_facts(scene.numbered_at(0.0), i) for group in groups for i, scene in enumerate(group)]
        media_nums = [len(group) for group in groups]
        return {**inputs, **self.text_inputs(rows, facts, attention, media_nums, inputs["picture_grids"])}

    def picture_groups(self, rng, limits) -> tuple[list[list[Scene]], list[list[Question]]]:
        """Groups of two to four pictures that fill a batch, and the questions about each group."""
        total = self.size * 3 // 2 if limits is self.picture_limits else self.size * 2
        groups, questions = [], []
        canvas = random_canvas(rng)
        while sum(map(len, groups)) < total:
            canvas = random_canvas(rng) if sum(map(len, groups)) > total // 2 else canvas
            group = [random_picture(rng, rng.randint(1, 3), 0.2, canvas) for _ in range(rng.randint(2, 4))]
            asked = (ask_images(group, rng, rng.random() < 0.35) for _ in range(4))
            by_prompt = {question.prompt: question for question in asked if question is not None}
            if by_prompt:
                groups.append(group)
                questions.append(list(by_prompt.values()))
        return groups, questions

    def text_inputs(self, rows: list[RowText], facts, attention: AttentionTargets, media_nums, grids) -> dict:
        """The inputs of rows about whole pictures."""
        text = join(rows, self.tokenizer.pad_token_id)
        tokens = sum(h * w // 4 for _, h, w in grids)
        return {
            **text,
            "frame_facts": fact_rows(facts),
            "attention": attention.points(),
            "grid_thw": grids,
            "gather": torch.arange(tokens),
            "media_nums": media_nums,
        }

    def clips(self, rng, sizes, progress) -> dict:
        """Clips of similar length, drawn at the times that the video processor samples."""
        fps, limits = sizes.choice((1, 2)), self.frame_limits if sizes.random() < 0.85 else WIDE_LIMITS
        late = progress >= LATE
        seconds = sizes.choices(((2, 6), (4, 10), (8, 14), (13, 20)), (2, 2, 2, 3))[0]
        if late and sizes.random() < LONG:
            seconds = LONG_SECONDS
        clips, frames = [], 0
        while frames < 8 * self.size and len(clips) < self.size * 3 // 4:
            if len(clips) % 4 == 0:
                canvas = random_canvas(rng)
            later = late and rng.random() < LATER
            clips.append(self.clip(rng, random_clip(rng, seconds, canvas), fps, limits, later))
            frames += len(clips[-1].frames)
        return self.clip_inputs(rng, clips)

    def clip_inputs(self, rng, clips: list[Clip]) -> dict:
        """The inputs of rows about clips."""
        clips = sorted(clips, key=lambda clip: clip.drawn.grid)  # equal grids follow each other
        attention = AttentionTargets()
        for row, clip in enumerate(clips):
            attention.add(row, clip.text, clip.frames, clip=True)
        pictures, begins, gather = {}, [], []  # id of what was drawn -> it
        for clip in clips:
            pictures.setdefault(id(clip.drawn), clip.drawn)
        first = 0
        for drawn in pictures.values():
            begins.append(first)
            first += len(drawn.pixels) * drawn.grid[0] * drawn.grid[1] // 4
        begin_of = dict(zip(pictures, begins, strict=True))
        for clip in clips:
            tokens = clip.drawn.grid[0] * clip.drawn.grid[1] // 4
            begin = begin_of[id(clip.drawn)] + tokens * torch.tensor(clip.drawn.moments)
            gather.append((begin[:, None] + torch.arange(tokens)).flatten())
        # vision tokens of each frame, with its separator
        tokens = torch.tensor([h * w // 4 + 1 for clip in clips for h, w in [clip.drawn.grid] * len(clip.frames)])
        leaps = torch.tensor([leap for clip in clips for leap in clip.leaps])
        return {
            "pixel_values": torch.cat([drawn.pixels.flatten(0, 1) for drawn in pictures.values()]),
            "picture_grids": [[1, *drawn.grid] for drawn in pictures.values() for _ in drawn.pixels],
            "grid_thw": [[len(clip.frames), *clip.drawn.grid] for clip in clips],
            "gather": torch.cat(gather),
            "frame_facts": torch.cat([clip.facts for clip in clips]),
            "grain": rng.getrandbits(32),
            "leaps": leaps.repeat_interleave(tokens),
            "attention": attention.points(),
            **join([clip.text for clip in clips], self.tokenizer.pad_token_id),
            "media_nums": [1] * len(clips),
        }

    def clip(self, rng, scene: Scene, fps: int, limits, later: bool) -> Clip:
        """A row about a clip. `later`: as part of a longer clip, half of the time with leaps."""
        times = sampled_times(scene, fps)
        drawn = self.draw(rng, scene, times, limits)
        if later:
            seconds = round(rng.uniform(0, LATEST), 1)
            scene, times = scene.later(seconds), [time + seconds for time in times]
        stamps = "".join(f"<|time_start|>{time:.1f} seconds<|time_end|><|image_pad|>" for time in times)
        media = f"<|vision_start|>{stamps}<|vision_end|>"
        text, leaps = RowText(self.tokenizer, rng.random() < 0.5, media, [drawn.merged] * len(times)), [0] * len(times)
        if later and rng.random() < LEAPING:
            leaps = random_leaps(rng, len(times))
        text.leap(leaps)
        text.add_all(choose(rng, CLIP_TASKS, lambda task, plain: ask_clip(task, scene, times, rng, plain)))
        frames = [FrameView.of(scene, drawn.merged, time) for time in times]
        return Clip(text, drawn, leaps, fact_rows(clip_facts(scene, times)), frames)

    def draw(self, rng, scene: Scene, times, limits) -> Drawn:
        """The frames of a clip at these times."""
        background, drawn, moments = draw_background(scene), {}, []  # things -> (index, picture)
        for time in times:
            things = tuple(scene.at(time))
            if things not in drawn:
                drawn[things] = len(drawn), compressed(rng, draw_scene(scene, time, background))
            moments.append(drawn[things][0])
        pixels, grids = self.pixels([picture for _, picture in drawn.values()], limits)
        return Drawn(pixels.view(len(grids), -1, pixels.shape[1]), tuple(grids[0][1:]), moments)

    def streams(self, rng, sizes, progress) -> dict:
        """Realtime streams of watched clips of similar length, SCRIPTS of each clip."""
        rate, limits = sizes.choice((1, 1, 2)), self.picture_limits if sizes.random() < 0.85 else WIDE_LIMITS
        if progress >= LATE and sizes.random() < LONG_STREAMS:
            low, high = sizes.choice(LONG_STREAM_SECONDS)
        else:
            low, high = sizes.choices(STREAM_SECONDS, (3, 3, 1 if progress < LATE else 3))[0]
        silence = SILENCE_WEIGHTS[0] + progress * (SILENCE_WEIGHTS[1] - SILENCE_WEIGHTS[0])
        rows, frames = [], 0
        while frames < 8 * self.size and len(rows) < self.size * 3 // 4:
            if len(rows) % (2 * SCRIPTS) == 0:
                canvas = random_canvas(rng)
            rows += self.stream_rows(rng, rng.randint(low, high), rate, limits, canvas, silence)
            frames = sum(len(row.frames) for row in rows)
        return self.clip_inputs(rng, rows)

    def stream_rows(self, rng, seconds: int, rate: int, limits, canvas, silence: float) -> list[Clip]:
        """Rows about one watched clip, of `rate` frames per second."""
        scene = watched_clip(rng, seconds, canvas)
        times = [number / rate for number in range(seconds * rate)]
        drawn, known = self.draw(rng, scene, times, limits), clip_facts(scene, times)
        frames = [FrameView.of(scene, drawn.merged, time) for time in times]
        rows = []
        for _ in range(SCRIPTS):
            script = random_script(rng, scene, times)
            player = Player(self.protocol, script, random_budgets(rng, len(times)), rng.random() < 0.5)
            stream = player.play()
            happening = {times.index(event.time) for event in script.events}
            text = stream_text(self.tokenizer, stream, drawn.merged, silence, happening)
            facts = [values | {"fires": int(number in stream.due)} for number, values in enumerate(known)]
            rows.append(Clip(text, drawn, [0] * len(times), fact_rows(facts), frames))
        return rows
