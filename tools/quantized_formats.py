"""The formats that `tools/quantize.py` writes: one linear layer's weight to the tensors of a file, and the
`quantization_config` with which transformers reads them.

| format | library | a weight W becomes |
|---|---|---|
| nf4 | bitsandbytes | 4-bit codes of blocks of 64 values, whose scales are quantized again (QLoRA, arXiv 2305.14314) |
| int8 | bitsandbytes | W = q s / 127, s the largest absolute value of a row (LLM.int8(), arXiv 2208.07339) |
| int8 | torchao | W = q s, s a scale per row; transformers 5 alone reads it |
| fp8 | compressed-tensors | FP8_DYNAMIC: W = q s, q in float8_e4m3fn, s a scale per row; a scale per input token |
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


# tensors, entries for the metadata of the file, the weight that they stand for
Encoded = tuple[dict[str, torch.Tensor], dict[str, str], torch.Tensor]


@dataclass(frozen=True)
class Format:
    """A format of a library.

    Attributes:
        encode: (name of the weight, weight [out, in] on the CPU) -> what is written for it.
        config: (linear layers that are kept, in the fewest names; all their names) -> `quantization_config`.
        package: the package that reads the folder, as pip and as Python know it.
        writes: whether the package is needed for writing as well.
        keeps: parts of the model that are kept unless others are named, as in released checkpoints.
        ends: share of the decoder layers that are kept at its start, and at its end.
        plain_entry: entry for the metadata of the file of a tensor that is not quantized, if the library wants one.
        transformers: the first version of transformers that reads it.
    """

    encode: Callable[[str, torch.Tensor], Encoded]
    config: Callable[[Sequence[str], Sequence[str]], dict]
    package: tuple[str, str]
    writes: bool
    keeps: tuple[str, ...]
    ends: float
    plain_entry: str | None = None
    transformers: int = 4


def encode_nf4(name: str, weight: torch.Tensor) -> Encoded:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    stats = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {name: codes, **stats}, {}, dequantize_4bit(codes, state)


def encode_int8(name: str, weight: torch.Tensor) -> Encoded:
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, scale, _ = int8_vectorwise_quant(weight.half())
    stem = name.removesuffix("weight")
    tensors = {name: codes, f"{stem}SCB": scale, f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, {}, codes.float() * scale[:, None] / 127


def encode_torchao(name: str, weight: torch.Tensor) -> Encoded:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    quantize_(linear, torchao_config())
    tensors, metadata = flatten_tensor_state_dict({name: linear.weight})
    return tensors, {name: metadata[name]}, linear.weight.dequantize()


def torchao_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(version=2)


def encode_fp8(name: str, weight: torch.Tensor) -> Encoded:
    largest = torch.finfo(torch.float8_e4m3fn).max
    wide = weight.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / largest).to(weight.dtype)
    scale = scale.clamp(min=torch.finfo(weight.dtype).tiny)  # a row of zeros
    codes = (wide / scale.float()).clamp(-largest, largest).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scale}, {}, codes.float() * scale.float()


def bitsandbytes_config(in_4_bits: bool) -> Callable:
    def config(kept: Sequence[str], names: Sequence[str]) -> dict:
        four = {
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": in_4_bits,
            "load_in_8bit": not in_4_bits,
            **(four if in_4_bits else {"llm_int8_has_fp16_weight": False, "llm_int8_threshold": 6.0}),
            "llm_int8_skip_modules": list(kept),
        }

    return config


def torchao_settings(kept: Sequence[str], names: Sequence[str]) -> dict:
    from transformers import TorchAoConfig

    settings = TorchAoConfig(torchao_config(), modules_to_not_convert=list(kept)).to_dict()
    return json.loads(json.dumps(settings, default=str))


def fp8_config(kept: Sequence[str], names: Sequence[str]) -> dict:
    eight = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": "float-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(names),  # compressed-tensors compares whole names
        "kv_cache_scheme": None,
    }


KEPT = ("vision", "merger", "cross-attention", "head")
FORMATS = {
    ("nf4", "bitsandbytes"): Format(
        encode_nf4, bitsandbytes_config(True), ("bitsandbytes", "bitsandbytes"), True, KEPT, 1 / 12
    ),
    ("int8", "bitsandbytes"): Format(
        encode_int8, bitsandbytes_config(False), ("bitsandbytes", "bitsandbytes"), True, KEPT, 1 / 12
    ),
    ("int8", "torchao"): Format(
        encode_torchao, torchao_settings, ("torchao", "torchao"), True, KEPT, 1 / 12, '{"_type": "Tensor"}', 5
    ),
    ("fp8", "compressed-tensors"): Format(
        encode_fp8, fp8_config, ("compressed-tensors", "compressed_tensors"), False, (*KEPT, "cross-mlp"), 0
    ),
}


def file_metadata(entries: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    """The metadata of a file, from the entries of its weights. For torchao they have the names of the weights in all
    files as well: transformers joins the entries of all files, but takes the names from one of them."""
    return {"format": "pt", **entries, **({"tensor_names": json.dumps(list(names))} if entries else {})}
