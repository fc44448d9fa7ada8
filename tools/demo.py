"""A page in the browser to try a MOSS-VL checkpoint: questions about pictures and videos, and live streams.

    pip install -r requirements-demo.txt
    python tools/demo.py

The page is at http://127.0.0.1:7860 and needs no network. tools/demo_sessions.py has what its visitors have, and
tools/attention_maps.py what a word of an answer looked at.
"""

import argparse
import html
import os
import signal
import sys
import tempfile
import threading
from itertools import accumulate
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moss_vl.infer import NANO, add_running_arguments, load
from moss_vl.tools.attention_maps import AnswerWord
from moss_vl.tools.command_line import above_0, at_least, message_of
from moss_vl.tools.demo_sessions import (
    UPLOADS_PREFIX,
    AnswerWriter,
    LiveRun,
    Look,
    Remark,
    Visitor,
    Visitors,
    message_for_user,
)
from moss_vl.tools.live import TOKENS_PER_SECOND
from moss_vl.tools.live_sources import find_source
from moss_vl.tools.query_files import MediaReader
from moss_vl.tools.query_options import CHECKPOINT_OPTIONS


IMAGES = [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"]
VIDEOS = [".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"]
FILE, WEBCAM = "Video file", "Webcam"
CLIP, CLIP_REQUEST = Path(__file__).resolve().parents[1] / "data" / "watching.mp4", "Tell me when the star appears."
KEPT_SECONDS = (3600, 24 * 3600)  # how often old uploads are looked for, and when they are deleted
REMARKS = 100  # latest remarks of a live run that are shown
ENDS = {"cancelled": "stopped", "length": "cut off: the most tokens of an answer are reached"}
HINT = "Click a word of the answer to see what it looked at."
CSS = """
.gradio-container {width: 100%; max-width: 1280px !important; margin: 0 auto !important}
#chat .message-buttons, #remarks .message-buttons, #remarks button[aria-label=Clear] {display: none}
footer {display: none !important}
"""


def main(argv=None) -> int:
    """Runs the command and returns its exit code. An error is one line on stderr."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as an interrupt does
    with tempfile.TemporaryDirectory(prefix=UPLOADS_PREFIX) as uploads:
        # Gradio reads them when it is imported.
        os.environ.update(GRADIO_TEMP_DIR=uploads, GRADIO_ANALYTICS_ENABLED="False")
        try:
            serve(args)
        except KeyboardInterrupt:
            return 130
        except (ValueError, OSError, ImportError) as error:
            print(f"demo.py: {message_of(error)}", file=sys.stderr)
            return 2
    return 0


def parse(argv) -> argparse.Namespace:
    """The arguments of the command line. Wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--checkpoint",
        default=str(NANO),
        help="folder or hub name of a checkpoint (default: checkpoints/moss-vl-nano); streams need a realtime one",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this computer)")
    parser.add_argument("--port", type=at_least(int, 1), default=7860, help="(default: 7860)")
    parser.add_argument(
        "--fps", metavar="RATE", type=above_0, help="frames per second of video (default: the checkpoint's; live 1)"
    )
    parser.add_argument(
        "--frames", metavar="N", type=at_least(int, 1), help="most frames of the videos of a conversation"
    )
    parser.add_argument(
        "--max-pixels", metavar="N", type=at_least(int, 1), help="most pixels of an image or frame after its resize"
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=at_least(int, 1), default=1024, help="most tokens of an answer (1024)"
    )
    parser.add_argument(
        "--rows", metavar="N", type=at_least(int, 1), default=8, help="most answers that are written at once (8)"
    )
    parser.add_argument(
        "--cache-gb",
        metavar="GB",
        type=at_least(float, 0),
        default=4.0,
        help="memory for the caches of all conversations; those that do not fit are encoded again (4)",
    )
    add_running_arguments(parser)
    return parser.parse_args(argv)


def serve(args) -> None:
    """Serves the page until an interrupt."""
    gr = import_gradio()
    processor, model = load(args)
    visitors = Visitors(AnswerWriter(model, processor, args.rows, int(args.cache_gb * 1e9)))
    try:
        page = Page(args, model, processor, visitors).build(gr)
        launch(gr, page, args)
        print(f"MOSS-VL: {page.local_url} (Ctrl+C ends it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    finally:
        visitors.close()


def import_gradio():
    """Raises ImportError, with the command that installs it, if Gradio is missing."""
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"the page needs Gradio ({error}): pip install -r requirements-demo.txt") from error
    return gradio


