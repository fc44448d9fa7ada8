"""Colours of frames: HDR, tone-mapped against slow formulas and ffmpeg's tone mapping; matrices that files declare."""

import math

import av
import numpy as np
import pytest
from av.filter import Graph

from moss_vl import colours
from moss_vl.video_reading import open_video


SLOW_MATRICES = {  # from the chromaticities, by the derivation of SMPTE RP 177
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
D65 = (0.3127, 0.3290)


def to_xyz(name):
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in SLOW_MATRICES[name]]).T
    white = np.array([D65[0] / D65[1], 1, (1 - D65[0] - D65[1]) / D65[1]])
    return columns * np.linalg.solve(columns, white)


@pytest.mark.parametrize("code, name", [(colours.BT2020, "bt2020"), (colours.P3_D65, "p3")])
def test_matrices_follow_from_chromaticities(code, name):
    expected = np.linalg.inv(to_xyz("bt709")) @ to_xyz(name)
    assert np.allclose(colours.TO_BT709[code], expected, atol=2e-5)


def slow_pixel(codes, transfer, peak):
    """One pixel, with scalars in double precision, as the module docstring says."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875

    def eotf(e):
        x = e ** (1 / m2)
        return 10000 * (max(x - c1, 0) / (c2 - c3 * x)) ** (1 / m1)

    def inverse(y):
        x = (y / 10000) ** m1
        return ((c1 + c2 * x) / (1 + c3 * x)) ** m2

    values = [code / 65535 for code in codes]
    if transfer == colours.PQ:
        light = [eotf(v) for v in values]
    else:
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * math.log(4 * a)
        scene = [v * v / 3 if v <= 0.5 else (math.exp((v - c) / a) + b) / 12 for v in values]
        luminance = 0.2627 * scene[0] + 0.6780 * scene[1] + 0.0593 * scene[2]
        light = [1000 * max(luminance, 1e-9) ** 0.2 * s for s in scene]
    matrix = np.linalg.inv(to_xyz("bt709")) @ to_xyz("bt2020")
    light = [max(0.0, float(row @ light)) for row in matrix]
    bright = max(light)
    if bright > 0 and peak > 203:
        source = inverse(peak)
        e, top = min(inverse(min(bright, 10000)) / source, 1), inverse(203) / source
        knee = 1.5 * top - 0.5
        if e >= knee:
            t = (e - knee) / (1 - knee)
            e = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
        scale = eotf(e * source) / bright
        light = [x * scale for x in light]
    return [round(255 * min(x / 203, 1) ** (1 / 2.4)) for x in light]


@pytest.mark.parametrize("transfer, peak", [(16, 1000.0), (16, 4000.0), (16, 10000.0), (16, 300.0), (18, 1000.0)])
def test_tone_mapping_is_the_slow_formula_within_a_level(transfer, peak):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    codes[:10] //= 4
    codes[10, :] = np.linspace(0, 65535, 50).astype(np.uint16)[:, None]
    fast = colours.ToneMap(transfer, colours.BT2020, peak)(codes)
    slow = np.array([[slow_pixel(pixel, transfer, peak) for pixel in row] for row in codes.tolist()])
    assert np.abs(fast.astype(int) - slow).max() <= 1
    assert (fast != slow).mean() < 0.05


@pytest.mark.parametrize("curve", ["hable", "mobius"])
def test_tone_mapping_is_near_that_of_ffmpeg(curve):
    """Greys of 0.1 to 1000 cd/m2 ascend, within 60 levels of the usual curves of ffmpeg at a nominal white of 100."""
    light = np.geomspace(0.1, 1000, 64)
    codes = np.rint(colours.light_to_pq(light) * 65535).astype(np.uint16)
    ours = colours.ToneMap(colours.PQ, colours.BT2020, 1000.0)(np.repeat(codes[None, :, None], 3, axis=2))[0, :, 0]
    graph = Graph()
    source = graph.add_buffer(width=64, height=16, format="gbrpf32le", time_base="1/25")
    tonemap = graph.add("tonemap", f"tonemap={curve}:desat=0:peak=10")
    sink = graph.add("buffersink")
    source.link_to(tonemap)
    tonemap.link_to(sink)
    graph.configure()
    planes = np.repeat(np.repeat((light / 100).astype(np.float32)[None, :, None], 16, axis=0), 3, axis=2)
    frame = av.VideoFrame.from_ndarray(planes, format="gbrpf32le")
    frame.pts, frame.color_trc = 0, 8  # linear
    graph.push(frame)
    mapped = graph.pull().to_ndarray(format="gbrpf32le")[0, :, 0]
    theirs = 255 * np.clip(mapped, 0, 1) ** (1 / 2.4)
    assert np.all(np.diff(ours.astype(int)) >= 0) and ours[-1] == 255
    assert np.abs(ours - theirs).max() <= 60, list(zip(light, ours, theirs, strict=True))


def yuv_video(path, planes, pixels, params, count=3, size=(64, 64)):
    """An x265 (10 bits) or x264 (8 bits) video of one colour, whose codes are `planes`, tagged by `params`."""
    is_deep = pixels.endswith("10le")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265" if is_deep else "libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if is_deep:
            stream.options = {"x265-params": f"lossless=1:log-level=none:pools=none{params}"}
        else:
            stream.options = {"qp": "0", **params}
        for number in range(count):
            frame = av.VideoFrame(*size, pixels)
            for plane, value in zip(frame.planes, planes, strict=True):
                kind = np.uint16 if is_deep else np.uint8
                plane.update(np.full(plane.buffer_size // kind().nbytes, value, kind).tobytes())
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def pixel_of(path, backend=None):
    ((_, _, image),) = open_video(path, backend=backend).frames([1], [])
    return image[32, 32].tolist()


PQ_TAGS = ":colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"


@pytest.mark.parametrize(
    "tags, low, high",
    [
        (PQ_TAGS + ":hdr10=1:max-cll=1000,400", 228, 232),
        (PQ_TAGS, 228, 232),
        (PQ_TAGS + ":hdr10=1:max-cll=4000,400", 208, 213),
        (PQ_TAGS + ":hdr10=1:master-display=G(0,0)B(0,0)R(0,0)WP(0,0)L(6000000,1)", 237, 240),
        (":colorprim=bt2020:transfer=arib-std-b67:colormatrix=bt2020nc", 225, 236),
    ],
)
def test_white_of_203_nits_looks_white(tags, low, high, tmp_path):
    white = 573 if "arib" not in tags else 721  # 58.1 % PQ, 75 % HLG, of limited range
    path = yuv_video(tmp_path / "hdr.mp4", (white, 512, 512), "yuv420p10le", tags)
    red, green, blue = pixel_of(path)
    assert low <= green <= high and max(red, green, blue) - min(red, green, blue) <= 1


def test_a_file_whose_matrix_is_declared(tmp_path):
    """The same codes by the matrix that the file declares; without one by BT.601, also in HD, as ffmpeg decodes."""

    def expected(y, u, v, kr, kb):
        y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
        red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
        green = (y - kr * red - kb * blue) / (1 - kr - kb)
        return [round(255 * min(max(x, 0), 1)) for x in (red, green, blue)]

    planes = (120, 90, 170)
    for size in ((64, 64), (1280, 720)):
        plain = yuv_video(tmp_path / f"plain{size[0]}.mp4", planes, "yuv420p", {}, size=size)
        assert np.allclose(pixel_of(plain), expected(*planes, 0.299, 0.114), atol=2)
    tagged = yuv_video(
        tmp_path / "709.mp4",
        planes,
        "yuv420p",
        {"x264-params": "colormatrix=bt709:colorprim=bt709:transfer=bt709"},
    )
    assert np.allclose(pixel_of(tagged), expected(*planes, 0.2126, 0.0722), atol=2)


def test_decord_leaves_hdr_to_pyav(tmp_path, caplog):
    pytest.importorskip("decord")
    path = yuv_video(tmp_path / "hdr.mp4", (573, 512, 512), "yuv420p10le", PQ_TAGS)
    from moss_vl import decord_video

    texts = []
    handler = decord_video.logging.logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    decord_video.logger.addHandler(handler)
    try:
        open_video(path, backend="decord")
    finally:
        decord_video.logger.removeHandler(handler)
    assert len(texts) == 1 and "it is HDR" in texts[0]
