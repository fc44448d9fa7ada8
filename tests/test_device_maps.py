"""Device maps over several GPUs, on a machine without any: tensors of torch's fake mode have a device and a shape, but
no numbers, and an operation on two devices is an error as on GPUs. "lazy" is a device type that every build of torch
permits.
"""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_align_device_hook_on_blocks
from tiny import Sample, make_model
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode


LAYERS = {f"model.language_model.layers.{i}": i % 3 for i in range(6)}
TEXT = {"model.language_model.embed_tokens": 1, **LAYERS, "model.language_model.norm": 2}
VISION = {
    "model.visual.patch_embed": 0,
    "model.visual.pos_embed": 1,
    **{f"model.visual.blocks.{i}": (i + 2) % 3 for i in range(3)},
    "model.visual.merger": 1,
}
MAPS = {
    "every part on another device": {**VISION, **TEXT, "model.separator_token": 0, "lm_head": 0},
    "patch_embed and pos_embed": {
        **dict.fromkeys(VISION, 0),
        "model.visual.pos_embed": 1,
        "model.separator_token": 0,
        "model.language_model": 0,
        "lm_head": 0,
    },
    "vision and text": {"model.visual": 0, "model.separator_token": 1, "model.language_model": 1, "lm_head": 1},
    "the separator": {"model.visual": 0, "model.separator_token": 1, "model.language_model": 0, "lm_head": 0},
}


def spread(model, device_map, hooked=True):
    """Moves the parameters to the devices of the map, and adds hooks that move inputs, as `device_map=` does."""
    devices = {name: f"lazy:{number}" for name, number in device_map.items()}
    for name, parameter in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        device = next(device for part, device in devices.items() if name == part or name.startswith(part + "."))
        model.get_submodule(module)._parameters[attribute] = torch.nn.Parameter(
            torch.empty(parameter.shape, device=device)
        )
    if hooked:
        attach_align_device_hook_on_blocks(
            model,
            execution_device={name: device for name, device in devices.items() if name != "model.separator_token"},
        )


def within(mode, module):
    """Runs the module in fake mode. The plan of a call needs the numbers of its inputs, and is made outside."""
    forward = module.forward

    def inside(*args, **kwargs):
        with mode:
            return forward(*args, **kwargs)

    module.forward = inside


@pytest.fixture
def mode():
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("implementation, uint8", [("eager", False), ("sdpa", True)])
@pytest.mark.parametrize("name", MAPS)
def test_no_operation_has_inputs_on_two_devices(mode, name, implementation, uint8):
    model = make_model(implementation)
    sample = Sample("tFFtFtF", (2, 4, 4), (1, 4, 6), (1, 2, 2), seed=1)
    inputs = sample.inputs()
    inputs["cross_attention_mask"][0, 0, 4:6, 0] = True  # not a prefix
    inputs["attention_mask"] = None
    if uint8:
        inputs |= {
            "pixel_values": sample.pixel_values.byte(),
            "image_mean": [[0.5] * 3] * 3,
            "image_std": [[0.5] * 3] * 3,
        }
    with mode, torch.no_grad():
        spread(model, MAPS[name])
    for module in (
        model.model.language_model.embed_tokens,
        model.model.visual,
        model.model.language_model,
        model.lm_head,
    ):
        within(mode, module)
    with torch.no_grad():
        assert model(**inputs, use_cache=False, vision_chunked_length=2).logits.shape == (1, 7, 200)
    additive = torch.full((1, 1, 7, 7), float("-inf")).triu(1)
    with mode:
        mask = additive.to("lazy:2")
    with torch.no_grad():
        assert model(**{**inputs, "attention_mask": mask}, use_cache=False).logits.shape == (1, 7, 200)


def test_an_operation_on_two_devices_is_an_error(mode):
    """The test above relies on it."""
    model = make_model()
    with mode, torch.no_grad():
        spread(model, MAPS["patch_embed and pos_embed"], hooked=False)
        with pytest.raises(FakeTensorDeviceMismatchError):
            model.model.visual(torch.randn(16, 48), [(1, 4, 4)])


def test_uint8_pixels_with_every_parameter_offloaded():
    """The projection has no device to normalise on."""
    model, inputs = make_model(), Sample("tFtF", (1, 4, 6), (1, 4, 4), seed=7).inputs()
    inputs |= {
        "pixel_values": torch.arange(40 * 48).view(40, 48).to(torch.uint8),
        "image_mean": [[0.5] * 3] * 2,
        "image_std": [[0.4] * 3] * 2,
    }
    with torch.no_grad():
        expected = model(**inputs).logits
        cpu_offload(model, execution_device="cpu")
        assert torch.equal(model(**inputs).logits, expected)
