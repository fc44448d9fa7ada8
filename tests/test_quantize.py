"""tools/quantize.py: what it writes loads, computes what was meant, and was written shard by shard.

The packages are in requirements-quantize.txt; without them most tests are skipped.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
import quantized_layouts as layouts
import torch
import transformers
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import Sample, make_model
from transformers import AutoModelForCausalLM

from moss_vl.benchmarks import quantized
from moss_vl.tools import quantize
from moss_vl.tools.quantized_formats import FORMATS, encode_fp8
from moss_vl.training.nano import evaluate


NANO = ROOT / "checkpoints/moss-vl-nano"
TRANSFORMERS = int(transformers.__version__.split(".")[0])
REASON = "{} is not installed; see requirements-quantize.txt"
# (format, library) -> relative error of a weight at most, and whether transformers 4 reads it
MATRIX = {
    ("nf4", "bitsandbytes"): (0.11, True),
    ("int8", "bitsandbytes"): (0.011, True),
    ("int8", "torchao"): (0.011, False),
    ("fp8", "compressed-tensors"): (0.03, True),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return layouts.write_plain(tmp_path_factory.mktemp("quantize") / "plain")


@pytest.fixture(scope="module", params=MATRIX, ids=" ".join)
def kind(request):
    package = FORMATS[request.param].package[1]
    pytest.importorskip(package, reason=REASON.format(package))
    if TRANSFORMERS < FORMATS[request.param].transformers:
        pytest.skip(f"transformers {transformers.__version__} does not read {' of '.join(request.param)}")
    return request.param


def run(checkpoint, output, *arguments, code=0, capsys=None):
    arguments = [str(checkpoint), "--output", str(output), "--compare", "no", *map(str, arguments)]
    assert quantize.main(arguments) == code
    return output if capsys is None else capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(kind, plain, tmp_path_factory):
    """A folder in several files."""
    output = tmp_path_factory.mktemp("quantized") / "model"
    return run(plain, output, "--to", kind[0], "--library", kind[1], "--shard-gb", 0.001)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)


def logits_of(model, sample):
    with torch.no_grad():
        return model(**sample.inputs()).logits.float()


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def report_of(folder):
    return json.loads((folder / quantize.REPORT).read_text())


def is_quantized(module) -> bool:
    """Whether a linear layer has another class of weights than torch's."""
    weight = module.weight
    return weight.dtype not in (torch.bfloat16, torch.float16) or type(weight.data) is not torch.Tensor


def quantized_layers(model) -> set[str]:
    return {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and is_quantized(module)
    }


def test_the_matrix_is_that_of_the_formats():
    assert MATRIX.keys() == FORMATS.keys()
    assert {kind for kind, (_, reads) in MATRIX.items() if not reads} == {
        kind for kind, one in FORMATS.items() if one.transformers > 4
    }


@pytest.mark.skipif(TRANSFORMERS < 5, reason="transformers 4 reads weights of hqq, in float32 alone")
def test_hqq_is_not_offered_because_transformers_cannot_read_it(plain):
    """If this fails, hqq can be added to the formats."""
    pytest.importorskip("hqq", reason=REASON.format("hqq"))
    with pytest.raises(NotImplementedError, match="HQQ"):
        AutoModelForCausalLM.from_pretrained(
            plain, trust_remote_code=True, quantization_config=transformers.HqqConfig(nbits=8)
        )


