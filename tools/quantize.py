#!/usr/bin/env python3
"""Quantizes a checkpoint: python tools/quantize.py CHECKPOINT --to nf4|int8|fp8 --output FOLDER

The weights are read and written tensor by tensor, without a GPU and without the model in memory. The folder that is
written holds the code of this package, and loads like any other: `AutoModelForCausalLM.from_pretrained(FOLDER,
trust_remote_code=True)`. docs/quantization.md says which format to choose.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path


if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import moss_vl  # noqa: F401 - makes the root importable under this name

from moss_vl.tools.command_line import at_least, message_of
from moss_vl.tools.install_into import (
    InstallError,
    code_files,
    plan_changes,
    put,
    read_json,
    verify_checkpoint,
)


PROJECT = Path(__file__).resolve().parents[1]
PARTS = ("vision", "merger", "cross-attention", "cross-mlp", "head")
REPORT = "quantization_report.json"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt", ".gguf")
QUESTIONS = (
    {"images": ["data/example_image.jpg"], "prompt": "Describe the picture."},
    {"images": ["data/sample_a.jpg", "data/example_image.jpg"], "prompt": "What differs between the two pictures?"},
    {"prompt": "What is the difference between a picture and a video? Explain it in one sentence."},
)


# which layers


def meta_model(config):
    """The model without memory for its weights."""
    import torch

    from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration

    with torch.device("meta"):
        return MossVLForConditionalGeneration(config)


def linear_layers(model) -> list[str]:
    """Names of all linear layers of the model."""
    import torch

    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def part_of(name: str, config) -> str:
    """The part of the model that a linear layer belongs to: one of `PARTS`, or "text"."""
    if name.startswith("model.visual.merger."):
        return "merger"
    if name.startswith("model.visual."):
        return "vision"
    if name == "lm_head":
        return "head"
    if ".cross_attn." in name:
        return "cross-attention"
    return "cross-mlp" if layer_of(name) in config.text_config.cross_attention_layers else "text"


def layer_of(name: str) -> int | None:
    """The number of the decoder layer of a module; None outside the decoder."""
    prefix = "model.language_model.layers."
    return int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None


@dataclass(frozen=True)
class Choice:
    """What stays as it is.

    Attributes:
        parts: parts of the model, of `PARTS`.
        first, last: how many decoder layers at the start and at the end.
        names: parts of the names of modules.
    """

    parts: tuple[str, ...]
    first: int
    last: int
    names: tuple[str, ...] = ()

    def keeps(self, name: str, config) -> bool:
        layer, count = layer_of(name), config.text_config.num_hidden_layers
        return (
            part_of(name, config) in self.parts
            or (layer is not None and not self.first <= layer < count - self.last)
            or any(one in name for one in self.names)
        )


def fewest_names(kept: set[str], names: list[str], prefix: str = "") -> list[str]:
    """The kept ones of all linear layers in the fewest names: that of a module stands for all layers below it."""
    below = [name for name in names if not prefix or name == prefix or name.startswith(f"{prefix}.")]
    if prefix and kept.issuperset(below):
        return [prefix]
    if prefix and below == [prefix]:
        return []
    depth = prefix.count(".") + 1 if prefix else 0
    children = dict.fromkeys(".".join(name.split(".")[: depth + 1]) for name in below)
    return [found for child in children for found in fewest_names(kept, below, child)]


# writing


@dataclass
class Shards:
    """Writes tensors into files of a folder, of at most `most` bytes each. `names` are those of all weights."""

    folder: Path
    most: int
    names: list[str]
    tensors: dict = field(default_factory=dict)
    entries: dict[str, str] = field(default_factory=dict)  # for the metadata of the file
    files: list[list[str]] = field(default_factory=list)  # names of the tensors of each file
    bytes: int = 0  # of all tensors
    waiting: int = 0  # bytes of `tensors`

    def add(self, tensors: dict, entries: dict[str, str]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self.tensors and self.waiting + size > self.most:
            self.flush()
        # a copy: the tensors of an input file are pages of that file
        self.tensors |= {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        self.entries |= entries
        self.waiting, self.bytes = self.waiting + size, self.bytes + size

    def flush(self) -> None:
        from safetensors.torch import save_file

        from moss_vl.tools.quantized_formats import file_metadata

        save_file(self.tensors, self._part(len(self.files)), metadata=file_metadata(self.entries, self.names))
        self.files.append(list(self.tensors))
        self.tensors, self.entries, self.waiting = {}, {}, 0

    def finish(self) -> None:
        """Writes the last file and the index, under the names that transformers expects."""
        if self.tensors:
            self.flush()
        if len(self.files) == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        index = {}
        for number, names in enumerate(self.files):
            file = f"model-{number + 1:05}-of-{len(self.files):05}.safetensors"
            self._part(number).rename(self.folder / file)
            index |= dict.fromkeys(names, file)
        content = {"metadata": {"total_size": self.bytes}, "weight_map": index}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")

    def _part(self, number: int) -> Path:
        return self.folder / f".part-{number}"


def write_weights(files: list[Path], shards: Shards, quantized: set[str], chosen, dtype) -> dict[str, float]:
    """Copies all tensors, and quantizes the weights of the layers in `quantized`.

    Returns:
        The relative error of each quantized weight, |W - W'| / |W|.
    """
    from tqdm import tqdm

    from moss_vl.tools.checkpoint_weights import check_finite, opened

    errors, done = {}, 0
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="quantizing", file=sys.stderr) as progress:
        for file in files:
            with opened(file) as weights:
                for name in weights.keys():  # noqa: SIM118 - no iterator
                    tensor = check_finite(name, weights.get_tensor(name), "in the checkpoint, which is damaged")
                    size = tensor.numel() * tensor.element_size()
                    if dtype is not None and tensor.is_floating_point():
                        why = f"in {dtype}, which cannot hold so large ones; choose another --dtype"
                        tensor = check_finite(name, tensor.to(dtype), why)
                    if name.removesuffix(".weight") in quantized and name.endswith(".weight"):
                        tensors, entries, read = chosen.encode(name, tensor)
                        check_finite(name, read, "in this format; keep the layer with --keep-names, or take another")
                        errors[name.removesuffix(".weight")] = relative_error(read, tensor)
                    else:
                        tensors, entries = {name: tensor}, {name: chosen.plain_entry} if chosen.plain_entry else {}
                    shards.add(tensors, entries)
                    progress.update(size)
            done += file.stat().st_size  # with the header
            progress.update(done - progress.n)
    if absent := sorted(quantized - errors.keys()):
        raise ValueError(f"the weights lack {absent[0]}.weight, which config.json asks for")
    shards.finish()
    return errors


def relative_error(got, expected) -> float:
    got, expected = got.float(), expected.float()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def copy_other_files(checkpoint: Path, output: Path) -> None:
    """Copies tokenizer, settings and so on, but neither weights nor code, and installs the code of this package."""
    skipped = {*code_files(), "config.json", REPORT}
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name not in skipped:
            if not path.name.endswith(WEIGHTS):
                shutil.copyfile(path, output / path.name)


def install_code(output: Path) -> None:
    for change in plan_changes(output, link=False):
        put(output / change.name, change.content, None)


# comparing


def compare(checkpoint: Path, output: Path, examine: int, dtype) -> dict:
    """Logits of both models for `QUESTIONS`, and their results in the examination of moss-vl-nano."""
    import torch

    before, after = (measure(folder, examine, dtype) for folder in (checkpoint, output))
    result = {}
    first, second = torch.cat(before["logits"]).float(), torch.cat(after["logits"]).float()
    first, second = first.log_softmax(-1), second.log_softmax(-1)
    result["logits"] = {
        "tokens": len(first),
        "relative error": relative_error(second, first),
        "KL divergence": float((first.exp() * (first - second)).sum(-1).mean()),
        "same most likely token": float((first.argmax(-1) == second.argmax(-1)).float().mean()),
    }
    if examine:
        result["examination"] = {
            task: {"before": before["examination"][task], "after": after["examination"][task]}
            for task in before["examination"]
        }
    return result


def measure(folder: Path, examine: int, dtype) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    logits = []
    for question in QUESTIONS:
        images = [str(PROJECT / path) for path in question.get("images", ())]
        inputs = processor(
            text="<|image|>" * len(images) + question["prompt"], images=images or None, return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            logits.append(model(**inputs).logits[0].cpu())
    return {"logits": logits, "examination": examined(model, processor, examine) if examine else {}}


def examined(model, processor, count: int) -> dict[str, float]:
    """The share of right answers per task of the examination of moss-vl-nano."""
    from moss_vl.training.nano import evaluate

    asked = evaluate.examination(evaluate.TASKS, count, 0, 1)
    items = [item for columns in asked.values() for item in columns[""]]
    answers: dict[str, list] = {}
    for item, answer in evaluate.ask(model, processor, items, 32, 0):
        answers.setdefault(item.question.task, []).append((item, answer))
    return {task: evaluate.average(pairs)["exact"] for task, pairs in answers.items()}


def fits_into_memory(size: int) -> bool:
    """Whether two such models, one after the other, leave half of the free memory."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return False
    return size < free / 2


