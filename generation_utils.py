"""The offline methods: query -> turn -> inputs of the processor -> `generate` -> text.

    generation_queries.py    reads and checks queries, before anything is decoded
    generation_options.py    reads and checks their options of the processors and of `generate`
    generation_batches.py    turns to inputs of `generate`, alone or left-padded
    generation_rows.py       answers that are written beside each other, token by token
    generation_streams.py    streams of events of many answers
    generation_sessions.py   session states that keep their caches
    generation_queue.py      serves queries from a queue

No call changes the model or the processor. A conversation continues from the session state that a call returned.
"""

import inspect
from dataclasses import replace

from .checks import shorten
from .generation_batches import answer_turn
from .generation_options import (
    GENERATE_DEFAULTS,
    GENERATE_OPTIONS,
    IMAGE_OPTIONS,
    MEDIA_DEFAULTS,
    NOT_TEXT,
    VIDEO_OPTIONS,
    VISION_CHUNKED_LENGTH,
    check_option,
    check_options,
)
from .generation_queries import (
    QUERY_KEYS,
    QUEUE_KEYS,
    SYSTEM_PROMPTS,
    THINKING_MODES,
    THINKING_PROMPT,
    WEIGHT_OPTIONS,
    Turn,
    check_processor,
    list_media,
    name_query,
    read_query,
)
from .generation_queue import QueueServer
from .generation_sessions import CacheBudget, SessionState, has_cache, load_session
from .generation_streams import DEFAULT_LIMITS, BatchLimits, BatchStream
from .options import REFUSED


__all__ = (
    "GENERATE_DEFAULTS",
    "MEDIA_DEFAULTS",
    "QUERY_KEYS",
    "QUEUE_KEYS",
    "SYSTEM_PROMPTS",
    "THINKING_MODES",
    "THINKING_PROMPT",
    "VISION_CHUNKED_LENGTH",
    "MossVLGenerationMixin",
)

INDEX_BYTES = 256 << 20  # of the planned videos of a batch
TURN_ARGUMENTS = ("use_template", "system_prompt", "system_prompt_type", "thinking_mode")


def _arguments(**media_arguments) -> dict:
    """The keyword arguments of a single-medium method: name -> default."""
    return {
        "shortest_edge": MEDIA_DEFAULTS["min_pixels"],
        "longest_edge": MEDIA_DEFAULTS["max_pixels"],
        **media_arguments,
        "image_mean": None,
        "image_std": None,
        **GENERATE_DEFAULTS,
        "vision_chunked_length": VISION_CHUNKED_LENGTH,
        **dict.fromkeys(TURN_ARGUMENTS),
    }


ARGUMENTS = {
    "image": _arguments(
        multi_image_max_pixels=MEDIA_DEFAULTS["multi_image_max_pixels"],
        **dict.fromkeys(WEIGHT_OPTIONS),
    ),
    "video": _arguments(
        video_max_pixels=MEDIA_DEFAULTS["video_max_pixels"],
        **dict.fromkeys(WEIGHT_OPTIONS),
        video_fps=MEDIA_DEFAULTS["video_fps"],
        num_frames=None,
        min_frames=MEDIA_DEFAULTS["min_frames"],
        max_frames=MEDIA_DEFAULTS["max_frames"],
        num_extract_threads=MEDIA_DEFAULTS["num_extract_threads"],
    ),
}


def _with_arguments(arguments: dict):
    """Decorator that shows `arguments` and `**generate_kwargs` in the signature of a method that takes `**given`.

    With `**given`, the method knows which arguments the caller passed. A default must not contradict one of these: the
    default of `video_fps` would contradict a given `num_frames`.
    """

    def decorate(method):
        signature = inspect.signature(method)
        positional = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in arguments.items()
        ]
        others = inspect.Parameter("generate_kwargs", inspect.Parameter.VAR_KEYWORD)
        method.__signature__ = signature.replace(parameters=[*positional, *keywords, others])
        return method

    return decorate


