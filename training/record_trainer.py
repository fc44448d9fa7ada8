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
        weights = balanced_weights(*count_decisions(records, processor), args.balance_decisions)
    return TokenLoss(tokens.silence, tokens.response, *weights, args.focal_gamma)


class RecordTrainer(Trainer):
    """A Trainer whose loss may have weights, and whose records may be streamed.

    Args:
        token_loss: None leaves the loss to the model. It must be None, or not None, on all processes.
    """

    def __init__(self, *args, token_loss: TokenLoss | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.token_loss = token_loss

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, StreamedRecords):
            return streaming_loader(
                self.train_dataset,
                self.data_collator,
                self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                prefetch_factor=self.args.dataloader_prefetch_factor,
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
        if self.token_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels, record_weights = inputs.pop("labels"), inputs.pop("record_weights", None)
        outputs = model(**inputs)
        loss = self.token_loss(outputs.logits, labels, record_weights)
        if num_items_in_batch is None:
            loss = loss / self.token_loss.weights(labels[:, 1:], record_weights).sum().to(loss.device)
        else:
            loss = loss / num_items_in_batch.to(loss.device)
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # their gradients are averaged
        return (loss, outputs) if return_outputs else loss
