"""Labels and batches of training records: what is learned, and that a batch equals its samples alone."""

import copy
import gc
import json
import pickle
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader
from tuning import (  # noqa: F401 - fixtures among them
    checkpoint,
    data,
    load,
    loss_of,
    processor,
    run,
)

from moss_vl.training.batches import BadRecord, Collator, RecordDataset, encode, render
from moss_vl.training.records import read_records


# labels


def learned(processor, sample) -> list[str]:
    """The learned tokens as text, one string per consecutive run."""
    runs, before = [], False
    for label in sample["labels"].tolist():
        if label != -100:
            runs = [*runs[:-1], [*runs[-1], label]] if before else [*runs, [label]]
        before = label != -100
    return [processor.tokenizer.decode(run) for run in runs]


def test_only_assistant_turns_with_their_ends_are_learned(processor, data):
    records = read_records(data)
    found = [learned(processor, encode(record, processor)) for record in records]
    answers = ["red", "blue", "3.0 seconds", ["Red.", "Yes, I am."], "yes", "2", "a red picture", "no"]
    assert found == [
        [f"{text}<|im_end|>" for text in ([answer] if isinstance(answer, str) else answer)] for answer in answers
    ]
    without = [record for record in records if record.messages[0]["role"] != "system"]
    bare = [learned(processor, encode(record, processor, template=False)) for record in without]
    assert bare == [turns for record, turns in zip(records, found, strict=True) if record in without]
    base = copy.deepcopy(processor)
    base.tokenizer.eos_token = base.tokenizer.pad_token  # as base checkpoints may have it
    assert learned(base, encode(records[3], base, template=False)) == ["Red.<|endoftext|>", "Yes, I am.<|endoftext|>"]


def test_tokens_before_an_answer_equal_the_prompt_of_generation(processor, data):
    record = read_records(data)[3]
    sample = encode(record, processor)
    media = {"images": record.images, "videos": record.videos}
    starts = [i for i, (a, b) in enumerate(pairwise(sample["labels"]), start=1) if a == -100 and b != -100]
    prompt = processor.apply_chat_template(record.messages[:1], tokenize=False, add_generation_prompt=True)
    assert sample["input_ids"][: starts[0]].tolist() == processor(prompt, **media)["input_ids"][0]
    prompt = processor.apply_chat_template(record.messages[:3], tokenize=False, add_generation_prompt=True)
    assert sample["input_ids"][: starts[1]].tolist() == processor(prompt, **media)["input_ids"][0]
    whole = processor.apply_chat_template(record.messages, tokenize=False)
    assert sample["input_ids"].tolist() == processor(whole, **media)["input_ids"][0]


def test_prompt_and_answer_share_no_token(processor, data):
    """Together they are one word of the vocabulary; the prompt is its first half, the answer its second."""
    tokenizer = processor.tokenizer
    word = next(word for word in sorted(tokenizer.get_vocab()) if word.isascii() and word.isalpha() and len(word) > 5)
    text_record = read_records(data)[4]
    record = type(text_record)(
        "here", [{"role": "user", "content": word[:3]}, {"role": "assistant", "content": word[3:]}], [], []
    )
    sample = encode(record, processor, template=False)
    prompt, answer = (tokenizer(text)["input_ids"] for text in (word[:3], word[3:] + tokenizer.eos_token))
    assert len(tokenizer(word)["input_ids"]) == 1
    assert sample["input_ids"].tolist() == prompt + answer
    assert sample["labels"].tolist() == [-100] * len(prompt) + answer


def test_a_bare_text_is_learned_from_its_second_token_on(processor, data):
    record = read_records(data)[4]
    record.messages[0]["content"] = ""
    sample = encode(record, processor, template=False)
    assert sample["labels"].tolist() == [-100, *sample["input_ids"][1:].tolist()]


def test_a_template_that_rewrites_turns_is_refused(processor, data):
    class Rewriting:
        tokenizer = processor.tokenizer

        @staticmethod
        def apply_chat_template(messages, tokenize, add_generation_prompt=False):
            text = processor.apply_chat_template(
                messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt
            )
            return text.replace("Red.", "") if len(messages) > 3 else text

    record = read_records(data)[3]
    assert list(render(record, processor)[1])
    with pytest.raises(ValueError, match="turn 3 differently"):
        render(record, Rewriting)


