"""Targets of attention heads for the auxiliary losses of train_nano.py: which tokens a token should attend to."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch

from moss_vl.training.nano.facts import SLOTS, assign_slots, letter_tokens, thing_tokens
from moss_vl.training.nano.questions import Evidence
from moss_vl.training.nano.rows import RowText
from moss_vl.training.nano.world import Scene, Sign, Thing


@dataclass(frozen=True)
class FrameView:
    """A picture, or a frame of a clip, with its vision tokens."""

    grid: tuple[int, int]  # merged
    things: list[tuple[int, Thing]]  # (index in the scene, thing)
    sign: Sign | None
    canvas: tuple[int, int]

    @classmethod
    def of(cls, scene: Scene, grid: tuple[int, int], time: float = 0.0) -> "FrameView":
        return cls(grid, scene.numbered_at(time), scene.sign, (scene.width, scene.height))

    @functools.cached_property
    def thing_tokens(self) -> np.ndarray:
        return thing_tokens([thing for _, thing in self.things], self.canvas, self.grid)

    @functools.cached_property
    def cells_of_things(self) -> list[list[int]]:
        """For each thing the indices of the tokens that show it."""
        shown = self.thing_tokens.ravel()
        return [np.flatnonzero(shown == index).tolist() for index in range(len(self.things))]

    @functools.cached_property
    def letter_tokens(self) -> list[tuple[int, int]]:
        return letter_tokens(self.sign, self.canvas, self.grid)

    def tokens_of(self, evidence: Evidence) -> list[int]:
        """Indices of the vision tokens of a letter or thing; the separator, the last one, for the frame as a whole."""
        rows, columns = self.grid
        if evidence.letter is not None:
            cells = [self.letter_tokens[evidence.letter]]
        elif evidence.thing is not None:
            index = [number for number, _ in self.things].index(evidence.thing)
            return self.cells_of_things[index]
        else:
            return [rows * columns]
        return [y * columns + x for y, x in cells]


class AttentionTargets:
    """Which tokens the attention heads should attend to, for an auxiliary loss. A group needs one of its tokens.

    By name of the attention layer:
        "stamps": text token of a frame -> digits of its time stamp, answer about a time -> digits in the question.
        "slots": text token of a picture or frame -> thing in a slot, or the separator if the slot is empty.
        "before": text token of a frame -> that of the frame before.
        "asked": answer -> the thing that the question names, or the separator if it is absent.
        "looks": answer -> the vision tokens of a picture that show it.
        "frames": answer -> the text token of the picture or frame that shows it.
        "request": text token of a frame of a stream -> what the standing request names, and what shall happen to it.
    The three digits and the slots have a head each.
    """

    NAMES = ("stamps", "slots", "before", "asked", "looks", "frames", "request")
    HALF = range(len(SLOTS) // 2)  # heads with targets, of one per slot; the other half is free

    def __init__(self):
        self.groups = {name: [] for name in self.NAMES}  # (row, head, text token, target tokens)

    def add_group(self, name: str, row: int, heads, text: int, tokens: list[int]) -> None:
        self.groups[name] += [(row, head, text, tokens) for head in heads if tokens]

    def add(self, row: int, text: RowText, frames: list[FrameView], clip: bool = False) -> None:
        """Adds the targets of a row, with its pictures or frames in order."""
        begins = [0, *itertools.accumulate(frame.grid[0] * frame.grid[1] + 1 for frame in frames)]

        def vision_tokens(evidence):
            return [begins[evidence.frame] + token for token in frames[evidence.frame].tokens_of(evidence)]

        self._add_frames(row, text, frames, clip, vision_tokens)
        for token, digits in text.stamps:
            for head, digit in enumerate(digits):
                self.add_group("stamps", row, [head], token, [digit])
        for token, named, happening in text.requests:
            self.add_group("request", row, self.HALF[::2], token, named)
            self.add_group("request", row, self.HALF[1::2], token, happening)
        for token, evidence in text.evidence:
            whole_frame = evidence.thing is None and evidence.letter is None
            if whole_frame or len(frames) > 1:
                self.add_group("frames", row, self.HALF, token, [text.pads[evidence.frame]])
            if not whole_frame and not clip:
                self.add_group("looks", row, self.HALF, token, vision_tokens(evidence))
        for token, evidence in text.subjects:
            self.add_group("asked", row, self.HALF, token, vision_tokens(evidence))

    def _add_frames(self, row: int, text: RowText, frames: list[FrameView], clip: bool, vision_tokens) -> None:
        for number, (pad, frame) in enumerate(zip(text.pads, frames, strict=True)):
            slots = assign_slots(frame.things)
            for head, slot in enumerate(SLOTS):
                thing = slots[slot][0] if slot in slots else None
                self.add_group("slots", row, [head], pad, vision_tokens(Evidence(frame=number, thing=thing)))
            if clip:
                self.add_group("before", row, range(len(SLOTS)), pad, [text.pads[max(number - 1, 0)]])

    def points(self) -> dict[str, torch.Tensor]:
        """name -> [points, 5]: row, head, text token, target token, and the index of the group."""
        points = {}
        for name, groups in self.groups.items():
            if groups:
                rows = [(*place, token, i) for i, (*place, tokens) in enumerate(groups) for token in tokens]
                points[name] = torch.from_numpy(np.array(rows, dtype=np.int64))
        return points
