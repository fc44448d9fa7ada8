"""Turns to inputs of `generate`: alone, or left-padded batches for methods that `generate` alone has."""

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
        grid_name="grid_thw",  # whatever the processor's settings are
        blank_medium=True,
        do_normalize=False,  # the model normalises on its device, chunk by chunk: a quarter of the bytes to move
        encoder=encode_frames if alone and turn.videos else None,
    )


def answer_turn(model, processor, turn: Turn) -> str:
    """The answer to one turn, written by `generate`."""
    batch, arguments = generate_inputs(model, turn.generate, [encode_turn(model, processor, turn)])
    ids = model.generate(**batch, **arguments)[0, batch["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


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


def may_share_call(turn: Turn, inputs: dict, other: Turn, other_inputs: dict) -> bool:
    """Whether two turns may be rows of one `generate` call: they have equal options, none of them an object of the
    caller, and also equal lengths if an option is not `PADDING_SAFE`."""
    options = turn.generate
    if options.keys() & OBJECTS or options != other.generate:
        return False
    return options.keys() <= PADDING_SAFE or prompt_length(inputs) == prompt_length(other_inputs)


def prompt_length(inputs: dict) -> int:
    return inputs["input_ids"].shape[1]


def vision_length(model, inputs: dict) -> int:
    """The number of vision tokens of inputs, separators included."""
    grids = inputs["grid_thw"].tolist() if "grid_thw" in inputs else []
    merged = model.config.vision_config.spatial_merge_size**2
    return sum(frames * (rows * columns // merged + 1) for frames, rows, columns in grids)


def longest_text(turn: Turn, inputs: dict) -> int:
    """Most tokens of prompt and answer, of all beams together."""
    length, limit = prompt_length(inputs), turn.generate.get("max_new_tokens")
    most = max(length, turn.generate.get("max_length") or 0) if limit is None else length + limit
    return most * (turn.generate.get("num_beams") or 1)


def left_pad(inputs: list, pad_token_id: int) -> dict:
    """Joins inputs of batch size 1 into one left-padded batch. The model derives the frame mask from `input_ids`."""
    width = max(map(prompt_length, inputs))

    def padded(name, value):  # [1, T] each -> [B, width]
        return joined(
            [torch.nn.functional.pad(one[name], (width - prompt_length(one), 0), value=value) for one in inputs]
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
