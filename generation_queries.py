"""Reads queries of the offline methods: each is checked before anything is decoded, and becomes a `Turn`.

A conversation is a list of {"role", "content"}. Content is a list of plain parts (conversation.py): texts, and one
part per medium.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from .checks import check_characters, check_choice, check_misspelled, flag_or, shorten
from .conversation import (
    PLACEHOLDERS,
    are_complete_parts,
    check_no_placeholder,
    collect_media,
    fill_placeholders,
    is_frames,
    media_before_text,
    plain_medium,
    read_medium,
    read_messages,
    split_placeholders,
    write_placeholders,
)
from .generation_options import (
    GENERATE_DEFAULTS,
    IMAGE_OPTIONS,
    MEDIA_DEFAULTS,
    MEDIA_OPTIONS,
    VIDEO_OPTIONS,
    check_options,
    complete_media_kwargs,
    generate_arguments,
    merge_media_kwargs,
    misplaced_hint,
)
from .options import REFUSED, drop_fixed


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
# Keys with which records of other software describe their media. In `media_kwargs` the same names are errors.
RECORD_FACTS = {"frames", "resolution", "image_size", "raw_fps"}
# Keys of a message that only a chat template can write into the prompt.
TOOL_KEYS = ("tool_calls", "function_call")
# Options that must equal the model's: option -> its name in `config.vision_config`.
WEIGHT_OPTIONS = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}

NEW_CONVERSATION = {"messages": [], "media_kwargs": {}}  # the session state of a new conversation; never changed

THINKING_MODES = {  # name -> whether the system turn asks for the reasoning
    "no_thinking": False,
    "default": False,
    "standard": False,
    "deep_thinking": True,
    "thinking": True,
    "reasoning": True,
}
SYSTEM_PROMPTS = {
    "text_image": (
        "You are a helpful AI assistant. Respond to the user's request based on the provided text and images."
    ),
    "video": "You are a helpful AI assistant. Respond to the user's request based on the provided video.",
}
THINKING_PROMPT = (
    "First think the request through, step by step, and write your reasoning inside <thinking></thinking>; "
    "then write the answer inside <answer></answer>."
)


@dataclass(frozen=True)
class Turn:
    """A checked query: the arguments of the processor and of `generate`, and the content of the next session state.

    Attributes:
        messages: the conversation up to the question, which is included.
        text: the prompt, with a placeholder per medium (per segment of a video with segments).
        images, videos: the media of the whole conversation, in the order of the text.
        media_kwargs: `media_kwargs` of the session by canonical names, without defaults.
        images_kwargs, videos_kwargs: options of the processors, with defaults.
        generate: keyword arguments of `generate`, apart from the inputs.
        state: the session state before the query. It is returned unchanged if `persist` is False.
        persist: whether the returned session state has this turn.
        extra: other keys of the query, which are copied into the result.
    """

    messages: list[dict]
    text: str
    images: list
    videos: list
    media_kwargs: dict
    images_kwargs: dict
    videos_kwargs: dict
    generate: dict
    state: dict | None
    persist: bool
    extra: dict

    def finish(self, answer: str) -> tuple[list[dict], dict | None]:
        """(conversation with the answer, session state after the turn)."""
        messages = [*self.messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return messages, {"messages": messages, "media_kwargs": self.media_kwargs} if self.persist else self.state

    def result(self, index: int, text: str, messages: list[dict]) -> dict:
        """The result of the query, as `offline_batch_generate` returns it."""
        return {**self.extra, "index": index, "text": text, "input_text": self.text, "messages": messages}


def read_query(model, processor, query, state, vision_chunked_length: int) -> Turn:
    """The turn that a query adds to a session state. Decodes no media.

    Raises:
        ValueError: for an error in the query, the state or a probed medium, or a wrong processor.
        FileNotFoundError: for a missing image.
    """
    check_processor(processor)
    extra = check_query(query, QUERY_KEYS)
    _check_state(state)
    if read_flag(query, "reset_session") or read_flag(query, "clear_history"):
        state = None
    append = read_flag(query, "append_messages_to_session", True)
    earlier = state if append and state is not None else NEW_CONVERSATION

    messages = _choose_system(earlier["messages"], _read_new_messages(query), query)
    text = check_characters("the conversation", _render(processor, messages, _choose_template(processor, query)))
    given = check_options("media_kwargs", query.get("media_kwargs"), MEDIA_OPTIONS | REFUSED.keys())
    media_kwargs = merge_media_kwargs(earlier["media_kwargs"], given)
    options = complete_media_kwargs(media_kwargs)
    images, videos = (collect_media(messages, kind) for kind in ("image", "video"))
    images_kwargs = {name: value for name, value in options.items() if name in IMAGE_OPTIONS}
    videos_kwargs = {name: value for name, value in options.items() if name in VIDEO_OPTIONS}
    generate = generate_arguments(model, processor.tokenizer, query.get("generate_kwargs"), vision_chunked_length)
    persist = read_flag(query, "persist_session", True)
    _check_media_kwargs(model, processor.image_processor, images, images_kwargs)
    _check_media_kwargs(model, processor.video_processor, videos, videos_kwargs)
    return Turn(
        messages=messages,
        text=text,
        images=processor.image_processor.probe(images, **images_kwargs) if images else images,
        videos=videos,
        media_kwargs=media_kwargs,
        images_kwargs=images_kwargs,
        videos_kwargs=videos_kwargs,
        generate=generate,
        state=state,
        persist=persist,
        extra=extra,
    )


@contextmanager
def name_query(index: int):
    """Puts "query INDEX: " before the message of an error that a query causes."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"query {index}: {error}") from error
    except ValueError as error:
        raise ValueError(f"query {index}: {error}") from error