def report_lines(report: dict) -> list[str]:
    before, after = report["bytes before"], report["bytes after"]
    lines = [
        f"{report['quantized']} of {report['linear layers']} linear layers quantized to {report['format']}",
        f"{before / 1e9:.3f} GB -> {after / 1e9:.3f} GB in {report['files']} file(s)",
        f"relative error of the quantized weights: {report['weights']['mean error']:.4f} on average, at most "
        f"{report['weights']['largest error']:.4f} ({report['weights']['of']})",
    ]
    if isinstance(report["logits"], str):
        return [*lines, f"logits: {report['logits']}"]
    lines.append("logits: " + ", ".join(f"{name} {value:.4g}" for name, value in report["logits"].items()))
    for task, row in report.get("examination", {}).items():
        lines.append(f"  {task}: {row['before']:.1%} -> {row['after']:.1%}")
    return lines


# the command


@dataclass(frozen=True)
class Plan:
    """What is written, decided before anything is.

    Attributes:
        content: the checkpoint's config.json.
        format: what is written for a weight.
        name: of the format and its library.
        names: all linear layers.
        kept: those that are not quantized.
        files: the weights of the checkpoint.
        weights: the names of all weights in the files.
        can_read: whether the package is installed with which transformers reads the result.
    """

    content: dict
    format: "Format"  # noqa: F821
    name: str
    names: list[str]
    kept: set[str]
    files: list[Path]
    weights: list[str]
    can_read: bool

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def plan_quantization(args) -> Plan:
    """Raises ValueError or InstallError for what cannot be done."""
    from moss_vl.configuration_moss_vl import MossVLConfig
    from moss_vl.tools.checkpoint_weights import check_weights, weight_files

    if args.examine and importlib.util.find_spec("moss_vl.training") is None:
        raise ValueError(
            "--examine needs the training code, which is not installed; run tools/quantize.py of a checkout"
        )
    name, chosen = choose_format(args.to, args.library)
    can_read = importlib.util.find_spec(chosen.package[1]) is not None
    if chosen.writes and not can_read:
        raise ValueError(f"{chosen.package[0]} is not installed; install it by: pip install {chosen.package[0]}")
    verify_checkpoint(args.checkpoint)
    content = read_json(args.checkpoint / "config.json")
    if content.get("quantization_config") is not None:
        raise ValueError(f"{args.checkpoint} is quantized already; expected the checkpoint that it was made from")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"--output {args.output} exists and is not an empty folder; name a new one")
    config = MossVLConfig(**content)
    choice = choose_layers(args, chosen, config)
    model = meta_model(config)
    names = linear_layers(model)
    for one in choice.names:
        if not any(one in name for name in names):
            raise ValueError(f"--keep-names {one}: no linear layer has this in its name, such as {names[-2]}")
    kept = {name for name in names if choice.keeps(name, config)}
    if len(kept) == len(names):
        raise ValueError(
            f"nothing is left to quantize: {config.text_config.num_hidden_layers} decoder layers, {choice.first} kept "
            f"at the start and {choice.last} at the end; lower --keep-first and --keep-last"
        )
    files = weight_files(args.checkpoint)
    weights = check_weights(files, model, config.tie_word_embeddings)
    return Plan(content, chosen, name, names, kept, files, weights, can_read)


