"""Training: losses, gradients, both kinds of checkpointing, initial weights, and `transformers.Trainer`."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import two_ranks
from tiny import Sample, assorted_samples, batch, make_config, make_model
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, Trainer, TrainingArguments

from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration


def labelled(samples, side="right") -> dict:
    inputs = batch(samples, side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs | {"labels": labels}


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_loss_is_next_token_cross_entropy():
    model = make_model()
    inputs = labelled(assorted_samples())
    inputs["labels"][:, :2] = -100
    out = model(**inputs)
    logits, labels = out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    assert torch.allclose(out.loss, expected, atol=1e-6)
    summed = model(**inputs, num_items_in_batch=10).loss
    assert torch.allclose(summed, expected * (labels != -100).sum() / 10, atol=1e-5)


# Rows and labels


def test_kept_tokens_predict_the_labels_of_the_whole_sequence():
    """However `logits_to_keep` selects tokens, with gaps or without, token k has the label of token k + 1."""
    model, inputs = make_model(), labelled(assorted_samples())
    length = inputs["input_ids"].shape[1]
    bools = torch.zeros(length, dtype=torch.bool)
    bools[[1, 2, 5, length - 1]] = True
    with torch.no_grad():
        whole = model(**inputs).logits
        for kept, rows in (
            (0, [*range(length)]),
            (4, [*range(length - 4, length)]),
            (length + 3, [*range(length)]),
            (torch.tensor([3, 6, 8]), [3, 6, 8]),
            (torch.tensor([8, 3]), [8, 3]),
            (torch.tensor([-2, 0]), [length - 2, 0]),
            (bools, [1, 2, 5, length - 1]),
        ):
            out = model(**inputs, logits_to_keep=kept)
            assert torch.allclose(out.logits, whole[:, rows], atol=1e-5)
            targets = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, [row + 1 for row in rows]]
            expected = cross_entropy(whole[:, rows].flatten(0, 1), targets.flatten())
            assert torch.allclose(out.loss, expected, atol=1e-6), kept
            summed = model(**inputs, logits_to_keep=kept, num_items_in_batch=torch.tensor(7)).loss
            assert torch.allclose(summed, expected * (targets != -100).sum() / 7, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_shortened_with_the_logits(side):
    """Labels [B, n] of the last n tokens stand for labels [B, T], also beside padding. For tokens that a tensor
    names, the target is the next of the labels: a mask of the tokens before learned ones, and of the last token, gives
    the loss of the whole row."""
    model, inputs = make_model(), labelled(assorted_samples(), side)
    for kept in (1, 5):
        short = inputs | {"labels": inputs["labels"][:, -kept:], "logits_to_keep": kept}
        expected = model(**short | {"labels": inputs["labels"]}).loss
        if kept == 1:  # predicts nothing
            assert torch.isnan(expected) and torch.isnan(model(**short).loss)
        else:
            assert torch.equal(model(**short).loss, expected)
    alone = labelled(assorted_samples()[:1])
    learned = torch.zeros(alone["labels"].shape[1], dtype=torch.bool)
    learned[[3, 4, -2]] = True
    labels = torch.nn.functional.pad(alone["labels"][:, learned], (1, 0), value=-100)
    kept = torch.nn.functional.pad(learned[1:], (0, 1), value=True)
    expected = model(**alone | {"labels": alone["labels"].masked_fill(~learned, -100)}).loss
    found = model(**alone | {"labels": labels, "logits_to_keep": kept})
    assert found.logits.shape[1] == 4 and torch.allclose(found.loss, expected, atol=1e-6)


@pytest.mark.parametrize("of_padding", [-100, 7])
@pytest.mark.parametrize("padding", ["left", "right", "inside"])
def test_the_loss_of_a_batch_is_that_of_its_samples(padding, of_padding):
    """Padding predicts nothing and is not predicted, whatever its labels are."""
    model, samples = make_model(), assorted_samples()
    inputs = batch(samples, "left" if padding == "left" else "right")
    if padding == "inside":  # before the last token of the shorter samples
        for row, sample in enumerate(samples):
            end = len(sample.ids) - 1
            inputs["input_ids"][row, end:] = 0
            inputs["input_ids"][row, -1] = sample.ids[-1]
            inputs["attention_mask"][row, end:-1] = 0
            inputs["attention_mask"][row, -1] = 1
        del inputs["cross_attention_mask"]
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, of_padding)
    with torch.no_grad():
        alone = [model(**sample.inputs(), labels=sample.ids[None]).loss * (len(sample.ids) - 1) for sample in samples]
        expected = sum(alone) / sum(len(sample.ids) - 1 for sample in samples)
        assert torch.allclose(model(**inputs).loss, expected, atol=1e-6)
        kept = torch.arange(inputs["input_ids"].shape[1])
        assert torch.allclose(model(**inputs, logits_to_keep=kept).loss, expected, atol=1e-6)


@pytest.mark.parametrize("without_first", [False, True])
def test_the_loss_of_packed_rows_is_that_of_their_texts(without_first):
    """With all labels, and without the first of each text, as by DataCollatorWithFlattening."""
    model, samples = make_model(), assorted_samples()
    with torch.no_grad():
        alone = [model(**sample.inputs(), labels=sample.ids[None]).loss * (len(sample.ids) - 1) for sample in samples]
        expected = sum(alone) / sum(len(sample.ids) - 1 for sample in samples)
        with_media = [sample for sample in samples if sample.grids]
        labels = [sample.ids.clone() for sample in samples]
        if without_first:
            for of_text in labels:
                of_text[0] = -100
        loss = model(
            input_ids=torch.cat([sample.ids for sample in samples])[None],
            position_ids=torch.cat([torch.arange(len(sample.ids)) for sample in samples])[None],
            labels=torch.cat(labels)[None],
            pixel_values=torch.cat([sample.pixel_values for sample in with_media]),
            grid_thw=torch.cat([sample.grid_thw for sample in with_media]),
            use_cache=False,
        ).loss
    assert torch.allclose(loss, expected, atol=1e-5)


def test_the_loss_of_a_later_call_is_that_of_its_tokens():
    model, sample = make_model(), assorted_samples()[2]
    inputs, labels = sample.inputs(), sample.ids[None]
    with torch.no_grad():
        whole = model(**inputs).logits
        first = {
            name: value for name, value in inputs.items() if name not in ("attention_mask", "cross_attention_mask")
        }
        out = model(**first | {"input_ids": labels[:, :6]}, use_cache=True)
        cache = out.get("cache", out.get("past_key_values"))
        loss = model(
            input_ids=labels[:, 6:],
            attention_mask=torch.ones_like(labels),
            past_key_values=cache,
            labels=labels[:, 6:],
        ).loss
    assert torch.allclose(loss, cross_entropy(whole[0, 6:-1], labels[0, 7:]), atol=1e-5)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"labels": torch.zeros(1, 3, dtype=torch.long)}, r"`labels` has shape \[1, 3\]; expected \[1, 7\]"),
        ({"logits_to_keep": -1}, "`logits_to_keep` is -1; expected how many"),
        ({"logits_to_keep": torch.tensor([0, 7])}, "indices below 7"),
        ({"logits_to_keep": torch.ones(6, dtype=torch.bool)}, r"a bool tensor \[7\]"),
        ({"logits_to_keep": torch.ones(1, 7, dtype=torch.bool)}, r"a bool tensor \[7\]"),
        ({"logits_to_keep": torch.ones(2)}, "`logits_to_keep` is tensor"),
    ],
)
def test_wrong_rows_are_refused_before_anything_is_computed(wrong, message):
    model = make_model()
    model.model.forward = None
    with pytest.raises(ValueError, match=message):
        model(**assorted_samples()[1].inputs(), **wrong)


# Gradients


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_reach_every_parameter(implementation):
    model = make_model(implementation).train()
    for samples in (assorted_samples(), assorted_samples()[1:2]):
        _, grads = gradients(model, labelled(samples))
        assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []


def test_a_batch_without_media_gives_every_parameter_a_gradient():
    """In training blank media are encoded and multiplied by 0, so that no rank of a distributed run waits for a
    gradient."""
    model = make_model().train()
    texts = [Sample("ttttt", seed=1), Sample("ttt", seed=2)]
    inputs = labelled(texts)
    loss, grads = gradients(model, inputs)
    assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []
    assert not grads["model.visual.merger.linear_fc1.weight"].any()
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    expected, _ = gradients(model, plain)
    assert torch.allclose(loss, expected, atol=1e-6)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, use_cache):
    """The layers get no cache, because they would write to it again in the backward pass."""
    model = make_model().train()
    inputs = labelled(assorted_samples())
    loss, plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    layers = (
        model.model.visual.blocks[1].mlp,
        model.model.language_model.layers[1].mlp,
        model.model.language_model.layers[2].mlp,
    )
    hooks = [layer.register_forward_pre_hook(lambda module, args: calls.append(id(module))) for layer in layers]
    again, checkpointed = gradients(model, inputs | {"use_cache": use_cache})
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == sorted([id(layer) for layer in layers] * 2), "each layer runs again in the backward pass"
    assert torch.allclose(loss, again, atol=1e-6)
    for name, grad in plain.items():
        assert torch.allclose(grad, checkpointed[name], atol=1e-5, rtol=1e-4), name


def test_dropout_acts_in_training_only():
    model = make_model(text={"attention_dropout": 0.5})
    inputs = assorted_samples()[3].inputs()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_initial_weights():
    torch.manual_seed(0)
    model = MossVLForConditionalGeneration(make_config(text={"hidden_size": 256}, vision={"out_hidden_size": 256}))
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.numel() == 1 or "separator" in name or name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.mean()) < 0.002 and 0.015 < parameter.std() < 0.025, (name, parameter.std())


def test_trainer_lowers_the_loss(tmp_path):
    """A few steps on three records with media."""
    torch.manual_seed(0)
    model = make_model()
    samples = assorted_samples()[1:4]

    def collate(records):
        return labelled([samples[record["index"]] for record in records])

    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=3,
        max_steps=12,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        gradient_checkpointing=True,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[{"index": i} for i in range(3)], data_collator=collate
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0], losses
    assert trainer.predict(trainer.train_dataset).predictions.shape == (3, 11, 200), "the logits alone"


@pytest.mark.parametrize("outputs", [{}, {"output_hidden_states": True, "output_attentions": True}])
def test_compute_metrics_gets_logits(tmp_path, outputs):
    """Also with batches of different lengths, and with a config that requests all outputs."""
    model, samples = make_model("eager"), assorted_samples()
    for name, value in outputs.items():
        setattr(model.config, name, value)
    evaluations = []

    def metrics(evaluated):
        evaluations.append(evaluated)
        hits = (np.argmax(evaluated.predictions, -1)[:, :-1] == evaluated.label_ids[:, 1:]) & (
            evaluated.label_ids[:, 1:] != -100
        )
        return {"accuracy": hits.sum() / (evaluated.label_ids[:, 1:] != -100).sum()}

    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_eval_batch_size=2,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        eval_dataset=[{"index": i} for i in range(5)],
        compute_metrics=metrics,
        data_collator=lambda records: labelled([samples[record["index"]] for record in records]),
    )
    found = trainer.evaluate()
    assert evaluations[0].predictions.shape == (5, 11, 200) and evaluations[0].label_ids.shape == (5, 11)
    hits = total = 0
    for sample in samples:
        with torch.no_grad():
            guessed = model(**sample.inputs()).logits[0, :-1].argmax(-1)
        hits, total = hits + int((guessed == sample.ids[1:]).sum()), total + len(guessed)
    assert found["eval_accuracy"] == pytest.approx(hits / total)


# Gradient checkpointing


def with_vision_adapters():
    targets = r".*(visual.*\.(qkv|linear_fc1)|language_model.*q_proj)"
    return peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize("use_reentrant", [True, False, None])
def test_adapters_of_every_layer_get_gradients_through_checkpointing(use_reentrant):
    """Everything before the adapters is frozen, in the vision encoder as in the text model."""
    torch.manual_seed(0)
    model, sample = with_vision_adapters().train(), assorted_samples()[1]
    inputs = sample.inputs() | {"labels": sample.ids[None]}
    _, plain = gradients(model, inputs)
    model.gradient_checkpointing_enable(None if use_reentrant is None else {"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    _, checkpointed = gradients(model, inputs)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum("visual.blocks" in name for name in trained) == 2 * 2 * 3
    for name in trained:
        assert checkpointed[name] is not None and torch.allclose(
            plain[name], checkpointed[name], atol=1e-5, rtol=1e-4
        ), name
    model.disable_input_require_grads()
    embeddings = (
        model.get_base_model().model.visual.patch_embed,
        model.get_base_model().model.language_model.embed_tokens,
    )
    assert not any(embedding._forward_hooks for embedding in embeddings)


def test_layers_after_frozen_ones_are_trained_with_default_checkpointing():
    model, sample = make_model().train(), assorted_samples()[1]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual.blocks.1" in name)
    model.gradient_checkpointing_enable()
    _, grads = gradients(model, sample.inputs() | {"labels": sample.ids[None]})
    assert all(grad is not None and grad.any() for name, grad in grads.items() if "visual.blocks.1" in name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_generating_while_training_with_checkpointing_uses_the_cache(use_reentrant):
    model, samples = make_model(), assorted_samples()
    inputs = batch(samples, "left")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)


def test_checkpointing_with_gradients_accepts_no_cache():
    """The layers would write to it twice."""
    model, sample = make_model().train(), assorted_samples()[1]
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="with gradient checkpointing; expected none"):
        model(**sample.inputs(), past_key_values=DynamicCache())
    out = model(**sample.inputs(), use_cache=True)
    assert out.get("cache", out.get("past_key_values")) is None
    with torch.no_grad():
        cache = DynamicCache()
        model(**sample.inputs(), past_key_values=cache)
    assert cache.get_seq_length() == len(sample.ids)


# Several processes


def test_fsdp2_with_the_language_model_as_a_group(tmp_path):
    """Weights are complete only inside the forward of their group: embeddings in that of the language model."""
    from torch.distributed.fsdp import fully_shard

    sample = Sample("ttFFttt", (2, 4, 6), seed=2)
    inputs = sample.inputs() | {"labels": sample.ids[None]}
    loss, plain = gradients(make_model().train(), inputs)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = make_model().train()
        for group in (*model.model.language_model.layers, model.model.language_model, model.model.visual, model):
            fully_shard(group, mesh=mesh)
        sharded_loss, sharded = gradients(model, inputs)
        features = model.model.visual(sample.pixel_values, sample.grid_thw)
        other = {name: value for name, value in inputs.items() if name != "pixel_values"}
        encoded = model(**other, image_features=features.detach()).loss
        sharded = {name: grad.full_tensor() for name, grad in sharded.items()}
    finally:
        torch.distributed.destroy_process_group()
    assert torch.allclose(loss, sharded_loss, atol=1e-6) and torch.allclose(loss, encoded, atol=1e-5)
    assert all(torch.allclose(plain[name], sharded[name], atol=1e-6) for name in plain)


def test_a_rank_without_pixels_contributes_every_gradient(tmp_path):
    """One of two processes has an image, the other only text: both get the mean of the gradients."""
    torch.multiprocessing.start_processes(two_ranks.step, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(Path(tmp_path, f"{rank}.pt")) for rank in range(2))
    losses = [gradients(make_model().train(), inputs)[1] for inputs in map(two_ranks.inputs_of, range(2))]
    for name, grad in first.items():
        assert torch.equal(grad, second[name])
        image, text = (torch.zeros_like(grad) if of_rank[name] is None else of_rank[name] for of_rank in losses)
        assert torch.allclose(grad, (image + text) / 2, atol=1e-5), name


# PEFT


def test_the_separator_is_trained_with_adapters_and_saved_with_the_merged_model(tmp_path):
    """PEFT's `modules_to_save` ignores parameters; the docstring of MossVLModel says how to train and save this
    one."""
    sample = assorted_samples()[1]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model().train(), config)
    separator = model.get_base_model().model.separator_token
    before = separator.detach().clone()
    separator.requires_grad_(True)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model(**sample.inputs(), labels=sample.ids[None]).loss.backward()
    optimizer.step()
    assert not torch.equal(separator, before)
    model.eval()
    expected = model(**sample.inputs()).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    saved = MossVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(saved.model.separator_token, separator)
    assert torch.allclose(saved(**sample.inputs()).logits, expected, atol=1e-4)
