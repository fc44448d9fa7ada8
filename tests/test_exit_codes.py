"""Exit codes and messages of infer.py and finetune.py after exceptions."""

import pytest

from moss_vl import infer
from moss_vl.training import finetune


CASES = [
    (MemoryError(), 1, "out of memory; try"),
    (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "out of memory; try"),
    (RuntimeError("shapes cannot be multiplied"), None, ""),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize("error, code, message", CASES, ids=repr)
@pytest.mark.parametrize("program", ["infer", "finetune"])
def test_exit_codes(program, error, code, message, monkeypatch, capsys):
    """Out of memory and Ctrl-C print one line; any other RuntimeError keeps its traceback."""
    module, worker, arguments = {
        "infer": (infer, "answer_one", ["-p", "a"]),
        "finetune": (finetune, "finetune", ["--checkpoint", "c", "--data", "d", "--output", "o"]),
    }[program]

    def fail(args):
        raise error

    monkeypatch.setattr(module, worker, fail)
    if code is None:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module.main(arguments)
        return
    assert module.main(arguments) == code
    err = capsys.readouterr().err
    assert f"{program}.py: {message}" in err and len(err.splitlines()) == 1
