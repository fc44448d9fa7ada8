"""Auxiliary losses of train_nano.py: classifiers of facts on hidden states, and targets for attention weights.

Axes: B rows, H heads, T text tokens, S attended tokens, N vision tokens, D channels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from moss_vl.training.nano.collation import INK_LEVELS
from moss_vl.training.nano.dense import decode, encode, rows_of_vision
from moss_vl.training.nano.facts import CHANGES, CONTENTS, COURSE, IGNORED, SLOTS, TOKEN_FACTS
from moss_vl.training.nano.rows import TASKS


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
NOISY = ("clips", "streams")  # kinds of batches with NOISE
NOISE = 0.02  # of vision tokens, in standard deviations: frames of a file that show the same are not quite equal


class FactHeads(nn.Module):
    """Linear classifiers of facts, all on the same hidden states, computed together.

    Args:
        facts: (name, classes) of each. Facts with the same first word of their name are a group.
        weights: of the loss of each group.
    """

    def __init__(self, width: int, facts, weights: dict[str, float]):
        super().__init__()
        self.facts, self.default_weights = facts, weights
        self.groups = list(dict.fromkeys(name.split()[0] for name, _ in facts))
        self.most = max(classes for _, classes in facts)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, len(facts) * self.most)
        tables = {name: torch.zeros(len(facts), self.most) for name in ("absent", "class_weights", "counted")}
        member = torch.zeros(len(facts), len(self.groups))
        for index, (name, classes) in enumerate(facts):
            group = name.split()[0]
            tables["absent"][index, classes:] = float("-inf")
            tables["class_weights"][index, :classes] = tables["counted"][index, :classes] = 1.0
            tables["class_weights"][index, classes - 1] = ABSENT_WEIGHTS.get(group, 1.0)
            tables["counted"][index, classes - 1] = float(group not in ABSENT_WEIGHTS)
            member[index, self.groups.index(group)] = 1.0
        for name, table in {**tables, "member": member}.items():
            self.register_buffer(name, table, persistent=False)
        self.register_buffer("group_weights", torch.zeros(len(self.groups)), persistent=False)
        self.weigh()

    def weigh(self, **weights: float) -> None:
        """Sets the weights of groups, those not given to their default."""
        self.group_weights.copy_(torch.tensor([(self.default_weights | weights)[group] for group in self.groups]))

    def forward(self, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, and for each of `groups` the number of right predictions and of all.

        Args:
            states: [N, D].
            targets: [N, facts], IGNORED if a fact does not apply.
        """
        logits = self.heads(self.norm(states)).unflatten(1, (-1, self.most)).float() + self.absent.float()
        applies = targets != IGNORED
        target = targets.clamp(min=0)[..., None]
        losses = -logits.log_softmax(2).gather(2, target)[..., 0]  # [N, facts]

        def of_targets(table):
            return table.float().expand(len(target), -1, -1).gather(2, target)[..., 0] * applies

        class_weights = of_targets(self.class_weights)
        loss = (losses * class_weights).sum(0) / class_weights.sum(0).clamp(min=1e-6)
        member = self.member.float()
        total = (loss @ member * self.group_weights.float()).sum()
        counted = of_targets(self.counted)
        right = (logits.detach().argmax(2) == target[..., 0]) * counted
        return total, right.sum(0) @ member, counted.sum(0) @ member


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
        self.register_buffer("attention_weights", torch.zeros(len(ATTENTION_WEIGHTS)), persistent=False)
        self.weigh()

    def weigh(self, **weights: float) -> None:
        """Sets the weights of groups of frame facts and of attention targets, those not given to their default."""
        for heads in self.facts:
            heads.weigh(**weights)
        values = [weights.get(name, weight) for name, weight in ATTENTION_WEIGHTS.items()]
        self.attention_weights.copy_(torch.tensor(values))

    def loss(self, model, step: dict) -> tuple[torch.Tensor, "Counts"]:
        """Loss of a step of `collation.collate`, and what to log.

        Pictures with token facts train the encoder, and text trains the language model, each with losses of its own.
        """
        counts, losses = Counts(), []
        with torch.set_grad_enabled("token_facts" in step):
            tokens, states = encode(model.model.visual, step, self.ink_layer)
            if "token_facts" in step:
                losses.append(self.encoder_loss(tokens, states, step, counts))
        if "ids" in step:
            losses.append(self.language_model_loss(model, tokens.detach(), step, counts))
        return sum(losses), counts

    def encoder_loss(self, tokens: torch.Tensor, states: torch.Tensor, step: dict, counts: "Counts") -> torch.Tensor:
        """Loss of the vision encoder. tokens [N, P / 4, D], states [N, P, D] of the ink layer."""
        naming, right, counted = self.sights(tokens.flatten(0, 1), step["token_facts"].flatten(0, 1))
        known, shares = step["ink"] >= 0, step["ink"].clamp(min=0).float() / INK_LEVELS
        inks = self.inks(self.ink_norm(states)).float()
        inking = F.binary_cross_entropy_with_logits(inks, shares, reduction="none")
        inking = (inking * known).sum() / known.sum()
        counts.add([f"names {group}" for group in self.sights.groups], right, counted)
        counts.add_means({"naming": naming, "inking": inking})
        return naming + INK_WEIGHT * inking

    def language_model_loss(self, model, tokens: torch.Tensor, step: dict, counts: "Counts") -> torch.Tensor:
        """Loss of answers, facts and attention. tokens [N, P / 4, D] of the encoder."""
        noise = NOISE if step["kind"] in NOISY else 0.0
        vision = rows_of_vision(tokens, model.model.separator_token, step, noise)
        names = [name for name in ATTENTION_WEIGHTS if f"points {name}" in step]
        layers = {self.attention_layers[name] for name in names}
        states, fact_states, attended = decode(model.model.language_model, step, vision, self.fact_layers, layers)
        logits = model.lm_head(states.flatten(0, 1).index_select(0, step["learned"])).float()
        loss = answer_loss(logits, step)
        means = {f"loss {step['kind']}": loss}
        counts.add(TASKS, *right_answers(logits.detach(), step))
        targets = step["frame_facts"].split([len(heads.facts) for heads in self.facts], dim=1)
        for heads, layer, target in zip(self.facts, self.fact_layers, targets, strict=True):
            hidden = fact_states[layer].flatten(0, 1).index_select(0, step["pads"])
            fact_loss, right, counted = heads(hidden, target)
            loss = loss + FRAME_FACTS_WEIGHT * fact_loss
            counts.add([f"knows {group}" for group in heads.groups], right, counted)
        for name in names:
            weights, number = attended[self.attention_layers[name]], step[f"groups {name}"]
            logarithms, share = attention_on(weights, step[f"points {name}"], number)
            loss = loss - self.attention_weights[list(ATTENTION_WEIGHTS).index(name)].float() * logarithms
            means[f"attends {name}"] = share
        counts.add_means(means)
        return loss


