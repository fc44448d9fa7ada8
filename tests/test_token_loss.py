"""Weights of records and decisions, and the focal factor: against a slow loop, and through the Trainer with
accumulated batches and two processes."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from make_media import write_video
from test_finetune import assert_same_step
from tuning import (
    FAST,
    LINEAR,
    checkpoint,  # noqa: F401 - a fixture
    data,  # noqa: F401 - a fixture
    load,
    load_processor,
    run,
    run_parallel,
    tune_as_rank,
)

from moss_vl.training.batches import IGNORED, Collator, RecordDataset
from moss_vl.training.record_trainer import make_token_loss
from moss_vl.training.records import read_records
from moss_vl.training.token_loss import TokenLoss, balanced_weights


def slow_loss(rule, logits, labels, record_weights):
    """(sum of w f l, sum of w), token by token."""
    total = weight_sum = 0.0
    skipped = labels.shape[1] - logits.shape[1]
    for row in range(len(labels)):
        for column in range(labels.shape[1] - 1):
            label = int(labels[row, column + 1])
            if label == IGNORED:
                continue
            weight = float(record_weights[row])
            weight *= {rule.silence: rule.silence_weight, rule.response: rule.response_weight}.get(label, 1.0)
            weight_sum += weight
            if column < skipped:
                continue
            scores = logits[row, column - skipped].double()
            loss = float(scores.logsumexp(0) - scores[label])
            focal = (1 - math.exp(-loss)) ** rule.focal_gamma if label in (rule.silence, rule.response) else 1.0
            total += weight * focal * loss
    return total, weight_sum


def test_the_loss_equals_a_slow_loop():
    for seed in range(40):
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        rows, length, vocabulary = rng.randint(1, 3), rng.randint(2, 9), 7
        labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.4] = IGNORED
        labels[0, -1] = 3
        first = int((labels != IGNORED).any(0).nonzero()[0])
        kept = rng.choice((length, min(length, length - first + 1)))
        logits = 3 * torch.randn(rows, kept, vocabulary, generator=generator)
        given = torch.tensor([rng.choice((0.5, 1.0, 2.0)) for _ in range(rows)]) if rng.random() < 0.7 else None
        rule = TokenLoss(3, 5, *rng.choice(((1.0, 1.0), (0.25, 4.0))), rng.choice((0.0, 0.5, 2.0)))
        total, weight_sum = slow_loss(rule, logits, labels, torch.ones(rows) if given is None else given)
        assert rule(logits, labels, given).item() == pytest.approx(total, rel=1e-5, abs=1e-6), f"seed {seed}"
        assert rule.weights(labels[:, 1:], given).sum().item() == pytest.approx(weight_sum), f"seed {seed}"


def test_the_gradient_of_the_focal_factor_is_finite_for_sure_tokens():
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 3] = 200.0
    logits.requires_grad_(True)
    TokenLoss(3, 2, focal_gamma=0.5)(logits, torch.tensor([[IGNORED, 3]])).backward()
    assert logits.grad.isfinite().all()


def test_balanced_weights():
    """Both decisions have the same total weight, and together that of their number."""
    silence, response = balanced_weights(30, 10, 1.0)
    assert silence * 30 == pytest.approx(response * 10) == pytest.approx(20)
    assert balanced_weights(30, 10, 0.5) == pytest.approx((silence**0.5, response**0.5))
    assert balanced_weights(30, 10, 0.0) == balanced_weights(7, 0, 1.0) == balanced_weights(0, 7, 1.0) == (1.0, 1.0)


@pytest.fixture(scope="module")
def weighted(data, tmp_path_factory):  # noqa: F811
    """The records of `data` with weights, and a stream."""
    folder = tmp_path_factory.mktemp("weighted")
    records = json.loads(data.read_text())
    for record, weight in zip(records, (1, 4, 0.5, 2, 1, 1, 3, None), strict=True):
        record["weight"] = weight
        for name in ("images", "videos"):
            media = record.get(name)
            if isinstance(media, str):
                record[name] = str(data.parent / media)
            elif isinstance(media, list):
                record[name] = [str(data.parent / one) for one in media]
            elif media:
                record[name] = media | {"video_path": str(data.parent / media["video_path"])}
    write_video(folder / "v.mp4", count=30, rate=10, size=(64, 64))
    said = "<|silence|><|video|><|silence|><|video|><|response|>Red<|silence|>"
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": said}]
    records[7] = {"messages": messages, "videos": [{"video_path": "v.mp4", "segments": [[0], [1.5]]}], "weight": 2}
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


OPTIONS = ["--silence-weight", "0.5", "--response-weight", "3", "--focal-gamma", "2"]
STEP = ["--steps", "1", "--train", "cross", *LINEAR]


def test_accumulated_weighted_batches_equal_one_large_batch(checkpoint, weighted, tmp_path):  # noqa: F811
    assert run(checkpoint, weighted, tmp_path / "one", "--batch-size", 8, *STEP, *OPTIONS) == 0
    assert run(checkpoint, weighted, tmp_path / "four", "--batch-size", 2, "--accumulation", 4, *STEP, *OPTIONS) == 0
    assert_same_step(checkpoint, tmp_path / "one", tmp_path / "four")

    # and the loss of the step is that of the formula
    processor, model = load_processor(checkpoint), load(checkpoint)
    dataset = RecordDataset(read_records(weighted), processor, min_pixels=4096, max_pixels=9216)
    batch = Collator(processor.tokenizer.pad_token_id)([dataset[index] for index in range(8)])
    record_weights, labels = batch.pop("record_weights"), batch.pop("labels")
    assert record_weights.tolist() == [1, 4, 0.5, 2, 1, 1, 3, 2]
    silence, response = processor.tokenizer.convert_tokens_to_ids(["<|silence|>", "<|response|>"])
    with torch.no_grad():
        logits = model(**batch).logits
    total, weight_sum = slow_loss(TokenLoss(silence, response, 0.5, 3.0, 2.0), logits, labels, record_weights)
    [entry] = [
        entry
        for entry in json.loads((tmp_path / "one/trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    assert entry["loss"] == pytest.approx(total / weight_sum, abs=2e-4)


def eval_loss(folder) -> float:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return next(entry["eval_loss"] for entry in history if "eval_loss" in entry)


def test_the_loss_of_an_evaluation_is_that_of_its_tokens(checkpoint, tmp_path):  # noqa: F811
    """By the weights of their records, and whatever the size of batches and the number of processes."""
    text = [{"prompt": "Say yes.", "response": "yes"}, {"prompt": "Say no.", "response": "no, no, no", "weight": 7}]
    text.append({"prompt": "And?", "response": "a long answer of a few words"})
    (tmp_path / "data.json").write_text(json.dumps(text))
    model, processor = load(checkpoint), load_processor(checkpoint)
    dataset, total, weight_sum = RecordDataset(read_records(tmp_path / "data.json"), processor), 0.0, 0.0
    for sample in dataset:
        batch = Collator(processor.tokenizer.pad_token_id)([sample])
        labels, record_weights = batch.pop("labels"), batch.pop("record_weights", torch.ones(1))
        with torch.no_grad():
            loss, weight = slow_loss(TokenLoss(), model(**batch).logits, labels, record_weights)
        total, weight_sum = total + loss, weight_sum + weight
    options = ["--eval-data", str(tmp_path / "data.json"), "--steps", "1", "--lr", "1e-12"]
    for size in (1, 2):
        assert run(checkpoint, tmp_path / "data.json", tmp_path / str(size), "--batch-size", size, *options) == 0
        assert eval_loss(tmp_path / str(size)) == pytest.approx(total / weight_sum, rel=1e-5), size
    command = ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "data.json"), *FAST, *options]
    run_parallel(tune_as_rank, ([*command, "--output", str(tmp_path / "two")],), processes=2)
    assert eval_loss(tmp_path / "two") == pytest.approx(total / weight_sum, rel=1e-5)


def test_two_processes_that_stream_weighted_records_equal_one(checkpoint, weighted, tmp_path):  # noqa: F811
    records = json.loads(weighted.read_text())
    (tmp_path / "v.mp4").write_bytes((weighted.parent / "v.mp4").read_bytes())
    (tmp_path / "two.json").write_text(json.dumps([records[1], records[7]]))
    command = ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "two.json"), *FAST, *STEP, *OPTIONS]
    streaming = ["--streaming", "--shuffle-buffer", "1"]
    run_parallel(tune_as_rank, ([*command, *streaming, "--output", str(tmp_path / "two")],), 2)
    assert run(checkpoint, tmp_path / "two.json", tmp_path / "one", *STEP, *OPTIONS, "--batch-size", "2") == 0
    assert_same_step(checkpoint, tmp_path / "one", tmp_path / "two")


def options(**given):
    defaults = {"silence_weight": 1.0, "response_weight": 1.0, "balance_decisions": 0.0, "focal_gamma": 0.0}
    return SimpleNamespace(skip_bad=False, **defaults | given)


def test_the_loss_that_options_and_records_need(checkpoint, weighted, data):  # noqa: F811
    processor = load_processor(checkpoint)
    silence, response = processor.tokenizer.convert_tokens_to_ids(["<|silence|>", "<|response|>"])
    with_weights, plain = (RecordDataset(read_records(file), processor) for file in (weighted, data))
    assert make_token_loss(options(), processor, plain, None) is None
    assert make_token_loss(options(), processor, plain, with_weights) == TokenLoss()
    assert make_token_loss(options(), processor, with_weights, None) == TokenLoss()
    assert make_token_loss(options(balance_decisions=1.0), processor, with_weights, None) == TokenLoss(
        silence, response, 4 / 6, 4 / 2
    ), "three silences and a response"
    assert make_token_loss(options(focal_gamma=2.0), processor, with_weights, None).focal_gamma == 2
    with pytest.raises(ValueError, match="are for realtime streams, but no record of --data is one"):
        make_token_loss(options(focal_gamma=2.0), processor, plain, None)


def test_weights_change_the_share_of_their_records(checkpoint, tmp_path):  # noqa: F811
    """A record of weight 3 counts as three records."""
    step = ["--steps", "1", "--train", "language", *LINEAR]
    text = [{"prompt": "Say yes.", "response": "yes"}, {"prompt": "Say no.", "response": "no, no, no"}]
    (tmp_path / "thrice.json").write_text(json.dumps([text[0], text[1], text[1], text[1]]))
    (tmp_path / "weight.json").write_text(json.dumps([text[0], text[1] | {"weight": 3}]))
    assert run(checkpoint, tmp_path / "thrice.json", tmp_path / "thrice", *step, "--batch-size", 4) == 0
    assert run(checkpoint, tmp_path / "weight.json", tmp_path / "weight", *step, "--batch-size", 2) == 0
    assert_same_step(checkpoint, tmp_path / "thrice", tmp_path / "weight")