def test_a_folder_loads_and_computes_what_was_meant(kind, folder, plain):
    model, report = load(folder), report_of(folder)
    default = 0 if kind[0] == "fp8" else 1  # a twelfth of 12 layers
    assert quantized_layers(model) == {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.startswith(layouts.LAYER)
        and "cross_attn" not in name
        and default <= int(name.split(".")[3]) < layouts.LAYERS - default
        and not (kind[0] == "fp8" and int(name.split(".")[3]) in layouts.CROSS)
    }
    most, _ = MATRIX[kind]
    assert most / 3 < report["weights"]["mean error"] <= report["weights"]["largest error"] < most
    sample = Sample("ttFFFttttt", (3, 4, 4), seed=3)
    original = load(plain)
    expected, got = logits_of(original, sample), logits_of(model, sample)
    assert 0 < float((got - expected).norm() / expected.norm()) < 8 * most  # of the whole model
    # the same, from the outside: the weights of one layer alone
    name = f"{layouts.LAYER}.5.mlp.down_proj"
    states = torch.randn(2, 3, 192, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        one, other = (found.get_submodule(name)(states).float() for found in (model, original))
    assert float((one - other).norm() / other.norm()) < 1.5 * most + 0.01


def test_what_is_kept_is_unchanged(folder, plain):
    before, after = tensors_of(plain), tensors_of(folder)
    kept = report_of(folder)["kept"]
    assert {"model.visual", "lm_head", f"{layouts.LAYER}.2.cross_attn"} & set(kept)
    same_type = [name for name, tensor in before.items() if name in after and after[name].dtype == tensor.dtype]
    unchanged = [name for name in same_type if torch.equal(after[name], before[name])]
    for name in ("model.language_model.embed_tokens.weight", "model.separator_token", "lm_head.weight"):
        assert name in unchanged
    assert [name for name in before if name.startswith("model.visual.")] == [
        name for name in unchanged if name.startswith("model.visual.")
    ]
    assert {name for name in before if "cross_attn" in name} <= set(unchanged)


def test_the_files_and_their_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1 and set(index["weight_map"].values()) == set(files)
    for file in files:
        with safe_open(str(folder / file), framework="pt") as opened:
            assert set(opened.keys()) == {name for name, where in index["weight_map"].items() if where == file}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(folder).values())
    assert index["metadata"]["total_size"] == total == report_of(folder)["bytes after"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_parts_and_layers_can_be_chosen(tmp_path):
    pytest.importorskip("bitsandbytes", reason=REASON.format("bitsandbytes"))
    arguments = ["--to", "nf4", "--keep", "vision", "cross-attention", "--keep-first", 2, "--keep-last", 0]
    folder = run(NANO, tmp_path / "nano", *arguments, "--keep-names", "v_proj", "--cache-8-bits")
    names = quantized_layers(load(folder))
    assert "lm_head" in names and "model.visual.merger.linear_fc1" in names
    assert not [name for name in names if "visual.blocks" in name or "cross_attn" in name or "v_proj" in name]
    assert {int(name.split(".")[3]) for name in names if name.startswith(layouts.LAYER)} == set(range(2, 9))
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["cache_config"] == layouts.KV8["cache_config"] and "eos_token_id" in generation
    assert {path.name for path in NANO.iterdir()} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("to", ["nf4", "int8", "fp8"])
def test_the_tables_count_the_bytes_that_are_written(to, plain, tmp_path):
    kind = next(kind for kind in FORMATS if kind[0] == to)
    if FORMATS[kind].writes:
        pytest.importorskip(FORMATS[kind].package[1], reason=REASON.format(FORMATS[kind].package[1]))
    weight = torch.randn(256, 1024).to(torch.bfloat16)
    tensors, _, _ = FORMATS[kind].encode("a.weight", weight)
    fixed = sum(tensor.nbytes for name, tensor in tensors.items() if re.search("map|state|format", name))
    assert sum(tensor.nbytes for tensor in tensors.values()) - fixed == quantized.quantized_bytes(to, *weight.shape)


def test_fp8_rounds_as_compressed_tensors_does(plain, tmp_path):
    pytest.importorskip("compressed_tensors", reason=REASON.format("compressed_tensors"))
    theirs = load_file(layouts.write_fp8(plain, tmp_path / "fp8") / "model.safetensors")
    weights = load_file(plain / "model.safetensors")
    for name in layouts.FP8_MODULES:
        ours, _, read = encode_fp8(f"{name}.weight", weights[f"{name}.weight"])
        assert torch.equal(ours[f"{name}.weight_scale"], theirs[f"{name}.weight_scale"])
        their_read = theirs[f"{name}.weight"].float() * theirs[f"{name}.weight_scale"].float()
        error, their_error = ((one - weights[f"{name}.weight"].float()).norm() for one in (read, their_read))
        assert error <= their_error  # they divide in bfloat16, which makes ties


def test_weights_of_zeros_stay_zeros():
    _, _, read = encode_fp8("a.weight", torch.zeros(4, 64, dtype=torch.bfloat16))
    assert torch.equal(read, torch.zeros(4, 64))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_is_that_of_a_file_and_not_of_the_model(tmp_path, monkeypatch):
    """FP8 needs no package. The weights are 466 MB, the largest one 4 MB."""
    text = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 36, "cross_attention_layers": [2, 6]}
    plain = tmp_path / "plain"
    make_model(text=text, vision={"out_hidden_size": 512}).to(torch.bfloat16).save_pretrained(plain)
    size = (plain / "model.safetensors").stat().st_size
    assert size > 450e6

    used = []

    def resident() -> int:
        """Bytes of this process that no file backs."""
        [kilobytes] = re.findall(r"RssAnon:\s+(\d+) kB", open("/proc/self/status").read())
        return 1024 * int(kilobytes)

    def add(shards, *arguments):
        original(shards, *arguments)
        used.append(resident())

    original = quantize.Shards.add
    monkeypatch.setattr(quantize.Shards, "add", add)
    before = resident()
    run(plain, tmp_path / "fp8", "--to", "fp8", "--shard-gb", 0.02)
    assert max(used) - before < size / 2