# batches


def test_the_loss_of_a_batch_is_that_of_its_samples_alone(checkpoint, processor, data):
    model, pad = load(checkpoint), processor.tokenizer.pad_token_id
    dataset = RecordDataset(read_records(data), processor, min_pixels=4096, max_pixels=9216)
    samples = [dataset[index] for index in range(len(dataset))]
    batch = Collator(pad)(samples)
    assert set(batch) - {"logits_to_keep", "use_cache"} == {
        "input_ids",
        "attention_mask",
        "labels",
        "pixel_values",
        "grid_thw",
        "media_nums_per_sample",
    }
    assert batch["media_nums_per_sample"] == [1, 1, 1, 3, 1, 2, 1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [len(sample["input_ids"]) for sample in samples]
    counts = [int((sample["labels"] != -100).sum()) for sample in samples]
    alone = [loss_of(model, Collator(pad)([sample])) for sample in samples]
    assert len({round(loss, 3) for loss in alone}) == len(alone)
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    assert loss_of(model, batch) == pytest.approx(expected, abs=1e-5)

    del batch["logits_to_keep"]
    assert loss_of(model, batch) == pytest.approx(expected, abs=1e-5), "omitted logits belong to tokens without a loss"
    assert loss_of(model, Collator(pad, vision_chunked_length=1)(samples)) == pytest.approx(expected, abs=1e-5)


def test_logits_before_the_first_learned_token_are_not_computed(checkpoint, processor, data):
    sample = encode(read_records(data)[2], processor, min_pixels=4096, max_pixels=9216)
    with torch.no_grad():
        logits = load(checkpoint)(**Collator(processor.tokenizer.pad_token_id)([sample])).logits
    first = int((sample["labels"] != -100).nonzero()[0])
    assert first > 20 and logits.shape[1] == len(sample["labels"]) - first + 1


def test_workers_return_the_same_batches_as_the_main_process(processor, data):
    """Also spawned workers (macOS, Windows), to which dataset and processor are sent."""
    dataset = RecordDataset(read_records(data), processor, min_pixels=4096, max_pixels=9216)
    collate = Collator(processor.tokenizer.pad_token_id)
    expected = [collate([dataset[index], dataset[index + 1]]) for index in (0, 2, 4, 6)]
    gc.collect()  # a forked worker that collected frames decoded here would wait for their threads forever
    for options in ({"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn"}):
        found = list(DataLoader(dataset, batch_size=2, collate_fn=collate, **options))
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in theirs)
    assert len(pickle.dumps(collate)) < 1000


def test_a_record_that_is_too_long_is_named_or_replaced(processor, data, caplog):
    records = read_records(data)
    longest = len(encode(records[4], processor)["input_ids"])
    with pytest.raises(BadRecord, match=r"data.json, record 0: \d+ tokens are more than --max-length"):
        RecordDataset(records, processor, max_length=longest)[0]
    dataset = RecordDataset(records, processor, skip_bad=True, max_length=longest)
    for _ in range(2):
        assert torch.equal(dataset[0]["input_ids"], dataset[4]["input_ids"])
    assert ["record 0" in message for message in caplog.messages] == [True, False, False, False], (
        "each is warned of once"
    )
    with pytest.raises(BadRecord, match="none of the 8 records"):
        RecordDataset(records, processor, skip_bad=True, max_length=3)[0]


def test_a_video_that_cannot_be_decoded_in_a_worker_is_named(checkpoint, data, tmp_path, capfd):
    """Its header is intact, so only decoding finds the damage."""
    video = bytearray((data.parent / "v.mp4").read_bytes())
    at = video.index(b"mdat")
    size = int.from_bytes(video[at - 4 : at], "big")
    video[at + 4 : at - 4 + size] = bytes(size - 8)
    (tmp_path / "v.mp4").write_bytes(video)
    (tmp_path / "data.jsonl").write_text(json.dumps({"response": "x", "videos": "v.mp4"}))
    assert run(checkpoint, tmp_path / "data.jsonl", tmp_path / "out", "--workers", 1) == 2
    assert (
        "finetune.py: " + str(tmp_path / "data.jsonl, record 0 (line 1): ") in capfd.readouterr().err.splitlines()[-1]
    )
