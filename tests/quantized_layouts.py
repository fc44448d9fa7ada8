"""Small folders in the layouts of released quantized checkpoints (FP8, NF4, 8-bit cache), with random weights, written
by compressed-tensors and bitsandbytes."""

import json
import re
import shutil

import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny import make_model

from moss_vl.tools.install_into import code_files


LAYERS, CROSS = 12, [2, 6, 10]
PROJECTIONS = [f"self_attn.{one}_proj" for one in "qkvo"] + [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
LAYER = "model.language_model.layers"
# The modules that the layouts quantize, written out: FP8 the self-attention layers, NF4 all but cross-attention, the
# first four layers and the last four.
FP8_MODULES = {f"{LAYER}.{index}.{name}" for index in (0, 1, 3, 4, 5, 7, 8, 9, 11) for name in PROJECTIONS}
NF4_MODULES = {f"{LAYER}.{index}.{name}" for index in (4, 5, 7) for name in PROJECTIONS} | {
    f"{LAYER}.6.mlp.{one}_proj" for one in ("gate", "up", "down")
}
KV8 = {
    "cache_implementation": "quantized",
    "cache_config": {
        "backend": "hqq",
        "nbits": 8,
        "axis_key": 0,
        "axis_value": 0,
        "q_group_size": 64,
        "residual_length": 128,
    },
}


def write_plain(folder):
    """A folder with the code and a random model in bfloat16 of 12 layers, 3 of them cross-attention."""
    text = {"num_hidden_layers": LAYERS, "cross_attention_layers": CROSS, "hidden_size": 128, "intermediate_size": 192}
    model = make_model(text=text, vision={"out_hidden_size": 128}).to(torch.bfloat16)
    model.save_pretrained(folder)
    for name in code_files():
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def copied(plain, folder):
    """A copy of a folder, and its tensors."""
    shutil.copytree(plain, folder)
    return folder, load_file(folder / "model.safetensors")


def edit_json(path, **values):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | values))


def write_fp8(plain, folder):
    """FP8_DYNAMIC of compressed-tensors: a scale for each output channel. As in released folders, a second set of
    targets has the fused names of SGLang, which no module has."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    folder, tensors = copied(plain, folder)
    layers = "|".join(sorted({name.split(".")[3] for name in FP8_MODULES}, key=int))
    targets = [rf"re:model\.language_model\.layers\.({layers})\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)$"]
    fused = [rf"re:model\.layers\.({layers})\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)$"]
    model = torch.nn.ModuleDict()  # a tree of linear layers with the names of the checkpoint
    for name in FP8_MODULES:
        put_linear(model, name, tensors[f"{name}.weight"])
    scheme = preset_name_to_scheme("FP8_DYNAMIC", targets)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for name in FP8_MODULES:
        module = model.get_submodule(name)
        scale = module.weight.detach().float().abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    compressor.update_config(str(folder))
    compressed = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors | compressed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["targets"] += fused
    config["packed_modules_mapping"] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    edit_json(folder / "config.json", quantization_config=config)
    return folder


def put_linear(tree, name, weight):
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in tree:
            tree[parent] = torch.nn.ModuleDict()
        tree = tree[parent]
    tree[last] = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    tree[last].weight.data.copy_(weight)


def write_nf4(plain, folder):
    """NF4 of bitsandbytes with double quantization. The skip list has the names of released folders."""
    from bitsandbytes.nn import Linear4bit

    folder, tensors = copied(plain, folder)
    for name in sorted(NF4_MODULES):
        weight = tensors.pop(f"{name}.weight")
        linear = Linear4bit(*reversed(weight.shape), bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        linear.load_state_dict({"weight": weight})
        linear = linear.to("cpu")  # quantizes
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in linear.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ends = [*range(4), *range(LAYERS - 4, LAYERS)]
    layers = [f"{prefix}.{index}" for prefix in (LAYER, "model.language_model.model.layers") for index in ends]
    config = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["model.visual", "cross_attn", "lm_head", *layers],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    edit_json(folder / "config.json", quantization_config=config)
    return folder


def write_kv8(folder):
    """Makes a folder ask for an 8-bit cache."""
    edit_json(folder / "generation_config.json", **KV8)
    return folder


def dequantized(folder) -> dict[str, torch.Tensor]:
    """The tensors of a quantized folder under the names of the plain model, by the formulas of the formats."""
    tensors = load_file(folder / "model.safetensors")
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:  # W = q s, a scale per row
            tensor = (tensor.float() * tensors[f"{name}_scale"].float()).to(torch.bfloat16)
        elif any(other.startswith(f"{name}.quant_state") for other in tensors):
            stats = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
            tensor = dequantized_nf4(stats, tensor)
        elif re.search(r"\.weight\.", name):
            continue
        plain[name] = tensor
    return plain


def in_fp8(states: torch.Tensor) -> torch.Tensor:
    """States [..., D] rounded to float8_e4m3fn, with a scale per token. Division in their own dtype makes ties."""
    scale = states.abs().amax(dim=-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (states / scale).to(torch.float8_e4m3fn).to(states.dtype) * scale


def dequantized_nf4(stats: dict[str, torch.Tensor], packed: torch.Tensor) -> torch.Tensor:
    """W = code[q] a for blocks of 64 values; a = b c[r] + mean is itself quantized in blocks of 256. High nibble first
    (QLoRA, arXiv 2305.14314, sections 3 and 4)."""
    stats = {key.split(".weight.")[1]: value for key, value in stats.items()}
    state = json.loads(bytes(stats["quant_state.bitsandbytes__nf4"].tolist()))
    absmax = stats["nested_quant_map"][stats["absmax"].long()]
    absmax = absmax.float() * stats["nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(absmax)]
    absmax = absmax + state["nested_offset"]
    packed = packed.flatten().long()
    values = stats["quant_map"][torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    values = values * absmax.repeat_interleave(state["blocksize"])[: len(values)]
    return values.reshape(state["shape"]).to(torch.bfloat16)