class MossVLGenerationMixin:
    """Offline methods of `MossVLForConditionalGeneration`. `processor` is a `MossVLProcessor` of the same checkpoint.

    Answers are decoded without special tokens, and their white space is kept. For a media option that is None, the
    processor's setting is used.

    Raises:
        ValueError, FileNotFoundError: for anything wrong with a query, before any medium is decoded; in a batch, the
            message begins with "query INDEX:".
    """

    @_with_arguments(ARGUMENTS["image"])
    def offline_image_generate(self, processor, prompt: str = "", image=None, **given) -> str:
        """Answers `prompt` about one image or a list of images, which come before the prompt.

        Args:
            image: an image in any form that the processor takes (a path, a URL, bytes, a PIL image, an array
                [h, w, 3], ...), or a list of images.
            shortest_edge, longest_edge: least and most *pixels* (height x width) of an image after its resize.
            multi_image_max_pixels: most pixels of all images together.
            patch_size, temporal_patch_size, merge_size: must equal those of the model; None means the processor's.
            image_mean, image_std: three numbers each, for pixels in 0..1; None means the processor's.
            max_new_tokens, temperature, top_k, top_p, repetition_penalty, do_sample: as `generate` takes them, except
                that a temperature of 0 or less means greedy, as does `do_sample=False`.
            vision_chunked_length: frames per call of the vision encoder.
            use_template: True renders the chat template; False gives the model the images and the bare prompt; None
                means True if the processor has a template.
            system_prompt, system_prompt_type, thinking_mode: choose a system turn, see `offline_batch_generate`.
            generate_kwargs: any other option of images, or of a `generate` call that returns one text (`num_beams`,
                `streamer`, `stop_strings`, ...).

        Raises:
            ValueError: for an unknown argument (with the nearest known one), a wrong value, or an unreadable image.
            FileNotFoundError: for a missing file.
        """
        return _answer_single(self, processor, "image", prompt, image, given)

    @_with_arguments(ARGUMENTS["video"])
    def offline_video_generate(self, processor, prompt: str = "", video=None, **given) -> str:
        """Answers `prompt` about one video or a list of videos, which come before the prompt.

        Args:
            video: a video in any form that the processor takes (a path, a URL, bytes, a list of frames, an array
                [n, h, w, 3], a dict with segments, ...), or a list of videos.
            shortest_edge, longest_edge: least and most *pixels* (height x width) of a frame after its resize.
            video_max_pixels: most pixels of all frames together.
            video_fps: frames per second of video to take. `min_frames` and `max_frames` bound their number.
            num_frames: the number of frames to take; not together with `video_fps`.
            num_extract_threads: threads that decode. `frame_extract_num_threads` is an older name of it.

        The other arguments and errors are those of `offline_image_generate`.
        """
        return _answer_single(self, processor, "video", prompt, video, given)

    def offline_batch_generate(
        self,
        processor,
        queries: list[dict],
        session_states: list | None = None,
        vision_chunked_length: int = VISION_CHUNKED_LENGTH,
        keep_cache: bool | CacheBudget = False,
        *,
        batch_size: int = DEFAULT_LIMITS.batch_size,
        max_text_tokens: int = DEFAULT_LIMITS.max_text_tokens,
        max_vision_tokens: int = DEFAULT_LIMITS.max_vision_tokens,
        prepared_bytes: int = DEFAULT_LIMITS.prepared_bytes,
    ) -> dict:
        """Answers many queries, some at once, as `stream_batch` does. Each answer is the same as for the query alone.
        The limits bound the memory, whatever the number of queries.

        Args:
            queries: a list of dicts. All keys are optional:
                prompt: text, after the query's images and then videos; or
                messages: chat messages, whose content is text or a list of parts. A part of type image or video has
                    its medium (conversation.py lists the forms). Without a medium it is a placeholder for the next of
                    `images` or `videos`, like `<|image|>` in a text. `prompt` may be an empty string then.
                images, videos: one medium or a list of media. With messages, they fill the placeholders; or they list
                    all media of the messages again, in order, and the options of both are joined.
                media_kwargs: options of the image and video processors, as in options.py.
                generate_kwargs: options of `generate`.
                use_template: as for `offline_image_generate`. Without a template, the contents of the messages are
                    joined bare.
                system_prompt: the text of the system turn.
                system_prompt_type: "text_image" or "video": the text of the system turn if there is no
                    `system_prompt`; by default "video" if the conversation has a video.
                thinking_mode: "deep_thinking" ("thinking", "reasoning") has the system turn ask for the reasoning
                    inside <thinking></thinking> and the answer inside <answer></answer>; "no_thinking" ("default",
                    "standard") does not. Without `system_prompt`, `system_prompt_type` and `thinking_mode`, no system
                    turn is added.
                reset_session, clear_history: True ignores the session state.
                persist_session: False leaves the turn out of the returned session state.
                append_messages_to_session: False takes the query as a whole conversation, not as the next turn of its
                    session.
                Other keys (`id`, `metadata`, `response`, ...) are copied into the result, except those that the result
                has already. A misspelled key, or an option outside media_kwargs and generate_kwargs, is a ValueError.
            session_states: None, or a list with None or the state of an earlier call for each query. The
                `media_kwargs` of earlier turns hold until a query changes them.
            vision_chunked_length: frames per call of the vision encoder.
            keep_cache: True makes the returned states keep their caches, so that the next turn of a conversation
                computes only its own tokens and media; or a budget of `cache_budget`, which limits their bytes. The
                answers are the same. A state with a cache is a dict as without, with `has_cache`, `cache_bytes`,
                `drop_cache()`, `to(device)`, `save(file)` (see `load_session`); any number of queries may continue
                it. Its files are not read again, also if they change. Without a cache (False), a state is plain data,
                and costs no memory on the device.
            batch_size, max_text_tokens, max_vision_tokens, prepared_bytes: as for `stream_batch`.

        Returns:
            {"results": [{"index", "text", "input_text", "messages", ...}], "session_states": [...]}, in the order of
            the queries. `input_text` is the prompt as the processor got it, `messages` the conversation with the
            answer at its end.

        Raises:
            ValueError, FileNotFoundError: for the first query with an error, before any medium is decoded.
        """
        _check_batch(queries, session_states)
        limits = BatchLimits(batch_size, max_text_tokens, max_vision_tokens, prepared_bytes)
        states = [None] * len(queries) if session_states is None else session_states
        turns = []
        for index, (query, state) in enumerate(zip(queries, states, strict=True)):
            with name_query(index):
                turns.append(read_query(self, processor, query, state, vision_chunked_length))
        if len(turns) > 1:  # the processor plans a single query's videos before it decodes them
            turns = _plan_videos(processor, turns)
        ends = {}
        with BatchStream(
            self,
            processor,
            turns,
            states,
            limits=limits,
            vision_chunked_length=vision_chunked_length,
            keep_cache=keep_cache,
            fills_rows=True,
        ) as stream:
            del turns  # the stream frees those that were answered
            for event in stream:
                if event.kind == "error":
                    raise event.error
                if event.kind == "end":
                    ends[event.index] = event
        ends = [ends[index] for index in range(len(queries))]
        return {"results": [end.result for end in ends], "session_states": [end.session_state for end in ends]}

    def stream_batch(
        self,
        processor,
        queries: list[dict] = (),
        session_states: list | None = None,
        *,
        batch_size: int = DEFAULT_LIMITS.batch_size,
        max_text_tokens: int = DEFAULT_LIMITS.max_text_tokens,
        max_vision_tokens: int = DEFAULT_LIMITS.max_vision_tokens,
        prepared_bytes: int = DEFAULT_LIMITS.prepared_bytes,
        vision_chunked_length: int = VISION_CHUNKED_LENGTH,
        open_ended: bool = False,
        keep_cache: bool | CacheBudget = False,
    ) -> BatchStream:
        """Answers many queries, and yields their answers in pieces as they are written, beside each other.

        Up to `batch_size` answers are written at once, each on its own cache, without padding: one call of the model
        adds a token to all of them. If an answer ends, the next query takes its row. Each answer is the same as for
        the query alone; sampled answers depend on the order in which tokens are drawn. A long prompt lets the other
        answers wait while it is prefilled.

        Args:
            queries, session_states, vision_chunked_length: as for `offline_batch_generate`. Each query may have its
                own options. Beams, assisted decoding and other methods that do not add one token per call are written
                by `generate` when their turn comes, while the others wait, and give one piece; queries with equal
                options that are ready and have about the same length share the call.
            batch_size: most answers that are written at once.
            max_text_tokens: most tokens of the prompts and answers (`max_new_tokens`) that are written at once.
            max_vision_tokens: most vision tokens in the caches of these answers. An answer that exceeds a limit alone
                is written alone.
            prepared_bytes: a background thread decodes the media of the next queries while their pixels together have
                fewer bytes than this. At least one query is prepared.
            open_ended: True lets the iteration wait for queries of `add`, until `finish` is called.
            keep_cache: as for `offline_batch_generate`.

        Returns:
            An iterator and asynchronous iterator of events with `kind` and `index`: "piece" (`text`), "end" (`text`,
            `reason`, `result`, `session_state`) and "error" (`error`, which ends this query only). Methods:
            `add(query, session_state=None)` returns an index, `cancel(index)`, `finish()`, `close()`,
            `for_each(callback)`, `results()`.

        Raises:
            ValueError: for wrong arguments. An error in a query is an event.
        """
        _check_batch(queries, session_states)
        check_processor(processor)
        return BatchStream(
            self,
            processor,
            queries,
            session_states,
            limits=BatchLimits(batch_size, max_text_tokens, max_vision_tokens, prepared_bytes),
            vision_chunked_length=check_option("vision_chunked_length", vision_chunked_length),
            keep_cache=keep_cache,
            open_ended=open_ended,
        )

    def cache_budget(self, max_bytes: int) -> CacheBudget:
        """A limit for the caches that session states keep, for `keep_cache`. If a new cache exceeds it, those that
        were not used for longest are dropped, and their conversations are encoded again when they go on."""
        return CacheBudget(max_bytes)

    def load_session(self, file) -> SessionState:
        """Reads a session state with its cache, which `state.save(file)` wrote.

        Raises:
            ValueError: if the file is no session, or of a model with other weights.
        """
        return load_session(self, file)

    def offline_generate(
        self,
        processor,
        new_queries,
        output_text_queue,
        vision_chunked_length: int = VISION_CHUNKED_LENGTH,
        keep_cache: bool | CacheBudget = False,
    ) -> None:
        """Serves queries from a `queue.Queue` until one has `stop_offline_generate`. Answers are strings on a queue.

        A query is one of `offline_batch_generate`. Its answer is the text and `<|round_end|>`; with `stream_output` it
        is `<|round_start|>`, pieces that join to the text, and `<|round_end|>`. An error is `[ERROR] MESSAGE` in place
        of the text (or of the rest of it), and the next query is served.

        A query with `cancel_current_generate` or `stop_generation` ends the current answer at once, also if other
        queries wait. Its other keys are served in turn, as is `stop_offline_generate`; a query without other keys gets
        no answer. False and None have no effect.

        Queries are independent, unless one has `persist_session`: then the next queries continue its conversation,
        until one has `reset_session`. With `keep_cache`, see `offline_batch_generate`, such a query computes only its
        own tokens and media. Other keys (`id`, `metadata`, ...) are ignored.

        When the method returns or is interrupted, queries that were not served are on `new_queries`, in their order.
        """
        QueueServer(self, processor, new_queries, output_text_queue, vision_chunked_length, keep_cache).serve()


