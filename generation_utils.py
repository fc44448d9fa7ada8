"""The offline methods of MOSS-VL: query -> conversation -> prompt -> processor -> `generate` -> text.

A query is checked as a whole before anything is decoded, and becomes a `_Turn`. Turns whose `generate` call would be the same
share one, left-padded. Nothing of a call stays on the model or the processor: a conversation goes on through the session state
that a call returns.

A conversation is a list of {"role", "content"}; content is a list of plain parts (conversation.py), each medium in its own part.
"""

import math
import numbers
import queue
from collections import deque
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from .checks import nearest_name, shorten
from .conversation import (
    PLACEHOLDER,
    PLACEHOLDERS,
    clips_of,
    fill_places,
    is_frames,
    kind_of,
    media_of,
    plain_medium,
    read_medium,
    read_messages,
    split_places,
)
from .options import REFUSED, drop_fixed, layered, names_of, read_options, reject_unknown


class _Int(int):
    """The default of an argument that is an int: equal to the number, but no caller gives one of this class."""


class _Float(float):
    """The same for a float."""


def _defaults(values: dict) -> dict:
    kinds = {int: _Int, float: _Float}
    return {name: kinds[type(value)](value) if type(value) in kinds else value for name, value in values.items()}


# Used where a query or call does not say otherwise. None, given for a media knob, leaves it to the processor's own setting.
MEDIA_DEFAULTS = {
    "min_pixels": 4096,
    "max_pixels": 16777216,
    "multi_image_max_pixels": 201326592,
    "video_max_pixels": 201326592,
    "video_fps": 1.0,
    "min_frames": 1,
    "max_frames": 256,
    "num_extract_threads": 4,
}
GENERATE_DEFAULTS = {
    "max_new_tokens": 1024,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "do_sample": False,
}
VISION_CHUNKED_LENGTH = 64
# The same numbers as the signatures of the methods have them: what was given is told apart from what was not.
_MEDIA, _GENERATE = _defaults(MEDIA_DEFAULTS), _defaults(GENERATE_DEFAULTS)

# Facts about the weights: the knob, and its name in `config.vision_config`.
WEIGHT_KNOBS = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}
OF_ONE_VIDEO = {"segments", "video_metadata"}  # options that a video has for itself alone
IMAGE_KNOBS, VIDEO_KNOBS = ({*names_of(kind)} - OF_ONE_VIDEO for kind in ("image", "video"))
MEDIA_KNOBS = IMAGE_KNOBS | VIDEO_KNOBS
CALL_OPTIONS = {
    *names_of("text"),
    *names_of("call"),
}  # of a call of the processor, which the offline methods make themselves
FRAME_OPTIONS = {
    "video_fps",
    "num_frames",
    "do_sample_frames",
    "min_frames",
    "max_frames",
}  # they say how many frames are taken

QUERY_KEYS = {
    "prompt",
    "messages",
    "images",
    "videos",
    "media_kwargs",
    "generate_kwargs",
    "use_template",
    "system_prompt",
    "system_prompt_type",
    "thinking_mode",
    "reset_session",
    "clear_history",
    "persist_session",
    "append_messages_to_session",
}
CANCEL_KEYS = ("cancel_current_generate", "stop_generation")
QUEUE_KEYS = {*QUERY_KEYS, *CANCEL_KEYS, "stop_offline_generate", "stream_output"}
NEAR = 0.85  # of difflib: "generation_kwargs" is near "generate_kwargs", "prompt_id" is not near "prompt"
HINT = 0.7  # of difflib, where the name is wrong for sure and only a hint is looked for: "seed" is not near "streamer"
# Names of other software that a record may have for facts about its media; beside a query's keys they ask for nothing.
RECORD_FACTS = {"frames", "resolution", "image_size", "raw_fps"}
# Keys in which a chat template may show what the model did. One that nothing reads would vanish.
TOOL_KEYS = ("tool_calls", "function_call")

# What turns sampling off again where the checkpoint's generation_config.json sets it; transformers warns about any other value.
GREEDY = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
GENERATE_OBJECTS = {"streamer", "stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn"}
LISTS = {"stopping_criteria", "logits_processor"}
WHOLE_NUMBERS = {  # the least value of each
    "num_beams": 1,
    "num_beam_groups": 1,
    "max_length": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "prompt_lookup_num_tokens": 1,
}
# Fields of GenerationConfig that belong to `model.generate`: they ask for something else than one text, or for nothing at all.
NOT_TEXT = {
    "num_return_sequences",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
}
CONFIG_FIELDS = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {"transformers_version"}
GENERATE_KNOBS = (CONFIG_FIELDS | GENERATE_OBJECTS | {"vision_chunked_length", *GENERATE_DEFAULTS}) - NOT_TEXT
BOXES = {"media_kwargs": MEDIA_KNOBS, "generate_kwargs": GENERATE_KNOBS}  # the dicts of a query that hold options
# These mean the same for a prompt with padding in front. (`repetition_penalty` is made to: see `_UnpaddedPenalty`.)
PADDING_BLIND = {
    *GREEDY,
    *GENERATE_DEFAULTS,
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "suppress_tokens",
    "renormalize_logits",
    "remove_invalid_values",
    "vision_chunked_length",
}

THINKING_MODES = {
    "no_thinking": False,
    "default": False,
    "standard": False,
    "deep_thinking": True,
    "thinking": True,
    "reasoning": True,
}
SYSTEM_PROMPTS = {
    "text_image": "You are a helpful AI assistant. Respond to the user's request based on the provided text and images.",
    "video": "You are a helpful AI assistant. Respond to the user's request based on the provided video.",
}
THINKING_PROMPT = (
    "First think the request through, step by step, and write your reasoning inside <thinking></thinking>; "
    "then write the answer inside <answer></answer>."
)