def choose_format(to: str, library: str | None):
    """The name of a format with its library, and the format."""
    import transformers

    from moss_vl.tools.quantized_formats import FORMATS

    libraries = [known for name, known in FORMATS if name == to]
    library = libraries[0] if library is None else library
    if library not in libraries:
        raise ValueError(f"--library {library} does not write {to}; expected one of: {', '.join(libraries)}")
    chosen = FORMATS[to, library]
    if int(transformers.__version__.split(".")[0]) < chosen.transformers:
        raise ValueError(
            f"transformers {transformers.__version__} cannot read {to} of {library}; expected transformers "
            f"{chosen.transformers} or --library {libraries[0]}"
        )
    return f"{to} ({library})", chosen


def quantize(args) -> dict:
    """Writes the folder, or nothing if that fails; returns the report."""
    plan = plan_quantization(args)
    made = not args.output.exists()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        shards, errors = write_folder(args, plan)
    except BaseException:
        shutil.rmtree(args.output)
        if not made:
            args.output.mkdir()
        raise
    worst = max(errors, key=errors.get)
    report = {
        "checkpoint": str(args.checkpoint),
        "format": plan.name,
        "linear layers": len(plan.names),
        "quantized": len(errors),
        "kept": fewest_names(plan.kept, plan.names),
        "bytes before": plan.bytes,
        "bytes after": shards.bytes,
        "files": len(shards.files),
        "weights": {"mean error": sum(errors.values()) / len(errors), "largest error": errors[worst], "of": worst},
        "logits": "not compared",
    }
    write_report(args.output, report)  # also if the comparison is interrupted
    try:
        report |= compared(args, plan)
    except Exception as error:
        if args.compare == "yes" or args.examine:
            raise ValueError(f"{args.output} is written, but was not compared: {message_of(error)}") from error
        report["logits"] = f"not compared: {message_of(error)}"
    write_report(args.output, report)
    return report


