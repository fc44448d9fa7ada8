"""Answers to held-out records at an evaluation: written greedily, compared with the record's, saved as a file.

The prompt of a record is its text up to the last assistant turn, as it is trained; the expected answer is that turn.
"""

import copy
import json
import logging
import random
from contextlib import contextmanager
from functools import partial

import torch

from moss_vl.conversation import PLACEHOLDER
from moss_vl.generation_options import MEDIA_DEFAULTS
from moss_vl.training.batches import TURN_END, render
from moss_vl.training.processes import is_main
from moss_vl.training.records import try_record
from moss_vl.training.tuning_options import PROCESSOR_OPTIONS


logger = logging.getLogger("finetune")

FOLDER = "predictions"  # in the output folder


class AnswerWriter:
    """Writes the answers to up to `options.eval_generate` held-out records.

    Processes with whole weights share the records. If the weights are sharded, the main process makes a whole copy of
    the model and answers all records, while the others wait.

    Args:
        trainer: has the model, and the held-out records as `eval_dataset`.
        processor: of the checkpoint.
        options: of the command.
    """

    def __init__(self, trainer, processor, options):
        self.trainer, self.processor, self.options = trainer, processor, options
        data = trainer.eval_dataset
        read = partial(read_prompt, processor=processor, template=data.options["template"])
        prompts = [try_record(record, read, options.skip_bad) for record in data.records]
        chosen = [index for index, prompt in enumerate(prompts) if prompt is not None]
        if len(chosen) > options.eval_generate:
            chosen = sorted(random.Random(options.seed).sample(chosen, options.eval_generate))
        if not chosen:
            logger.warning("--eval-generate: all held-out records are streams or have media in their last answers")
        names = {*PROCESSOR_OPTIONS.values(), "num_extract_threads"}
        media_options = {name: value for name, value in data.options.items() if name in names}
        self.wheres = [data.records[index].where for index in chosen]
        self.expected = [prompts[index][1] for index in chosen]
        self.queries = [self._query(data.records[index], prompts[index][0], media_options) for index in chosen]

    def _query(self, record, prompt: str, media_options: dict) -> dict:
        """The query of the offline methods whose prompt is this text, with the options of the training."""
        return {
            "messages": [{"role": "user", "content": prompt}],
            "images": record.images,
            "videos": record.videos,
            "use_template": False,  # the prompt is rendered already
            "media_kwargs": dict.fromkeys(MEDIA_DEFAULTS) | media_options,  # None: the setting of the processor
            "generate_kwargs": {"do_sample": False, "max_new_tokens": self.options.eval_tokens},
        }

    def write(self, step: int) -> dict[str, float]:
        """Answers the records, and writes the file of this step. Returns the metrics, in every process."""
        if not self.queries:
            return {}
        rank, processes = self.trainer.args.process_index, self.trainer.args.world_size
        if has_sharded_weights(self.trainer):
            model, mine = whole_copy(self.trainer), range(len(self.queries)) if rank == 0 else range(0)
        else:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
            mine = range(rank, len(self.queries), processes)
        found = dict(zip(mine, self._answer(model, [self.queries[index] for index in mine]), strict=True))
        if processes > 1:
            parts = [None] * processes
            torch.distributed.all_gather_object(parts, found)
            found = {index: answer for part in parts for index, answer in part.items()}
        rows = [
            {"record": where, "prompt": query["messages"][0]["content"], "expected": expected}
            for where, query, expected in zip(self.wheres, self.queries, self.expected, strict=True)
        ]
        for index, row in enumerate(rows):
            row |= found[index]
            row["match"] = row.get("answer", "").strip() == row["expected"].strip() and "error" not in row
        if is_main():
            folder = self.options.output / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"step-{step}.jsonl").write_text("".join(lines), encoding="utf-8")
        return {"eval_exact_match": sum(row["match"] for row in rows) / len(rows)}

    @torch.no_grad()
    def _answer(self, model, queries: list[dict]) -> list[dict]:
        """{"answer"} or {"error"} per query, by the package's generation in batches."""
        if not queries:
            return []
        was_training = model.training
        model.eval()
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        try:
            with self.trainer.accelerator.autocast():
                batch_size = self.trainer.args.per_device_eval_batch_size
                stream = model.stream_batch(self.processor, queries, batch_size=batch_size)
                results = stream.results()["results"]
        finally:
            self.trainer.model.train(was_training)
        answers = []
        for result in results:
            if isinstance(error := result.get("error"), (ValueError, OSError)):
                answers.append({"error": str(error)})
            elif error is not None:
                raise error
            else:
                answers.append({"answer": result["text"]})
        return answers


def read_prompt(record, processor, template: bool) -> tuple[str, str] | None:
    """(prompt, expected answer) of a record; None for a stream, and if the last answer has media, which a model cannot
    write."""
    if record.is_stream:
        return None
    text, spans = render(record, processor, template)
    start, end = spans[-1]
    if PLACEHOLDER.search(text, start):
        return None
    ending = TURN_END if template else processor.tokenizer.eos_token
    return text[:start], text[start:end].removesuffix(ending)


def has_sharded_weights(trainer) -> bool:
    """Whether no process has the whole weights: with FSDP, and with DeepSpeed's stage 3."""
    if trainer.is_deepspeed_enabled:
        return trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    return trainer.is_fsdp_enabled


@contextmanager
def without_zero_init(trainer):
    """In this context, transformers does not shard a new model, which DeepSpeed would do with all processes."""
    if not trainer.is_deepspeed_enabled:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(trainer.args.hf_deepspeed_config)


def whole_copy(trainer):
    """A copy of the model with whole weights in the main process; None in the others. All processes must call it."""
    wrapped = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model_wrapped
    weights = trainer.accelerator.get_state_dict(wrapped)
    if not is_main():
        return None
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with without_zero_init(trainer), torch.device("meta"):
        whole = type(inner)(copy.deepcopy(inner.config))
        if inner is not model:
            from peft import get_peft_model

            whole = get_peft_model(whole, model.peft_config[model.active_adapter])
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights() if inner is model else whole.get_base_model().tie_weights()
    whole.generation_config = inner.generation_config
    return whole.to(trainer.args.device)
