"""Auxiliary losses of train_nano.py: classifiers of facts on hidden states, and targets for attention weights.

Axes: B rows, H heads, T text tokens, S attended tokens, N vision tokens, D channels.
"""

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from operator import mul

import torch
import torch.nn.functional as F
from torch import nn

from moss_vl.training.nano.facts import CHANGES, CONTENTS, COURSE, IGNORED, SLOTS, TOKEN_FACTS
from moss_vl.training.nano.lessons import TASKS, visible_parts


# Weights of the losses. The keys of the first three are groups of facts, the first words of their names.
TOKEN_FACT_WEIGHTS = {
    "shape": 3.0,
    "colour": 0.5,
    "size": 0.5,
    "place": 1.0,
    "across": 1.0,
    "down": 1.0,
    "rank": 0.3,
    "twin": 0.3,
    "nearest": 0.2,
    "letter": 2.0,
    "spelling": 0.3,
}
FRAME_FACT_WEIGHTS = {
    "colour": 1.0,
    "kind": 0.5,
    "size": 0.3,
    "place": 1.0,
    "across": 0.4,
    "down": 0.4,
    "rank": 0.2,
    "count": 0.3,
    "event": 2.0,
    "stamp": 0.2,
    "picture": 1.0,
    "events": 0.5,
    "begins": 1.0,
    "subject": 0.5,
    "fires": 1.0,
}
ABSENT_WEIGHTS = {"shape": 0.3, "letter": 0.05, "event": 0.03, "begins": 0.1}  # of the last class, "none"
ATTENTION_WEIGHTS = {
    "stamps": 0.1,
    "slots": 0.2,
    "before": 0.1,
    "asked": 0.2,
    "looks": 0.2,
    "frames": 0.2,
    "request": 0.2,
}
INK_WEIGHT = 4.0
FRAME_FACTS_WEIGHT = 0.2
NOISE = 0.02  # of vision tokens, in standard deviations: frames of a file that show the same are not quite equal


class FactHeads(nn.Module):
    """Linear classifiers of facts, all on the same hidden states. `facts`: (name, classes) of each."""

    def __init__(self, width: int, facts, weights: dict[str, float]):
        super().__init__()
        self.facts, self.weights = facts, weights
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, sum(classes for _, classes in facts))

    def forward(
        self, states: torch.Tensor, targets: torch.Tensor, **weights: float
    ) -> tuple[torch.Tensor, dict[str, list[bool]]]:
        """Loss, and for each group of facts whether each prediction is right.

        Args:
            states: [N, D].
            targets: [N, facts], IGNORED if a fact does not apply.
            weights: of groups, instead of the default ones.
        """
        logits = self.heads(self.norm(states)).float().split([classes for _, classes in self.facts], dim=1)
        total, right = 0.0, defaultdict(list)
        for (name, classes), scores, target in zip(self.facts, logits, targets.unbind(1), strict=True):
            applies = target != IGNORED
            if not applies.any():
                continue
            group = name.split()[0]
            class_weights = torch.ones(classes, device=scores.device)
            class_weights[-1] = ABSENT_WEIGHTS.get(group, 1.0)
            loss = F.cross_entropy(scores, target, weight=class_weights, ignore_index=IGNORED)
            total = total + weights.get(group, self.weights[group]) * loss
            counted = applies & (target < classes - 1) if group in ABSENT_WEIGHTS else applies
            right[group] += (scores.argmax(1) == target)[counted].tolist()
        return total, right


