"""Makes moss-vl-nano, a MOSS-VL of two million parameters, in the folder beside this file: python checkpoints/make_nano.py

Configuration, processor files, chat template and tokenizer are written as released checkpoints carry them; the weights are
random, from a fixed seed. The code files of the folder are relative symbolic links to those of the project.
"""

import argparse
import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
from install_into import code_files, read_json  # noqa: E402

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                  "<|video_pad|>", "<|time_start|>", "<|time_end|>")
VOCABULARY = 768  # at most: merging ends when every word of the corpus is one token
SEED = 20
TEXT_SIZES = {
    "cross_attention_layers": [2, 6], "num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}
VISION_SIZES = {
    "deepstack_visual_indexes": [0, 2], "depth": 4, "hidden_size": 64, "intermediate_size": 192, "num_heads": 2,
    "num_position_embeddings": 256, "out_hidden_size": 128,
}

# The pattern by which Qwen2 cuts text into words; digits stand alone.
QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")

CHAT_TEMPLATE = r"""{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- elif part['type'] == 'image' -%}
{{- '<|image|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|video|>' -}}
{%- else -%}
{{- raise_exception('a content part has type text, image or video, not ' + part['type']|string) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


def corpus():
    """Text of the drawn world, for the tokenizer.

    The strings of signs are left out: their letters stay one token each, so that a sign is read letter by letter.
    """
    shapes = ("circle", "square", "triangle", "star", "cross", "ring")
    colours = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
    places = ("on the left", "on the right", "at the top", "at the bottom", "in the center", "at the top left",
              "at the top right", "at the bottom left", "at the bottom right")
    ways = ("left", "right", "up", "down")
    yield from (f"a {size} {colour} {shape} {place}, a" for size, colour, shape, place
                in product(("large", "small"), colours, shapes, places))
    yield from ("Describe the picture.", "Describe the image.", "What do you see in the picture?", "What is in the image?",
                "Describe the video.", "Describe the clip.", "What happens in the video?", "What happens?", "nothing",
                "What happens first?", "What happens last?", "Tell me what happens, in order, with times.",
                "How many objects are there?", "Count the objects.", "How many shapes can you see in the picture?",
                "What does the text say?", "What does the sign say?", "Read the text.", "What is written in the picture?",
                "and the text", ", and the text \"", "How long is the video?", "How many seconds does the clip last?",
                "yes", "no", "Which image shows", "In which picture is", "Image number", "Give the time in seconds.") * 20
    for shape in shapes:
        yield from (f"What color is the {shape}?", f"What colour is the {shape}?", f"Which color does the {shape} have?",
                    f"Where is the {shape}?", f"In which part of the picture is the {shape}?", f"Which image shows a {shape}?",
                    f"When does the {shape} appear?", f"When does the {shape} disappear?", f"At what time does the {shape} appear?",
                    f"When does the {shape} change color?", f"When does the {shape} start moving?",
                    f"Which way does the {shape} move?", f"In which direction does the {shape} move?",
                    f"What color is the {shape} after it changes?", f"the {shape} disappears", f"the {shape} is visible") * 4
        yield from (f"What is {side} the {shape}?" for side in ("to the left of", "to the right of", "above", "below"))
        yield from (f"the {shape} moves {way}" for way in ways)
    for colour in colours:
        yield from (f"What shape is the {colour} object?", f"Which shape is {colour}?", f"changes to {colour}") * 4
        yield from (f"Is there a {colour} {shape}?" for shape in shapes)
        yield from (f"a small {colour} {shape} appears {place}; at" for shape in shapes for place in places)
    for tenths in range(0, 300, 3):
        yield f"at {tenths / 10:.1f} seconds the"
        yield f"What is visible at {tenths / 10:.1f} seconds?"
    yield from ("system\n", "user\n", "assistant\n", "thinking", "answer", "You are a helpful assistant.\n") * 20


def build_tokenizer(texts):
    """A byte-level BPE of these texts with the parts of Qwen2TokenizerFast; special tokens come last, as there."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer):
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(tokenizer.token_to_id(text)): {"content": text, **token} for text in SPECIAL_TOKENS},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def model_config(tokenizer, text_sizes, vision_sizes):
    """The project's config.json with these sizes and this tokenizer's ids."""
    config = read_json(PROJECT / "config.json")
    config["text_config"] |= {
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"), "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 32768,
        "rope_scaling": config["text_config"]["rope_scaling"] | {"mrope_section": [6, 5, 5]}, **text_sizes,
    }
    config["vision_config"] |= vision_sizes
    for name in ("image", "video"):
        config[f"{name}_token_id"] = tokenizer.token_to_id(f"<|{name}_pad|>")
    for name in ("start", "end"):
        config[f"vision_{name}_token_id"] = tokenizer.token_to_id(f"<|vision_{name}|>")
    return config


def processor_settings(name, size=None):
    """The project's, with the (fewest, most) pixels `size` where they are given."""
    settings = read_json(PROJECT / name)
    if size is not None:
        settings["size"] = dict(zip(("shortest_edge", "longest_edge"), size))
    if "image_processor_type" in settings:
        # The other name that releases use: 4.57's AutoImageProcessor asks for torchvision where it ends in Fast.
        settings["image_processor_type"] = "MossVLImageProcessor"
        settings["auto_map"]["AutoImageProcessor"] = "processing_moss_vl.MossVLImageProcessor"
    return settings


def write_folder(folder, texts, text_sizes, vision_sizes, picture_pixels=None, frame_pixels=None):
    """Everything of a checkpoint folder but the weights. `texts` are what the tokenizer is made from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in code_files():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(PROJECT / name, folder.resolve()))

    tokenizer = build_tokenizer(texts)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")

    config = model_config(tokenizer, text_sizes, vision_sizes)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", read_json(PROJECT / "generation_config.json") | {
        key: config["text_config"][key] for key in ("bos_token_id", "eos_token_id")})
    write_json(folder / "preprocessor_config.json", processor_settings("preprocessor_config.json", picture_pixels))
    write_json(folder / "video_preprocessor_config.json", processor_settings("video_preprocessor_config.json", frame_pixels))


def weight_shapes(folder):
    """Name -> shape of the folder's model, by rising names."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_MODULES_CACHE"] = cache  # read when transformers is imported
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(config, trust_remote_code=True).state_dict()
    return {name: state[name].shape for name in sorted(state)}


def random_weights(shapes):
    """The state dict: normal(0, 0.02), norms 1, biases 0. The gates are open, so that what the model sees counts."""
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("_gate"):
            weights[name] = torch.full(shape, 0.5)
        elif name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
        elif "norm" in name:
            weights[name] = torch.ones(shape)
        else:
            weights[name] = 0.02 * torch.randn(shape, generator=generator)
    return weights


def write_weights(folder, weights):
    """Writes them in bf16."""
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    count, vocabulary = sum(tensor.numel() for tensor in weights.values()), weights["lm_head.weight"].shape[0]
    print(f"{folder}: {len(weights)} tensors, {count:,} parameters, {2 * count / 1e6:.1f} MB, vocabulary {vocabulary}")


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Make moss-vl-nano with random weights.")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "moss-vl-nano",
                        help="checkpoint folder to write (default: moss-vl-nano beside this file)")
    folder = parser.parse_args().output
    write_folder(folder, corpus(), TEXT_SIZES, VISION_SIZES)
    write_weights(folder, random_weights(weight_shapes(folder)))


if __name__ == "__main__":
    main()
