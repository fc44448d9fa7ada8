"""Saves moss-vl-nano with one transformers version and loads it with another: python tests/cross_version.py save|load
FOLDER

`.ci/run` calls it, since one environment has one version. `load` fails unless ids, pixels, logits and the greedy
answer are equal.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor


ROOT = Path(__file__).resolve().parent.parent


def load_checkpoint(folder, **options):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, **options)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return processor, model.eval()


def observe(processor, model):
    """Outputs of the checkpoint, as tensors by name."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What happens?"}]}
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=text,
        images=str(ROOT / "data/example_image.jpg"),
        videos=str(ROOT / "data/example_video.mp4"),
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return {
        "input_ids": inputs["input_ids"],
        "pixel_values": inputs["pixel_values"],
        "logits": logits.contiguous(),
        "answer": answer.contiguous(),
    }


def save(folder):
    processor, model = load_checkpoint(
        ROOT / "checkpoints/moss-vl-nano", max_frames=6
    )  # a setting that must be saved too
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    save_file(observe(processor, model), record_of(folder))


def load(folder):
    expected = load_file(record_of(folder))
    for name, tensor in observe(*load_checkpoint(folder)).items():
        if tensor.shape != expected[name].shape or not torch.allclose(
            tensor.float(), expected[name].float(), atol=1e-5, rtol=0
        ):
            raise SystemExit(f"{folder}: {name} is not what it was where the folder was saved")


def record_of(folder):
    return folder.with_name(f"{folder.name}-observed.safetensors")


if __name__ == "__main__":
    action = {"save": save, "load": load}[sys.argv[1]]
    action(Path(sys.argv[2]))
    print(f"{sys.argv[1]}: done with transformers {transformers.__version__}")