def launch(gr, page, args) -> None:
    """Starts the server of the page. Nothing of it reaches beyond this computer, apart from `args.host`."""
    from moss_vl.video_reading import MAX_VIDEO_BYTES

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.queue(default_concurrency_limit=None)
    page.launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        prevent_thread_lock=True,
        max_threads=256,  # a live run waits for its events on one of them
        quiet=True,
        max_file_size=MAX_VIDEO_BYTES,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        theme=gr.themes.Default(primary_hue="indigo", **fonts),
        css=CSS,
    )


def make_query(args, settings, files: list[str], prompt: str, max_new_tokens: int, temperature: float) -> dict:
    """The query for a question.

    Args:
        settings: the video processor.

    Raises:
        ValueError: for a question without text and media, and for a file that is no image and no video.
    """
    if not files and not prompt.strip():
        raise ValueError("write a question, or add a picture or a video")
    media_kwargs = {**CHECKPOINT_OPTIONS, "max_pixels": args.max_pixels, "video_fps": args.fps}
    if args.frames is not None:
        media_kwargs |= {"max_frames": args.frames, "min_frames": min(args.frames, settings.min_frames)}
    sampling = {"do_sample": True, "temperature": float(temperature)} if temperature > 0 else {"do_sample": False}
    return {
        "messages": MediaReader(allow_http=False).user_turn(files, prompt),
        "media_kwargs": media_kwargs,
        "generate_kwargs": {"max_new_tokens": int(max_new_tokens), **sampling},
    }


def why_not_live(model, processor) -> str | None:
    """Why the checkpoint cannot watch streams; None if it can."""
    try:
        model.create_realtime_stream(processor)
    except ValueError as error:
        return message_of(error)
    return None


def live_messages(remarks: list[Remark]) -> list[dict]:
    """The latest remarks as messages of a chat, each with its time."""
    return [
        {
            "role": remark.role,
            "content": f"{0.0 if remark.seconds is None else remark.seconds:.1f} s \N{MIDDLE DOT} {remark.text}",
        }
        for remark in remarks[-REMARKS:]
    ]


def highlighted(words: list[AnswerWord], chosen: int | None = None) -> list[tuple[str, str | None]]:
    """Words as parts of a `HighlightedText`: the white space before each word, if there is some, is a part as well."""
    parts = []
    for number, word in enumerate(words):
        bare = word.text.lstrip()
        space = word.text[: len(word.text) - len(bare)]
        parts += [(space, None)] if space else []
        parts += [(bare, "chosen" if number == chosen else None)] if bare else []
    return parts


def word_at(words: list[AnswerWord], part: int) -> int:
    """The number of the word that a part of `highlighted` belongs to."""
    ends = accumulate(len(highlighted([word])) for word in words)
    return next((number for number, end in enumerate(ends) if part < end), len(words))


