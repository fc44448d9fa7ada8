"""The parts of the model: which weights a run trains, as a whole or by adapters, and the model with them."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moss_vl.training.tuning_options import part_rates


PREFIX = re.compile(r"^(module\.|_orig_mod\.|base_model\.model\.)+")
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
GATES = ("cross_attn_attn_gate", "cross_attn_mlp_gate")


def plain_name(name: str) -> str:
    """The name of a parameter or module without what PEFT, DDP, FSDP and torch.compile add before it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return PREFIX.sub("", name)


def part_of(name: str, config) -> str:
    """The part (one of `tuning_options.PARTS`) of the parameter or module with this name."""
    name = plain_name(name)
    if name.startswith("model.visual.merger.") or name == "model.separator_token":
        return "merger"
    if name.startswith("model.visual."):
        return "vision"
    layer = re.match(r"model\.language_model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) in config.text_config.cross_attention_layers:
        return "cross"
    return "head" if name.startswith("lm_head") else "language"


def extra_of(name: str, config, parts) -> str | None:
    """Which of `tuning_options.EXTRAS` the parameter with this name is; None if it is none of them. Norms count in
    these parts only."""
    name = plain_name(name)
    if name.endswith(GATES):
        return "gates"
    if name == "model.separator_token":
        return "separator"
    if name == "model.language_model.embed_tokens.weight":
        return "embeddings"
    return "norms" if re.search(r"norm\w*(\.\d+)?\.(weight|bias)$", name) and part_of(name, config) in parts else None


def train_only(model, parts) -> None:
    """Makes the parameters of these parts trainable and freezes all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name, model.config) in parts)


def linear_layers(model, parts) -> list[str]:
    """Names of the linear layers of these parts, which adapters can be added to."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if part_of(name, model.config) in parts]


def lora_targets(model, parts, wanted=None) -> list[str]:
    """The linear layers of these parts whose last name, such as `q_proj`, is in `wanted` (None: all).

    Raises:
        ValueError: for a name that no layer has.
    """
    layers = linear_layers(model, parts)
    known = {name.rsplit(".", 1)[-1] for name in layers}
    for name in wanted or ():
        if name not in known:
            names = ", ".join(sorted(known))
            raise ValueError(f"--lora-targets: {name!r} is no linear layer of {', '.join(parts)}; known: {names}")
    return [name for name in layers if wanted is None or name.rsplit(".", 1)[-1] in wanted]


def check_model(args) -> None:
    """Builds the model without weights and raises ValueError if the options do not fit it."""
    folder = Path(args.checkpoint)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"--checkpoint {folder} is an adapter; merge it first with --merge {folder} --output DIR")
    config = AutoConfig.from_pretrained(args.checkpoint, trust_remote_code=True)
    if config.model_type != "moss_vl":
        raise ValueError(f"--checkpoint {args.checkpoint} is a {config.model_type}; expected moss_vl")
    # With whole parts, a tied head is trained with the embeddings.
    if config.tie_word_embeddings and "head" in args.train and (args.lora_rank or "language" not in args.train):
        raise ValueError(
            "--train head: this checkpoint ties its head to the embeddings (tie_word_embeddings); give language"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    if args.lora_rank:
        check_adapters(model, args)


def check_adapters(model, args) -> None:
    """Raises ValueError for adapters that the model cannot have, and for options that would act on no weight."""
    parts = {part_of(name, model.config) for name in lora_targets(model, args.train, args.lora_targets)}
    found = {name: extra_of(name, model.config, args.train) for name, _ in model.named_parameters()}
    for extra in args.lora_also:
        if extra not in found.values():
            raise ValueError(f"--lora-also {extra} has no effect: {', '.join(args.train)} has none; leave it out")
    parts |= {part_of(name, model.config) for name, extra in found.items() if extra in args.lora_also}
    for part in part_rates(args):
        if part not in parts:
            raise ValueError(f"--lr-{part} has no effect: no layer of {part} is among --lora-targets; leave it out")


def load_model(args):
    """The model with its parts trainable or frozen, or with new adapters. Whole parts are trained in float32."""
    options = {} if args.attn is None else {"attn_implementation": args.attn}
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True, dtype=dtype, **options)
    torch.manual_seed(args.seed)
    if args.lora_rank:
        return with_adapters(model, args)
    train_only(model, args.train)
    make_trained_float32(model, args)
    return model


def make_trained_float32(model, args) -> None:
    """Makes trained weights float32, for mixed precision. DeepSpeed makes its own float32 copies."""
    if args.deepspeed is None:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()


def count_trained(model) -> int:
    """The number of trained weights, also of a model that DeepSpeed has sharded."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)


def with_adapters(model, args):
    """The model as a PeftModel: new adapters in the parts to train, all other weights frozen but for --lora-also."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_targets(model, args.train, args.lora_targets),
        task_type="CAUSAL_LM",
    )
    config_of_model, model = model.config, get_peft_model(model, config)
    if args.lora_also:
        for name, parameter in model.named_parameters():
            if extra_of(name, config_of_model, args.train) in args.lora_also:
                parameter.requires_grad_(True)
        make_trained_float32(model, args)
    return model
