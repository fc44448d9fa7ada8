"""Reading video files: the right frames at the right times in every kind of file, sources, and what is refused."""

import base64
import io
import random
import sys
from pathlib import Path

import av
import make_media
import numpy as np
import pytest
import torch
from make_media import (
    copy_packets,
    decode_all,
    draw,
    read_number,
    turn,
    write_video,
)
from PIL import Image
from video_kinds import CLIP, KINDS, SMALL, make, processor  # noqa: F401

from moss_vl import decord_video, video_files
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor
from moss_vl.video_reading import open_video
from moss_vl.video_sampling import sample_indices


# kinds of files


@pytest.mark.parametrize("name", KINDS)
def test_right_frames_at_right_times(name, make):
    path, expected = make(name), KINDS[name][1]
    truth = decode_all(path)
    video = open_video(path)
    total = len(video.times)
    assert [read_number(image) for _, image in truth] == expected and total == len(expected)
    assert (video.height, video.width) == truth[0][1].shape[:2]
    assert video.problems == []
    times = [time for time, _ in truth]
    if times[0] is None or times != sorted(times):  # raw.h264 has a nominal rate of 25, h264.avi a constant rate
        times = [i / (25 if times[0] is None else 30) for i in range(total)]
    assert np.allclose(video.times, times, atol=1e-9)
    rng = random.Random(0)
    for wanted in ([*range(total)], [total - 1], [total // 2], sorted(rng.sample(range(total), min(5, total)))):
        problems = []
        got = list(video.frames(wanted, problems))
        assert [(number, shown) for number, shown, _ in got] == [(number, number) for number in wanted]
        assert all(np.array_equal(image, truth[number][1]) for number, _, image in got)
        assert problems == []


def test_duration_and_rate(make):
    expected = {
        "h264.mp4": (4 / 3, 30.0),
        "late.mkv": (4 / 3, 30.0),
        "h264_cut.mp4": (0.9, 30.0),
        "animation.gif": (4.0, 10.0),
    }
    for name, (duration, rate) in expected.items():
        video = open_video(make(name))
        assert (video.duration, video.rate) == pytest.approx((duration, rate), abs=1e-9), name


def test_real_times_of_a_variable_rate(make, processor):
    clip = processor.extract(make("variable.mp4"), num_frames=7, **SMALL)[0]
    truth = decode_all(make("variable.mp4"))
    assert clip.timestamps == pytest.approx([truth[i][0] for i in clip.metadata.frames_indices])
    assert clip.metadata.actual_timestamps == clip.timestamps
    constant = processor.extract(make("h264.mp4"), num_frames=7, **SMALL)[0]
    assert constant.metadata.actual_timestamps is None
    assert constant.timestamps == pytest.approx([i / 30 for i in constant.metadata.frames_indices])


QUARTERS = {  # display matrix -> how the stored frame is shown
    (0, 1, -1, 0): lambda x: np.rot90(x, 3),
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
}


@pytest.mark.parametrize("matrix", QUARTERS)
def test_rotation_tag(matrix, make, tmp_path):
    video = open_video(turn(make("h264.mp4"), tmp_path / "turned.mp4", matrix))
    upright = QUARTERS[matrix](decode_all(make("h264.mp4"))[17][1])
    ((_, _, image),) = video.frames([17], [])
    assert (video.height, video.width) == upright.shape[:2]
    assert np.array_equal(image, upright)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("codec, options", [("libx264", "open_gop=1:bframes=3:"), ("libx265", "")])
def test_distant_frames_are_reached_by_seeking(codec, options, suffix, tmp_path, monkeypatch):
    """Distant frames are reached by one seek each, or by reading on if the container seeks badly (MPEG-TS). Frames in
    between are not decoded."""
    key = "x264-params" if codec == "libx264" else "x265-params"
    options = {
        key: options
        + "keyint=60:min-keyint=60:scenecut=0:log-level=none"
        + (":pools=none" if codec == "libx265" else "")
    }
    path = write_video(tmp_path / "source.mp4", count=900, codec=codec, options=options)
    path = path if suffix == "mp4" else copy_packets(path, tmp_path / f"long.{suffix}")
    jumps, fed = [], []
    seek, decode = video_files._PacketReader._seek, video_files.decode
    monkeypatch.setattr(video_files._PacketReader, "_seek", lambda *args: jumps.append(seek(*args)) or jumps[-1])
    video = open_video(path)
    monkeypatch.setattr(video_files, "decode", lambda *args: fed.append(args[2]) or decode(*args))
    wanted = [0, 62, 419, 420, 421, 899]
    problems = []
    assert [read_number(image) for _, _, image in video.frames(wanted, problems)] == wanted
    assert problems == []
    assert jumps == ([False] if suffix == "ts" else [True, True])
    assert len(fed) < 300


def test_untrue_keyframe_flags(make, tmp_path):
    """An mp4 without its table of sync samples flags every sample as a keyframe."""
    path = tmp_path / "lies.mp4"
    path.write_bytes(make("h264_open_gop.mp4").read_bytes().replace(b"stss", b"free"))
    clip = MossVLVideoProcessor(num_frames=9, **SMALL).extract(path, num_extract_threads=3)[0]
    truth = decode_all(make("h264_open_gop.mp4"))
    expected = MossVLVideoProcessor(num_frames=9, **SMALL).extract(
        np.stack([truth[i][1] for i in clip.metadata.frames_indices]), video_metadata={"timestamps": clip.timestamps}
    )[0]
    assert clip.metadata.frames_indices == sample_indices(40, 9).tolist()
    assert torch.equal(clip.patches, expected.patches)


def test_transparency_becomes_white(tmp_path):
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 32, 64))
    picture.save(tmp_path / "half.gif")
    ((_, _, image),) = open_video(tmp_path / "half.gif").frames([0], [])
    assert image[5, 50].tolist() == [255, 255, 255] and image[5, 5].tolist() == [255, 0, 0]


