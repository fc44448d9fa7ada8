"""Realtime streams in training records: tokens as a session feeds them, labels, frames, and what is refused."""

import functools
import json
import random

import pytest
import torch
from make_media import write_video
from PIL import Image
from realtime import (  # noqa: F401 - fixtures among them
    IM_END,
    RESPONSE,
    SILENCE,
    make_tokenizer,
    model,
    processor,
    stream,
)
from realtime import make_processor as make_realtime_processor

from moss_vl.realtime_protocol import SYSTEM_PROMPT
from moss_vl.tools.live_sources import frames_at
from moss_vl.training.batches import IGNORED, Collator, check_record, encode
from moss_vl.training.realtime_records import count_decisions, read_stream
from moss_vl.training.records import read_records


FRAME = "<|video|>"
WORDS = ("Red", " a star", " two", "\u2014 ja", " 3.5", "\n", "star appears")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    write_video(folder / "v.mp4", count=60, rate=10)
    write_video(folder / "w.mp4", count=80, rate=10)
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    return folder


def read_one(folder, record):
    (folder / "data.jsonl").write_text(json.dumps(record))
    [found] = read_records(folder / "data.jsonl")
    return found


def record_of(content, times=(), system=None, prompt="", **others):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    videos = [{"video_path": "v.mp4", "segments": [[time] for time in times]}] if times else []
    return {"messages": messages, "images": [], "videos": videos, **others}