def _answer_single(model, processor, kind: str, prompt, media, given: dict) -> str:
    """The answer of `offline_image_generate` or `offline_video_generate`.

    Args:
        kind: "image" or "video".
        given: the keyword arguments that the caller passed.
    """
    given = {name: value for name, value in given.items() if value is not None or name not in REFUSED}
    media_options = IMAGE_OPTIONS if kind == "image" else VIDEO_OPTIONS
    generate_options = GENERATE_OPTIONS | NOT_TEXT
    known = {"processor", "prompt", kind, *ARGUMENTS[kind]} | media_options | generate_options
    check_options(f"offline_{kind}_generate", given, known)
    listed = list_media(kind, media)
    if not listed:
        raise ValueError(f"{kind} must be one {kind} or a list of at least one, got {shorten(media)}")
    query = {
        "prompt": prompt,
        f"{kind}s": listed,
        "media_kwargs": {name: value for name, value in given.items() if name in media_options},
        "generate_kwargs": {name: value for name, value in given.items() if name in generate_options},
        **{name: value for name, value in given.items() if name in TURN_ARGUMENTS},
    }
    turn = read_query(model, processor, query, None, VISION_CHUNKED_LENGTH)
    return answer_turn(model, processor, turn)


def _check_batch(queries, session_states) -> None:
    if not isinstance(queries, (list, tuple)):
        raise ValueError(f"queries must be a list of dicts, got {type(queries).__name__}")
    if session_states is None:
        return
    if not isinstance(session_states, (list, tuple)) or len(session_states) != len(queries):
        is_list = isinstance(session_states, (list, tuple))
        got = len(session_states) if is_list else type(session_states).__name__
        raise ValueError(
            f"session_states must be None or a list with one state per query: got {got}, expected {len(queries)}"
        )


def _plan_videos(processor, turns: list[Turn]) -> list[Turn]:
    """Plans the videos of all turns that need no download, so that a wrong video raises before another is decoded.

    Returns:
        The turns, with the planned clips as videos while the indexes of their files have at most `INDEX_BYTES`; later
        files are indexed again when they are decoded. Not if the state keeps its cache: the videos may be known.
    """
    planned, indexed = [], 0
    for index, turn in enumerate(turns):
        if turn.videos and not has_cache(turn.state) and not turn.videos_kwargs.get("allow_http"):
            with name_query(index):
                clips = processor.video_processor.plan(turn.videos, **turn.videos_kwargs)
            indexed += sum(video.index_bytes for video in {clip.video for clip in clips})
            if indexed <= INDEX_BYTES:
                turn = replace(turn, videos=clips)
        planned.append(turn)
    return planned
