"""Memory of the 11B model after `tools/quantize.py`, by formula: python benchmarks/quantized.py

Prints the tables of docs/quantization.md.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.measuring import ROOT, table
from moss_vl.benchmarks.memory import DRIVER, frames_that_fit
from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration
from moss_vl.tools.quantize import PARTS, choose_layers, parse, part_of
from moss_vl.tools.quantized_formats import FORMATS


class Setting(NamedTuple):
    """A row of the table: memory of the GPU in GB, arguments of tools/quantize.py, whether embeddings and head are in
    CPU memory, `vision_chunked_length`."""

    memory: int
    arguments: str
    offloaded: bool = False
    chunk: int = 8


ALL_LAYERS = "--keep-first 0 --keep-last 0"
SETTINGS = (
    Setting(8, f"--to nf4 --keep merger head {ALL_LAYERS}", True, 2),
    Setting(12, f"--to nf4 --keep vision head {ALL_LAYERS}"),
    Setting(12, f"--to nf4 --keep vision merger cross-attention head {ALL_LAYERS}"),
    Setting(16, "--to nf4"),
    Setting(24, "--to nf4"),
    Setting(24, "--to int8"),
    Setting(24, "--to fp8"),
)


class Sizes(NamedTuple):
    """What a quantized model takes, in bytes.

    Attributes:
        layers: how many linear layers are quantized.
        weights: all weights.
        largest: the largest quantized layer after dequantization, as the layer is when it is computed.
        offloadable: embeddings, and the head if it is not quantized.
    """

    layers: int
    weights: int
    largest: int
    offloadable: int


class QuantizedSizes:
    """The sizes of the 11B model for arguments of tools/quantize.py."""

    def __init__(self):
        self.config = MossVLConfig.from_pretrained(ROOT)
        with torch.device("meta"):
            model = MossVLForConditionalGeneration(self.config)
        self.total = 2 * model.num_parameters()
        self.embeddings = 2 * model.get_input_embeddings().weight.numel()
        linear = ((name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear))
        self.shapes = {name: tuple(part.weight.shape) for name, part in linear}

    def of(self, arguments: str) -> Sizes:
        args = parse(["CHECKPOINT", "--output", "FOLDER", *arguments.split()])
        chosen = next(one for (name, _), one in FORMATS.items() if name == args.to)
        choice = choose_layers(args, chosen, self.config)
        shapes = {name: shape for name, shape in self.shapes.items() if not choice.keeps(name, self.config)}
        weights = self.total + sum(quantized_bytes(args.to, *shape) - 2 * rows(shape) for shape in shapes.values())
        head = 0 if "lm_head" in shapes else 2 * rows(self.shapes["lm_head"])
        return Sizes(len(shapes), round(weights), 2 * max(map(rows, shapes.values())), self.embeddings + head)

    def part_bytes(self, part: str) -> int:
        return 2 * sum(rows(shape) for name, shape in self.shapes.items() if part_of(name, self.config) == part)


def rows(shape: tuple[int, int]) -> int:
    """The number of values of a weight."""
    return shape[0] * shape[1]


def quantized_bytes(to: str, out: int, inputs: int) -> float:
    """Bytes of a weight [out, inputs]. NF4: half a byte per value, a byte per block of 64, 4 bytes per 256 blocks."""
    values = out * inputs
    return {"nf4": values * (1 / 2 + 1 / 64 + 4 / (64 * 256)), "int8": values + 4 * out, "fp8": values + 2 * out}[to]


def choice_table() -> str:
    """What to choose for the memory of a GPU."""
    sizes, lines = QuantizedSizes(), []
    for setting in SETTINGS:
        found = sizes.of(setting.arguments)
        on_gpu = found.weights - (found.offloadable if setting.offloaded else 0)
        free = (1 - DRIVER) * setting.memory * 1e9 - on_gpu - found.largest
        frames = [frames_that_fit(sizes.config, free, int8, setting.chunk) for int8 in (False, True)]
        where = " (embeddings and head in CPU memory)" if setting.offloaded else ""
        lines.append(
            (
                f"{setting.memory} GB",
                f"`{setting.arguments}`{where}",
                found.layers,
                f"{on_gpu / 1e9:.1f}",
                f"{found.largest / 1e9:.1f}",
                setting.chunk,
                *(f"{count:,}" for count in frames),
            )
        )
    head = ("GPU", "`tools/quantize.py`", "layers", "weights, GB", "largest layer, GB", "chunk", "frames")
    return table((*head, "with a vision cache in 8 bits"), lines)


def parts_table() -> str:
    """The parts of the 11B model that can be kept."""
    sizes = QuantizedSizes()
    lines = [(f"`{part}`", f"{sizes.part_bytes(part) / 1e9:.2f}") for part in (*PARTS, "text")]
    lines[-1] = ("the other decoder layers", lines[-1][1])
    return table(
        ("part", "GB in bfloat16"), [*lines, ("embeddings (never quantized)", f"{sizes.embeddings / 1e9:.2f}")]
    )


if __name__ == "__main__":
    print(f"{parts_table()}\n\n{choice_table()}")