class Drawn:
    """A random stream: as the messages of a record, as pieces of text, and as the inputs of a session.

    Attributes:
        rounds: (prompts, times, what is written) in turn; the first has no input.
        pieces: (text, whether it is learned).
    """

    def __init__(self, seed, opens=True):
        rng = self.rng = random.Random(seed)
        self.system, self.prompt = (
            rng.choice((None, SYSTEM_PROMPT, "Watch.")),
            rng.choice(("", "Tell me what you see.")),
        )
        self.messages, self.pieces, self.rounds, self.times = [], [], [], []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.messages += [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": ""}]
        system = SYSTEM_PROMPT if self.system is None else self.system
        head = (
            f"<|im_start|>system\n{system}{IM_END}\n<|im_start|>user\n{self.prompt}{IM_END}\n<|im_start|>assistant\n"
        )
        self.pieces.append((head, False))
        self.loss, self.replying = True, False
        if opens:
            self.take([], [])
        for _ in range(rng.randint(2, 7)):
            prompts = ["Now?", "And\nnow?"][: rng.choice((0, 0, 0, 1, 2))]
            last = self.times[-1] if self.times else 0.0
            times = [
                round(last + rng.random(), 2)
                for _ in range(rng.choice((0, 1, 1, 2)) if prompts else rng.choice((1, 2)))
            ]
            self.take(prompts, sorted(times))

    def take(self, prompts, times):
        rng = self.rng
        for prompt in prompts:
            block = f"{IM_END}\n<|im_start|>user\n{prompt}{IM_END}\n<|im_start|>assistant\n{SILENCE}"
            self.pieces.append((block, False))
            if self.messages[-1]["content"] == "":
                self.messages.pop()  # a prompt at once after a prompt
            self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
            self.loss = rng.random() < 0.8 or not any(learned for _, learned in self.pieces)
            if not self.loss:
                self.messages[-1]["loss"] = False
        for time in times:
            self.pieces.append(
                (f"<|vision_start|><|time_start|>{time:.1f} seconds<|time_end|><|image_pad|><|vision_end|>", False)
            )
        words = "".join(rng.choices(WORDS, k=rng.randint(1, 3)))
        said = rng.choice(([SILENCE], [SILENCE], [RESPONSE, words, SILENCE], [RESPONSE, words], [RESPONSE, SILENCE]))
        self.pieces += [(piece, self.loss) for piece in said]
        content = FRAME * len(times) + "".join(said)
        if prompts and (content.startswith(SILENCE) or rng.random() < 0.5):
            content = SILENCE + content  # what the session feeds after a prompt, which a record may leave out
        self.messages[-1]["content"] += content
        self.times += times
        self.rounds.append((prompts, times, said))

    def record(self) -> dict:
        cut = self.rng.randint(0, len(self.times))
        videos = [("v.mp4", self.times[:cut]), ("w.mp4", self.times[cut:])]
        videos = [{"video_path": name, "segments": [[time] for time in times]} for name, times in videos if times]
        return {"messages": self.messages, "images": [], "videos": videos, "source": "another key"}

    def expected(self, processor) -> tuple[list[int], list[int]]:
        """Ids and labels, piece by piece."""
        ids, labels = [], []
        for piece, learned in self.pieces:
            tokens = processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if learned else [IGNORED] * len(tokens)
        return ids, labels


def test_random_streams_have_the_ids_and_labels_of_their_pieces(folder, processor):  # noqa: F811
    for seed in range(150):
        drawn = Drawn(seed, opens=seed % 2 == 0)
        text = read_stream(read_one(folder, drawn.record()), processor)
        ids, labels = drawn.expected(processor)
        assert text.ids == ids, f"seed {seed}"
        assert [
            token if learned else IGNORED for token, learned in zip(text.ids, text.learned, strict=True)
        ] == labels, f"seed {seed}"


def fed_by_a_session(model, processor, drawn, record):  # noqa: F811
    """(ids, logits before each written token) of a session that is given the same prompts and frames, and made to
    write the same."""
    words = [word for _, _, said in drawn.rounds for word in said]
    kwargs = {} if drawn.system is None else {"system_prompt": drawn.system}
    made, script = stream(model, processor, *words, initial_prompt=drawn.prompt, **kwargs)
    frames = (
        item
        for video in record.videos
        for item in frames_at(video["video_path"], [segment[0] for segment in video["segments"]])
    )
    for prompts, times, said in drawn.rounds:
        for prompt in prompts:
            made.push_prompt(prompt)
        for _ in times:
            item = next(frames)
            made.push_frame(item.image, item.seconds)
        for _ in range(sum(len(script.encode(word)) for word in said)):
            assert not [event for event in made.step() if type(event).__name__ == "Failed"]
    return made.ids, script.seen


def test_a_stream_is_rendered_as_a_session_feeds_it(folder, processor, model):  # noqa: F811
    """Ids are equal, and the logits of one forward over the sample are those with which the session chose."""
    for seed in range(12):
        drawn = Drawn(seed)
        record = read_one(folder, drawn.record())
        sample = encode(record, processor)
        ids, seen = fed_by_a_session(model, processor, drawn, record)
        assert sample["input_ids"].tolist() == ids, f"seed {seed}"
        batch = Collator(processor.tokenizer.pad_token_id)([sample])
        del batch["logits_to_keep"]
        with torch.no_grad():
            logits = model(**batch).logits[0]
        for before, chosen in seen:
            assert torch.allclose(logits[len(before) - 1], chosen, atol=1e-4), f"seed {seed}"


def test_frames_have_the_pixels_of_the_image_processor(folder, processor):  # noqa: F811
    record = read_one(folder, record_of(f"{FRAME}{SILENCE}{FRAME}{SILENCE}", [0.25, 5]))
    for options in ({}, {"max_pixels": 4096}):
        sample = encode(record, processor, torch.bfloat16, pixel_dtype=torch.float32, **options)
        images = [item.image for item in frames_at(str(folder / "v.mp4"), [0.25, 5.0])]
        alone = [processor.image_processor([image], return_tensors="pt", **options) for image in images]
        assert sample["pixel_values"].equal(torch.cat([one["pixel_values"] for one in alone]))
        assert sample["grid_thw"].equal(torch.cat([one["image_grid_thw"] for one in alone]))
    assert not images[0].tolist() == images[1].tolist()


def test_a_stream_without_frames_and_one_in_a_batch(folder, processor, model):  # noqa: F811
    """Padding and the other samples change no loss."""
    records = [
        record_of(f"{RESPONSE}Yes{SILENCE}"),
        record_of(f"{FRAME}{RESPONSE}Red{SILENCE}", [1.0]),
        {"response": "x"},
    ]
    samples = [encode(read_one(folder, record), processor) for record in records]
    collate = Collator(processor.tokenizer.pad_token_id)
    with torch.no_grad():
        alone = [model(**collate([sample])).loss * (sample["labels"] != IGNORED).sum() for sample in samples]
        together = model(**collate(samples)).loss
    count = sum((sample["labels"] != IGNORED).sum() for sample in samples)
    assert torch.allclose(together, sum(alone) / count, atol=1e-5)


def test_decisions_are_counted(folder, processor):  # noqa: F811
    streams = [record_of(f"{SILENCE}{FRAME}{RESPONSE}A{SILENCE}{FRAME}{SILENCE}", [0, 1]), {"response": "x"}]
    later = record_of(f"{FRAME}{SILENCE}", [1])
    later["messages"] += [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"{SILENCE}{SILENCE}"}]
    records = [read_one(folder, record) for record in (*streams, later)]
    assert count_decisions(records, processor) == (5, 1)


