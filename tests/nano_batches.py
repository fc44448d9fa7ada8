"""Batches of the drawn world for tests, and notes on what went into them."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import make_model
from transformers import AutoProcessor

from moss_vl.realtime_protocol import RESPONSE, SILENCE
from moss_vl.training.nano import lessons, rows, world
from moss_vl.training.nano.facts import FRAME_FACTS, TOKEN_FACTS
from moss_vl.training.nano.lessons import Lessons


KINDS = ("look", "pictures", "images", "clips")  # "streams" are checked in test_watching.py
NAMES = [name for name, _ in TOKEN_FACTS]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def make_processor():
    """The processor of the checkpoint, whose tokenizer has the tokens of the realtime protocol."""
    processor = AutoProcessor.from_pretrained(
        ROOT / "checkpoints/moss-vl-nano", trust_remote_code=True, frame_extract_num_threads=1
    )
    processor.tokenizer.add_tokens([SILENCE, RESPONSE], special_tokens=True)
    return processor


@pytest.fixture(scope="module")
def model(processor):
    """A model with random weights and the patch size and tokens of the checkpoint."""
    tokenizer = processor.tokenizer
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()}
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 32768}
    return make_model(text=text, vision={"patch_size": 16}, **ids)


@pytest.fixture(autouse=True)
def one_font(monkeypatch):
    """Only one font, so that scenes do not depend on the installed fonts."""
    monkeypatch.setattr(world, "fonts", lambda: (None,))


@pytest.fixture
def notes(monkeypatch):
    """What went into the last batch.

    "scenes": all scenes; "pixels": (pictures, limits) of each call of the image processor; "rows": the texts of the
    rows, each with its questions as `asked` and, of a clip, (scene, pictures, limits) as `clip`.
    """
    notes = {"scenes": [], "pixels": [], "rows": []}

    def note_scene(make):
        def noting(*args, **kwargs):
            notes["scenes"].append(make(*args, **kwargs))
            return notes["scenes"][-1]

        return noting

    def note_question(row, question, add=rows.RowText.add):
        row.asked = [*getattr(row, "asked", []), question]
        row.clip = notes["scenes"][-1], *notes["pixels"][-1]
        add(row, question)

    def note_pixels(self, pictures, limits, pixels=Lessons.pixels):
        notes["pixels"].append((pictures, limits))
        return pixels(self, pictures, limits)

    def note_rows(rows, pad, join=lessons.join):
        notes["rows"] = rows
        return join(rows, pad)

    monkeypatch.setattr(lessons, "random_picture", note_scene(lessons.random_picture))
    monkeypatch.setattr(lessons, "random_crowd", note_scene(lessons.random_crowd))
    monkeypatch.setattr(lessons, "random_clip", note_scene(lessons.random_clip))
    monkeypatch.setattr(lessons, "join", note_rows)
    monkeypatch.setattr(rows.RowText, "add", note_question)
    monkeypatch.setattr(Lessons, "pixels", note_pixels)
    return notes


def batch_of(processor, kind, step, progress=0.0):
    return Lessons(processor, seed=0, size=8).batch(step, kind, progress)


def media_inputs(model, batch) -> dict:
    """The media of a batch as inputs of the model, with each distinct picture encoded once."""
    half = [[0.5, 0.5, 0.5]] * len(batch["picture_grids"])
    features = model.get_image_features(
        batch["pixel_values"], torch.tensor(batch["picture_grids"]), image_mean=half, image_std=half
    ).pooler_output
    return {
        "image_features": features[batch["gather"]],
        "grid_thw": batch["grid_thw"],
        "media_nums_per_sample": batch["media_nums"],
    }


def media_of(notes, batch, row) -> dict:
    """The media of a row as inputs of the processor."""
    if batch["kind"] != "clips":
        pictures, (low, high) = notes["pixels"][0]
        begin = sum(batch["media_nums"][:row])
        return {"images": pictures[begin : begin + batch["media_nums"][row]], "min_pixels": low, "max_pixels": high}
    scene, pictures, (low, high) = notes["rows"][row].clip
    # Most frames are not sampled, and their memory is never touched.
    frames = np.zeros((round(scene.seconds * scene.fps), scene.height, scene.width, 3), dtype=np.uint8)
    rate = next(rate for rate in (1, 2) if len(lessons.sampled_times(scene, rate)) == batch["grid_thw"][row][0])
    moments = {}
    for time in lessons.sampled_times(scene, rate):
        moment = moments.setdefault(tuple(scene.at(time)), len(moments))
        frames[round(time * scene.fps)] = np.asarray(pictures[moment])
    return {
        "videos": [frames],
        "video_metadata": [{"fps": scene.fps}],
        "video_fps": rate,
        "min_pixels": low,
        "max_pixels": high,
    }


def named(row) -> dict:
    """Name -> class of the facts of a vision token."""
    return dict(zip(NAMES, row.tolist(), strict=True))


def known(row) -> dict:
    """Name -> class of the frame facts that apply."""
    return {name: value for (name, _), value in zip(FRAME_FACTS, row, strict=True) if value != -100}