class Counts:
    """What a step logs, on the device: for each name a sum and the number of its summands."""

    def __init__(self):
        self.names: tuple[str, ...] = ()
        self.parts: list[torch.Tensor] = []  # [2, names]

    def add(self, names, sums: torch.Tensor, numbers: torch.Tensor) -> None:
        self.names += tuple(names)
        self.parts.append(torch.stack([sums, numbers]))

    def add_means(self, values: dict[str, torch.Tensor]) -> None:
        means = torch.stack([value.detach().float() for value in values.values()])
        self.add(values, means, torch.ones_like(means))

    def joined(self) -> tuple[tuple[str, ...], torch.Tensor]:
        """All names, and [2, names]: sums and numbers."""
        return self.names, torch.cat(self.parts, dim=1)


def answer_loss(logits: torch.Tensor, step: dict) -> torch.Tensor:
    """Cross-entropy of logits [learned, vocabulary], weighted by `weights`."""
    losses = F.cross_entropy(logits, step["targets"], reduction="none")
    return (losses * step["weights"]).sum() / step["weights"].sum()


def right_answers(logits: torch.Tensor, step: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of TASKS, the number of right answers and of all.

    An answer is right if all of its tokens are the most likely ones given the tokens before.
    """
    tasks = step["answer_tasks"]
    missed = (logits.argmax(-1) != step["targets"]).float()
    missed = torch.zeros_like(tasks, dtype=torch.float).index_add_(0, step["answer"], missed)
    sums = torch.zeros(2, len(TASKS) + 1, device=logits.device)
    right = torch.stack([(missed == 0).float(), torch.ones_like(missed)])
    return tuple(sums.index_add_(1, tasks, right)[:, 1:])


def attention_on(
    weights: torch.Tensor, points: torch.Tensor, groups: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The means over all groups of targets of the logarithm of the attention weight in the group, and of that weight.

    Args:
        weights: [B, H, T, S].
        points, groups: of `collation.joined_points`; group 0 does not count.
    """
    row, head, text, token, group = points
    _, heads, length, attended = weights.shape
    index = ((row * heads + head) * length + text) * attended + token
    shares = torch.zeros(points.shape[1] + 1, device=weights.device)
    shares = shares.index_add_(0, group, weights.flatten().index_select(0, index).float())[1:]
    counted = torch.arange(len(shares), device=shares.device) < groups
    logarithms = ((shares + 1e-4).log() * counted).sum() / groups
    return logarithms, (shares * counted).sum() / groups
