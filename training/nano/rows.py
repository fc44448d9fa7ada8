"""Rows of text for the lessons of train_nano.py: a picture or clip with several questions, or a stream.

The questions about one picture or clip share its text tokens. A row is [media, question 1 with answer, question 2 with
answer, ...]; each question sees the media and itself, and has the positions it would have alone. A stream is a row of
media alone, in which the written tokens are learned.

Axes: B rows, T text tokens.
"""

import functools
import random

import numpy as np
import torch

from moss_vl.training.nano.facts import IGNORED
from moss_vl.training.nano.questions import CLIP_TASKS, IMAGES_TASK, PICTURE_TASKS, Evidence, Question
from moss_vl.training.nano.streams import DECISION, END, Stream
from moss_vl.training.nano.watching import KINDS
from moss_vl.training.nano.world import COLOURS, SHAPES


SILENT, RESPONDS, WORDS = STREAM_TASKS = ("silent decisions", "responses", "words of responses")
TASKS = (*PICTURE_TASKS, IMAGES_TASK, *CLIP_TASKS, *STREAM_TASKS)
CHANCES = {  # expected number of questions of each task about a picture or clip
    "describe picture": 0.7,
    "color": 0.4,
    "shape": 0.4,
    "count": 0.5,
    "place": 0.6,
    "relation": 1.8,
    "exists": 1.6,
    "text": 0.5,
    "describe clip": 0.7,
    "first or last": 0.8,
    "when": 1.7,
    "visible at": 1.7,
    "direction": 0.8,
    "color after": 0.6,
    "duration": 0.15,
}


