"""Accelerators that are not CUDA (NPU, MPS, XPU): on a stand-in, models and commands give the answers of the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


START = """
import torch
import stand_in_device
library = stand_in_device.install()
"""

MODEL = """
from tiny import Sample, make_model

sample = Sample("ttFFFttttt", (3, 4, 4), seed=3)
inputs = sample.inputs()
far = {name: value.to("npu") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
options = {"max_new_tokens": 5, "do_sample": False}
with torch.no_grad():
    model = make_model()
    logits, answer = model(**inputs).logits, model.generate(**inputs, **options)
    model = make_model().to("npu")
    assert {parameter.device for parameter in model.parameters()} == {torch.device("npu:0")}
    output = model(**far, use_cache=True)
    assert output.logits.device == torch.device("npu:0")
    torch.testing.assert_close(output.logits.cpu(), logits)
    assert model.generate(**far, **options).tolist() == answer.tolist()
try:
    torch.ones(2, device="npu") + torch.ones(2)
except RuntimeError as error:
    assert "of npu:0 and of cpu" in str(error)
else:
    raise AssertionError("the stand-in mixes devices")
"""

ANSWERS = """
from moss_vl import infer
from moss_vl.threads import on_device
from moss_vl.training.tuning_options import computes_in_bfloat16

processor, model = infer.load(infer.parse(["-p", "", "--device", "npu:0", "--dtype", "float32"]))
queries = [
    {"images": ["data/example_image.jpg"], "prompt": "What color is the star?"},
    {"images": ["data/sample_a.jpg"], "prompt": "How many objects are there?"},
]
ended = {event.index: event.text for event in model.stream_batch(processor, queries) if event.kind != "piece"}
assert ended == {0: "blue", 1: "3"}, ended
assert set(stand_in_device.entered) == {torch.device("npu:0")}
out = model.offline_batch_generate(processor, queries[1:], keep_cache=True)
again = [{"prompt": "What color is the cross?"}]
out = model.offline_batch_generate(processor, again, session_states=out["session_states"])
assert out["results"][0]["text"] == "yellow"

count = len(stand_in_device.entered)
for name in ("npu", "cpu", "meta", "cpu:0"):
    with on_device(torch.device(name)):
        assert len(stand_in_device.entered) == count
assert computes_in_bfloat16()
try:
    infer.load(infer.parse(["-p", "", "--device", "xpu"]))
except ValueError as error:
    assert str(error) == "--device xpu: this torch finds no XPU device"
"""


@pytest.mark.parametrize("script", [MODEL, ANSWERS], ids=["model", "answers"])
def test_answers_on_an_accelerator_that_is_not_cuda(script):
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot make a device in Python")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", START + script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