ROUND_START, ROUND_END = "<|round_start|>", "<|round_end|>"


# the methods


class MossVLGenerationMixin:
    """Offline methods of `MossVLForConditionalGeneration`. `processor` is a `MossVLProcessor` of the same checkpoint.

    Texts are what was generated without special tokens, white space as it came. What is wrong with a query is a ValueError or
    FileNotFoundError, raised before anything is decoded; in a batch it begins with "query INDEX:". A media knob that is None
    is the processor's own setting.
    """

    def offline_image_generate(
        self,
        processor,
        prompt="",
        image=None,
        *,
        shortest_edge=_MEDIA["min_pixels"],
        longest_edge=_MEDIA["max_pixels"],
        multi_image_max_pixels=_MEDIA["multi_image_max_pixels"],
        patch_size=None,
        temporal_patch_size=None,
        merge_size=None,
        image_mean=None,
        image_std=None,
        max_new_tokens=_GENERATE["max_new_tokens"],
        temperature=_GENERATE["temperature"],
        top_k=_GENERATE["top_k"],
        top_p=_GENERATE["top_p"],
        repetition_penalty=_GENERATE["repetition_penalty"],
        do_sample=_GENERATE["do_sample"],
        vision_chunked_length=VISION_CHUNKED_LENGTH,
        use_template=None,
        system_prompt=None,
        system_prompt_type=None,
        thinking_mode=None,
        **generate_kwargs,
    ) -> str:
        """The answer to `prompt` about one image or a list of them, which stand before it.

        Args:
            image: anything the processor takes for an image, or a list.
            shortest_edge, longest_edge: least and most *pixels* of an image after its resize; `multi_image_max_pixels` of all together.
            patch_size, temporal_patch_size, merge_size: those of the weights (the default), or an error.
            image_mean, image_std: three numbers each; default the processor's own.
            temperature: 0 or less means greedy, as does `do_sample=False`.
            vision_chunked_length: frames that the vision encoder takes at a time.
            use_template: True renders the chat template, False feeds the images and the bare prompt, None is True if there is one.
            system_prompt, system_prompt_type, thinking_mode: a system turn, see `offline_batch_generate`.
            generate_kwargs: any other knob of `generate` that leaves one text (`num_beams`, `streamer`, `stop_strings`, ...).
        """
        return _answer_one(self, processor, "image", locals())

    def offline_video_generate(
        self,
        processor,
        prompt="",
        video=None,
        *,
        shortest_edge=_MEDIA["min_pixels"],
        longest_edge=_MEDIA["max_pixels"],
        video_max_pixels=_MEDIA["video_max_pixels"],
        patch_size=None,
        temporal_patch_size=None,
        merge_size=None,
        video_fps=_MEDIA["video_fps"],
        num_frames=None,
        min_frames=_MEDIA["min_frames"],
        max_frames=_MEDIA["max_frames"],
        num_extract_threads=_MEDIA["num_extract_threads"],
        image_mean=None,
        image_std=None,
        max_new_tokens=_GENERATE["max_new_tokens"],
        temperature=_GENERATE["temperature"],
        top_k=_GENERATE["top_k"],
        top_p=_GENERATE["top_p"],
        repetition_penalty=_GENERATE["repetition_penalty"],
        do_sample=_GENERATE["do_sample"],
        vision_chunked_length=VISION_CHUNKED_LENGTH,
        use_template=None,
        system_prompt=None,
        system_prompt_type=None,
        thinking_mode=None,
        **generate_kwargs,
    ) -> str:
        """The answer to `prompt` about one video or a list of them, which stand before it.

        Args:
            video: anything the processor takes for a video (a dict with segments, too), or a list.
            shortest_edge, longest_edge: least and most *pixels* of a frame after its resize; `video_max_pixels` of all frames together.
            video_fps: frames a second that are looked at; `min_frames` and `max_frames` bound their number. `num_frames` may be given
                instead.
            num_extract_threads: threads that decode (`frame_extract_num_threads` is its older name).

        The others are as for `offline_image_generate`.
        """
        return _answer_one(self, processor, "video", locals())

    def offline_batch_generate(
        self, processor, queries, session_states=None, vision_chunked_length=VISION_CHUNKED_LENGTH
    ) -> dict:
        """Answers to many queries. Those that can share a `generate` call do; each answer is the one it would get alone.

        Args:
            queries: a list of dicts with, all optional,
                prompt: text, after the query's images and then videos (an empty one may stand beside messages); or
                messages: chat messages; content is text or a list of parts. A part of type image or video carries its medium
                    (conversation.py says how), else it (like a placeholder in a text) stands for the next one of `images` or `videos`.
                images, videos: one medium or a list. Beside messages they fill the places without a medium, or name again, in their
                    order, all media of the messages (or all segments, otherwise divided into videos); what both say of a medium is joined.
                media_kwargs: options of images and of videos, whichever the query has; generate_kwargs: `GENERATE_KNOBS`.
                use_template: as for `offline_image_generate`; without a template the contents of messages follow each other bare.
                system_prompt: the system turn. thinking_mode: "deep_thinking" (or "thinking", "reasoning") asks for the reasoning inside
                    <thinking></thinking> and the answer inside <answer></answer>, "no_thinking" ("default", "standard") does not.
                    system_prompt_type: "text_image" or "video", the opening sentence where there is no `system_prompt`; by default
                    "video" if there is one. Without any of the three, no system turn is added.
                reset_session (or clear_history): True forgets the session state first.
                persist_session: False leaves the turn out of the returned session state.
                append_messages_to_session: False takes the query as the whole conversation instead of its next turn.
                Other keys (`id`, `metadata`, `response`, ...) are copied into the result, unless it has a key of that name. A key that is
                one typo away from one of these, or has the name of an option, which would have no effect there, is a ValueError.
            session_states: None, or a list with None or an earlier call's state for each query. `media_kwargs` of earlier turns
                hold until a query says otherwise.

        Returns:
            {"results": [{"index", "text", "input_text", "messages", ...}], "session_states": [...]} in the order of the queries:
            `input_text` is the prompt as given to the processor, `messages` the conversation with the answer at its end.
        """
        if not isinstance(queries, (list, tuple)):
            raise ValueError(f"queries must be a list of dicts, got {type(queries).__name__}")
        states = [None] * len(queries) if session_states is None else session_states
        if not isinstance(states, (list, tuple)) or len(states) != len(queries):
            got = len(states) if isinstance(states, (list, tuple)) else type(states).__name__
            raise ValueError(
                f"session_states must be None or a list with one state a query: got {got}, expected {len(queries)}"
            )
        turns = []
        for index, (query, state) in enumerate(zip(queries, states, strict=True)):
            with _naming(index):
                turns.append(_resolve(self, processor, query, state, vision_chunked_length))
        for index, turn in enumerate(
            turns if len(turns) > 1 else ()
        ):  # the processor looks at one query's videos first by itself
            if turn.videos and not turn.videos_kwargs.get("allow_http"):
                with _naming(index):
                    processor.video_processor.plan(turn.videos, **turn.videos_kwargs)
        inputs = []
        for index, turn in enumerate(turns):
            with _naming(index):
                inputs.append(_encode(self, processor, turn, alone=len(turns) == 1))
        results, session_states = [], []
        for index, (turn, text) in enumerate(zip(turns, _answer(self, processor, turns, inputs), strict=True)):
            messages, state = turn.closed(text)
            results.append(
                {**turn.record, "index": index, "text": text, "input_text": turn.text, "messages": messages}
            )
            session_states.append(state)
        return {"results": results, "session_states": session_states}

    def offline_generate(
        self, processor, new_queries, output_text_queue, vision_chunked_length=VISION_CHUNKED_LENGTH
    ) -> None:
        """Serves queries from a `queue.Queue` until one has `stop_offline_generate`; strings go to `output_text_queue`.

        A query is one of `offline_batch_generate`; its answer is the text and `<|round_end|>`, or with `stream_output`
        `<|round_start|>`, pieces of text that join to it, and `<|round_end|>`. An error is `[ERROR] MESSAGE` in place of the text
        (or of the rest of it), and the loop goes on.

        A query with `cancel_current_generate` or `stop_generation` ends the answer being generated, if there is one, ahead of
        the queries that wait; what else it says is served in its turn, as is `stop_offline_generate`. False and None say nothing.
        A query of nothing but these flags is no question and gets no round.

        Queries stand alone, unless one has `persist_session`: its conversation is continued by those after it, up to one with
        `reset_session`. Keys of a record that mean nothing here (`id`, `metadata`, ...) are left alone.

        When the method returns or is interrupted, the queries that came after are on `new_queries`, in their order.
        """
        waiting, state = deque(), None
        try:
            while True:
                query = waiting.popleft() if waiting else new_queries.get()
                try:
                    query = _without_cancel(query)
                    if query is None:
                        continue
                    if _flag(query, "stop_offline_generate", False):
                        return
                    stream = _flag(query, "stream_output", False)
                    query = {
                        name: value
                        for name, value in query.items()
                        if name not in ("stop_offline_generate", "stream_output")
                    }
                    query["persist_session"] = _flag(query, "persist_session", False)
                    turn = _resolve(self, processor, query, state, vision_chunked_length)
                    inputs = _encode(self, processor, turn)
                    cancel = _CancelFromQueue(new_queries, waiting)
                    turn.generate["stopping_criteria"] = [*turn.generate.get("stopping_criteria", []), cancel]
                    if stream:
                        if "streamer" in turn.generate:
                            raise ValueError(
                                "a query has stream_output or a streamer in its generate_kwargs, got both"
                            )
                        output_text_queue.put(ROUND_START)
                        turn.generate["streamer"] = _QueueStreamer(processor.tokenizer, output_text_queue)
                    text = _answer(self, processor, [turn], [inputs])[0]
                    _, state = turn.closed(text)
                    if not stream:
                        output_text_queue.put(text)
                except Exception as error:  # whatever one query does, the next is served
                    output_text_queue.put(f"[ERROR] {error or type(error).__name__}")
                output_text_queue.put(ROUND_END)
        finally:
            _put_back(new_queries, waiting)


