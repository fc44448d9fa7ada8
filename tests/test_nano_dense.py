"""The padded forward of moss-vl-nano's training (training/nano/dense.py, collation.py) beside the model itself."""

import pytest
import torch
from nano_batches import make_processor, media_inputs, one_font  # noqa: F401
from nano_batches import model as random_model  # noqa: F401

from moss_vl.training.nano.collation import Sizes, collate, pack, unpack
from moss_vl.training.nano.dense import decode, encode, rows_of_vision
from moss_vl.training.nano.lessons import KINDS, Lessons
from moss_vl.training.nano.rows import visible_parts


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def model(random_model):  # noqa: F811
    """With random weights everywhere: gates and norms, too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in random_model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return random_model


@pytest.fixture
def batches(processor):
    """kind -> two batches with small pictures."""
    lessons = Lessons(processor, 0, 8)
    lessons.picture_limits = lessons.frame_limits = (64 * 64, 96 * 96)
    return lambda kind, progress=0.5: [lessons.batch(3, kind, progress, rank) for rank in range(2)]


def logits_of_model(model, batch: dict) -> torch.Tensor:
    """At all tokens before those of answers."""
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=visible_parts(batch["parts"]),
        position_ids=batch["position_ids"],
        **media_inputs(model, batch),
    )
    return out.logits[:, :-1][batch["labels"][:, 1:] != -100]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "look"])
def test_logits_equal_those_of_the_model(model, batches, kind):
    drawn = batches(kind)
    step = unpack(pack(collate(drawn, Sizes.of(model.config))), "cpu")
    with torch.no_grad():
        expected = torch.cat([logits_of_model(model, batch) for batch in drawn])
        tokens, _ = encode(model.model.visual, step)
        vision = rows_of_vision(tokens, model.model.separator_token, step)
        states, _, _ = decode(model.model.language_model, step, vision)
        logits = model.lm_head(states.flatten(0, 1)[step["learned"]])
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
    labels = torch.cat([batch["labels"][:, 1:][batch["labels"][:, 1:] != -100] for batch in drawn])
    assert torch.equal(step["targets"], labels)


def test_tokens_of_pictures_equal_those_of_the_encoder(model, batches):
    drawn = batches("look")
    step = collate(drawn, Sizes.of(model.config))
    pixels = torch.cat([batch["pixel_values"] for batch in drawn])
    grids = [grid for batch in drawn for grid in batch["picture_grids"]]
    with torch.no_grad():
        expected = model.model.visual((pixels.float() - 127.5) / 127.5, grids)
        tokens, _ = encode(model.model.visual, step)
    found = torch.cat([part[: h * w // 4] for part, (_, h, w) in zip(tokens, grids, strict=False)])
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    facts = torch.cat([part[: h * w // 4] for part, (_, h, w) in zip(step["token_facts"], grids, strict=False)])
    assert torch.equal(facts, torch.cat([batch["token_facts"] for batch in drawn]))


def test_steps_cross_processes_unchanged(model, batches):
    step = collate(batches("clips"), Sizes.of(model.config))
    same = unpack(pack(step), "cpu")
    assert same.keys() == step.keys()
    for name, value in step.items():
        assert same[name].equal(value) if isinstance(value, torch.Tensor) else same[name] == value, name
