"""Realtime streams of watched clips (watching.py) as tokens: what the session feeds, and what the model should write.

The layout is that of `RealtimeStream`: system prompt and first request, then frames and later requests as they come,
and after each of them what the model writes: `<|silence|>`, or `<|response|>` and words, which a frame may interrupt.

    opening | silence | frame | silence | frame | response the star | frame | response appears silence | ...
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from moss_vl.realtime_protocol import SYSTEM_PROMPT, Protocol
from moss_vl.training.nano.watching import Request, Script


UNLIMITED = 1 << 30
KNOWN_TEXTS = 50_000
MOST_WRITTEN = 64  # tokens after one input, in case a model does not fall silent
DECISION, WORD, END = "decision", "word", "end"  # what a written token is: the last is the silence after words


class QuickProtocol(Protocol):
    """Keeps the tokens of texts that come again and again."""

    def __init__(self, processor, vocab_size: int):
        super().__init__(processor, vocab_size)
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self.known:
            if len(self.known) >= KNOWN_TEXTS:
                self.known.clear()
            self.known[text] = super().encode(text)
        return list(self.known[text])


@dataclass(frozen=True)
class Written:
    """A token that the model writes.

    Attributes:
        index: in the ids of the stream.
        role: DECISION after an input, WORD, or END.
        frame: the last frame taken in; -1 before the first.
        shown: the frame that shows what the token says.
        continues: True for a decision within a reply.
    """

    index: int
    role: str
    frame: int
    shown: int
    continues: bool = False


@dataclass
class Stream:
    """A stream as tokens. `pads`: the index of each frame's image_pad token. `due`: frames at which an event is said.

    `standing`: for each frame, the span (first, end) of the standing request's tokens; None without one.
    """

    silence: int  # the token
    ids: list[int] = field(default_factory=list)
    pads: list[int] = field(default_factory=list)
    points: list[int] = field(default_factory=list)  # the decimal points of the frames' time stamps
    written: list[Written] = field(default_factory=list)
    standing: list[tuple[int, int] | None] = field(default_factory=list)
    due: set[int] = field(default_factory=set)

    @property
    def tokens(self) -> list[int]:
        """The written tokens."""
        return [self.ids[one.index] for one in self.written]


class Speaker:
    """Knows what is right to write next, also after a token that was not right."""

    def __init__(self, protocol: Protocol):
        self.protocol, self.tokens = protocol, protocol.tokens
        self.rest: list[tuple[int, int]] = []  # (token, frame that shows it) of the reply, still to write
        self.replying = self.decides = False

    def interrupt(self) -> None:
        """A prompt ends the reply that is being written."""
        self.rest, self.replying = [], False

    def add(self, text: str, shown: int) -> None:
        joined = f"; {text}" if self.replying or self.rest else text
        self.rest += [(token, shown) for token in self.protocol.encode(joined)]

    def next(self) -> int:
        if self.decides:
            return self.tokens.response if self.rest else self.tokens.silence
        return self.rest[0][0] if self.rest else self.tokens.silence

    def take(self, token: int, index: int, frame: int) -> Written:
        """Notes the token that was written at an index of the stream."""
        shown, continues = self.rest[0][1] if self.rest else frame, self.replying
        role = DECISION if self.decides else END if token == self.tokens.silence else WORD
        self.decides = False
        if token == self.tokens.silence:
            self.rest, self.replying = [], False
        else:
            self.replying = True
            if role == WORD:
                self.rest = self.rest[1:]
        return Written(index, role, frame, shown, continues)


class Player:
    """Plays a script as a session would.

    Args:
        budgets: for each frame, the most tokens that are written before the next one.
        opens: whether a token is written before the first frame.
        spoken: the first tokens that are written; the right ones follow.
    """

    def __init__(self, protocol: Protocol, script: Script, budgets: list[int], opens: bool = True, spoken=()):
        self.protocol, self.script, self.budgets, self.opens = protocol, script, budgets, opens
        self.spoken, self.speaker, self.stream = list(spoken), Speaker(protocol), Stream(protocol.tokens.silence)
        self.standing: Request | None = None
        self.span: tuple[int, int] | None = None
        self.waiting: list[Request] = []  # questions asked before the first frame

    def play(self) -> Stream:
        requests = list(self.script.requests)
        opening = requests.pop(0) if requests and requests[0].frame == 0 else None
        self.open(opening)
        for frame in range(len(self.script.times)):
            now = [request for request in requests if request.frame == frame]
            for request in now:
                self.ask(request, frame if request.with_frame else frame - 1)
                if not request.with_frame:
                    self.write(frame - 1, self.budgets[frame - 1])
            self.show(frame)
            self.write(frame, UNLIMITED if frame + 1 == len(self.script.times) else self.budgets[frame])
        return self.stream

    def open(self, request: Request | None) -> None:
        prompt = request.prompt if request is not None else ""
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
        self.stream.ids += self.protocol.opening(messages)
        if request is not None:
            end = len(self.stream.ids) - len(self.protocol.encode("<|im_end|>\n<|im_start|>assistant\n"))
            self.stand(request, end - len(self.protocol.encode(prompt)), end)
            self.waiting = [] if request.stands else [request]
        if self.opens:
            self.speaker.decides = True
            self.write(-1, UNLIMITED)

    def stand(self, request: Request, begin: int, end: int) -> None:
        if request.stands:
            self.standing, self.span = request, (begin, end)

    def ask(self, request: Request, frame: int) -> None:
        """Takes in a prompt; `frame` is the last frame that its answer knows."""
        begin = len(self.stream.ids) + len(self.protocol.encode("<|im_end|>\n<|im_start|>user\n"))
        self.stream.ids += self.protocol.prompt_block(request.prompt)
        self.stand(request, begin, begin + len(self.protocol.encode(request.prompt)))
        self.speaker.interrupt()
        self.speaker.decides = True
        if not request.stands:
            self.speaker.add(*self.script.answer(request, frame))

    def show(self, frame: int) -> None:
        """Takes in a frame."""
        stream, block = self.stream, self.protocol.frame_block(self.script.times[frame])
        pad, point = (block.index(token) for token in (self.protocol.tokens.image_pad, self.point))
        stream.pads.append(len(stream.ids) + pad)
        stream.points.append(len(stream.ids) + point)
        stream.ids += block
        stream.standing.append(self.span)
        for request in self.waiting:
            self.speaker.add(*self.script.answer(request, frame))
        self.waiting = []
        clauses = self.script.clauses(self.standing, frame)
        if clauses:
            stream.due.add(frame)
        for clause in clauses:
            self.speaker.add(clause, frame)
        self.speaker.decides = True

    @property
    def point(self) -> int:
        return self.protocol.tokenizer.convert_tokens_to_ids(".")

    def write(self, frame: int, budget: int) -> None:
        """Writes until silence, or until the budget is spent."""
        for _ in range(min(budget, MOST_WRITTEN)):
            token = self.spoken.pop(0) if self.spoken else self.speaker.next()
            self.stream.written.append(self.speaker.take(token, len(self.stream.ids), frame))
            self.stream.ids.append(token)
            if token == self.protocol.tokens.silence:
                return


def random_budgets(rng: random.Random, frames: int) -> list[int]:
    """Tokens that are written after each frame: often more than any reply needs."""
    if rng.random() < 0.5:
        return [UNLIMITED] * frames
    low = rng.randint(1, 8)
    return [rng.randint(low, low + 4) for _ in range(frames)]


def paced_budgets(times: Iterable[float], tokens_per_second: float) -> list[int]:
    """Tokens that are written between frames at this pace, at least one; the last frame's budget is that before it."""
    times = list(times)
    gaps = [later - sooner for sooner, later in zip(times, times[1:], strict=False)]
    gaps.append(gaps[-1] if gaps else 1.0)
    return [max(1, int(gap * tokens_per_second + 1e-6)) for gap in gaps]


def agree(stream: Stream, chosen: list[int]) -> list[int] | None:
    """The tokens that a greedy model writes, up to the first one that differs from the stream's; None if all agree.

    Args:
        chosen: for each written token, the one that the model writes in its place.
    """
    tokens = stream.tokens
    wrong = next((i for i, (one, other) in enumerate(zip(tokens, chosen, strict=True)) if one != other), None)
    return None if wrong is None else [*tokens[:wrong], chosen[wrong]]
