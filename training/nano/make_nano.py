"""Writes the checkpoint folder of moss-vl-nano, a MOSS-VL of sixteen million parameters, from trained weights:

    python training/nano/make_nano.py --weights FILE

Configuration, processor files, chat template and tokenizer have the form of released checkpoints. The code files are
relative symbolic links to those of the project. Without --weights, the initial weights of train_nano.py are written.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moss_vl.realtime_protocol import RESPONSE, SILENCE, SYSTEM_PROMPT
from moss_vl.tools.install_into import code_files, read_json
from moss_vl.training.nano import questions, watching, world


PROJECT = Path(__file__).resolve().parents[2]
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|time_start|>",
    "<|time_end|>",
    SILENCE,
    RESPONSE,
)
VOCABULARY = 896  # at most; merging ends when every word of the corpus is one token
SEED = 20
PICTURE_PIXELS = (224 * 224, 256 * 256)  # fewest and most pixels of a picture
FRAME_PIXELS = (192 * 192, 224 * 224)  # of a frame of a clip
TEXT_SIZES = {
    "cross_attention_layers": [2, 6],
    "num_hidden_layers": 9,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rope_theta": 10000.0,
}
VISION_SIZES = {
    "deepstack_visual_indexes": [2],
    "depth": 6,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_heads": 8,
    "num_position_embeddings": 256,
    "out_hidden_size": 256,
}

# The pattern by which Qwen2 splits text into words; each digit is a word.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = r"""{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- set said -%}
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
{%- endset -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- said + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- said + '<|im_end|>' -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


def corpus():
    """Questions and answers about the drawn world, for the tokenizer.

    The texts of signs are left out, so that each of their letters is a token.
    """
    rng = random.Random(SEED)
    for _ in range(4000):
        picture, clip = world.random_picture(rng, sign_share=0), world.random_clip(rng)
        times = questions.sampled_times(clip, rng.choice((1, 2)))
        asked = [questions.ask_picture(task, picture, rng) for task in questions.PICTURE_TASKS]
        asked += [questions.ask_clip(task, clip, times, rng) for task in questions.CLIP_TASKS]
        asked += [questions.ask_images([picture], rng)]
        yield from (text for question in asked if question is not None for text in (question.prompt, question.answer))
        clip = watching.watched_clip(rng, rng.randint(6, 20))
        script = watching.random_script(rng, clip, [float(second) for second in range(int(clip.seconds))])
        yield from (request.prompt for request in script.requests)
    frame = ("system\n", "user\n", "assistant\n", "thinking", "answer", "You are a helpful assistant.\n")
    said = SYSTEM_PROMPT.replace(SILENCE, ""), watching.NOT_YET, "; "
    yield from (', and the text "', *frame, *said) * 20


def build_tokenizer():
    """A byte-level BPE of the corpus, built like Qwen2TokenizerFast, with the special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer):
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): {"content": text, **token} for text in SPECIAL_TOKENS
        },
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


def model_config(tokenizer):
    """The project's config.json with the sizes of nano and the ids of this tokenizer."""
    config = read_json(PROJECT / "config.json")
    config["text_config"] |= {
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 32768,
        "rope_scaling": config["text_config"]["rope_scaling"] | {"mrope_section": [6, 5, 5]},
        **TEXT_SIZES,
    }
    config["vision_config"] |= VISION_SIZES
    for name in ("image", "video"):
        config[f"{name}_token_id"] = tokenizer.token_to_id(f"<|{name}_pad|>")
    for name in ("start", "end"):
        config[f"vision_{name}_token_id"] = tokenizer.token_to_id(f"<|vision_{name}|>")
    return config


def processor_settings(name, pixels):
    """The project's settings file `name`, with these (fewest, most) pixels."""
    settings = read_json(PROJECT / name)
    settings["size"] = dict(zip(("shortest_edge", "longest_edge"), pixels, strict=True))
    if "image_processor_type" in settings:
        # transformers 4.57 requires torchvision for class names that end in Fast, so the other released name is used
        settings["image_processor_type"] = "MossVLImageProcessor"
        settings["auto_map"]["AutoImageProcessor"] = "processing_moss_vl.MossVLImageProcessor"
    return settings


def write_folder(folder):
    """Writes all files of the checkpoint folder except the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in code_files():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(PROJECT / name, folder.resolve()))

    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")

    config = model_config(tokenizer)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        read_json(PROJECT / "generation_config.json")
        | {key: config["text_config"][key] for key in ("bos_token_id", "eos_token_id")},
    )
    write_json(folder / "preprocessor_config.json", processor_settings("preprocessor_config.json", PICTURE_PIXELS))
    write_json(
        folder / "video_preprocessor_config.json", processor_settings("video_preprocessor_config.json", FRAME_PIXELS)
    )


def weight_shapes(folder):
    """Name -> shape of the weights of the folder's model, sorted by name."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_MODULES_CACHE"] = cache  # transformers reads it when imported
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(config, trust_remote_code=True).state_dict()
    return {name: state[name].shape for name in sorted(state)}


def first_weights(shapes):
    """The initial weights of training.

    Matrices are normal with variance 1 / fan-in, but 0 if their output is added to the residual stream or gives the
    logits; norms and gates are 1, biases 0.
    """
    zero = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight", "lm_head.weight")
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("_gate") or "norm" in name and name.endswith(".weight"):
            weights[name] = torch.ones(shape)
        elif len(shape) < 2 or name.endswith(zero):
            weights[name] = torch.zeros(shape)
        elif "embed" in name and "patch" not in name:
            weights[name] = 0.3 * torch.randn(shape, generator=generator)
        else:
            weights[name] = torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
    return weights


def write_weights(folder, weights):
    """Writes model.safetensors in bfloat16."""
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    count, vocabulary = sum(tensor.numel() for tensor in weights.values()), weights["lm_head.weight"].shape[0]
    print(f"{folder}: {len(weights)} tensors, {count:,} parameters, {2 * count / 1e6:.1f} MB, vocabulary {vocabulary}")


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Write the checkpoint folder of moss-vl-nano.")
    parser.add_argument(
        "--output",
        type=Path,
        default=PROJECT / "checkpoints" / "moss-vl-nano",
        help="checkpoint folder to write (default: checkpoints/moss-vl-nano)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="model.safetensors of a run of train_nano.py (default: the initial weights of training)",
    )
    args = parser.parse_args()
    weights = load_file(args.weights) if args.weights else None  # read first: the file may lie in the output folder
    write_folder(args.output)
    shapes = weight_shapes(args.output)
    if weights is None:
        weights = first_weights(shapes)
    elif {name: tensor.shape for name, tensor in weights.items()} != shapes:
        parser.error(
            f"{args.weights} does not hold the tensors of this model; expected a model.safetensors of train_nano.py"
        )
    write_weights(args.output, weights)


if __name__ == "__main__":
    main()