def _answer_one(model, processor, kind: str, call: dict) -> str:
    """The answer of a single method; `call` has its arguments by name."""
    extra = {
        name: value for name, value in call["generate_kwargs"].items() if value is not None or name not in REFUSED
    }
    media_knobs = IMAGE_KNOBS if kind == "image" else VIDEO_KNOBS
    arguments = call.keys() - {"self", "generate_kwargs"}
    _check_dict(f"offline_{kind}_generate", extra, arguments | media_knobs | GENERATE_KNOBS | NOT_TEXT)
    media = _as_list(kind, call[kind])
    if not media:
        raise ValueError(f"{kind} must be one {kind} or a list of at least one, got {shorten(call[kind])}")
    given = {
        name: call[name] for name in call if name in arguments and not isinstance(call[name], (_Int, _Float))
    } | extra
    query = {
        "prompt": call["prompt"],
        f"{kind}s": media,
        "media_kwargs": {name: value for name, value in given.items() if name in media_knobs},
        "generate_kwargs": {name: value for name, value in given.items() if name in GENERATE_KNOBS | NOT_TEXT},
        **{name: call[name] for name in ("use_template", "system_prompt", "system_prompt_type", "thinking_mode")},
    }
    turn = _resolve(model, processor, query, None, call["vision_chunked_length"])
    return _answer(model, processor, [turn], [_encode(model, processor, turn)])[0]


