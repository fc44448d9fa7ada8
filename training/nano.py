"""Makes the folder of the moss-vl-nano that train_nano.py trains: python training/nano.py --output FOLDER --weights FILE

It is made as checkpoints/make_nano.py makes its folder, with sizes, pixel limits, tokenizer and first weights of its own; the weights
are those that training starts from, or a file of trained ones.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT / "training"), str(PROJECT / "checkpoints")]
import questions  # noqa: E402
import world  # noqa: E402
from make_nano import SEED, weight_shapes, write_folder, write_weights  # noqa: E402

PICTURE_PIXELS = (224 * 224, 256 * 256)  # fewest and most, of a picture and of a clip's frame
FRAME_PIXELS = (128 * 128, 160 * 160)
TEXT_SIZES = {
    "cross_attention_layers": [2, 6], "num_hidden_layers": 8, "hidden_size": 192, "intermediate_size": 448,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "rope_theta": 10000.0,
}
VISION_SIZES = {
    "deepstack_visual_indexes": [2], "depth": 6, "hidden_size": 192, "intermediate_size": 768, "num_heads": 6,
    "num_position_embeddings": 256, "out_hidden_size": 192,
}


def corpus():
    """Text of the drawn world, for the tokenizer: questions and answers.

    The strings of signs are left out: their letters stay one token each, so that a sign is read letter by letter.
    """
    lot = random.Random(SEED)
    for _ in range(4000):
        picture, clip = world.random_picture(lot, sign_share=0), world.random_clip(lot)
        times = questions.sampled_times(clip, lot.choice((1, 2)))
        asked = [questions.ask_picture(task, picture, lot) for task in questions.PICTURE_TASKS]
        asked += [questions.ask_clip(task, clip, times, lot) for task in questions.CLIP_TASKS]
        asked += [questions.ask_images([picture], lot)]
        yield from (text for question in asked if question is not None for text in (question.prompt, question.answer))
    frame = ("system\n", "user\n", "assistant\n", "thinking", "answer", "You are a helpful assistant.\n")
    yield from (', and the text "', *frame) * 20


def first_weights(shapes):
    """The weights with which training starts: matrices normal with variance 1 / fan-in, but 0 where they write to the residual stream or
    to the logits; norms 1, biases 0, gates open."""
    writing = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight", "lm_head.weight")
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("_gate") or "norm" in name and name.endswith(".weight"):
            weights[name] = torch.ones(shape)
        elif len(shape) < 2 or name.endswith(writing):
            weights[name] = torch.zeros(shape)
        elif "embed" in name and "patch" not in name:
            weights[name] = 0.3 * torch.randn(shape, generator=generator)
        else:
            weights[name] = torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
    return weights


def make(folder: Path, weights: Path | None = None) -> None:
    """Writes the checkpoint folder; `weights` is a safetensors file to take in place of the first weights."""
    write_folder(folder, corpus(), TEXT_SIZES, VISION_SIZES, PICTURE_PIXELS, FRAME_PIXELS)
    shapes = weight_shapes(folder)
    if weights is None:
        return write_weights(folder, first_weights(shapes))
    given = load_file(weights)
    if {name: tensor.shape for name, tensor in given.items()} != shapes:
        raise ValueError(f"{weights} does not hold the tensors of this model; expected those that training/train_nano.py writes")
    write_weights(folder, given)


def main():
    parser = argparse.ArgumentParser(description="Make the folder of moss-vl-nano, with first weights or with trained ones.")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--weights", type=Path,
                        help="model.safetensors of a run of training/train_nano.py (default: those training starts from)")
    args = parser.parse_args()
    make(args.output, args.weights)


if __name__ == "__main__":
    main()