def test_a_tokenizer_without_the_tokens_is_refused_as_by_a_session(folder):
    record = read_one(folder, record_of(f"{FRAME}{SILENCE}", [1]))
    plain = make_realtime_processor(make_tokenizer(added=()))
    with pytest.raises(
        ValueError, match=r"the tokenizer has no special token <\|silence\|> and no <\|response\|>, so"
    ):
        check_record(record, plain)


def with_role(role):
    record = record_of(f"{FRAME}{SILENCE}", [1])
    record["messages"][1:1] = [{"role": "assistant", "content": f"{SILENCE}"}, {"role": role, "content": SILENCE}]
    return record


BAD = [
    (record_of(f"{FRAME} {SILENCE}", [1]), "' ' does not follow <|response|>"),
    (record_of(f"{FRAME}\n{SILENCE}", [1]), "'\\n' does not follow <|response|>"),
    (record_of(f"{FRAME}Red{SILENCE}", [1]), "'Red' does not follow <|response|>"),
    (record_of(f"{SILENCE}Red"), "'Red' does not follow <|response|>"),
    (record_of(f"{SILENCE}{RESPONSE}Red"), "<|response|> follows <|silence|>; expected <|video|> or the end"),
    (record_of(f"{FRAME}{SILENCE}{SILENCE}", [1]), "<|silence|> follows <|silence|>"),
    (record_of(f"{RESPONSE}a<|time_start|>b{SILENCE}"), "the assistant's text holds '<|time_start|>'"),
    (record_of(f"{FRAME}{SILENCE}", [1], tools=[{"name": "look"}]), "a stream has no tools"),
    (with_role("tool"), "a stream has no tools"),
    (with_role("assistant"), "two turns of the assistant follow each other"),
    (record_of(f"{FRAME}{SILENCE}", [1, 2], prompt=FRAME), "turn 0 of a stream, the user's, holds '<|video|>'"),
    ({**record_of(f"<|image|>{SILENCE}"), "images": ["a.png"]}, "a stream has no images, got 1"),
    ({**record_of(f"{FRAME}{SILENCE}"), "videos": "v.mp4"}, "a video of a stream must be {'video_path', 'segments'"),
    (
        {**record_of(f"{FRAME}{SILENCE}"), "videos": {"video_path": "v.mp4", "segments": [[1]], "max_pixels": 9999}},
        "without other options",
    ),
    (
        {**record_of(f"{FRAME}{SILENCE}"), "videos": {"video_path": "v.mp4", "segments": [[0, 1]]}},
        "a segment of a stream must be [time]",
    ),
    (record_of(f"{FRAME}{FRAME}{SILENCE}", [2, 1]), "in seconds that do not fall, got [1]"),
    (record_of(f"{RESPONSE}a", weigth=2), "unknown key 'weigth'; did you mean 'weight'?"),
]


@pytest.mark.parametrize("record, reason", BAD, ids=[reason for _, reason in BAD])
def test_a_bad_stream_is_named(folder, processor, record, reason):  # noqa: F811
    (folder / "data.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError) as error:
        read_records(folder / "data.jsonl", check=functools.partial(check_record, processor=processor))
    assert reason in str(error.value)


def test_a_stream_needs_the_template_and_something_to_learn(folder, processor):  # noqa: F811
    record = read_one(folder, record_of(f"{FRAME}{SILENCE}", [1]))
    with pytest.raises(ValueError, match="a stream needs the chat template"):
        check_record(record, processor, template=False)
    prompt_only = record_of(f"{SILENCE}")
    prompt_only["messages"][1]["loss"] = False
    prompt_only["messages"] += [{"role": "user", "content": "?"}, {"role": "assistant", "content": SILENCE}]
    with pytest.raises(ValueError, match="the stream has nothing to learn"):
        check_record(read_one(folder, prompt_only), processor)
