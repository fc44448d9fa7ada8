"""Training: losses, gradients, both kinds of checkpointing, a new model's first weights, and a step of `transformers.Trainer`."""

import pytest
import torch
from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration
from tiny import Sample, assorted_samples, batch, make_config, make_model
from transformers import Trainer, TrainingArguments


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


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_reach_every_parameter(implementation):
    model = make_model(implementation).train()
    for samples in (assorted_samples(), assorted_samples()[1:2]):
        _, grads = gradients(model, labelled(samples))
        assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []


def test_a_batch_of_text_alone_still_touches_every_parameter():
    """In training the blank media are read times 0, so that no rank of a distributed run waits for a gradient."""
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
    """A cache is kept from the layers, which would write to it once more when they are run again."""
    model = make_model().train()
    inputs = labelled(assorted_samples())
    loss, plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    layers = (model.model.visual.blocks[1].mlp, model.model.language_model.layers[1].mlp, model.model.language_model.layers[2].mlp)
    hooks = [layer.register_forward_pre_hook(lambda module, args: calls.append(id(module))) for layer in layers]
    again, checkpointed = gradients(model, inputs | {"use_cache": use_cache})
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == sorted([id(layer) for layer in layers] * 2), "each is run again in the backward pass"
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


def test_a_new_model_starts_sensibly():
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
    """Three records, media and all, a few steps of `Trainer` as users run it."""
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
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"index": i} for i in range(3)], data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0], losses
    logits, rope_deltas = trainer.predict(trainer.train_dataset).predictions  # and not the cache
    assert (logits.shape, rope_deltas.shape) == ((3, 11, 200), (3,))