class Tutor(nn.Module):
    """Auxiliary heads and losses, used only for training.

    Vision encoder: each output token is classified by its token facts, and each patch state of a middle layer predicts
    which parts of the patch are covered. Language model: the text token of each picture or frame is classified by its
    frame facts after the first cross-attention layer (contents) and two layers after it (changes, course), and
    attention heads get the targets of `lessons.AttentionTargets`.
    """

    def __init__(self, config):
        super().__init__()
        text, vision = config.text_config, config.vision_config
        first, second = text.cross_attention_layers[:2]
        assert text.num_attention_heads == len(SLOTS), "each slot needs a head"
        self.ink_layer, self.fact_layers = vision.deepstack_visual_indexes[0], (first, first + 2, first + 3)
        self.attention_layers = {
            "stamps": first - 1,
            "slots": first,
            "before": first + 1,
            "asked": first,
            "looks": second,
            "frames": second + 1,
            "request": first + 2,
        }
        # The names of these modules are keys of state.pt.
        self.sights = FactHeads(vision.out_hidden_size, TOKEN_FACTS, TOKEN_FACT_WEIGHTS)
        self.ink_norm, self.inks = nn.LayerNorm(vision.hidden_size), nn.Linear(vision.hidden_size, 64)
        parts = (CONTENTS, CHANGES, COURSE)
        self.facts = nn.ModuleList(FactHeads(text.hidden_size, part, FRAME_FACT_WEIGHTS) for part in parts)

    def encoder_loss(self, model, batch: dict) -> tuple[torch.Tensor, dict]:
        """Loss of the vision encoder, and values to log."""
        visual = model.model.visual
        with record_outputs(visual.blocks[self.ink_layer]) as states:
            tokens = visual(batch["pixel_values"], batch["grid_thw"])
        naming, right = self.sights(tokens, batch["token_facts"])
        inking = F.binary_cross_entropy_with_logits(self.inks(self.ink_norm(states[0])).float(), batch["ink"])
        log = {"naming": [naming.item()], "inking": [inking.item()]}
        log |= {f"names {name}": values for name, values in right.items()}
        return naming + INK_WEIGHT * inking, log

    def language_model_loss(self, model, batch: dict, **weights: float) -> tuple[torch.Tensor, dict]:
        """Loss of answers, facts and attention, and values to log.

        Args:
            weights: of groups of facts and of attention layers, instead of the default ones.
        """
        layers = model.model.language_model.layers
        with ExitStack() as stack:
            states = [stack.enter_context(record_outputs(layers[layer])) for layer in self.fact_layers]
            attended = {
                name: stack.enter_context(record_outputs(layers[layer]))
                for name, layer in self.attention_layers.items()
            }
            stack.enter_context(encode_moments_once(model.model.visual, batch))
            stack.enter_context(leaping_frames(model.model.language_model, batch))
            out = model(
                input_ids=batch["input_ids"],
                attention_mask=visible_parts(batch["parts"]),
                position_ids=batch["position_ids"],
                pixel_values=batch["pixel_values"],
                grid_thw=batch["grid_thw"],
                media_nums_per_sample=batch["media_nums"],
                output_attentions=True,
            )
        loss = answer_loss(out.logits, batch)
        log = {f"loss {batch['kind']}": [loss.item()], **right_answers(out.logits, batch)}
        pads = batch["input_ids"] == model.config.image_token_id
        targets = batch["frame_facts"].split([len(heads.facts) for heads in self.facts], dim=1)
        for heads, [(hidden, _)], target in zip(self.facts, states, targets, strict=True):
            fact_loss, right = heads(hidden[pads], target, **weights)
            loss = loss + FRAME_FACTS_WEIGHT * fact_loss
            log |= {f"knows {name}": values for name, values in right.items()}
        for name, points in batch["attention"].items():
            [(_, attention)] = attended[name]
            share = attention_on(attention, points)
            loss = loss - weights.get(name, ATTENTION_WEIGHTS[name]) * (share + 1e-4).log().mean()
            log[f"attends {name}"] = [share.mean().item()]
        return loss, log