def write_report(output: Path, report: dict) -> None:
    (output / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def write_folder(args, plan: Plan) -> tuple[Shards, dict[str, float]]:
    """Writes everything but the report; config.json comes last."""
    import torch

    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    shards = Shards(args.output, int(args.shard_gb * 1e9), plan.weights)
    with torch.no_grad():
        errors = write_weights(plan.files, shards, set(plan.names) - plan.kept, plan.format, dtype)
    copy_other_files(args.checkpoint, args.output)
    if args.cache_8_bits:
        ask_for_8_bit_cache(args.output)
    content = dict(plan.content)
    if dtype is not None:
        content["dtype" if "dtype" in content else "torch_dtype"] = args.dtype
    kept = [name for name in plan.names if name in plan.kept]
    content["quantization_config"] = plan.format.config(fewest_names(plan.kept, plan.names), kept)
    put(args.output / "config.json", (json.dumps(content, indent=2) + "\n").encode(), None)
    install_code(args.output)
    return shards, errors


def choose_layers(args, chosen, config) -> Choice:
    """What stays as it is, by the options and the defaults of the format."""
    if args.keep is not None and "none" in args.keep and len(args.keep) > 1:
        raise ValueError(f"--keep {' '.join(args.keep)}: none goes alone")
    default = round(config.text_config.num_hidden_layers * chosen.ends)
    default = max(1, default) if chosen.ends else 0
    return Choice(
        parts=chosen.keeps if args.keep is None else tuple(part for part in args.keep if part != "none"),
        first=default if args.keep_first is None else args.keep_first,
        last=default if args.keep_last is None else args.keep_last,
        names=tuple(args.keep_names),
    )


def compared(args, plan: Plan) -> dict:
    """The entries of the report that need both models."""
    import torch

    if args.compare == "no" and not args.examine:
        return {}
    if not plan.can_read:
        return {"logits": f"not compared: {plan.format.package[0]} is not installed"}
    if args.compare == "auto" and not args.examine and not fits_into_memory(plan.bytes):
        return {"logits": f"not compared: {plan.bytes / 1e9:.1f} GB of weights need more memory; see --compare"}
    return compare(args.checkpoint, args.output, args.examine, torch.bfloat16)


def ask_for_8_bit_cache(output: Path) -> None:
    """Makes `generation_config.json` ask for keys and values in 8 bits, by hqq."""
    path = output / "generation_config.json"
    content = read_json(path) if path.is_file() else {}
    options = {"axis_key": 0, "axis_value": 0, "q_group_size": 64, "residual_length": 128}
    cache = {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", "nbits": 8, **options}}
    put(path, (json.dumps(content | cache, indent=2) + "\n").encode(), None)


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Quantize a MOSS-VL checkpoint, tensor by tensor, without a GPU.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. After 1 and 130 nothing is written, "
        "except a whole folder if only the comparison failed or was interrupted.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder with config.json and weights")
    parser.add_argument("--to", required=True, choices=("nf4", "int8", "fp8"))
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument("--library", choices=("bitsandbytes", "torchao", "compressed-tensors"))
    parser.add_argument(
        "--keep",
        nargs="+",
        choices=(*PARTS, "none"),
        metavar="PART",
        help=f"parts that are not quantized, of: {', '.join(PARTS)}; none: no part. Default: as in released "
        "checkpoints, all, but for nf4 and int8 without cross-mlp",
    )
    layers = "decoder layers that are not quantized at the {}; default: a twelfth for nf4 and int8, none for fp8"
    parser.add_argument("--keep-first", type=at_least(int, 0), metavar="N", help=layers.format("start"))
    parser.add_argument("--keep-last", type=at_least(int, 0), metavar="N", help=layers.format("end"))
    parser.add_argument(
        "--keep-names", nargs="+", default=(), metavar="NAME", help="keep layers with one of these in their names"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "keep"),
        default="bfloat16",
        help="of what is not quantized; keep: as in the checkpoint",
    )
    parser.add_argument("--cache-8-bits", action="store_true", help="ask for an 8-bit cache in generation_config.json")
    parser.add_argument(
        "--shard-gb", type=at_least(float, 0.001), default=2.0, help="most GB per file, and about the memory used"
    )
    parser.add_argument(
        "--compare",
        choices=("auto", "yes", "no"),
        default="auto",
        help="load both models and compare their logits; auto: if half of the free memory holds the checkpoint",
    )
    parser.add_argument(
        "--examine", type=at_least(int, 0), default=0, metavar="N", help="moss-vl-nano: N questions per task to both"
    )
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    args = parse(arguments)
    try:
        report = quantize(args)
    except (ValueError, OSError, InstallError) as error:
        words = str(error) if isinstance(error, InstallError) else message_of(error)
        print(f"quantize.py: {words}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quantize.py: interrupted", file=sys.stderr)
        return 130
    print("\n".join(report_lines(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