# sources


def test_sources_give_the_same(make, processor):
    path = make("late.mkv")
    data = path.read_bytes()
    url = "data:video/x-matroska;base64," + base64.b64encode(data).decode()
    expected = processor.extract(str(path), num_frames=5)[0]
    for source in (path, data, bytearray(data), memoryview(data), io.BytesIO(data), path.as_uri(), url):
        clip = processor.extract(source, num_frames=5)[0]
        assert torch.equal(clip.patches, expected.patches) and clip.timestamps == expected.timestamps


def test_file_objects_stay_open_and_keep_their_position(make, processor):
    expected = processor.extract(make("h264.mp4"), num_frames=3)[0].patches
    memory = io.BytesIO(make("h264.mp4").read_bytes())
    memory.seek(0, io.SEEK_END)
    with open(make("h264.mp4"), "rb") as file:
        file.seek(100)
        for source, position in ((file, 100), (memory, len(memory.getvalue()))):
            clips = processor.extract([source, source], num_frames=3)
            assert all(torch.equal(clip.patches, expected) for clip in clips)
            assert source.tell() == position and not source.closed


def test_downloads_need_permission(processor):
    with pytest.raises(ValueError, match="allow_http"):
        processor.plan("https://example.invalid/video.mp4")


def test_file_names_that_look_like_protocols_of_ffmpeg(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "pipe:0", "-i.mp4"):
        Path(name).write_bytes(make("h264.mp4").read_bytes())
        assert len(open_video(name).times) == 40


def test_playlists_open_no_other_file(tmp_path):
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/video.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    for source in (
        tmp_path / "list.m3u8",
        playlist.encode(),
        playlist.replace("http://127.0.0.1:9/video.ts", CLIP.as_posix()).encode(),
    ):
        with pytest.raises(ValueError, match="is not a video that PyAV can read"):
            open_video(source)