def answer_loss(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """Cross-entropy of the next token over `labels`, weighted by `weights`."""
    labels, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
    learned = labels != IGNORED
    losses = F.cross_entropy(logits[:, :-1][learned].float(), labels[learned], reduction="none")
    return (losses * weights[learned]).sum() / weights[learned].sum()


def right_answers(logits: torch.Tensor, batch: dict) -> dict[str, list[int]]:
    """Task -> for each answer 1 if all of its tokens are the most likely ones given the tokens before, else 0."""
    learned = batch["labels"][:, 1:] != IGNORED
    wrong = (logits[:, :-1].argmax(-1) != batch["labels"][:, 1:]) & learned
    rows, columns = learned.nonzero(as_tuple=True)
    parts, tasks = batch["parts"][:, 1:][rows, columns], batch["tasks"][:, 1:][rows, columns]
    failed = defaultdict(int)
    for row, part, task, miss in zip(
        rows.tolist(), parts.tolist(), tasks.tolist(), wrong[rows, columns].tolist(), strict=True
    ):
        failed[row, part, task] |= miss
    right = defaultdict(list)
    for (_, _, task), miss in failed.items():
        right[TASKS[task]].append(1 - miss)
    return right


def attention_on(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The sum of attention weights in each group of targets.

    weights [B, H, T, S], points [points, 5] of `lessons.AttentionTargets` -> [groups]
    """
    row, head, text, token, group = points.unbind(1)
    sums = weights.new_zeros(int(group[-1]) + 1, dtype=torch.float32)
    return sums.index_add_(0, group, weights[row, head, text, token].float())


@contextmanager
def encode_moments_once(visual, batch: dict):
    """Within the context, the encoder encodes one frame per moment of a clip and repeats its tokens, with noise."""
    if "moments" not in batch:
        yield
        return
    sizes = [h * w for _, h, w in batch["grid_thw"]]  # patches per frame
    firsts = [[moments.index(moment) for moment in range(max(moments) + 1)] for moments in batch["moments"]]

    def select_frames(module, args):
        clips = args[0].split([t * h * w for t, h, w in batch["grid_thw"]])
        selected = [
            clip.unflatten(0, (-1, size))[first].flatten(0, 1)
            for clip, size, first in zip(clips, sizes, firsts, strict=True)
        ]
        grid = [[len(first), h, w] for first, (_, h, w) in zip(firsts, batch["grid_thw"], strict=True)]
        return torch.cat(selected), grid, *args[2:]

    def repeat_tokens(module, args, out):
        counts = [size // visual.spatial_merge_size**2 for size in sizes]  # tokens per frame
        frames = [len(first) for first in firsts]
        separators = (len(out) - sum(map(mul, frames, counts))) // sum(frames)  # per frame: 1 if the encoder adds them
        clips = out.split([number * (count + separators) for number, count in zip(frames, counts, strict=True)])
        repeated = [
            clip.unflatten(0, (-1, count + separators))[moments]
            for clip, count, moments in zip(clips, counts, batch["moments"], strict=True)
        ]
        tokens = torch.cat([clip[:, :count].flatten(0, 1) for clip, count in zip(repeated, counts, strict=True)])
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(batch["grain"])).to(tokens)
        tokens = (tokens + NOISE * tokens.std(0) * noise).split(list(map(mul, map(len, repeated), counts)))
        return torch.cat(
            [
                torch.cat([part.unflatten(0, (-1, count)), clip[:, count:]], dim=1).flatten(0, 1)
                for part, clip, count in zip(tokens, repeated, counts, strict=True)
            ]
        )

    hooks = [visual.register_forward_pre_hook(select_frames), visual.register_forward_hook(repeat_tokens)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def leaping_frames(language_model, batch: dict):
    """Within the context, `leaps` are added to the positions of vision tokens; `position_ids` already contain them."""
    if "leaps" not in batch:
        yield
        return

    def add_leaps(module, args, kwargs):
        positions = kwargs["vision_position_ids"]
        return args, kwargs | {"vision_position_ids": positions + batch["leaps"].to(positions.device)}

    hook = language_model.register_forward_pre_hook(add_leaps, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def record_outputs(module):
    """Within the context, the module's outputs are appended to the list that it yields."""
    outputs = []
    hook = module.register_forward_hook(lambda module, args, out: outputs.append(out))
    try:
        yield outputs
    finally:
        hook.remove()
