"""Colours of decoded video frames: to 8-bit RGB for an SDR display, with tone mapping of HDR.

Frames are converted by swscale as PyAV calls it (bilinear chroma, the matrix and range that the frame declares; ITU-R
BT.601 and limited range if it declares none). HDR frames, transfer PQ (SMPTE ST 2084) or HLG (ARIB STD-B67), are
converted to 16-bit R'G'B' by swscale, and from there by `ToneMap`:

1. R'G'B' to linear light in cd/m2: the PQ EOTF, or the HLG inverse OETF and OOTF for a display of 1000 cd/m2 with
   system gamma 1.2 (ITU-R BT.2100-2, tables 4 and 5).
2. BT.2020 (or P3-D65) primaries to BT.709 (ITU-R BT.2087-0); negative values become 0.
3. EETF of ITU-R BT.2390-8, 5.4.1, on the largest of R, G and B, which scales all three: from the peak of the source to
   203 cd/m2, the reference white of HDR (ITU-R BT.2408-4). The peak is what the first frame declares (MaxCLL, else the
   mastering display), else 1000 cd/m2.
4. Inverse EOTF of SDR, gamma 2.4 (ITU-R BT.1886).

Steps 2 to 4 are the order of ffmpeg's `zscale=t=linear,zscale=p=bt709,tonemap=...,zscale=t=bt709`. A white of
203 cd/m2 in a video with a peak of 1000 cd/m2 becomes 230 of 255. SDR frames with BT.2020 primaries get steps 2 and 4.

Axes: h rows, w columns.
"""

import struct
from functools import lru_cache

import numpy as np


# Codes of ITU-T H.273, as ffmpeg numbers them
PQ, HLG = 16, 18  # transfer characteristics
BT2020, P3_D65 = 9, 12  # colour primaries

REFERENCE_WHITE = 203.0  # cd/m2, of diffuse white in HDR; becomes the peak of SDR
DEFAULT_PEAK = 1000.0  # cd/m2
PEAK_LIMITS = 203.0, 10000.0  # cd/m2
SDR_GAMMA = 2.4
STEPS = 1 << 14  # entries of tables over the fourth root of light
STRIP_PIXELS = 1 << 16  # converted at once

# Linear R, G, B with these primaries -> BT.709
TO_BT709 = {
    BT2020: ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730)),
    P3_D65: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}


# formulas


def pq_to_light(code: np.ndarray) -> np.ndarray:
    """PQ EOTF: codes 0..1 to cd/m2 (ITU-R BT.2100-2, table 4)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
    x = np.asarray(code, np.float64) ** (1 / m2)
    return 10000 * (np.maximum(x - c1, 0) / (c2 - c3 * x)) ** (1 / m1)


def light_to_pq(light: np.ndarray) -> np.ndarray:
    """Inverse PQ EOTF: cd/m2 to codes 0..1."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
    y = (np.asarray(light, np.float64) / 10000) ** m1
    return ((c1 + c2 * y) / (1 + c3 * y)) ** m2