# from a query to a turn


@dataclass
class _Turn:
    """A query that was found good: all that the processor and `generate` need, and what its session state is made of."""

    messages: list  # the conversation up to the question
    text: str
    images: list
    videos: list
    media_kwargs: dict  # as the queries of this conversation gave them
    images_kwargs: dict
    videos_kwargs: dict
    generate: dict
    state: dict | None  # what the turn continues
    persist: bool
    record: dict  # what else the query says, which is the caller's

    def closed(self, answer: str) -> tuple[list, dict | None]:
        """The conversation with the answer, and the session state after it."""
        messages = [*self.messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return messages, {"messages": messages, "media_kwargs": self.media_kwargs} if self.persist else self.state


def _resolve(model, processor, query, state, vision_chunked_length) -> _Turn:
    """The turn of a query after a session state. Raises ValueError or FileNotFoundError; decodes nothing."""
    if lacks := [name for name in ("tokenizer", "image_processor", "video_processor") if not hasattr(processor, name)]:
        raise ValueError(f"processor must be a MossVLProcessor, got a {type(processor).__name__} without {lacks[0]}")
    record = _check_query(query, QUERY_KEYS)
    _check_state(state)
    if _flag(query, "reset_session", False) or _flag(query, "clear_history", False):
        state = None
    continued = state if _flag(query, "append_messages_to_session", True) else None
    before, media_kwargs = (continued["messages"], continued["media_kwargs"]) if continued else ([], {})

    messages = _with_system([*before], _query_messages(query), query)
    use_template = _flag(query, "use_template", None)
    has_template = bool(
        getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    )
    if use_template and not has_template:
        raise ValueError(
            "use_template=True, but the processor has no chat template; pass use_template=False or add chat_template.jinja"
        )
    text = _render(processor, messages, has_template if use_template is None else use_template)

    media_kwargs = _merge_media_kwargs(
        media_kwargs, _check_dict("media_kwargs", query.get("media_kwargs"), MEDIA_KNOBS | REFUSED.keys())
    )
    knobs = {
        name: value
        for name, value in layered(_defaults_beside(media_kwargs), media_kwargs).items()
        if value is not None
    }
    turn = _Turn(
        messages=messages,
        text=text,
        images=media_of(messages, "image"),
        videos=media_of(messages, "video"),
        media_kwargs=media_kwargs,
        images_kwargs={name: value for name, value in knobs.items() if name in IMAGE_KNOBS},
        videos_kwargs={name: value for name, value in knobs.items() if name in VIDEO_KNOBS},
        generate=_generate_kwargs(model, processor.tokenizer, query.get("generate_kwargs"), vision_chunked_length),
        state=state,
        persist=_flag(query, "persist_session", True),
        record=record,
    )
    _check_media(model, processor, turn)
    return turn


def _check_state(state) -> None:
    """ValueError for what no call returned as a session state."""
    if state is None:
        return
    expected = "a session state is None or what an earlier call returned in 'session_states'"
    if not isinstance(state, dict) or set(state) != {"messages", "media_kwargs"}:
        raise ValueError(f"{expected}, got {shorten(state)}")
    _check_dict("media_kwargs of the session state", state["media_kwargs"], MEDIA_KNOBS)
    if not isinstance(state["messages"], list) or state["media_kwargs"] is None:
        raise ValueError(f"{expected}, got {shorten(state)}")
    for index, message in enumerate(state["messages"]):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and _are_plain_parts(message.get("content"))
        ):
            raise ValueError(
                f"{expected}; message {index} of its messages needs a role and a list of parts as content, each with its text or medium, "
                f"got {shorten(message)}"
            )


def _are_plain_parts(content) -> bool:
    """Whether this is a list of plain parts, each with its text or medium."""

    def is_plain(part):
        kind = part.get("type") if isinstance(part, dict) else None
        return kind_of(kind) == kind is not None and (
            isinstance(part.get(kind), str) if kind == "text" else part.get(kind) is not None
        )

    return isinstance(content, list) and all(map(is_plain, content))


def _query_messages(query: dict) -> list:
    """The messages that a query adds, each medium in its part."""
    given = {kind: _as_list(kind, query.get(f"{kind}s")) for kind in PLACEHOLDERS}
    prompt, messages = query.get("prompt"), query.get("messages")
    if messages is None:
        if prompt is None and not any(given.values()):
            raise ValueError("a query needs a prompt, messages, images or videos; got none of them")
        prompt = "" if prompt is None else prompt
        if not isinstance(prompt, str):
            raise ValueError(
                f"prompt must be a string, got {type(prompt).__name__}; chat messages go under 'messages'"
            )
        if placeholder := PLACEHOLDER.search(prompt):
            raise ValueError(
                f"prompt holds {placeholder[0]!r}, but media come before a prompt by themselves; for another order use 'messages'"
            )
        media = [{"type": kind, kind: _plain(kind, medium)} for kind, media in given.items() for medium in media]
        return [{"role": "user", "content": [*media, {"type": "text", "text": prompt}]}]
    if prompt is not None and not (
        isinstance(prompt, str) and prompt == ""
    ):  # clients send an empty one beside messages
        raise ValueError("a query has a prompt or messages, got both")
    filled = []
    for message in read_messages(messages, "messages"):
        _check_keys("message", message, {"role", "content"})
        content = message.get("content")
        if not isinstance(message["role"], str) or content is None:
            raise ValueError(
                f"a message needs a role (a string) and content (a string or a list of parts), got {shorten(message)}"
            )
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        filled.append({**message, "content": list(split_places(parts))})
    for kind, media in given.items():
        fill_places(kind, filled, [_plain(kind, medium) for medium in media])
    return filled


