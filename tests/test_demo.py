"""The page of tools/demo.py as its visitors see it, in a headless browser. What it does without one is tested in
test_demo_sessions.py. Needs requirements-demo.txt, playwright, and Chromium."""

import os
import re
import time

import pytest
from conftest import ROOT, SCRATCH
from demo_browser import CHROMIUM, SECONDS, Tab, free_port, opened_browser, served
from realtime import make_talking_model, plain_checkpoint

from moss_vl.tools import demo
from moss_vl.tools.demo_sessions import AnswerWriter, Visitors


os.environ["GRADIO_TEMP_DIR"] = str(SCRATCH / "gradio")  # read by the import
gradio = pytest.importorskip("gradio")
pytest.importorskip("playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

RING = (
    "at 0.0 seconds a large white ring at the top left, a small yellow cross at the bottom right; "
    "at 2.3 seconds the ring changes color to orange; at 4.7 seconds the cross moves up"
)


@pytest.fixture(scope="module")
def browser():
    with opened_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def nano():
    """The page with moss-vl-nano."""
    with served("--dtype", "float32") as address:
        yield address


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """The page with the checkpoint of `make_talking_model`."""
    folder = tmp_path_factory.mktemp("checkpoints") / "talking"
    for part in make_talking_model():
        part.save_pretrained(folder)
    with served("--checkpoint", folder, "--max-new-tokens", "20000", "--fps", "1") as address:
        yield address


@pytest.fixture
def tab(browser):
    """A function that opens a tab. At the end no tab may have asked another host for anything."""
    tabs = []

    def open_tab(address):
        tabs.append(Tab(browser, address))
        return tabs[-1]

    yield open_tab
    for one in tabs:
        one.page.close()
    assert [address for one in tabs for address in one.elsewhere] == []


def test_questions_about_a_video(nano, tab):
    """Upload, streamed answer, the frames that a word looked at, second turn, new conversation."""
    page = tab(nano)
    page.upload(ROOT / "data/sample_b.mp4")
    page.page.evaluate(
        """() => {window.seen = []; new MutationObserver(() => {
            const said = document.querySelector('#chat [data-testid=bot]');
            if (said) window.seen.push(said.innerText.trim())
        }).observe(document.querySelector('#chat'), {subtree: true, childList: true, characterData: true})}"""
    )
    page.ask("What happens?")
    page.wait_for("#words", "moves")
    assert page.answers([RING]) == [RING]
    seen = list(dict.fromkeys(page.page.evaluate("window.seen")))
    assert len(seen) > 2 and all(RING.startswith(text) for text in seen), seen  # it came in pieces

    page.at("#words").get_by_text("orange").click()
    page.wait_for("#caption", "orange")
    found = re.search(r"frame (\d) of 6, at (\d\.\d) s: (\d+)% of the attention", page.at("#caption").inner_text())
    assert found and float(found[2]) >= 2.0  # the ring is orange from 2.0 s on
    page.at("#map img").wait_for()
    first = page.at("#map img").get_attribute("src")
    page.at("#frame input[type=range]").focus()
    page.page.keyboard.press("Home")  # to the first frame
    page.wait_for("#caption", "frame 1 of 6, at 0.0 s")
    page.page.wait_for_function("src => document.querySelector('#map img').src != src", arg=first)

    page.ask("What color is the ring after it changes?")
    page.wait_for("#words", "orange")
    page.page.wait_for_function("() => document.querySelectorAll('#chat [data-testid=bot]').length == 2")
    assert page.answers([RING, "orange"]) == [RING, "orange"]
    assert not page.at("#map img").is_visible()  # the picture was of the first answer

    page.at("#new").click()
    page.page.wait_for_function("() => !document.querySelector('#chat [data-testid=bot]')")
    page.ask("What color is the ring?")
    page.page.wait_for_function("() => document.querySelectorAll('#chat [data-testid=bot]').length == 1")


def test_tabs_have_conversations_of_their_own(nano, tab):
    one, other = tab(nano), tab(nano)
    one.upload(ROOT / "data/sample_a.jpg")
    other.upload(ROOT / "data/example_image.jpg")
    one.ask("Where is the cross?")
    other.ask("What color is the star?")
    for page, answer in ((one, "top left"), (other, "blue")):
        page.wait_for("#words", answer.split()[-1])
        assert page.answers([answer]) == [answer]
    one.ask("How many objects are there?")
    other.ask("What does the text say?")
    for page, answers in ((one, ["top left", "3"]), (other, ["blue", "MOSS"])):
        page.wait_for("#words", answers[-1])
        assert page.answers(answers) == answers


def test_errors_are_shown_as_sentences(nano, tab, tmp_path):
    page = tab(nano)
    page.ask(" ")
    assert "write a question, or add a picture" in page.message()
    wrong = tmp_path / "<b>wrong.jpg"
    wrong.write_bytes(b"no picture")
    page = tab(nano)
    page.upload(wrong)
    page.ask("What is it?")
    message = page.message()
    assert "wrong" in message and "Traceback" not in message and "query" not in message, message
    assert page.answers() == []
    page.page.wait_for_function("() => document.querySelector('#question textarea').value == 'What is it?'")


def test_an_answer_can_be_stopped(talking, tab):
    page = tab(talking)
    page.ask("Are you there?")
    page.wait_for("#chat [data-testid=bot]", "YesYesYes")
    page.ask("And now?")
    assert "still being written" in page.message()
    page.at("#stop").click()
    page.wait_for("#chat [data-testid=bot]", "(stopped)")
    assert re.fullmatch(r"(Yes)+Y?\s*\(stopped\)", page.answers()[0])
    page.ask("Go on")
    page.page.wait_for_function("() => document.querySelectorAll('#chat [data-testid=bot]').length == 2")
    page.at("#stop").click()
    page.page.wait_for_function("() => document.querySelector('#chat').innerText.match(/stopped/g).length == 2")


def remarks(page) -> list[str]:
    return [one.inner_text().strip() for one in page.at("#remarks [data-testid]").all()]


def test_a_video_is_watched_at_its_pace(talking, tab):
    """One frame per second; a question meanwhile; stop; a second run. On a slow machine, a frame may come within a
    remark, which then goes on as "redred star"."""
    page = tab(talking)
    page.open_live()
    page.at("#start").click()
    assert "choose a video file first" in page.message()
    page.upload(ROOT / "data/example_video.mp4", "#file")
    page.at("#start").click()
    page.wait_for("#remarks", re.compile(r"[1-9]\.0 s · red"))
    page.at("#live-question textarea").fill("Is it red?")
    page.at("#live-question textarea").press("Enter")
    page.wait_for("#remarks", "s · Yes")
    page.at("#seen img").wait_for()
    page.at("#stop-live").click()
    page.wait_for("#status", "Stopped")
    said = [text for text in remarks(page) if "·" in text]
    assert said[0] == "0.0 s · Tell me what happens." and said[1].startswith("0.0 s · red"), said
    [question] = [number for number, text in enumerate(said) if re.fullmatch(r"[1-9]\.0 s · Is it red\?", text)]
    assert re.match(r"[1-9]\.0 s · Yes", said[question + 1]), said
    times = [float(text.split(" s")[0]) for text in said]
    assert times == sorted(times) and times[-1] < 10
    page.at("#live-question textarea").fill("Is it red?")
    page.at("#live-question textarea").press("Enter")
    page.wait_for(".toast-body", "press Start first")
    page.at("#start").click()
    page.wait_for("#status", "Watching")
    page.wait_for("#remarks", "0.0 s · red")
    page.at("#stop-live").click()
    page.wait_for("#status", "Stopped")


def test_a_webcam_is_watched(talking, tab):
    """Chromium's test pictures stand in for a camera."""
    page = tab(talking)
    page.open_live()
    page.page.get_by_label("Webcam", exact=True).check()
    page.at("#webcam").get_by_text("Click to Access Webcam").click()
    page.at("#webcam").get_by_text("Record").click()
    page.at("#start").click()
    page.wait_for("#remarks", "s · red")
    page.at("#stop-live").click()
    page.wait_for("#status", "Stopped")


def test_other_checkpoints_say_why_they_are_not_live(tab):
    with served("--checkpoint", plain_checkpoint()) as address:
        page = tab(address)
        page.open_live()
        page.wait_for("#not-live", "<|silence|>")
        assert not page.at("#start").is_visible()


def test_a_closed_tab_leaves_nothing(browser):
    """Served in this process. The answer and the live run of the tab end with it; those of another tab go on."""
    args = demo.parse(["--port", str(free_port()), "--max-new-tokens", "1000000"])
    processor, model = make_talking_model()
    visitors = Visitors(AnswerWriter(model, processor))
    page = demo.Page(args, model, processor, visitors).build(gradio)
    demo.launch(gradio, page, args)
    try:
        tabs = [Tab(browser, page.local_url) for _ in range(2)]
        for tab in tabs:
            tab.ask("Are you there?")
            tab.wait_for("#chat [data-testid=bot]", "YesYes")
            tab.open_live()
            tab.page.get_by_label("Webcam", exact=True).check()
            tab.at("#start").click()
            tab.wait_for("#remarks", "Tell me what happens.")
        both = list(visitors.visitors.values())
        runs = [visitor.live for visitor in both]
        assert [run.active for run in runs] == [True, True] and len(visitors.writer.queues) == 2
        tabs[0].page.close()
        deadline = time.monotonic() + SECONDS
        while len(visitors.visitors) == 2 or len(visitors.writer.queues) == 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        [stays] = visitors.visitors.values()
        assert [run.active for run in runs] == [visitor is stays for visitor in both]
        assert stays.conversation.is_writing and [one for one in both if one.messages] == [stays]
        tabs[1].page.close()
    finally:
        page.close(verbose=False)
        visitors.close()
