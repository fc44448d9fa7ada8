"""What the page of tools/demo.py does, without Gradio and without a browser."""

import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from offline import SMALL, VIDEO, model, pictures, processor, text_of  # noqa: F401 - fixtures
from realtime import RESPONSE, SILENCE, Script, make_processor, make_realtime_model, picture

from moss_vl.tools import demo
from moss_vl.tools.attention_maps import AnswerWord
from moss_vl.tools.demo_sessions import AnswerWriter, Conversation, LiveRun, Visitor, Visitors, message_for_user
from moss_vl.tools.live_sources import iterator_source


LONG = 400  # tokens: an answer that does not end before it is stopped


@pytest.fixture
def writer(model, processor):  # noqa: F811
    made = AnswerWriter(model, processor, rows=4)
    yield made
    made.close()


@pytest.fixture(scope="module")
def live_model():
    made = make_processor()
    return make_realtime_model(made), made


def query_of(prompt, new=6, **media):
    return {"prompt": prompt, "media_kwargs": SMALL, "generate_kwargs": {"max_new_tokens": new}, **media}


def is_idle(writer):
    """Whether no answer is being written, within some time."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not writer.queues and not writer.stream._rows:
            return True
        time.sleep(0.01)
    return False


# conversations


def test_a_conversation_gives_the_answers_of_the_offline_method(model, processor, writer):  # noqa: F811
    queries = [query_of("What happens?", videos=[VIDEO]), query_of("And then?")]
    conversation, state = Conversation(writer), None
    for query in queries:
        made = model.offline_batch_generate(processor, [query], session_states=[state])
        [state], expected = made["session_states"], made["results"][0]["text"]
        pieces = list(conversation.ask(query))
        assert pieces[-1] == conversation.answer == expected and conversation.reason in ("stop", "length")
        assert all(later.startswith(earlier) for earlier, later in zip(pieces, pieces[1:], strict=False))
        assert not conversation.is_writing
    assert dict(conversation.state) == state and conversation.state.has_cache


def test_conversations_at_once_do_not_mix(model, processor, writer, pictures):  # noqa: F811
    """Their pieces are taken in turn; both answers are those that each gets alone."""
    queries = [query_of("What?", images=[pictures[0]]), query_of("Where?", videos=[VIDEO])]
    alone = [text_of(model, processor, query) for query in queries]
    conversations = [Conversation(writer) for _ in queries]
    asking = [one.ask(query) for one, query in zip(conversations, queries, strict=True)]
    last = [""] * 2
    while any(asking):
        for number, iterator in enumerate(asking):
            text = None if iterator is None else next(iterator, None)
            last[number] = last[number] if text is None else text
            asking[number] = None if text is None else iterator
    assert last == alone
    messages = [one.state["messages"] for one in conversations]
    assert [len(one) for one in messages] == [2, 2] and messages[0] != messages[1]


def test_stop_keeps_what_was_written(writer):
    conversation = Conversation(writer)
    conversation.stop()  # nothing is written: no effect
    asking = conversation.ask(query_of("Tell me more.", LONG))
    first = next(asking)
    conversation.stop()
    rest = list(asking)
    assert conversation.reason == "cancelled" and conversation.answer == rest[-1]
    assert conversation.answer.startswith(first) and len(conversation.state["messages"]) == 2
    assert list(conversation.ask(query_of("And?")))[-1] == conversation.answer
    assert len(conversation.state["messages"]) == 4


def test_a_reader_that_leaves_cancels_its_answer(writer):
    conversation = Conversation(writer)
    asking = conversation.ask(query_of("Tell me more.", LONG))
    next(asking)
    asking.close()
    assert is_idle(writer) and not conversation.is_writing and conversation.state is None


def test_a_second_question_waits_for_the_first_answer(writer):
    conversation = Conversation(writer)
    asking = conversation.ask(query_of("Tell me more.", LONG))
    next(asking)
    with pytest.raises(ValueError, match="still being written"):
        next(conversation.ask(query_of("And?")))
    assert conversation.is_writing
    conversation.clear()  # a new conversation may begin at once
    list(asking)
    assert conversation.state is None and conversation.answer == ""
    list(conversation.ask(query_of("And?")))
    assert len(conversation.state["messages"]) == 2 and is_idle(writer)


def test_an_error_leaves_the_conversation_as_it_was(writer, tmp_path):
    conversation = Conversation(writer)
    list(conversation.ask(query_of("Hello")))
    before = dict(conversation.state)
    wrong = tmp_path / "wrong.mp4"
    wrong.write_bytes(b"no video")
    for query in (query_of("What?", videos=[str(wrong)]), {**query_of("What?"), "generate_kwargs": {"top_p": 7}}):
        with pytest.raises(ValueError) as raised:
            list(conversation.ask(query))
        assert str(raised.value).startswith("query ") and not message_for_user(raised.value).startswith("query")
        assert dict(conversation.state) == before and not conversation.is_writing
    list(conversation.ask(query_of("Hello again")))
    assert len(conversation.state["messages"]) == 4


def test_a_closed_writer_ends_its_answers(model, processor):  # noqa: F811
    writer = AnswerWriter(model, processor)
    conversation = Conversation(writer)
    asking = conversation.ask(query_of("Tell me more.", LONG))
    next(asking)
    writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(asking)
    with pytest.raises(ValueError, match="closed"):
        next(conversation.ask(query_of("And?")))


def test_words_can_be_looked_at(writer, pictures):  # noqa: F811
    conversation = Conversation(writer)
    list(conversation.ask(query_of("Hello")))
    assert conversation.words == []  # no frames
    list(conversation.ask(query_of("What happens?", videos=[VIDEO], images=[pictures[1]])))
    assert "".join(word.text for word in conversation.words) == conversation.answer
    look = conversation.look(0)
    assert look.count == len(look.frames.grids) > 1 and look.word == conversation.words[0].text.strip()
    assert look.weights.shares[look.strongest] == max(look.weights.shares)
    for number in range(look.count):
        caption = look.caption(number)
        assert caption.startswith(f"frame {number + 1} of {look.count}")
        assert (" s: " in caption) == (look.frames.seconds[number] is not None)
        assert look.picture(number).size == look.picture(0).size or look.frames.grids[number] != look.frames.grids[0]
    with pytest.raises(ValueError, match="words"):
        conversation.look(len(conversation.words))
    conversation.state.drop_cache()  # as the budget does
    with pytest.raises(ValueError, match="ask again"):
        conversation.look(0)


# visitors


def test_visitors_are_kept_apart_and_leave_nothing(writer, live_model):
    visitors = Visitors(writer)
    one, other = visitors.of("a"), visitors.of("b")
    assert one is visitors.of("a") and one is not other
    asking = one.conversation.ask(query_of("Tell me more.", LONG))
    next(asking)
    run = one.start_live(LiveRun(*live_model))
    running = run.run()
    next(running)
    assert run.active
    visitors.leave("a")
    visitors.leave("a")  # once is enough
    assert not run.active and run.session.stream.cache is None
    assert list(running) == []
    list(asking)
    assert is_idle(writer) and visitors.of("a") is not one and visitors.of("b") is other


def test_a_new_live_run_stops_the_earlier_one(writer, live_model):
    visitor = Visitor(writer)
    runs = [visitor.start_live(LiveRun(*live_model))]
    running = runs[0].run()
    next(running)
    visitor.start_live(LiveRun(*live_model))
    assert not runs[0].active
    list(running)  # ends; what had happened before may still come
    assert runs[0].stopped
    visitor.close()
    assert visitor.live is None


def test_messages_name_uploads_without_their_folders():
    error = ValueError("query 3: '/tmp/moss-vl-demo-ab_1/148f3a/my clip.mp4' is not a video that PyAV can read")
    assert message_for_user(error) == "'my clip.mp4' is not a video that PyAV can read"


# live runs


def played(frames, **options):
    return iterator_source([(picture(number), seconds) for number, seconds in enumerate(frames)], **options)


class AfterFrames:
    """A logits processor that says each text once the model has seen so many frames, and else is silent."""

    def __init__(self, processor, texts):
        self.pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.parts = {count: Script(processor, RESPONSE, text, SILENCE) for count, text in texts.items()}
        self.silent = Script(processor)

    def __call__(self, input_ids, scores):
        seen = int((input_ids == self.pad).sum())
        writing = [part for count, part in self.parts.items() if count <= seen and part.tokens]
        return (writing or [self.silent])[0](input_ids, scores)


def test_remarks_come_at_their_times(live_model):
    live, made = live_model
    script = AfterFrames(made, {1: "A ring.", 3: "It is red."})
    run = LiveRun(live, made, "", played([0.0, 1.0, 2.0]), logits_processor=[script], max_tokens_per_turn=None)
    seen = [(view.seconds, view.image) for view in run.run()]
    assert [(one.seconds, one.role, one.text) for one in run.remarks] == [
        (0.0, "assistant", "A ring."),
        (2.0, "assistant", "It is red."),
    ]
    times = [seconds for seconds, _ in seen[1:]]
    assert seen[0] == (None, None) and times == sorted(times) and set(times) == {0.0, 1.0, 2.0}
    for seconds, image in seen[1:]:
        assert np.array_equal(image, picture([0.0, 1.0, 2.0].index(seconds)))
    assert not run.stopped and not run.active and run.session.stream.cache is None
    assert demo.live_messages(run.remarks)[1] == {"role": "assistant", "content": "2.0 s · It is red."}


def test_questions_are_answered_meanwhile(live_model):
    live, made = live_model
    script = Script(made, SILENCE, SILENCE, RESPONSE, "Yes.", SILENCE)
    run = LiveRun(live, made, "Watch.", logits_processor=[script], max_tokens_per_turn=None)
    running = run.run()
    next(running)
    run.push(picture(0))
    views = 0
    while run.seconds is None:
        next(running)
    run.ask("Is it red?")
    for _ in running:
        views += 1
        if [one.text for one in run.remarks] == ["Watch.", "Is it red?", "Yes."]:
            run.stop()
    assert [one.role for one in run.remarks] == ["user", "user", "assistant"] and views
    assert run.stopped and run.session.stream.cache is None
    run.push(picture(1))  # a webcam does not know yet
    with pytest.raises(ValueError, match="has ended"):
        run.ask("And now?")


def test_errors_of_a_source_and_of_a_session_are_raised(live_model):
    live, made = live_model

    def broken():
        yield picture(0), 0.0
        raise ValueError("the film is torn")

    silent = {"logits_processor": [Script(made)]}
    run = LiveRun(live, made, "", iterator_source(broken()), **silent)
    with pytest.raises(ValueError, match="the film is torn"):
        list(run.run())

    def fail(ids, scores):
        raise ValueError("the model is ill")

    run = LiveRun(live, made, "", played([0.0, 0.1]), logits_processor=[fail])
    with pytest.raises(ValueError, match="the model is ill"):
        list(run.run())
    assert not run.active
    with pytest.raises(ValueError, match="max_tokens_per_turn"):
        LiveRun(live, made, max_tokens_per_turn=-1)


def test_a_reader_that_leaves_ends_the_run(live_model):
    live, made = live_model
    run = LiveRun(live, made, "", played([0.0, 600.0]), logits_processor=[Script(made)])
    running = run.run()
    while run.seconds is None:
        next(running)
    running.close()
    assert not run.active and not run.feeder.thread.is_alive()
    stopped = LiveRun(live, made)
    stopped.stop()
    assert list(stopped.run()) == []  # stopped before it began


# the command


def test_queries_have_the_options_of_the_command(processor, pictures):  # noqa: F811
    args = demo.parse(["--fps", "2", "--frames", "1", "--max-pixels", "4096"])
    query = demo.make_query(args, processor.video_processor, [pictures[0], VIDEO], "What?", 5, 0.5)
    [message] = query["messages"]
    assert [part["type"] for part in message["content"]] == ["image", "video", "text"]
    options = {name: value for name, value in query["media_kwargs"].items() if value is not None}
    assert options == {"video_fps": 2.0, "max_frames": 1, "min_frames": 1, "max_pixels": 4096}
    assert query["generate_kwargs"] == {"max_new_tokens": 5, "do_sample": True, "temperature": 0.5}
    greedy = demo.make_query(demo.parse([]), processor.video_processor, [], "What?", 5, 0)
    assert greedy["generate_kwargs"] == {"max_new_tokens": 5, "do_sample": False}
    assert set(greedy["media_kwargs"].values()) == {None}  # the settings of the checkpoint
    with pytest.raises(ValueError, match="write a question"):
        demo.make_query(args, processor.video_processor, [], " ", 5, 0)


def test_parts_of_the_shown_answer_are_words():
    words = [AnswerWord(text, (1,)) for text in ("\n", " at", " 2.3", "漢", "字", ", ", "end", "\n")]
    parts = demo.highlighted(words, 2)
    assert [text for text, _ in parts] == ["\n", " ", "at", " ", "2.3", "漢", "字", ", ", "end", "\n"]
    assert [label for _, label in parts] == [None] * 4 + ["chosen"] + [None] * 5
    assert [demo.word_at(words, part) for part in range(11)] == [0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("wrong", [["--port", "0"], ["--fps", "0"], ["--rows", "0"], ["--cache-gb", "-1"]])
def test_wrong_usage(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        demo.parse(wrong)
    assert ended.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_why_a_checkpoint_is_not_live(model, processor, live_model):  # noqa: F811
    assert "<|silence|>" in demo.why_not_live(model, processor)
    assert demo.why_not_live(*live_model) is None


def test_the_command_needs_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match="pip install -r requirements-demo.txt"):
        demo.import_gradio()


def test_the_command_runs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    command = [sys.executable, str(ROOT / "tools/demo.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "--checkpoint" in done.stdout, done.stderr