def hlg_to_scene(code: np.ndarray) -> np.ndarray:
    """HLG inverse OETF: codes 0..1 to scene light 0..1 (ITU-R BT.2100-2, table 5)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    code = np.asarray(code, np.float64)
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)


def eetf(light: np.ndarray, peak: float, target: float = REFERENCE_WHITE) -> np.ndarray:
    """EETF of ITU-R BT.2390-8, 5.4.1, with black 0: cd/m2 of a source with `peak` to cd/m2 up to `target`."""
    if peak <= target:
        return np.minimum(light, target)
    source = light_to_pq(peak)
    e1 = np.minimum(light_to_pq(light) / source, 1)
    max_lum = light_to_pq(target) / source
    knee = 1.5 * max_lum - 0.5
    t = np.clip((e1 - knee) / (1 - knee), 0, 1)
    t2, t3 = t**2, t**3
    spline = (2 * t3 - 3 * t2 + 1) * knee + (t3 - 2 * t2 + t) * (1 - knee) + (3 * t2 - 2 * t3) * max_lum
    return pq_to_light(np.where(e1 < knee, e1, spline) * source)


# tables


@lru_cache(maxsize=8)
def _light_of_codes(transfer: int) -> np.ndarray:
    """float32 [65536]: linear light of 16-bit codes; PQ in units of 10000 cd/m2, the others 0..1."""
    codes = np.arange(65536) / 65535
    if transfer == PQ:
        light = pq_to_light(codes) / 10000
    elif transfer == HLG:
        light = hlg_to_scene(codes)
    else:
        light = codes**SDR_GAMMA
    return light.astype(np.float32)


@lru_cache(maxsize=8)
def _gains(peak: float) -> np.ndarray:
    """float32 [STEPS + 1]: factor of the EETF, in units of `REFERENCE_WHITE` per unit of 10000 cd/m2, over the fourth
    root of the light in units of 20000 cd/m2: the change of primaries can exceed 10000."""
    light = np.maximum((np.arange(STEPS + 1) / STEPS) ** 4, 1e-12) * 20000
    return (eetf(light, peak) / REFERENCE_WHITE / (light / 10000)).astype(np.float32)


@lru_cache(maxsize=1)
def _levels() -> np.ndarray:
    """uint8 [STEPS + 1]: levels of SDR over the fourth root of light 0..1."""
    return np.rint(255 * (np.arange(STEPS + 1) / STEPS) ** (4 / SDR_GAMMA)).astype(np.uint8)


def _fourth_root_index(light: np.ndarray) -> np.ndarray:
    """The nearest entry of a table for light that is at most 1."""
    return (np.sqrt(np.sqrt(light)) * STEPS + 0.5).astype(np.int32)


# frames


class ToneMap:
    """The conversion of 16-bit R'G'B' to 8-bit SDR with BT.709 primaries, the same for all frames of a video."""

    def __init__(self, transfer: int, primaries: int, peak: float = DEFAULT_PEAK):
        self.transfer, self.peak = transfer, peak if transfer == PQ else DEFAULT_PEAK
        self._matrix = np.array(TO_BT709.get(primaries, np.eye(3)), np.float32).T

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """uint16 [h, w, 3] -> uint8 [h, w, 3]. Works in strips, so that memory stays small."""
        out = np.empty(codes.shape, np.uint8)
        rows = max(1, STRIP_PIXELS // codes.shape[1])
        for first in range(0, len(codes), rows):
            out[first : first + rows] = self._strip(codes[first : first + rows])
        return out

    def _strip(self, codes: np.ndarray) -> np.ndarray:
        light = np.take(_light_of_codes(self.transfer), codes)
        if self.transfer == HLG:  # OOTF, in units of 10000 cd/m2
            luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
            light *= (np.maximum(luminance, 1e-9) ** np.float32(0.2) * np.float32(DEFAULT_PEAK / 10000))[..., None]
        light = np.maximum(light.reshape(-1, 3) @ self._matrix, 0)
        if self.transfer in (PQ, HLG):
            brightest = np.maximum(np.maximum(light[:, 0], light[:, 1]), light[:, 2])
            light *= np.take(_gains(self.peak), _fourth_root_index(brightest / 2))[:, None]
        return np.take(_levels(), _fourth_root_index(np.minimum(light, 1, out=light))).reshape(codes.shape)


def tone_map_of(frame, context) -> ToneMap | None:
    """The tone mapping that a video needs, by its first decoded frame and its decoder (PyAV); None for SDR with common
    primaries."""
    transfer, primaries = int(context.color_trc), int(context.color_primaries)  # frames have them from PyAV 17 on
    if transfer in (PQ, HLG):
        return ToneMap(transfer, primaries, _declared_peak(frame) if transfer == PQ else DEFAULT_PEAK)
    return ToneMap(transfer, primaries) if primaries == BT2020 else None


def _declared_peak(frame) -> float:
    """cd/m2: MaxCLL, else the peak of the mastering display; `DEFAULT_PEAK` if the frame declares neither."""
    try:
        side_data = {data.type.name: bytes(data) for data in frame.side_data}
    except (ValueError, KeyError):  # PyAV does not know a type
        return DEFAULT_PEAK
    peak = 0.0
    light_level = side_data.get("CONTENT_LIGHT_LEVEL", b"")
    display = side_data.get("MASTERING_DISPLAY_METADATA", b"")
    if len(light_level) >= 4:
        peak = float(struct.unpack_from("=I", light_level)[0])
    if peak <= 0 and len(display) >= 88:  # ten rationals, the last is the peak; then two flags
        numerator, denominator = struct.unpack_from("=2i", display, 72)
        has_luminance = struct.unpack_from("=i", display, 84)[0]
        peak = numerator / denominator if has_luminance and denominator else 0.0
    return float(np.clip(peak, *PEAK_LIMITS)) if peak > 0 else DEFAULT_PEAK


def frame_to_rgb(frame, tone_map: ToneMap | None) -> np.ndarray:
    """uint8 [h, w, 3] of a decoded frame without alpha (PyAV)."""
    if tone_map is None:
        return frame.to_ndarray(format="rgb24")
    return tone_map(frame.to_ndarray(format="rgb48le"))