# checks


def read_flag(query: Mapping, name: str, default: bool | None = False) -> bool | None:
    """The value of a key that must be True or False; `default` if it is absent or None."""
    return flag_or(name, query.get(name), default)


def check_query(query, known) -> dict:
    """Checks the keys of a query.

    Args:
        known: the allowed ones of `QUEUE_KEYS`.

    Returns:
        The items with other keys, which have no effect.

    Raises:
        ValueError: for a query that is no dict, a key that is probably misspelled, and an option, which belongs in
            media_kwargs or generate_kwargs.
    """
    check_options("query", query)
    if query is None:
        raise ValueError("query must be a dict, got None")
    for name in query.keys() & (QUEUE_KEYS - known):
        if read_flag(query, name):
            raise ValueError(f"query: {name} is for the queue of offline_generate; leave it out")
    for name in query.keys() - QUEUE_KEYS - RECORD_FACTS - {"seed"}:
        if query[name] is not None:
            _check_unknown_key(name, query[name])
    check_misspelled("query", query, QUEUE_KEYS, {*MEDIA_DEFAULTS, *GENERATE_DEFAULTS})
    return {name: value for name, value in query.items() if name not in QUEUE_KEYS}


def _check_unknown_key(name, value) -> None:
    """Raises ValueError for a key that belongs elsewhere, not at the top of a query."""
    if hint := misplaced_hint(name, value):
        raise ValueError(f"query: {hint}")
    drop_fixed({name: value}, "query")
    if name in ("session_state", "session_states"):
        raise ValueError(
            f"query: {name!r} goes beside the queries; write offline_batch_generate(..., session_states=[...])"
        )
    if name == "media" and isinstance(value, (list, tuple, dict)):
        raise ValueError(
            "query: 'media' is a key of lines for infer.py; write 'images' and 'videos', or parts of messages"
        )


def check_processor(processor) -> None:
    missing = [name for name in ("tokenizer", "image_processor", "video_processor") if not hasattr(processor, name)]
    if missing:
        raise ValueError(f"processor must be a MossVLProcessor, got a {type(processor).__name__} without {missing[0]}")


def _check_state(state) -> None:
    """Raises ValueError for a session state that no earlier call can have returned."""
    if state is None:
        return
    expected = "a session state is None or what an earlier call returned in 'session_states'"
    if not isinstance(state, dict) or set(state) != {"messages", "media_kwargs"}:
        raise ValueError(f"{expected}, got {shorten(state)}")
    check_options("media_kwargs of the session state", state["media_kwargs"], MEDIA_OPTIONS)
    if not isinstance(state["messages"], list) or state["media_kwargs"] is None:
        raise ValueError(f"{expected}, got {shorten(state)}")
    for index, message in enumerate(state["messages"]):
        has_role = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not has_role or not are_complete_parts(message.get("content")):
            raise ValueError(
                f"{expected}; message {index} of its messages needs a role and a list of parts as content, each with "
                f"its text or medium, got {shorten(message)}"
            )


def _check_media_kwargs(model, processor, media: list, options: dict) -> None:
    """Raises ValueError for options that a processor refuses, or that do not fit the model's weights."""
    limits = options.keys() & {"min_pixels", "max_pixels"}
    if not media and len(limits) == 1:
        # The limit may be meant for media of the other kind, and contradict the other limit of this processor.
        processor.resolve({name: value for name, value in options.items() if name not in limits})
    else:
        processor.resolve(options)
    for name, config_name in WEIGHT_OPTIONS.items():
        expected = getattr(model.config.vision_config, config_name)
        got = options.get(name, getattr(processor, name))
        if got != expected:
            where = "the call" if name in options else f"the {type(processor).__name__}"
            raise ValueError(f"{name} of {where} is {got}, but the model's weights are made for {expected}")


# messages


def list_media(kind: str, media) -> list:
    """Makes a list of one medium, a list of media, or None. A list of frames is one video.

    Raises:
        ValueError: for an array of several media, [N, h, w, 3] for images and [N, n, h, w, 3] for videos.
    """
    if media is None:
        return []
    if isinstance(media, (np.ndarray, torch.Tensor)) and media.ndim == {"image": 4, "video": 5}[kind]:
        raise ValueError(
            f"{kind}s must be one {kind} or a list, got an array of shape {list(media.shape)}: {len(media)} {kind}s "
            "in one; pass list(array)"
        )
    is_one = not isinstance(media, (list, tuple)) or (kind == "video" and is_frames(media))
    return [media] if is_one else list(media)


