"""The golden cases of the processors: their files, and a processor with the settings of each case."""

import json
from pathlib import Path

import numpy as np
from conftest import GOLDEN
from transformers import Qwen2TokenizerFast

from moss_vl.processing_moss_vl import MossVLImageProcessorFast, MossVLProcessor, MossVLVideoProcessor


FOLDER = GOLDEN / "processing"
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9]*.json"))
PHOTO, SMALL, LARGE, SQUARE = (
    FOLDER / "images" / f"{name}.png" for name in ("a320x240", "b100x37", "c640x480", "h64x64")
)
SHORT, CLIP, LONG = (
    FOLDER / "media" / f"{name}.mp4" for name in ("v05s_320x240_30", "v5s_320x240_30", "v8s_426x240_2997")
)


def load_tokenizer():
    return Qwen2TokenizerFast.from_pretrained(FOLDER / "tokenizer")


def make_processor(image_config=None, video_config=None, tokenizer=None, **kwargs) -> MossVLProcessor:
    return MossVLProcessor(
        MossVLImageProcessorFast(**image_config or {}),
        tokenizer or load_tokenizer(),
        MossVLVideoProcessor(**video_config or {}),
        **kwargs,
    )


class Case:
    """One case: inputs (`text`, `images`, ...), expected outputs (`expected`, `arrays`), and the `processor`."""

    def __init__(self, name: str):
        self.expected = json.loads((FOLDER / f"{name}.json").read_text())
        self.arrays = dict(np.load(FOLDER / f"{name}.npz"))
        self.text = self.expected["text"]
        self.images = [FOLDER / "images" / image for image in self.expected["images"] or []] or None
        self.videos = [self._locate(video) for video in self.expected["videos"] or []] or None
        self.processor = make_processor(self.expected["image_config"], self.expected["video_config"])

    def _locate(self, video):
        if isinstance(video, dict):
            return {**video, "video_path": str(FOLDER / video["video_path"])}
        return str(FOLDER / video)

    def call(self, **changes):
        given = {
            "images": self.images,
            "videos": self.videos,
            "labels_spans": self.expected["labels_spans_in"],
            **self.expected["kwargs"],
        }
        return self.processor(self.text, return_tensors="np", return_metadata=True, **{**given, **changes})

    @property
    def pixel_values(self) -> np.ndarray:
        normalised = (self.arrays["pixel_levels_u8"].astype(np.float32) - 127.5) / 127.5
        return np.where(self.arrays["zero_patch_rows"][:, None], np.float32(0), normalised)


def decoded_frames(video: Path) -> tuple[np.ndarray, dict]:
    """The decoded frames of a golden video, and metadata with their times."""
    arrays = np.load(FOLDER / f"frames_{video.stem}.npz")
    return arrays["rgb_u8_thwc"], {"timestamps": arrays["pts"].tolist()}