def bad_sources(folder):
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video, just words\n" * 100)
    (folder / "notes.txt").write_text("no video, just words\n" * 100)
    (folder / "folder.mp4").mkdir()
    (folder / "noise.mp4").write_bytes(bytes(random.Random(0).randrange(256) for _ in range(5000)))
    make_media.write_sound(folder / "sound.wav")
    return {
        "missing.mp4": FileNotFoundError,
        "empty.mp4": ValueError,
        "text.mp4": ValueError,
        "notes.txt": ValueError,
        "folder.mp4": ValueError,
        "noise.mp4": ValueError,
        "sound.wav": ValueError,
    }


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_not_a_video(backend, tmp_path):
    processor = MossVLVideoProcessor(video_backend=backend)
    for name, error in bad_sources(tmp_path).items():
        with pytest.raises(error, match=name):
            processor.plan(tmp_path / name)
    for source, message in (
        (b"", "of 0 bytes is empty"),
        (b"no video", "is not a video that"),
        (7, "from a int"),
        ({"video_path": None}, "holds its source under"),
        ({"pth": "x"}, "did you mean 'path'"),
        ([], "no video given"),
        ({"video": []}, "has no frames"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.plan(source)


def test_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 96, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        container.mux(cover.encode(av.VideoFrame.from_ndarray(draw(1), "rgb24").reformat(format="yuvj420p")))
        container.mux(cover.encode())
        make_media._write_tone(container, sound)
    with pytest.raises(ValueError, match="song.mp4.*no video"):
        open_video(path)


def test_gigantic_and_thin_frames(make, tmp_path):
    data = bytearray(make("animation.gif").read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"  # the screen becomes 65535 x 65535
    (tmp_path / "huge.gif").write_bytes(data)
    with pytest.raises(ValueError, match="huge.gif"):
        open_video(tmp_path / "huge.gif")
    with pytest.raises(ValueError, match="200"):
        open_video(np.zeros((2, 2, 500, 3), np.uint8), {"fps": 1})


def test_all_videos_are_probed_before_one_is_decoded(make, processor, monkeypatch):
    monkeypatch.setattr(video_files.PyAVVideo, "frames", lambda *args: pytest.fail("decoded"))
    good = make("h264.mp4")
    for bad, error, message in (
        ("missing.mp4", FileNotFoundError, "no such video file: 'missing.mp4'"),
        ({"video_path": good, "segments": [[9.0, 10.0]]}, ValueError, "lies outside the video"),
    ):
        with pytest.raises(error, match=message):
            processor([good, bad])


# decord


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "variable.mp4", "late.mkv", "one.mp4", "h264_open_gop.mp4"])
def test_decord_reads_the_same_frames(name, make):
    video = open_video(make(name), backend="decord")
    ours = open_video(make(name))
    assert np.allclose(video.times, ours.times, atol=2e-3) and video.duration == pytest.approx(ours.duration, abs=2e-3)
    if "open_gop" not in name:  # decord gets those wrong
        ends = [0, len(video.times) - 1]
        for (_, _, a), (_, _, b) in zip(video.frames(ends, []), ours.frames(ends, []), strict=True):
            assert np.array_equal(a, b)


def test_choice_of_the_decoder(monkeypatch, make):
    assert isinstance(open_video(make("h264.mp4")), video_files.PyAVVideo)
    assert isinstance(open_video(make("h264.mp4"), backend="decord"), decord_video.DecordVideo)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "decord", None)
        with pytest.raises(ImportError, match="pip install decord"):
            open_video(make("h264.mp4"), backend="decord")
    monkeypatch.setitem(sys.modules, "av", None)
    for backend in (None, "pyav", "decord"):  # decord needs PyAV to recognise files for it
        with pytest.raises(ImportError, match="pip install av"):
            open_video(make("h264.mp4"), backend=backend)