def _plain(kind: str, medium):
    source, options = read_medium(kind, medium)
    if source is None:
        raise ValueError(
            f"{kind}s holds no {kind} in {shorten(medium)}; expected a path, a URL or another source of one"
        )
    if kind == "image" and isinstance(source, (list, tuple)):
        raise ValueError(f"images is nested too deep: {shorten(source)} stands for one image; give one flat list")
    return plain_medium(kind, source, options)


def _with_system(before: list, new: list, query: dict) -> list:
    """The conversation, with the system turn that the query chooses in place of the one it had."""
    system, mode, kind = (query.get(name) for name in ("system_prompt", "thinking_mode", "system_prompt_type"))
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system_prompt must be a string, got {type(system).__name__}")
    _check_choice("thinking_mode", mode, THINKING_MODES)
    _check_choice("system_prompt_type", kind, SYSTEM_PROMPTS)
    if system is mode is kind is None:
        return before + new
    if new[0]["role"] == "system":
        raise ValueError("the messages begin with a system turn, and the query chooses one; leave out one of them")
    if before and before[0]["role"] == "system":
        before = before[1:]
    if system is None:
        system = SYSTEM_PROMPTS[kind or ("video" if media_of(before + new, "video") else "text_image")]
    if mode is not None and THINKING_MODES[mode]:
        system = f"{system}\n{THINKING_PROMPT}".lstrip("\n")
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, *before, *new]


def _render(processor, messages: list, use_template: bool) -> str:
    """The prompt of a conversation, a placeholder for each medium (for each segment, if a video has segments)."""

    def content(parts):
        for part in parts:
            kind = part["type"]
            yield part["text"] if kind == "text" else PLACEHOLDERS[kind] * clips_of(kind, part[kind])

    plain = [{**message, "content": "".join(content(message["content"]))} for message in messages]
    template = _template_of(processor) if use_template else ""
    for index, message in enumerate(plain):
        if unread := [name for name in TOOL_KEYS if message.get(name) and name not in template]:
            why = "the chat template does not read it" if use_template else "there is no template to read it"
            raise ValueError(
                f"message {index} has {unread[0]!r}, but {why}; leave it out, or write it into the content"
            )
    if use_template:
        return processor.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    if any(message["role"] == "system" for message in plain):
        raise ValueError(
            "a system turn needs the chat template; pass use_template=True, or put its words into the prompt"
        )
    text = "".join(message["content"] for message in plain)
    if not text:
        raise ValueError("nothing to continue from: no template, no media and an empty prompt")
    return text


def _template_of(processor) -> str:
    """The text of the chat template that `apply_chat_template` renders."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    return template.get("default", "") if isinstance(template, dict) else template


# the knobs


def _defaults_beside(given: dict) -> dict:
    """`MEDIA_DEFAULTS` without those that would contradict what was given: a default is no choice of the caller's."""
    said, without = {name for name, value in given.items() if value is not None}, set()
    if given.get("do_sample_frames") is False:
        without = FRAME_OPTIONS
    elif (
        "sample_fps" in said and "do_sample_frames" not in said
    ):  # frames that were sampled before are all taken, or bounded
        without = {"video_fps"} if FRAME_OPTIONS & said else FRAME_OPTIONS
    return {name: value for name, value in MEDIA_DEFAULTS.items() if name not in without}


def _merge_media_kwargs(earlier: dict, given: dict) -> dict:
    """Earlier turns' options under this query's, by the names that this code uses. None is kept: it stands for the processor's own."""
    named, spelled = {}, {}
    for name, value in _without_size(given).items():
        if value is None and name in REFUSED:
            continue
        [known] = read_options({name: True}, MEDIA_KNOBS, "media_kwargs")
        if value is not None and named.get(known) is not None:
            raise ValueError(
                f"{name} is another name of {spelled[known]}, the same knob, and both were given; give one of them"
            )
        if value is not None or known not in named:
            named[known], spelled[known] = _plain_number(value), name
    return layered(earlier, named)


def _without_size(given: dict) -> dict:
    """Media options with the two limits that `size` holds under names of their own."""
    size = given.get("size")
    given = {name: value for name, value in given.items() if name != "size"}
    if size is None:
        return given
    if not isinstance(size, Mapping):
        raise ValueError(f"size must be {{'shortest_edge': pixels, 'longest_edge': pixels}}, got {shorten(size)}")
    reject_unknown(size, ("shortest_edge", "longest_edge"), "size")
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if size.get(edge) is not None:
            if also := next((one for one in (edge, name) if given.get(one) is not None), None):
                raise ValueError(
                    f"size has {edge!r}, and {also}, the same knob, was given beside it; give one of them"
                )
            given[name] = size[edge]
    return given


def _check_media(model, processor, turn: _Turn) -> None:
    """Knobs and media of a turn, as far as can be told without decoding."""
    for media, knobs, own in (
        (turn.images, turn.images_kwargs, processor.image_processor),
        (turn.videos, turn.videos_kwargs, processor.video_processor),
    ):
        limits = ("min_pixels", "max_pixels")
        alone = (
            not media and len(knobs.keys() & limits) == 1
        )  # it is meant for the other kind, and may not fit this one's other limit
        own.resolve({name: value for name, value in knobs.items() if name not in limits} if alone else knobs)
        for name, config_name in WEIGHT_KNOBS.items():
            expected = getattr(model.config.vision_config, config_name)
            got = knobs.get(name, getattr(own, name))
            if got != expected:
                where = "the call" if name in knobs else f"the {type(own).__name__}"
                raise ValueError(f"{name} of {where} is {got}, but the model's weights are made for {expected}")
    if turn.images:
        turn.images = processor.image_processor.probe(turn.images, **turn.images_kwargs)


