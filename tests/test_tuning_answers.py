"""Answers to held-out records at the evaluations of training/finetune.py."""

import json

import pytest
import torch
from tuning import (  # noqa: F401 - fixtures among them
    FAST,
    checkpoint,
    data,
    load,
    load_processor,
    processor,
    run,
    run_parallel,
    tune_as_rank,
)

from moss_vl.training import finetune
from moss_vl.training.batches import render
from moss_vl.training.records import read_records


ANSWERS = ["--eval-generate", 99, "--eval-tokens", 6]
PIXELS = {"min_pixels": 4096, "max_pixels": 9216}
STILL = ["--lr", "1e-12", "--steps", 1, "--batch-size", 4]  # weights stay as they are


def predictions(folder, step):
    return [json.loads(line) for line in (folder / f"predictions/step-{step}.jsonl").read_text().splitlines()]


def answered(model, processor, record, tokens=6):
    """(prompt, greedy answer), alone and by `generate`."""
    text, spans = render(record, processor)
    prompt = text[: spans[-1][0]]
    inputs = processor(
        text=prompt, images=record.images or None, videos=record.videos or None, return_tensors="pt", **PIXELS
    )
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1, repetition_penalty=1.0)
    return prompt, processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("options", [[], ["--lora-rank", 4, "--lora-also", "gates", "--gradient-checkpointing"]])
def test_answers_are_those_of_the_saved_model(checkpoint, processor, data, tmp_path, options):
    options = [*options, *ANSWERS, "--eval-data", data, "--steps", 2, "--eval-steps", 1, "--batch-size", 3]
    assert run(checkpoint, data, tmp_path, *options) == 0
    rows, records, model = predictions(tmp_path, 2), read_records(data), load(tmp_path)
    assert len(rows) == len(records) == len(predictions(tmp_path, 1))
    for row, record in zip(rows, records, strict=True):
        assert (row["prompt"], row["answer"]) == answered(model, processor, record)
        assert row["expected"] == record.messages[-1]["content"] and row["record"] == record.where
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_exact_match" in entry] == [1, 2]


@pytest.fixture(scope="module")
def half_right(checkpoint, processor, data, tmp_path_factory):
    """Records; the expected answers of the first two are what the checkpoint says."""
    records, model = json.loads(data.read_text())[:6], load(checkpoint)
    for index, record in enumerate(read_records(data)[:2]):
        records[index]["response"] = " " + answered(model, processor, record)[1]
    for record in records:
        for kind in ("images", "videos"):
            if isinstance(record.get(kind), str):
                record[kind] = str(data.parent / record[kind])
    file = tmp_path_factory.mktemp("half") / "half.json"
    file.write_text(json.dumps([records[index] for index in (0, 1, 2, 4)]))
    return file


def test_matches_are_counted_and_choose_the_best_checkpoint(checkpoint, data, half_right, tmp_path):
    options = [*STILL, *ANSWERS, "--eval-data", half_right, "--save-steps", 1]
    options += ["--metric_for_best_model", "exact_match", "--load_best_model_at_end", "--greater_is_better", "True"]
    assert run(checkpoint, data, tmp_path, *options) == 0
    assert [row["match"] for row in predictions(tmp_path, 1)] == [True, True, False, False]
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_metric"] == 0.5 and state["best_model_checkpoint"].endswith("checkpoint-1")


def test_two_processes_share_the_records(checkpoint, data, half_right, tmp_path):
    options = [*STILL[:-1], 2, *ANSWERS, "--eval-data", half_right, "--output", tmp_path]
    command = ["--checkpoint", checkpoint, "--data", data, *FAST, *options]
    run_parallel(tune_as_rank, ([str(word) for word in command],), 2)
    assert [row["match"] for row in predictions(tmp_path, 1)] == [True, True, False, False]


def test_some_records_are_drawn_and_errors_are_written(checkpoint, data, half_right, tmp_path, monkeypatch):
    """A file that disappears during the run is an error of its record."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 would leave "bf16" to later tests
    records = json.loads(half_right.read_text())
    records[0]["images"] = str(tmp_path / "gone.png")
    (tmp_path / "gone.png").write_bytes((data.parent / "red.png").read_bytes())
    (tmp_path / "data.json").write_text(json.dumps(records[:2]))
    args = ["--checkpoint", checkpoint, "--data", data, "--eval-data", tmp_path / "data.json", "--output"]
    args += [tmp_path / "out", *FAST, *STILL, "--bf16", "--lora-rank", 2, "--eval-generate"]
    trainer, *_ = finetune.prepare(finetune.parse([str(word) for word in (*args, 2)]))
    (tmp_path / "gone.png").unlink()
    trainer.model.train()
    assert trainer.answers.write(0) == {"eval_exact_match": 0.5 if predictions(tmp_path / "out", 0)[1]["match"] else 0}
    assert trainer.model.training and not torch.is_inference_mode_enabled()
    rows = predictions(tmp_path / "out", 0)
    assert "gone.png" in rows[0]["error"] and not rows[0]["match"] and "answer" in rows[1]
    args[5], args[7] = data, tmp_path / "more"
    trainer, *_ = finetune.prepare(finetune.parse([str(word) for word in (*args, 2)]))
    wheres = trainer.answers.wheres
    assert len(wheres) == 2 < len(trainer.eval_dataset) and wheres == sorted(wheres)
