"""transformers' Trainer with learning rates per part, weights beside adapters, and answers at evaluations."""

import logging
from pathlib import Path

import torch

from moss_vl.training.answers import AnswerWriter
from moss_vl.training.parts import extra_of, part_of
from moss_vl.training.record_trainer import RecordTrainer
from moss_vl.training.saving import add_to_adapter, set_config_dtype
from moss_vl.training.tuning_options import part_rates


logger = logging.getLogger("finetune")


class TuningTrainer(RecordTrainer):
    """A Trainer of finetune.py.

    Args:
        options: the options of the command.
        processor: of the checkpoint.
        The others are RecordTrainer's.

    Attributes:
        save_dtype: the dtype in which sharded weights are saved; None for that of the state dict.
    """

    def __init__(self, *args, options, processor, **kwargs):
        super().__init__(*args, **kwargs)
        self.options, self.save_dtype = options, None
        self.answers = None
        if options.eval_generate is not None:
            self.answers = AnswerWriter(self, processor, options)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights of the model are not whole on each process while it trains, or saved by a plugin."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    # learning rates

    def create_optimizer(self, *args, **kwargs):
        """Splits the groups of Trainer's optimizer by part, if parts have learning rates of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = part_rates(self.options)
        if is_new and rates:
            model = args[0] if args and args[0] is not None else kwargs.get("model") or self.model
            parts = {id(parameter): part_of(name, self.model.config) for name, parameter in model.named_parameters()}
            optimizer.param_groups[:] = split_groups(optimizer.param_groups, parts, rates)
            logger.info("learning rates: %s", ", ".join(f"{part} {rate:g}" for part, rate in rates.items()))
        return optimizer

    # saving

    def _save(self, output_dir=None, state_dict=None):
        """Also saves the weights that are trained beside adapters, and converts sharded weights to `save_dtype`."""
        if state_dict and self.save_dtype is not None:
            state_dict = {
                name: tensor.to(self.save_dtype) if tensor.is_floating_point() else tensor
                for name, tensor in state_dict.items()
            }
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.save_dtype is not None:
            set_config_dtype(folder, self.save_dtype)
        if self.options.lora_also:
            add_to_adapter(folder, self._extra_weights(state_dict))

    def _extra_weights(self, state_dict) -> dict[str, torch.Tensor]:
        weights = dict(self.model.named_parameters()) if state_dict is None else state_dict
        config, options = self.model.config, self.options
        return {
            name: tensor
            for name, tensor in weights.items()
            if "lora_" not in name and extra_of(name, config, options.train) in options.lora_also
        }

    # evaluation

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The loss of the held-out records, and with --eval-generate the share of answers that match."""
        metrics = super().evaluate(*args, **kwargs)
        if self.answers is not None:
            matches = self.answers.write(self.state.global_step)
            self.log(dict(matches))
            metrics.update(matches)
        return metrics


def split_groups(groups: list[dict], parts: dict[int, str], rates: dict[str, float]) -> list[dict]:
    """The groups of an optimizer, split by part.

    Args:
        parts: the part of each parameter, by its id.
        rates: learning rates of parts; the parameters of other parts keep the rate of their group. They come first,
            so that the logged learning rate is theirs.
    """
    split = []
    for group in groups:
        by_rate = {None: []} | {rate: [] for rate in rates}
        for parameter in group["params"]:
            part = parts[id(parameter)]
            by_rate[part if part in rates else None].append(parameter)
        for part, parameters in by_rate.items():
            if parameters:
                split.append({**group, "params": parameters} | ({} if part is None else {"lr": rates[part]}))
    return split
