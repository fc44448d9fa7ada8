"""A Trainer with weights in the loss (token_loss.py), and with data sets that are streamed (streaming.py)."""

import torch
from transformers import Trainer

from moss_vl.training.realtime_records import count_decisions, make_protocol
from moss_vl.training.streaming import StreamedRecords, streaming_loader
from moss_vl.training.token_loss import TokenLoss, balanced_weights


def make_token_loss(args, processor, train_data, eval_data) -> TokenLoss | None:
    """The loss that the options and the weights of records need; None if the model's own loss is right.

    Args:
        args: the options of finetune.py.
        train_data, eval_data: data sets; `eval_data` may be None.

    Raises:
        ValueError: for options of streams without a stream, or without the tokens of streams in the tokenizer.
    """
    weights, streamed = (args.silence_weight, args.response_weight), isinstance(train_data, StreamedRecords)
    records = None if streamed else train_data.records
    if weights == (1, 1) and not args.focal_gamma and not args.balance_decisions:
        held_out = [] if eval_data is None else eval_data.records
        has_weights = streamed or any(record.weight != 1 for record in [*records, *held_out])
        return TokenLoss() if has_weights else None
    if not streamed and not any(record.is_stream for record in records):
        raise ValueError(
            "--silence-weight, --response-weight, --balance-decisions and --focal-gamma are for realtime streams, but "
            "no record of --data is one; leave them out"
        )
    tokens = make_protocol(processor).tokens
    if args.balance_decisions:
        weights = balanced_weights(*count_decisions(records, processor, args.skip_bad), args.balance_decisions)
    return TokenLoss(tokens.silence, tokens.response, *weights, args.focal_gamma)


class RecordTrainer(Trainer):
    """A Trainer whose loss may have weights, and whose records may be streamed.

    Args:
        token_loss: None leaves the loss to the model. It must be None, or not None, on all processes.
    """

    def __init__(self, *args, token_loss: TokenLoss | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.token_loss = token_loss
        self.evaluated = []  # [samples, 2] of each batch of an evaluation: sum of w f l, sum of w

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, StreamedRecords):
            context = getattr(self.args, "dataloader_multiprocessing_context", None)  # transformers 5
            return streaming_loader(
                self.train_dataset,
                self.data_collator,
                self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                prefetch_factor=self.args.dataloader_prefetch_factor,
                multiprocessing_context=context,
            )
        return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step, and the weights of all their tokens, on all processes, by which losses are
        divided."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.token_loss is None or count is None:
            return batches, count
        weights = [self.token_loss.weights(batch["labels"][:, 1:], batch.get("record_weights")) for batch in batches]
        total = torch.stack([one.sum().to(device) for one in weights]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return batches, total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.token_loss is None and model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels, record_weights = inputs.pop("labels"), inputs.pop("record_weights", None)
        outputs = model(**inputs)
        if not model.training:
            loss = self._evaluate_batch(outputs.logits, labels, record_weights)
            return (loss, outputs) if return_outputs else loss
        loss = self.token_loss(outputs.logits, labels, record_weights)
        if num_items_in_batch is None:
            loss = loss / self.token_loss.weights(labels[:, 1:], record_weights).sum().to(loss.device)
        else:
            loss = loss / num_items_in_batch.to(loss.device)
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # their gradients are averaged
        return (loss, outputs) if return_outputs else loss

    def _evaluate_batch(self, logits, labels, record_weights) -> torch.Tensor:
        """The loss of a batch. Keeps the sums of its samples on all processes, without those that fill up the last
        batch."""
        rule, sums = self.token_loss or TokenLoss(), []
        for row in range(len(labels)):
            of_row = slice(row, row + 1)
            weights = None if record_weights is None else record_weights[of_row]
            total = rule.weights(labels[of_row, 1:], weights).sum().to(logits.device)
            sums.append(torch.stack([rule(logits[of_row], labels[of_row], weights), total]))
        sums = torch.stack(sums).detach()
        self.evaluated.append(self.accelerator.gather_for_metrics(sums).double().cpu())
        loss, weight = sums.sum(0)
        return loss / weight

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None,
                        metric_key_prefix="eval"):  # fmt: skip
        """The Trainer's. Its loss is the mean of all learned tokens by their weights, as in training: not the mean of
        the losses of batches, which depends on their size."""
        self.evaluated = []
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if self.evaluated:
            loss, weight = torch.cat(self.evaluated).sum(0)
            output.metrics[f"{metric_key_prefix}_loss"] = (loss / weight).item()
        return output