@functools.lru_cache(maxsize=50_000)
def encode(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and the characters that each id stands for."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


class RowText:
    """The text of a row: the media, then questions with answers. The lists have one entry per token.

    Args:
        media: the text of the media, with an image_pad token per picture or frame.
        grids: merged grid (H, W) of each picture or frame.
    """

    def __init__(self, tokenizer, template: bool, media: str, grids: list[tuple[int, int]]):
        self.tokenizer, self.template = tokenizer, template
        image_pad, self.point = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "."])
        self.image_pad = image_pad
        self.set_ids(self.encode(("<|im_start|>user\n" if template else "") + media), grids)
        # Pairs (text token, what it should attend to):
        self.evidence: list[tuple[int, Evidence]] = []  # of the next token of the answer
        self.subjects: list[tuple[int, Evidence]] = []  # the thing that the question names
        # (text token of a frame, tokens of the standing request that name things, those that say what happens)
        self.requests: list[tuple[int, list[int], list[int]]] = []
        points = [index for index, token in enumerate(self.ids) if token == self.point]  # one in each time stamp
        self.stamps = [(pad, self.digits(point)) for pad, point in zip(self.pads, points, strict=False)]

    def set_ids(self, ids: list[int], grids) -> None:
        """Sets the text of the media, with the merged grid of each picture or frame."""
        self.ids, self.positions, position, frames = ids, [], 0, iter(grids)
        for token in ids:
            position += max(next(frames)) if token == self.image_pad else 0
            self.positions.append(position)
            position += 1
        self.begin = position  # of the questions
        self.labels, self.parts = [IGNORED] * len(ids), [0] * len(ids)
        self.tasks, self.weights = [-1] * len(ids), [0.0] * len(ids)
        self.pads = [index for index, token in enumerate(ids) if token == self.image_pad]

    def leap(self, leaps: list[int]) -> None:
        """Moves each frame, with the text before it, and the questions to positions later by `leaps`."""
        start, self.begin = 0, self.begin + leaps[-1]
        for pad, leap in zip(self.pads, leaps, strict=True):
            self.positions[start : pad + 1] = [position + leap for position in self.positions[start : pad + 1]]
            start = pad + 1
        self.positions[start:] = [position + leaps[-1] for position in self.positions[start:]]

    def encode(self, text: str) -> list[int]:
        return list(encode(self.tokenizer, text)[0]) if text else []

    def encode_answer(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids with the end of the turn, and the characters that each id stands for."""
        ids, spans = encode(self.tokenizer, text + "<|im_end|>")
        return list(ids), list(spans)

    def add(self, question: Question) -> None:
        """Appends a question. An empty prompt without template must be the first one: it continues the media."""
        prompt = self.encode(question.prompt + ("<|im_end|>\n<|im_start|>assistant\n" if self.template else ""))
        answer, spans = self.encode_answer(question.answer)
        part = self.parts[-1] + 1
        assert prompt or part == 1, question
        self._add_attention(question, prompt, spans)
        length = len(prompt) + len(answer)
        self.ids += prompt + answer
        self.labels += [IGNORED] * len(prompt) + answer
        self.positions += range(self.begin, self.begin + length)
        self.parts += [part] * length
        self.tasks += [-1] * len(prompt) + [TASKS.index(question.task)] * len(answer)
        # a token of a short answer weighs more: answers weigh as the square root of their length
        self.weights += [0.0] * len(prompt) + [len(answer) ** -0.5] * len(answer)

    def _add_attention(self, question: Question, prompt: list[int], spans: list[tuple[int, int]]) -> None:
        """Notes what the tokens before those of the answer, with characters `spans`, should attend to."""
        first = len(self.ids) + len(prompt) - 1  # it predicts the first token of the answer
        for index, (begin, end) in enumerate(spans):
            if begin >= len(question.answer):
                continue
            evidence = next((one for one in reversed(question.evidence) if one.start < max(end, 1)), None)
            if evidence is not None:
                self.evidence.append((first + index, evidence))
            if question.subject is not None:
                self.subjects.append((first + index, question.subject))
            if question.task == "visible at":
                self.stamps.append((first + index, self.digits(len(self.ids) + prompt.index(self.point))))

    @staticmethod
    def digits(point: int) -> list[int]:
        """Indices of tenths, ones and tens of a number with its decimal point at `point`.

        Without tens, the last is the index of the token before the ones.
        """
        return [point + 1, point - 1, point - 2]

    def add_all(self, questions) -> None:
        for question in sorted(questions, key=lambda question: question.prompt != ""):
            self.add(question)


def stream_text(tokenizer, stream: Stream, grid: tuple[int, int], silence: float, happening: set[int]) -> RowText:
    """The row of a stream with frames of a merged grid: nothing but media, in which the written tokens are learned.

    Args:
        silence: weight of a silent decision, except at the frames `happening`: something happens there, and silence
            is right only because it is not asked for.
    """
    row = RowText(tokenizer, False, "", [])
    row.set_ids(stream.ids, [grid] * len(stream.pads))
    row.stamps = [(pad, row.digits(point)) for pad, point in zip(stream.pads, stream.points, strict=True)]
    row.requests = [
        (pad, *words_of(tokenizer, stream.ids, span))
        for pad, span in zip(stream.pads, stream.standing, strict=True)
        if span is not None
    ]
    words = sum(one.role != DECISION for one in stream.written) or 1
    for one in stream.written:
        token = stream.ids[one.index]
        silent = one.role == DECISION and token == stream.silence
        row.labels[one.index] = token
        row.tasks[one.index] = TASKS.index(WORDS if one.role != DECISION else SILENT if silent else RESPONDS)
        weight = silence if silent and one.frame not in happening else 1.0
        row.weights[one.index] = weight if one.role == DECISION else min(1.0, 2 * words**-0.5)
        if one.shown >= 0 and not silent and one.role != END:
            row.evidence.append((one.index - 1, Evidence(frame=one.shown)))
    return row


def words_of(tokenizer, ids: list[int], span: tuple[int, int]) -> tuple[list[int], list[int]]:
    """The tokens of a request that name things, and those that say what happens; all of them if there are none."""
    words = {index: tokenizer.decode([ids[index]]).strip() for index in range(*span)}
    named = [index for index, word in words.items() if word in SHAPES or word in COLOURS]
    happening = [index for index, word in words.items() if word in KINDS]
    return named or list(words), happening or list(words)


def choose(rng: random.Random, tasks, ask) -> list[Question]:
    """Random questions of the tasks by `CHANCES`, no two with the same prompt.

    `ask`: (task, plain) -> a question or None.
    """
    questions = {}
    while not questions:
        for task in tasks:
            for _ in range(int(CHANCES[task]) + (rng.random() < CHANCES[task] % 1)):
                question = ask(task, rng.random() < 0.35)
                if question is not None:
                    questions.setdefault(question.prompt, question)
    chosen = list(questions.values())
    rng.shuffle(chosen)
    return chosen


def join(rows: list[RowText], pad: int) -> dict[str, torch.Tensor]:
    """Rows as tensors [B, T]. T is a multiple of 32, because CPU kernels are prepared for each length."""
    length = -(-max(len(row.ids) for row in rows) // 32) * 32

    def padded(name, fill, dtype=np.int64):
        values = [getattr(row, name) + [fill] * (length - len(getattr(row, name))) for row in rows]
        return torch.from_numpy(np.array(values, dtype=dtype))

    return {
        "input_ids": padded("ids", pad),
        "labels": padded("labels", IGNORED),
        "position_ids": padded("positions", 0),
        "parts": padded("parts", -1),
        "tasks": padded("tasks", -1),
        "weights": padded("weights", 0.0, np.float32),
    }


def visible_parts(parts: torch.Tensor) -> torch.Tensor:
    """[B, T] -> bool [B, 1, T, T]: a token sees earlier tokens of the media and of its own question."""
    same = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
    return (same & torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool, device=parts.device).tril())[:, None]