def test_the_report_compares_logits_and_examines(tmp_path, capsys, monkeypatch):
    package = "compressed_tensors"
    pytest.importorskip(package, reason=REASON.format(package))
    monkeypatch.setattr(evaluate, "TASKS", ("color", "shape"))
    output = tmp_path / "nano"
    assert quantize.main([str(NANO), "--to", "fp8", "--output", str(output), "--examine", "2"]) == 0
    report, printed = report_of(output), capsys.readouterr().out
    assert report["logits"]["tokens"] > 20 and 0 < report["logits"]["relative error"] < 0.1
    assert 0 < report["logits"]["KL divergence"] < 0.1 and report["logits"]["same most likely token"] > 0.8
    assert report["examination"] == {task: {"before": 1, "after": 1} for task in evaluate.TASKS}
    assert (
        f"{report['quantized']} of {report['linear layers']} linear layers" in printed and "KL divergence" in printed
    )


WRONG = {
    "the library": (["--to", "fp8", "--library", "torchao"], "--library torchao does not write fp8"),
    "no such layer": (["--to", "fp8", "--keep-names", "o_proj", "experts"], "--keep-names experts: no linear layer"),
    "none and more": (["--to", "fp8", "--keep", "none", "vision"], "none goes alone"),
    "nothing left": (["--to", "fp8", "--keep-first", "12"], "nothing is left to quantize"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_one_line(case, plain, tmp_path, capsys):
    arguments, words = WRONG[case]
    error = run(plain, tmp_path / "out", *arguments, code=1, capsys=capsys)
    assert words in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_wrong_folders_are_one_line(plain, tmp_path, capsys):
    full, quantized_once, lacking = tmp_path / "full", tmp_path / "once", tmp_path / "lacking"
    full.mkdir()
    (full / "a").write_text("")
    assert "not an empty folder" in run(plain, full, "--to", "fp8", code=1, capsys=capsys)
    assert [path.name for path in full.iterdir()] == ["a"]
    run(plain, quantized_once, "--to", "fp8")
    assert "quantized already" in run(quantized_once, tmp_path / "b", "--to", "fp8", code=1, capsys=capsys)
    assert "not a folder" in run(tmp_path / "none", tmp_path / "b", "--to", "fp8", code=1, capsys=capsys)
    shutil.copytree(plain, lacking)
    (lacking / "model.safetensors").unlink()
    assert "lacks model.safetensors" in run(lacking, tmp_path / "b", "--to", "fp8", code=1, capsys=capsys)
    tensors = load_file(plain / "model.safetensors")
    del tensors[f"{layouts.LAYER}.5.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors")
    assert "layers.5.mlp.up_proj" in run(lacking, tmp_path / "b", "--to", "fp8", code=1, capsys=capsys)
    assert not (tmp_path / "b").exists()


LAYER = f"{layouts.LAYER}.5.mlp.up_proj.weight"
DAMAGED = {
    "nan": (
        lambda weight: weight.index_fill(0, torch.tensor([0]), float("nan")),
        [],
        "infinite or NaN in the checkpoint",
    ),
    "infinite": (lambda weight: weight / 0, [], "infinite or NaN in the checkpoint"),
    "float16": (lambda weight: weight * 0 + 1e5, ["--dtype", "float16"], "in torch.float16, which cannot hold"),
    "shape": (lambda weight: weight[:, 1:].contiguous(), [], "by config.json it has shape"),
    "whole": (lambda weight: weight.to(torch.int8), [], "and dtype I8; by config.json"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_weights_are_one_line(case, plain, tmp_path, capsys):
    """A folder with such weights would load, and compute nonsense."""
    change, arguments, words = DAMAGED[case]
    shutil.copytree(plain, tmp_path / "bad")
    tensors = load_file(plain / "model.safetensors")
    save_file({**tensors, LAYER: change(tensors[LAYER])}, tmp_path / "bad/model.safetensors")
    error = run(tmp_path / "bad", tmp_path / "out", "--to", "fp8", *arguments, code=1, capsys=capsys)
    assert words in error and LAYER in error and not (tmp_path / "out").exists()


def test_damaged_files_are_one_line(plain, tmp_path, capsys):
    bad, out = shutil.copytree(plain, tmp_path / "bad"), tmp_path / "out"
    weights, index = bad / "model.safetensors", bad / "model.safetensors.index.json"
    shutil.copy(weights, bad / "again.safetensors")
    for content, words in (
        ({"a": "model.safetensors", "b": "again.safetensors"}, "is in several of the files"),
        ({"a": "../plain/model.safetensors"}, "to files of this folder, got '../plain/"),
        ({}, "to files of this folder, got {}"),
        ({"a": 3}, "lacks 3"),
    ):
        index.write_text(json.dumps({"weight_map": content}))
        error = run(bad, out, "--to", "fp8", code=1, capsys=capsys)
        assert words in error and len(error.splitlines()) == 1
    index.unlink()
    for data in (weights.read_bytes()[:-9], b"x" * 99, b""):
        weights.write_bytes(data)
        error = run(bad, out, "--to", "fp8", code=1, capsys=capsys)
        assert "damaged or no safetensors file" in error and len(error.splitlines()) == 1
    assert not out.exists()


def test_a_failed_comparison_leaves_the_folder(plain, tmp_path, capsys, monkeypatch):
    def fails(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(quantize, "compared", fails)
    command = [str(plain), "--to", "fp8", "--output"]
    assert quantize.main([*command, str(tmp_path / "auto")]) == 0
    assert "logits: not compared: RuntimeError: no memory" in capsys.readouterr().out
    assert quantize.main([*command, str(tmp_path / "yes"), "--compare", "yes"]) == 1
    assert "is written, but was not compared: RuntimeError: no memory" in capsys.readouterr().err
    for name in ("auto", "yes"):
        assert "not compared" in report_of(tmp_path / name)["logits"] and (tmp_path / name / "config.json").is_file()


def test_a_missing_package_is_named(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = run(plain, tmp_path / "out", "--to", "nf4", code=1, capsys=capsys)
    assert "pip install bitsandbytes" in error
    output = tmp_path / "fp8"  # needs no package to be written
    assert quantize.main([str(plain), "--to", "fp8", "--output", str(output)]) == 0
    assert "compressed-tensors is not installed" in report_of(output)["logits"]


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_an_interrupt_leaves_nothing(exists, plain, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    if exists:
        output.mkdir()

    def interrupted(checkpoint, folder):
        assert list(folder.glob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "copy_other_files", interrupted)
    assert "interrupted" in run(plain, output, "--to", "fp8", code=130, capsys=capsys)
    assert output.exists() == exists and not (exists and list(output.iterdir()))


def test_names_of_modules_stand_for_the_layers_below():
    names = ["a.x.p", "a.x.q", "a.y.p", "b", "c.p"]
    assert quantize.fewest_names({"a.x.p", "a.x.q", "b"}, names) == ["a.x", "b"]
    assert quantize.fewest_names({"a.x.p", "a.x.q", "a.y.p", "c.p"}, names) == ["a", "c"]
    assert quantize.fewest_names(set(), names) == []


def test_the_command_runs_by_its_path(plain, tmp_path):
    command = [sys.executable, str(ROOT / "tools/quantize.py"), str(plain), "--to", "fp8", "--compare", "no"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "63 of 99 linear layers quantized to fp8" in done.stdout and "100%" in done.stderr


def test_the_released_model(capsys):
    """The numbers of layers of the released folders."""
    sizes = quantized.QuantizedSizes()
    assert [sizes.of(f"--to {to}").layers for to in ("nf4", "fp8")] == [240, 252]


def test_the_tables_of_the_page():
    page = (ROOT / "docs/quantization.md").read_text(encoding="utf-8")
    assert quantized.choice_table() in page and quantized.parts_table() in page
