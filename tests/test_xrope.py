"""Positions as literal rows, and rotation against a slow independent version."""

import math

import pytest
import torch
from conftest import ROOT
from tiny import IMAGE_PAD, make_model

from moss_vl.xrope import frame_positions, grid_rotary, rotate, walk_text, xrope_rotary


def rope_index(ids, grids, attention_mask=None, nums=None):
    patches = [[t, 2 * h, 2 * w] for t, h, w in grids] or None
    mask = torch.tensor(attention_mask) if attention_mask else None
    model = make_model()
    text, vision, delta = model.get_rope_index(torch.tensor(ids), patches and torch.tensor(patches), mask, nums)
    return text.tolist(), vision.tolist(), delta.tolist()


P = IMAGE_PAD


def test_the_example_of_the_documentation():
    """That of `walk_text`, `frame_positions` and docs/model.md."""
    text, vision, delta = rope_index([[5, P, 6, P, 7]], [(1, 2, 3), (1, 1, 2)])
    assert text == [[[0, 4, 5, 8, 9]]] * 3
    assert vision == [
        [[1, 1, 1, 1, 1, 1, 4, 6, 6, 8]],
        [[1, 1, 1, 2, 2, 2, 4, 6, 6, 8]],
        [[1, 2, 3, 1, 2, 3, 4, 6, 7, 8]],
    ]
    assert delta == [5]
    document = (ROOT / "docs/model.md").read_text(encoding="utf-8")
    assert " position    0          4          5          8          9\n" in document
    for t, h, w in zip(*(axis[0] for axis in vision), strict=True):
        assert f"({t},{h},{w})" in document


def test_one_frame_between_two_tokens():
    text, vision, delta = rope_index([[5, P, 6]], [(1, 2, 3)])
    assert text == [[[0, 4, 5]]] * 3
    assert vision == [[[1, 1, 1, 1, 1, 1, 4]], [[1, 1, 1, 2, 2, 2, 4]], [[1, 2, 3, 1, 2, 3, 4]]]
    assert delta == [3]


def test_a_clip_then_a_tall_image():
    text, vision, delta = rope_index([[P, P, 7, P]], [(2, 1, 2), (1, 3, 1)])
    assert text[0] == [[2, 5, 6, 10]]
    assert vision[0] == [[0, 0, 2, 3, 3, 5, 7, 7, 7, 10]]
    assert vision[1] == [[0, 0, 2, 3, 3, 5, 7, 8, 9, 10]]
    assert vision[2] == [[0, 1, 2, 3, 4, 5, 7, 7, 7, 10]]
    assert delta == [11 - 4]


def test_padding_has_position_0_and_shifts_nothing():
    ids = [[0, 0, 5, P, 6], [5, 5, 5, 5, 5]]
    text, vision, delta = rope_index(ids, [(1, 2, 3)], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [1, 0])
    assert text[0] == [[0, 0, 0, 4, 5], [0, 1, 2, 3, 4]]
    assert vision[2] == [[1, 2, 3, 1, 2, 3, 4], [0] * 7]
    assert delta == [6 - 5, 0]
    text, _, delta = rope_index([[5, P, 6, 0, 0]], [(1, 2, 3)], [[1, 1, 1, 0, 0]])
    assert text[0] == [[0, 4, 5, 0, 0]] and delta == [6 - 5]


def test_each_row_has_positions_of_its_own():
    together = rope_index([[5, P, 6], [P, 5, P]], [(1, 2, 3), (1, 1, 1), (1, 2, 2)])
    first, second = rope_index([[5, P, 6]], [(1, 2, 3)]), rope_index([[P, 5, P]], [(1, 1, 1), (1, 2, 2)])
    assert together[0][0] == [first[0][0][0], second[0][0][0]]
    assert together[1][1] == [first[1][1][0], second[1][1][0]]
    assert together[2] == [first[2][0], second[2][0]]


def test_a_walk_continues_from_its_start():
    tokens, frames = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[False, True]])
    text, origins, after = walk_text(tokens, frames, torch.tensor([4]), torch.tensor([10]))
    assert (text.tolist(), origins.tolist(), after.tolist()) == ([[10, 15]], [11], [16])
    assert frame_positions(origins, 1, 4).tolist() == [[11] * 4 + [15], [11] * 4 + [15], [11, 12, 13, 14, 15]]


SECTIONS = [
    (128, [24, 20, 20]),
    (16, [4, 2, 2]),
    (20, [4, 3, 3]),
    (12, [6, 0, 0]),
    (24, [8, 3, 1]),
    (24, [8, 1, 3]),
    (24, [9, 0, 3]),
    (24, [4, 4, 4]),
]


@pytest.mark.parametrize("theta", [5_000_000.0, 100.0])
@pytest.mark.parametrize("head_dim, section", SECTIONS)
def test_rotation_against_a_slow_version(head_dim, section, theta):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, head_dim, generator=generator)
    positions = torch.tensor([[0, 7, 300], [0, 9, 301], [0, 2, 500]])  # (t, h, w) of three tokens
    cos, sin = xrope_rotary(positions, head_dim, theta, section, torch.float32)
    got = rotate(x, cos, sin)
    half = head_dim // 2
    for token in range(3):
        for j in range(half):
            axis = 1 if j % 3 == 1 and j < 3 * section[1] else 2 if j % 3 == 2 and j < 3 * section[2] else 0
            angle = positions[axis, token].item() * theta ** (-2 * j / head_dim)
            a, b = x[token, j].item(), x[token, j + half].item()
            assert got[token, j].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-4)
            assert got[token, j + half].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-4)


def test_rotary_is_computed_in_float32():
    positions = torch.full((3, 1), 200_001)
    exact = xrope_rotary(positions, 16, 5e6, [4, 2, 2], torch.float32)
    half = xrope_rotary(positions, 16, 5e6, [4, 2, 2], torch.bfloat16)
    assert all(torch.equal(a.to(torch.bfloat16), b) for a, b in zip(exact, half, strict=True))


def test_grid_rotation_against_a_slow_version():
    cos, sin = grid_rotary(torch.tensor([3]), torch.tensor([5]), 72)
    frequencies = [10000 ** (-2 * i / 36) for i in range(18)]
    angles = [3 * f for f in frequencies] + [5 * f for f in frequencies]
    assert cos[0].tolist() == pytest.approx(2 * [math.cos(angle) for angle in angles], abs=1e-6)
    assert sin[0].tolist() == pytest.approx([sign * math.sin(angle) for sign in (-1, 1) for angle in angles], abs=1e-6)
