"""Evaluates a MOSS-VL checkpoint with VLMEvalKit, by the arguments of its run.py. The model's name is MOSS-VL:

    pip install . ms-vlmeval
    MOSS_VL_CHECKPOINT=CHECKPOINT python examples/vlmeval_adapter.py --model MOSS-VL --data MMBench_DEV_EN --verbose

Frames of videos are those that the data set asks for (`fps` or `nframe`), by default one per second.
"""

import os
from functools import partial

from vlmeval.vlm.base import BaseModel

from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration
from moss_vl.processing_moss_vl import MossVLProcessor


class MossVL(BaseModel):
    INTERLEAVE = VIDEO_LLM = True  # messages mix texts and media in any order, and videos stay videos

    def __init__(self, pretrained="checkpoints/moss-vl-nano", max_new_tokens=2048, dtype="auto", **media):
        super().__init__()
        self.max_new_tokens, self.media = max_new_tokens, media
        self.fps, self.nframe = 1.0, 64  # VLMEvalKit sets the one that a data set asks for, and the other one to None
        self.processor = MossVLProcessor.from_pretrained(pretrained)
        self.model = MossVLForConditionalGeneration.from_pretrained(pretrained, dtype=dtype, device_map="auto")

    def generate_inner(self, message, dataset=None) -> str:
        system = [item for item in message if item.get("role") == "system"]
        asked = [item for item in message if item.get("role") != "system"]  # also the beginning of an answer
        return self.chat_inner([{"role": "system", "content": system}] * bool(system) + [{"content": asked}])

    def chat_inner(self, messages, dataset=None) -> str:
        turns = [
            {"role": turn.get("role", "user"), "content": list(map(self.part, turn["content"]))} for turn in messages
        ]
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        query = {"messages": turns, "media_kwargs": dict(self.media), "generate_kwargs": options}
        return self.model.offline_batch_generate(self.processor, [query])["results"][0]["text"]

    def part(self, item: dict) -> dict:
        """A part of a message; other keys of the item are options of its medium."""
        kind, options = item["type"], {name: item[name] for name in item if name not in ("type", "value", "role")}
        if kind == "video" and not {"fps", "nframes"} & set(options):
            count = {"nframes": self.nframe, "max_frames": self.nframe}
            options |= count if self.fps is None else {"fps": self.fps}
        return {"type": kind, kind: item["value"], **options}


if __name__ == "__main__":
    from vlmeval.config import supported_VLM
    from vlmeval.run import load_env, main

    supported_VLM["MOSS-VL"] = partial(MossVL, os.environ.get("MOSS_VL_CHECKPOINT", "checkpoints/moss-vl-nano"))
    load_env()
    main()
