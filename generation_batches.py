"""Answers turns: inputs of the processor, batches that share a `generate` call, texts."""

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from .generation_options import GENERATE_DEFAULTS, GREEDY, OBJECTS
from .generation_queries import Turn


# Options of `generate` whose effect does not depend on left padding (`repetition_penalty` by `UnpaddedPenalty`).
PADDING_SAFE = {
    *GREEDY,
    *GENERATE_DEFAULTS,
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "suppress_tokens",
    "renormalize_logits",
    "remove_invalid_values",
    "vision_chunked_length",
    "vision_cache_dtype",
}


def encode_turn(model, processor, turn: Turn, alone: bool = True) -> dict:
    """The inputs of `generate` for one turn, batch size 1.

    If the turn is `alone`, the vision encoder runs on the first frames of a video while later frames are decoded.
    Several turns keep uint8 pixels until all are decoded: these need less memory than features, and none on the
    device.
    """

    def encode_frames(pixels, grid, mean, std):
        with torch.no_grad():
            return model.get_image_features(
                pixels, grid, turn.generate["vision_chunked_length"], [mean], [std]
            ).last_hidden_state

    return processor(
        text=turn.text,
        images=turn.images or None,
        videos=turn.videos or None,
        images_kwargs=turn.images_kwargs if turn.images else {},
        videos_kwargs=turn.videos_kwargs if turn.videos else {},
        return_tensors="pt",
        grid_name="grid_thw",  # whatever the processor's setting is
        do_normalize=False,  # the model normalises on its device, chunk by chunk: a quarter of the bytes to move
        encoder=encode_frames if alone and turn.videos else None,
    )


def answer_turns(model, processor, turns: list[Turn], inputs: list) -> list[str]:
    """The answer to each turn. Replaces used items of `inputs` by None, to free their memory."""
    texts = [None] * len(turns)
    for group in group_turns(turns, inputs):
        batch, arguments = generate_inputs(model, turns[group[0]].generate, [inputs[i] for i in group])
        for i in group:
            inputs[i] = None
        ids = model.generate(**batch, **arguments)[:, batch["input_ids"].shape[1] :]
        for i, text in zip(group, processor.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts


def generate_inputs(model, generate: dict, inputs: list) -> tuple[dict, dict]:
    """The keyword arguments of one `generate` call: its batch, from inputs of batch size 1, and its options."""
    device = "cpu" if model.device.type == "meta" else model.device  # meta: the weights are offloaded
    batch = left_pad(inputs, generate["pad_token_id"])
    arguments = _arguments_of_batch(generate, batch["attention_mask"])
    for name in ("input_ids", "attention_mask", "grid_thw"):  # the model moves pixels chunk by chunk
        if name in batch:  # the continuation of a kept cache may come without media
            batch[name] = batch[name].to(device)
    return batch, arguments


def _arguments_of_batch(arguments: dict, attention_mask: torch.Tensor) -> dict:
    """Keyword arguments of `generate` for a batch with this padding, `attention_mask` [B, T]."""
    arguments = dict(arguments)
    padding = (attention_mask == 0).sum(dim=1).tolist()
    if any(padding) and arguments["repetition_penalty"] != 1:
        penalty = UnpaddedPenalty(arguments["repetition_penalty"], padding)
        arguments |= {"logits_processor": LogitsProcessorList([penalty]), "repetition_penalty": 1.0}
    if "stopping_criteria" in arguments:
        arguments["stopping_criteria"] = StoppingCriteriaList(arguments["stopping_criteria"])
    return arguments


def group_turns(turns: list[Turn], inputs: list) -> list[list[int]]:
    """Groups turns that can share a `generate` call, as lists of indices.

    The turns of a group have equal arguments. They also have equal lengths if an argument is not `PADDING_SAFE`. A
    turn with objects of the caller (a streamer, stopping criteria, ...) is a group alone.
    """
    shared, groups = [], []  # shared: ((arguments, length), group); compared one by one, as arguments are not hashable
    for i, turn in enumerate(turns):
        if turn.generate.keys() & OBJECTS:
            groups.append([i])
            continue
        length = None if turn.generate.keys() <= PADDING_SAFE else inputs[i]["input_ids"].shape[1]
        key = (turn.generate, length)
        group = next((group for other, group in shared if other == key), None)
        if group is None:
            groups.append([i])
            shared.append((key, groups[-1]))
        else:
            group.append(i)
    return groups


def left_pad(inputs: list, pad_token_id: int) -> dict:
    """Joins inputs of batch size 1 into one left-padded batch. The model derives the frame mask from `input_ids`."""
    width = max(one["input_ids"].shape[1] for one in inputs)

    def padded(name, value):  # [1, T] each -> [B, width]
        return joined(
            [torch.nn.functional.pad(one[name], (width - one[name].shape[1], 0), value=value) for one in inputs]
        )

    def joined(tensors):
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    batch = {"input_ids": padded("input_ids", pad_token_id), "attention_mask": padded("attention_mask", 0)}
    for name in ("pixel_values", "image_features", "grid_thw"):
        if name in inputs[0]:
            batch[name] = joined([one[name] for one in inputs])
    for name in ("media_nums_per_sample", "image_mean", "image_std"):
        if name in inputs[0]:
            batch[name] = [item for one in inputs for item in one[name]]
    return batch


class UnpaddedPenalty(LogitsProcessor):
    """The repetition penalty of left-padded rows. Without it, transformers 4 penalises the padding token.

    Args:
        padding: number of padding tokens before each prompt. The beams of a prompt are consecutive rows.
    """

    def __init__(self, penalty: float, padding: list[int]):
        self.penalise = RepetitionPenaltyLogitsProcessor(penalty)
        self.padding = padding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        beams = len(input_ids) // len(self.padding)
        rows = [slice(i, i + 1) for i in range(len(input_ids))]
        return torch.cat(
            [self.penalise(input_ids[row, self.padding[row.start // beams] :], scores[row]) for row in rows]
        )