def _generate_kwargs(model, tokenizer, given, vision_chunked_length) -> dict:
    """Everything that `generate` gets beside the inputs, defaults filled in."""
    if isinstance(given, dict) and (instead := sorted(given.keys() & NOT_TEXT)):
        raise ValueError(
            f"generate_kwargs: {', '.join(instead)}: the offline methods return one text; call model.generate for more"
        )
    given = {
        name: _plain_number(value) for name, value in _check_dict("generate_kwargs", given, GENERATE_KNOBS).items()
    }
    knobs = {**GENERATE_DEFAULTS, "vision_chunked_length": vision_chunked_length, **given}
    for name in ("max_new_tokens", "vision_chunked_length"):
        _check_number(name, knobs[name], numbers.Integral, "a whole number of at least 1", lambda x: x >= 1)
    _check_number("temperature", knobs["temperature"], numbers.Real, "a number", lambda x: True)
    _check_number("top_p", knobs["top_p"], numbers.Real, "above 0 and at most 1", lambda x: 0 < x <= 1)
    _check_number("top_k", knobs["top_k"], numbers.Integral, "a whole number, 0 for no limit", lambda x: x >= 0)
    _check_number("repetition_penalty", knobs["repetition_penalty"], numbers.Real, "above 0", lambda x: x > 0)
    knobs |= {
        name: float(knobs[name]) for name in ("temperature", "top_p", "repetition_penalty")
    }  # transformers wants no ints here
    knobs |= {name: int(knobs[name]) for name in ("max_new_tokens", "vision_chunked_length", "top_k")}
    if not isinstance(knobs["do_sample"], bool):
        raise ValueError(f"do_sample must be True or False, got {shorten(knobs['do_sample'])}")

    _check_others(given)
    if not knobs["do_sample"] or knobs["temperature"] <= 0:
        knobs |= {name: value for name, value in GREEDY.items() if name in CONFIG_FIELDS}
    if "max_length" in given and "max_new_tokens" not in given:
        del knobs["max_new_tokens"]
    if given.get("eos_token_id") is None and model.generation_config.eos_token_id is None:
        knobs["eos_token_id"] = tokenizer.eos_token_id
    if given.get("pad_token_id") is None:
        knobs["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if given.get("stop_strings") is not None:
        knobs["tokenizer"] = tokenizer
    GenerationConfig(**{name: value for name, value in knobs.items() if name in CONFIG_FIELDS})  # its own checks
    return knobs


def _check_others(given: dict) -> None:
    """ValueError for a knob whose kind `generate` would find out about only in the middle of its work."""
    given = {name: value for name, value in given.items() if value is not None or name in LISTS}
    for name in given.keys() & WHOLE_NUMBERS.keys():
        least = WHOLE_NUMBERS[name]
        _check_number(name, given[name], numbers.Integral, f"a whole number of at least {least}", lambda x: x >= least)
    for name in given.keys() & {"eos_token_id", "pad_token_id"}:
        ids = given[name].tolist() if isinstance(given[name], (np.ndarray, torch.Tensor)) else given[name]
        for one in ids if isinstance(ids, (list, tuple)) and name == "eos_token_id" else [ids]:
            _check_number(
                name, one, numbers.Integral, "a token's number (or, for the end, a list of them)", lambda x: True
            )
    strings = given.get("stop_strings", "")
    if not isinstance(strings, str) and not (
        isinstance(strings, (list, tuple)) and all(isinstance(one, str) for one in strings)
    ):
        raise ValueError(f"stop_strings must be a string or a list of strings, got {shorten(strings)}")
    for name in given.keys() & LISTS:
        if not isinstance(given[name], list) or not all(map(callable, given[name])):
            raise ValueError(f"{name} must be a list of functions, got {shorten(given[name])}")
    if "streamer" in given and not all(hasattr(given["streamer"], name) for name in ("put", "end")):
        raise ValueError(f"streamer must have put and end, as a TextStreamer has, got {shorten(given['streamer'])}")


# from turns to their answers


def _encode(model, processor, turn: _Turn, alone: bool = True):
    """The inputs of a turn. Where it is the only one, the frames of its videos are encoded while others are decoded; where many wait for
    their `generate` call, what waits are levels, which take less room and none on the device."""

    def encoder(levels, grid, mean, std):
        with torch.no_grad():
            return model.get_image_features(
                levels, grid, turn.generate["vision_chunked_length"], [mean], [std]
            ).last_hidden_state

    return processor(
        text=turn.text,
        images=turn.images or None,
        videos=turn.videos or None,
        images_kwargs=turn.images_kwargs if turn.images else {},
        videos_kwargs=turn.videos_kwargs if turn.videos else {},
        return_tensors="pt",
        grid_name="grid_thw",  # whatever the processor's own setting is
        do_normalize=False,  # the model does it on its device, chunk by chunk: a quarter of the bytes until there
        encoder=encoder if alone and turn.videos else None,
    )


def _answer(model, processor, turns: list, inputs: list) -> list[str]:
    """The text of each turn. Empties `inputs` on the way."""
    device = "cpu" if model.device.type == "meta" else model.device  # meta: offloaded
    texts = [None] * len(turns)
    for group in _groups(turns, inputs):
        knobs = dict(turns[group[0]].generate)
        batch = _left_padded([inputs[i] for i in group], knobs["pad_token_id"])
        for i in group:
            inputs[i] = None
        padding = (batch["attention_mask"] == 0).sum(dim=1).tolist()
        if any(padding) and knobs["repetition_penalty"] != 1:
            knobs["logits_processor"] = LogitsProcessorList([_UnpaddedPenalty(knobs["repetition_penalty"], padding)])
            knobs["repetition_penalty"] = 1.0
        if "stopping_criteria" in knobs:
            knobs["stopping_criteria"] = StoppingCriteriaList(knobs["stopping_criteria"])
        for name in ("input_ids", "attention_mask", "grid_thw"):  # pixels follow chunk by chunk
            batch[name] = batch[name].to(device)
        ids = model.generate(**batch, **knobs)[:, batch["input_ids"].shape[1] :]
        for i, text in zip(group, processor.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts


def _groups(turns: list, inputs: list) -> list[list[int]]:
    """Indices of the turns that share a `generate` call, by what it would be asked to do."""
    groups = []
    for i, turn in enumerate(turns):
        knobs = turn.generate
        length = None if knobs.keys() <= PADDING_BLIND else inputs[i]["input_ids"].shape[1]
        shares = None if knobs.keys() & GENERATE_OBJECTS else (knobs, length)
        same = next((group for key, group in groups if shares is not None and key == shares), None)
        if same is None:
            groups.append((shares, [i]))
        else:
            same.append(i)
    return [group for _, group in groups]


def _left_padded(inputs: list, pad_token_id: int) -> dict:
    """One batch of samples that were processed each for itself; the frame mask is left to the model, which tells it from the text."""
    width = max(one["input_ids"].shape[1] for one in inputs)

    def padded(name, value):  # [1, T] each -> [1, width] each
        return [torch.nn.functional.pad(one[name], (width - one[name].shape[1], 0), value=value) for one in inputs]

    def joined(tensors):
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    return {
        "input_ids": joined(padded("input_ids", pad_token_id)),
        "attention_mask": joined(padded("attention_mask", 0)),
        **{
            name: joined([one[name] for one in inputs])
            for name in ("pixel_values", "image_features", "grid_thw")
            if name in inputs[0]
        },
        **{
            name: [row for one in inputs for row in one[name]]
            for name in ("media_nums_per_sample", "image_mean", "image_std")
            if name in inputs[0]
        },
    }


class _UnpaddedPenalty(LogitsProcessor):
    """The repetition penalty of rows with `padding[i]` tokens in front, which transformers 4 would count as said."""

    def __init__(self, penalty: float, padding: list[int]):
        self.penalise = RepetitionPenaltyLogitsProcessor(penalty)
        self.padding = padding

    def __call__(self, input_ids, scores):
        beams = len(input_ids) // len(self.padding)
        rows = [slice(i, i + 1) for i in range(len(input_ids))]
        return torch.cat(
            [self.penalise(input_ids[row, self.padding[row.start // beams] :], scores[row]) for row in rows]
        )


# the queues


def _is_cancel(query) -> bool:
    return isinstance(query, dict) and any(_is_flag(query.get(key)) and query.get(key) for key in CANCEL_KEYS)


def _without_cancel(query) -> dict | None:
    """The query without its cancel flags, None where nothing else is left of it. ValueError for what is no query."""
    _check_query(query, QUEUE_KEYS)
    if not any(key in query for key in CANCEL_KEYS):
        return query
    for key in CANCEL_KEYS:
        _flag(query, key, False)
    return {key: value for key, value in query.items() if key not in CANCEL_KEYS} or None


class _CancelFromQueue(StoppingCriteria):
    """Between two tokens, moves what has come in to `waiting`, in order; stops at a query that cancels."""

    def __init__(self, new_queries, waiting: deque):
        self.new_queries = new_queries
        self.waiting = waiting
        self.cancelled = False

    def __call__(self, input_ids, scores, **kwargs):
        while True:
            try:
                query = self.new_queries.get_nowait()
            except queue.Empty:
                break
            if _is_cancel(query):
                self.cancelled = True
                query = {key: value for key, value in query.items() if key not in CANCEL_KEYS}
                if not query:
                    continue
            self.waiting.append(query)
        return torch.full((len(input_ids),), self.cancelled, dtype=torch.bool, device=input_ids.device)


def _put_back(new_queries, waiting: deque) -> None:
    """Puts the queries that wait back on the queue they came from, ahead of those that came later."""
    if not waiting:
        return
    if isinstance(getattr(new_queries, "queue", None), deque):  # a queue.Queue: at its front, in one step
        with new_queries.mutex:
            new_queries.queue.extendleft(reversed(waiting))
            new_queries.not_empty.notify_all()
        return
    with suppress(queue.Empty):  # another kind of queue has no front: all come out, and go in again
        while True:
            waiting.append(new_queries.get_nowait())
    for query in reversed(waiting) if isinstance(new_queries, queue.LifoQueue) else waiting:
        new_queries.put(query)


class _QueueStreamer(TextStreamer):
    """Puts text on a queue as soon as it cannot change any more."""

    def __init__(self, tokenizer, output_text_queue):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.output_text_queue = output_text_queue

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if text:
            self.output_text_queue.put(text)


# checking arguments


@contextmanager
def _naming(index: int):
    """Puts the query's number before the message of what is wrong with it."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"query {index}: {error}") from error
    except ValueError as error:
        raise ValueError(f"query {index}: {error}") from error


def _check_dict(what: str, value, known=None) -> dict:
    """`value`, {} for None; ValueError unless it is a dict whose keys are all known (any, without `known`)."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a dict, got {type(value).__name__}")
    for name in value if known is not None else ():
        if name not in known:
            place = (
                None if name in MEDIA_KNOBS | GENERATE_KNOBS and what not in BOXES else _place_of(name, value[name])
            )
            raise ValueError(
                f"{what}: {place}"
                if place
                else f"{what}: unknown key {name!r}; {_nearest(name, known - REFUSED.keys())}"
            )
    return value


def _place_of(name, value) -> str | None:
    """What to say about an option that stands where it has no effect: where it goes. None for what is no option."""
    if box := next((box for box, options in BOXES.items() if name in options), None):
        return f"{name!r} belongs into its {box}; write {{{box!r}: {{{name!r}: ...}}}}"
    if name in OF_ONE_VIDEO:
        return f"{name!r} belongs to one video; write {{'video_path': ..., {name!r}: {shorten(value)}}} in place of its path"
    if name in NOT_TEXT:
        return f"{name!r}: the offline methods return one text; call model.generate for more"
    if name in CALL_OPTIONS:
        return (
            f"{name!r} is an option of the processor's call, which the offline methods make themselves; leave it out"
        )
    if name in REFUSED:
        return f"{name} is no option of MOSS-VL: {REFUSED[name]}"
    if name == "seed":
        return "'seed' is no option of generate; call torch.manual_seed before"
    return None


def _check_query(query, known) -> dict:
    """What a query says beside the `known` keys, which is left to the caller. ValueError for a key that was meant to be one of them."""
    _check_dict("query", query)
    if query is None:
        raise ValueError("query must be a dict, got None")
    for name in query.keys() & (QUEUE_KEYS - known):
        if _flag(query, name, False):
            raise ValueError(f"query: {name} is for the queue of offline_generate; leave it out")
    for name in query.keys() - QUEUE_KEYS - RECORD_FACTS - {"seed"}:
        if query[name] is None:
            continue
        if place := _place_of(name, query[name]):
            raise ValueError(f"query: {place}")
        drop_fixed({name: query[name]}, "query")
        if name in ("session_state", "session_states"):
            raise ValueError(
                f"query: {name!r} goes beside the queries; write offline_batch_generate(..., session_states=[...])"
            )
        if name == "media" and isinstance(query[name], (list, tuple, dict)):
            raise ValueError(
                "query: 'media' is a key of lines for infer.py; write 'images' and 'videos', or parts of messages"
            )
    _check_keys("query", query, QUEUE_KEYS, {*MEDIA_DEFAULTS, *GENERATE_DEFAULTS})
    return {name: value for name, value in query.items() if name not in QUEUE_KEYS}


def _check_keys(what: str, value: dict, known, elsewhere=()) -> None:
    """ValueError for a key that is not known, but was meant to be: one typo away from a known one or nearly the same, or one typo away from
    one that belongs `elsewhere`."""
    for name in value.keys() - known:
        spelled = str(name).lower().replace("-", "_").replace(" ", "_")
        if any(
            letter.isdigit() for letter in spelled
        ):  # no known name has a digit: "prompt_2" is one of a row of names
            continue
        typos = (one for one in (*sorted(known), *sorted(elsewhere)) if _is_typo(spelled, one))
        near = next(typos, None) or nearest_name(spelled, known, cutoff=NEAR)
        if near is not None:
            raise ValueError(f"{what}: unknown key {name!r}; did you mean {near!r}?")


def _is_typo(a: str, b: str) -> bool:
    """Whether two names are the same but for one letter: another one, one too many or too few, or two that are swapped. Names of fewer than
    five letters are too much alike to tell."""
    if min(len(a), len(b)) < 5 or abs(len(a) - len(b)) > 1:
        return False
    i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    swapped = a[i : i + 2] == b[i : i + 2][::-1] and a[i + 2 :] == b[i + 2 :]
    return swapped or a[i + 1 :] == b[i + 1 :] or a[i + 1 :] == b[i:] or a[i:] == b[i + 1 :]


def _check_choice(what: str, value, known) -> None:
    if value is not None and (not isinstance(value, str) or value not in known):
        raise ValueError(f"{what}: unknown value {shorten(value)}; {_nearest(value, known)}")


def _nearest(name, known) -> str:
    near = nearest_name(name, known, HINT) if isinstance(name, str) else None
    return f"did you mean {near!r}?" if near else f"known: {', '.join(sorted(known))}"


def _check_number(name: str, value, kind, expected: str, fits) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or not fits(value):
        raise ValueError(f"{name} must be {expected}, got {shorten(value)}")


def _plain_number(value):
    """The Python number or bool of a numpy scalar; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _is_flag(value) -> bool:
    """Whether this is True, False, or one of the numbers that equal them."""
    return isinstance(value, (bool, np.bool_)) or (isinstance(value, (numbers.Real, np.number)) and value in (0, 1))


def _flag(query: dict, name: str, default: bool | None) -> bool | None:
    value = query.get(name)
    if value is not None and not _is_flag(value):
        expected = "True, False or None" if default is None else "True or False"
        raise ValueError(f"{name} must be {expected}, got {shorten(value)}")
    return default if value is None else bool(value)


def _as_list(kind: str, media) -> list:
    """One medium, a list of them or None -> a list. A list of frames is one video. ValueError for an array of several."""
    if media is None:
        return []
    if isinstance(media, (np.ndarray, torch.Tensor)) and media.ndim == {"image": 4, "video": 5}[kind]:
        raise ValueError(
            f"{kind}s must be one {kind} or a list, got an array of shape {list(media.shape)}: {len(media)} {kind}s in one; pass list(array)"
        )
    one = not isinstance(media, (list, tuple)) or (kind == "video" and is_frames(media))
    return [media] if one else list(media)
