"""The weights of a checkpoint: its safetensors files, and whether they are those of the model in its config.json."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moss_vl.checks import shorten
from moss_vl.tools.install_into import read_json


def weight_files(checkpoint: Path) -> list[Path]:
    """Raises ValueError unless the files that the index names lie in the folder."""
    index, names = checkpoint / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        found = read_json(index).get("weight_map")
        names = set(map(str, found.values())) if isinstance(found, dict) else set()
        wrong = [name for name in names if Path(name).name != name]
        if wrong or not names:
            got = wrong[0] if wrong else found
            raise ValueError(f"{index}: expected a `weight_map` to files of this folder, got {shorten(got)}")
    if missing := [name for name in sorted(names) if not (checkpoint / name).is_file()]:
        raise ValueError(f"{checkpoint} lacks {missing[0]}; expected the weights as safetensors files")
    return [checkpoint / name for name in sorted(names)]


@contextmanager
def opened(file: Path) -> Iterator:
    """The file, open. Raises ValueError if it is no whole safetensors file."""
    try:
        with safe_open(str(file), framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}; download it again") from error


def check_weights(files: list[Path], model: torch.nn.Module, tied: bool) -> list[str]:
    """Checks names, shapes and dtypes by the headers of the files.

    Args:
        model: that of config.json, on the meta device.
        tied: whether the head may be left out, because it is the embedding.

    Returns:
        The names of all weights.

    Raises:
        ValueError: for the first tensor that is given twice, that lacks, or that has another shape or no float dtype.
    """
    expected, names = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}, []
    for file in files:
        with opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118 - no iterator
                part = weights.get_slice(name)
                shape, dtype = list(part.get_shape()), part.get_dtype()
                if name in expected and (shape != expected[name] or dtype not in ("F64", "F32", "F16", "BF16")):
                    raise ValueError(
                        f"{file}: {name} has shape {shape} and dtype {dtype}; by config.json it has shape "
                        f"{expected[name]}, and its dtype is float32, bfloat16 or float16"
                    )
                names.append(name)
    if twice := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
        raise ValueError(f"{twice[0]} is in several of the files {', '.join(file.name for file in files)}")
    absent = expected.keys() - set(names) - ({"lm_head.weight"} if tied else set())
    if absent:
        raise ValueError(f"the weights lack {min(absent)}, which config.json asks for")
    return names


def check_finite(name: str, tensor: torch.Tensor, why: str) -> torch.Tensor:
    """The tensor. Raises ValueError if it holds infinity or NaN."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{name} has numbers that are infinite or NaN {why}")
    return tensor