def _read_new_messages(query: dict) -> list[dict]:
    """The messages that a query adds to its conversation, each medium in its part."""
    media = {kind: list_media(kind, query.get(f"{kind}s")) for kind in PLACEHOLDERS}
    if query.get("messages") is None:
        return _messages_of_prompt(query.get("prompt"), media)
    prompt = query.get("prompt")
    if prompt is not None and not (isinstance(prompt, str) and not prompt):  # clients send an empty one with messages
        raise ValueError("a query has a prompt or messages, got both")
    messages = []
    for message in read_messages(query["messages"], "messages"):
        check_misspelled("message", message, {"role", "content"})
        content = message.get("content")
        if not isinstance(message["role"], str) or content is None:
            raise ValueError(
                f"a message needs a role (a string) and content (a string or a list of parts), got {shorten(message)}"
            )
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages.append({**message, "content": list(split_placeholders(parts))})
    for kind, given in media.items():
        fill_placeholders(kind, messages, [_read_listed_medium(kind, medium) for medium in given])
    return messages


def _messages_of_prompt(prompt, media: dict[str, list]) -> list[dict]:
    """The user turn of a prompt: its images, its videos, then the text."""
    if prompt is None and not any(media.values()):
        raise ValueError("a query needs a prompt, messages, images or videos; got none of them")
    prompt = "" if prompt is None else prompt
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {type(prompt).__name__}; chat messages go under 'messages'")
    check_no_placeholder("prompt", prompt)
    pairs = [(kind, _read_listed_medium(kind, medium)) for kind, given in media.items() for medium in given]
    return [{"role": "user", "content": media_before_text(pairs, prompt)}]


def _read_listed_medium(kind: str, medium):
    """The plain form of a medium in `images` or `videos`, where each must have its source."""
    source, options = read_medium(kind, medium)
    if source is None:
        raise ValueError(f"{kind}s holds no {kind} in {shorten(medium)}; expected a path, a URL or another source")
    if kind == "image" and isinstance(source, (list, tuple)):
        raise ValueError(
            f"images is nested too deep: {shorten(source)} is where one image belongs; give one flat list"
        )
    return plain_medium(kind, source, options)


def _choose_system(earlier: list[dict], new: list[dict], query: dict) -> list[dict]:
    """The whole conversation. A system turn that the query chooses replaces that of the earlier messages."""
    system, mode, kind = (query.get(name) for name in ("system_prompt", "thinking_mode", "system_prompt_type"))
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system_prompt must be a string, got {type(system).__name__}")
    check_choice("thinking_mode", mode, THINKING_MODES)
    check_choice("system_prompt_type", kind, SYSTEM_PROMPTS)
    if system is mode is kind is None:
        return earlier + new
    if new[0]["role"] == "system":
        raise ValueError("the messages begin with a system turn, and the query chooses one; leave out one of them")
    if earlier and earlier[0]["role"] == "system":
        earlier = earlier[1:]
    if system is None:
        system = SYSTEM_PROMPTS[kind or ("video" if collect_media(earlier + new, "video") else "text_image")]
    if mode is not None and THINKING_MODES[mode]:
        system = f"{system}\n{THINKING_PROMPT}".lstrip("\n")
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, *earlier, *new]


# the prompt


def _choose_template(processor, query: dict) -> str | None:
    """The chat template for the prompt; None if the query turns it off or the processor has none."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    use_template = read_flag(query, "use_template", None)
    if use_template and not template:
        raise ValueError(
            "use_template=True, but the processor has no chat template; pass use_template=False or add "
            "chat_template.jinja"
        )
    if not template or use_template is False:
        return None
    return template.get("default", "") if isinstance(template, dict) else template


def _render(processor, messages: list[dict], template: str | None) -> str:
    """The prompt of a conversation, with a placeholder per medium (per segment of a video with segments)."""
    texts = [{**message, "content": write_placeholders(message["content"])} for message in messages]
    for index, message in enumerate(texts):
        if ignored := [name for name in TOOL_KEYS if message.get(name) and name not in (template or "")]:
            why = "there is no template to read it" if template is None else "the chat template does not read it"
            raise ValueError(
                f"message {index} has {ignored[0]!r}, but {why}; leave it out, or write it into the content"
            )
    if template is not None:
        return processor.apply_chat_template(texts, tokenize=False, add_generation_prompt=True)
    if any(message["role"] == "system" for message in texts):
        raise ValueError(
            "a system turn needs the chat template; pass use_template=True, or put its words into the prompt"
        )
    text = "".join(message["content"] for message in texts)
    if not text:
        raise ValueError("nothing to continue from: no template, no media and an empty prompt")
    return text
