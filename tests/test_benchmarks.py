"""The implementations and limits of benchmarks/model.py."""

import pytest
import torch

from moss_vl.benchmarks import peers
from moss_vl.benchmarks.measuring import Clock
from moss_vl.benchmarks.model import bytes_per_step, first_pass, make_implementations, parse_arguments
from moss_vl.benchmarks.random_models import VIDEO_PAD, make_clock, make_config, make_prompt


SMALL = (
    "--layers 8 --width 128 --heads 2 --head-dim 64 --vision-depth 4 --vision-width 64 --device cpu --dtype float32"
)
FRAMES, SIDE, TOKENS = 4, 64, 5


@pytest.fixture(scope="module")
def implementations():
    args, clock = parse_arguments(SMALL.split()), Clock("cpu")
    return make_implementations(args, make_config(args), clock)


@pytest.fixture(scope="module")
def prompt():
    return make_prompt(FRAMES, SIDE, TOKENS, "cpu", torch.float32)


def test_the_plain_implementation_has_our_logits(implementations, prompt):
    peaks, differences = first_pass(implementations, prompt, "cpu")
    assert len(differences) == 2 and max(differences) < 1e-3
    assert min(peaks.values()) > 0 and set(peaks) == {"ours", "plain", "qwen3vl", "qwen3vl video"}


@pytest.mark.parametrize("name", ["ours", "qwen3vl", "qwen3vl video"])
@torch.no_grad()
def test_generate_continues_what_was_decoded(name, implementations, prompt):
    one, written = implementations[name], torch.tensor([[7, 8, 9]])
    one.prepare(prompt)
    one.prefill()
    for token in (7, 8):
        one.decode(torch.tensor([[token]]))
    times = peers.StepTimes(Clock("cpu"))
    answer = one.generate(written, 4, times)
    assert len(times.seconds()) == 3 and min(times.seconds()) > 0
    one.prefill()
    expected, tokens = [], [7, 8, 9]
    for token in tokens:
        logits = one.decode(torch.tensor([[token]]))
    for _ in range(4):
        expected.append(int(logits[0, -1].argmax()))
        logits = one.decode(torch.tensor([[expected[-1]]]))
    assert answer.tolist() == [expected]
    one.forget()
    assert one.cache is None


def test_qwen3vl_as_shipped_reads_half_the_vision_tokens_of_a_video(implementations, prompt):
    images, video = implementations["qwen3vl"], implementations["qwen3vl video"]
    for one in (images, video):
        one.prepare(prompt)
    per_frame = (SIDE // 32) ** 2
    assert int((images.ids == images.pad).sum()) == FRAMES * per_frame
    assert video.ids[0].tolist().count(VIDEO_PAD) == FRAMES // 2 * per_frame
    assert video.model.config.vision_config.temporal_patch_size == 2
    pixels, [[steps, rows, columns]] = video.media["pixel_values_videos"], video.media["video_grid_thw"].tolist()
    assert len(pixels) == steps * rows * columns == len(prompt.pixels) // 2
    first = prompt.pixels.view(FRAMES, rows * columns, 3, 256)
    assert torch.equal(pixels.view(steps, rows * columns, 3, 2, 256)[1, 2, :, 1], first[3, 2])
    with pytest.raises(SystemExit, match="even number of frames; got 3"):
        video.media_of(make_prompt(3, SIDE, TOKENS, "cpu", torch.float32))


@torch.no_grad()
def test_the_limit_counts_the_keys_and_values_that_a_step_reads(implementations, prompt):
    ours = implementations["ours"]
    ours.prepare(prompt)
    ours.prefill()
    config, cache = ours.model.config, ours.cache
    _, read = bytes_per_step(config, ours.model, prompt)
    held = 0
    for index, layer in enumerate(cache.layers):
        tokens = prompt.vision_tokens if index in config.text_config.cross_attention_layers else prompt.ids.shape[1]
        held += 2 * layer.keys[..., :tokens, :].numel() * layer.keys.element_size()
    assert read == held
    ours.forget()


def test_the_default_sizes_are_an_eighth_of_the_released_ones():
    scaled, released = (make_config(parse_arguments(flags)) for flags in ([], ["--released"]))
    for part, names in (
        (
            "text_config",
            ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"),
        ),
        ("vision_config", ("hidden_size", "num_heads", "out_hidden_size")),
    ):
        one, other = getattr(scaled, part), getattr(released, part)
        assert [8 * getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    assert scaled.text_config.num_hidden_layers == released.text_config.num_hidden_layers
    assert scaled.text_config.head_dim == released.text_config.head_dim
    assert scaled.vision_config.deepstack_visual_indexes == released.vision_config.deepstack_visual_indexes
    assert scaled.vision_config.depth == released.vision_config.depth


def test_cpu_time_is_no_clock_of_a_gpu():
    with pytest.raises(SystemExit, match="--device is cuda"):
        make_clock(parse_arguments(["--device", "cuda", "--clock", "cpu"]))