class Page:
    """The page, and what its buttons do.

    Args:
        args: the arguments of the command.
    """

    def __init__(self, args, model, processor, visitors: Visitors):
        self.args = args
        self.model = model
        self.processor = processor
        self.visitors = visitors

    def build(self, gr):
        """The `gradio.Blocks`."""
        self.gr = gr
        title = f"MOSS-VL \N{MIDDLE DOT} {Path(self.args.checkpoint).name}"
        with gr.Blocks(analytics_enabled=False, title=title, fill_width=True, delete_cache=KEPT_SECONDS) as page:
            gr.Markdown(f"## {title}")
            with gr.Tab("Ask"):
                self._build_ask()
            with gr.Tab("Live"):
                self._build_live()

            def leave(request: gr.Request):
                self.visitors.leave(request.session_hash)

            page.unload(leave)
        return page

    def show_error(self, error: Exception) -> None:
        """Shows an error as a message beside the page, which stays as it is. Raises errors of this program."""
        message = html.escape(message_for_user(error))
        if not isinstance(error, (ValueError, OSError)):
            raise self.gr.Error(message, duration=10) from error
        self.gr.Warning(message, duration=10, title="This did not work")

    # questions

    def _build_ask(self) -> None:
        gr, args = self.gr, self.args
        with gr.Row():
            with gr.Column(scale=3, min_width=420):
                chat = gr.Chatbot(
                    label="Conversation",
                    height=520,
                    buttons=[],
                    placeholder="Add pictures or a video with the paper clip, and ask about them.",
                    elem_id="chat",
                )
                box = gr.MultimodalTextbox(
                    show_label=False,
                    placeholder="Question",
                    file_count="multiple",
                    file_types=IMAGES + VIDEOS,
                    sources=["upload"],
                    autofocus=True,
                    elem_id="question",
                )
                with gr.Row():
                    stop = gr.Button("Stop", elem_id="stop", size="sm")
                    new = gr.Button("New conversation", elem_id="new", size="sm")
                with gr.Accordion("Settings", open=False):
                    length = gr.Slider(
                        1,
                        max(1024, args.max_new_tokens),
                        args.max_new_tokens,
                        step=1,
                        label="Most tokens of an answer",
                    )
                    temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: always the likeliest token)")
            with gr.Column(scale=2, min_width=320):
                words = gr.HighlightedText(
                    label="Last answer",
                    show_legend=False,
                    show_inline_category=False,
                    color_map={"chosen": "orange"},
                    elem_id="words",
                )
                caption = gr.Markdown(HINT, elem_id="caption")
                picture = gr.Image(
                    label="Where it looked", interactive=False, buttons=["fullscreen"], visible=False, elem_id="map"
                )
                frame = gr.Slider(1, 2, 1, step=1, label="Frame", buttons=[], visible=False, elem_id="frame")
        shown = [chat, box, words, caption, picture, frame]
        nothing = [[], HINT, gr.update(value=None, visible=False), gr.update(visible=False)]

        def ask(message, length, temperature, request: gr.Request):
            visitor = self.visitors.of(request.session_hash)
            before, begun = list(visitor.messages), False
            try:
                for messages in self.answer(visitor, message, length, temperature):
                    yield [messages, gr.skip() if begun else None, *(nothing if not begun else [gr.skip()] * 4)]
                    begun = True
            except Exception as error:
                self.show_error(error)
                if visitor.conversation.is_writing:  # the error is that of a second question
                    yield [gr.skip()] * 6
                    return
                visitor.messages = before
                yield [before, message, *[gr.skip()] * 4]
                return
            yield [gr.skip(), gr.skip(), highlighted(visitor.conversation.words), *[gr.skip()] * 3]

        def stop_answer(request: gr.Request):
            self.visitors.of(request.session_hash).conversation.stop()

        def begin_anew(request: gr.Request):
            self.visitors.of(request.session_hash).begin_anew()
            return [[], None, *nothing]

        def choose(event: gr.SelectData, request: gr.Request):
            visitor = self.visitors.of(request.session_hash)
            try:
                chosen = word_at(visitor.conversation.words, int(event.index))
                look = visitor.look = visitor.conversation.look(chosen)
            except Exception as error:
                self.show_error(error)
                return [gr.skip()] * 4
            number = look.strongest
            slider = gr.update(minimum=1, maximum=look.count, value=number + 1, visible=look.count > 1)
            return [highlighted(visitor.conversation.words, chosen), *show(look, number), slider]

        def show(look: Look, number: int) -> list:
            return [
                f"**{look.word}** \N{MIDDLE DOT} {look.caption(number)}",
                gr.update(value=look.picture(number), visible=True),
            ]

        def move(number, request: gr.Request):
            look = self.visitors.of(request.session_hash).look
            if look is None or not 1 <= number <= look.count:
                return [gr.skip(), gr.skip()]
            return show(look, int(number) - 1)

        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        box.submit(ask, [box, length, temperature], shown, trigger_mode="multiple", **quiet)
        stop.click(stop_answer, None, None, **quiet)
        gr.on([new.click, chat.clear], begin_anew, None, shown, **quiet)
        words.select(choose, None, [words, caption, picture, frame], **quiet)
        frame.input(move, frame, [caption, picture], trigger_mode="always_last", **quiet)

    def answer(self, visitor: Visitor, message: dict, max_new_tokens: int, temperature: float):
        """Adds the question to the messages of the visitor, and yields them with the answer so far."""
        conversation = visitor.conversation
        if conversation.is_writing:
            raise ValueError("an answer is still being written; stop it, or wait for its end")
        files, prompt = message.get("files") or [], message.get("text") or ""
        query = make_query(self.args, self.processor.video_processor, files, prompt, max_new_tokens, temperature)
        visitor.look, number = None, visitor.number
        asked = [{"role": "user", "content": {"path": file}} for file in files]
        asked += [{"role": "user", "content": prompt}] if prompt.strip() else []
        begun = visitor.messages = [*visitor.messages, *asked]
        yield begun
        for text in conversation.ask(query):
            if visitor.number != number:
                return
            visitor.messages = [*begun, {"role": "assistant", "content": text}]
            yield visitor.messages
        if conversation.reason in ENDS:
            visitor.messages = [*begun, {"role": "assistant", "content": f"{text}\n\n*({ENDS[conversation.reason]})*"}]
            yield visitor.messages

    # live

    def _build_live(self) -> None:
        gr = self.gr
        reason = why_not_live(self.model, self.processor)
        if reason is not None:
            gr.Markdown(
                f"This checkpoint cannot watch streams: {html.escape(reason)}.\n\nStart the page with a realtime "
                "checkpoint: `python tools/demo.py --checkpoint REALTIME`",
                elem_id="not-live",
            )
            return
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                kind = gr.Radio([FILE, WEBCAM], value=FILE, label="Source", elem_id="kind")
                file = gr.File(label="Video", file_types=VIDEOS, height=140, elem_id="file")
                webcam = gr.Image(
                    label="Webcam: start it here, then press Start",
                    sources=["webcam"],
                    streaming=True,
                    visible=False,
                    webcam_options=gr.WebcamOptions(mirror=False),
                    elem_id="webcam",
                )
                request_box = gr.Textbox(
                    label="What to watch for", value="Tell me what happens.", lines=2, elem_id="request"
                )
                if CLIP.is_file():
                    gr.Examples([[str(CLIP), CLIP_REQUEST]], [file, request_box], label="A clip to try")
                with gr.Row():
                    start = gr.Button("Start", variant="primary", elem_id="start")
                    stop = gr.Button("Stop", elem_id="stop-live")
            with gr.Column(scale=3, min_width=420):
                status = gr.Markdown("Not started.", elem_id="status")
                picture = gr.Image(
                    label="What the model sees", interactive=False, height=280, buttons=[], elem_id="seen"
                )
                remarks = gr.Chatbot(
                    label="Remarks", height=320, buttons=[], group_consecutive_messages=False, elem_id="remarks"
                )
                question = gr.Textbox(
                    show_label=False, placeholder="Ask meanwhile, and press Enter", elem_id="live-question"
                )

        def choose_source(kind):
            of_file, of_webcam = gr.update(visible=kind == FILE), gr.update(visible=kind == WEBCAM)
            return [of_file, of_webcam, of_file]

        def run_live(kind, file, prompt, request: gr.Request):
            visitor = self.visitors.of(request.session_hash)
            seen = None
            try:
                run = visitor.start_live(self.make_run(kind, file, prompt))
                yield ["Waiting for the first frame ...", None, []]
                for _ in run.run():
                    picture = gr.skip() if run.image is seen else run.image
                    seen = run.image
                    yield [watched("Watching", run), picture, live_messages(run.remarks)]
                yield [watched("Stopped" if run.stopped else "Ended", run), gr.skip(), gr.skip()]
            except Exception as error:
                yield ["Ended by an error.", gr.skip(), gr.skip()]
                self.show_error(error)

        def watched(what: str, run: LiveRun) -> str:
            return f"{what}." if run.seconds is None else f"{what} \N{MIDDLE DOT} {run.seconds:.1f} s"

        def stop_run(request: gr.Request):
            self.visitors.of(request.session_hash).stop_live()

        def push(image, request: gr.Request):
            run = self.visitors.of(request.session_hash).live
            if image is not None and run is not None and run.active and run.feeder is None:
                run.push(image)

        def ask_live(prompt, request: gr.Request):
            run = self.visitors.of(request.session_hash).live
            try:
                if run is None or not run.active:
                    raise ValueError("nothing runs; press Start first")
                if prompt.strip():
                    run.ask(prompt.strip())
            except ValueError as error:
                self.show_error(error)
                return gr.skip()
            return ""

        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        kind.change(choose_source, kind, [file, webcam, picture], **quiet)
        start.click(run_live, [kind, file, request_box], [status, picture, remarks], **quiet)
        stop.click(stop_run, None, None, **quiet)
        question.submit(ask_live, question, question, **quiet)
        webcam.stream(push, webcam, None, stream_every=1 / (self.args.fps or 1.0), **quiet)

    def make_run(self, kind: str, file: str | None, prompt: str) -> LiveRun:
        """A live run. Raises ValueError without a file where one is needed."""
        source = None
        if kind == FILE:
            if file is None:
                raise ValueError("choose a video file first")
            source = find_source(file, self.args.fps or 1.0)
        media_kwargs = {} if self.args.max_pixels is None else {"max_pixels": self.args.max_pixels}
        return LiveRun(
            self.model,
            self.processor,
            prompt.strip(),
            source,
            max_tokens_per_turn=TOKENS_PER_SECOND,
            media_kwargs=media_kwargs,
        )


if __name__ == "__main__":
    sys.exit(main())
