"""The loss with weights of records and of the decisions of streams; record_trainer.py computes it in training.

With the cross-entropy l of each learned token, its weight w and its focal factor f, the loss of a step is

    sum(w f l) / sum(w)        over the learned tokens of all batches and processes of the step

    w = weight of the record, times `silence_weight` at <|silence|>, `response_weight` at <|response|>
    f = (1 - exp(-l)) ** focal_gamma at <|silence|> and <|response|>, 1 at all other tokens: exp(-l) is the
        probability of the token (focal loss: Lin et al. 2017, https://arxiv.org/abs/1708.02002)

Without weights, this is the mean that the model computes itself.

Axes: B samples, T tokens, K kept tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moss_vl.training.batches import IGNORED


LEAST_DOUBT = 1e-12  # least 1 - p of the focal factor: the derivative of x ** gamma at 0 may be infinite


@dataclass(frozen=True)
class TokenLoss:
    """Weights of learned tokens.

    Attributes:
        silence, response: ids of the tokens; None for a tokenizer without them.
        silence_weight, response_weight, focal_gamma: see the top of this file.
    """

    silence: int | None = None
    response: int | None = None
    silence_weight: float = 1.0
    response_weight: float = 1.0
    focal_gamma: float = 0.0

    def weights(self, labels: torch.Tensor, record_weights: torch.Tensor | None = None) -> torch.Tensor:
        """The weight of each label [B, T], 0 for ignored ones.

        Args:
            record_weights: [B]; None if all are 1.
        """
        weights = (labels != IGNORED).float()
        if record_weights is not None:
            weights = weights * record_weights.to(weights)[:, None]
        for token, weight in ((self.silence, self.silence_weight), (self.response, self.response_weight)):
            if token is not None and weight != 1:
                weights = torch.where(labels == token, weights * weight, weights)
        return weights

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, record_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sum of w f l.

        Args:
            logits: [B, K, V], of the last K tokens of each row.
            labels: [B, T], padded on the right; not shifted.
        """
        labels = labels.to(logits.device)
        weights = self.weights(labels, record_weights)
        # the logits of a token predict the next one
        targets, weights = (
            F.pad(values[:, 1:], (0, 1), value=value)[:, -logits.shape[1] :]
            for values, value in ((labels, IGNORED), (weights, 0.0))
        )
        learned = targets != IGNORED
        targets, weights = targets[learned], weights[learned]
        losses = F.cross_entropy(logits[learned].float(), targets, reduction="none")
        if self.focal_gamma:
            decides = sum(targets == token for token in (self.silence, self.response) if token is not None)
            doubt = (-torch.expm1(-losses)).clamp(min=LEAST_DOUBT)
            losses = torch.where(decides > 0, losses * doubt**self.focal_gamma, losses)
        return (weights * losses).sum()


def balanced_weights(silences: int, responses: int, exponent: float) -> tuple[float, float]:
    """Weights of `<|silence|>` and `<|response|>` by their shares: (1 / (2 share)) ** exponent.

    With exponent 1, both have the same total weight, and the total of both is their number. With 0, both weights are
    1, and also if one of the two does not occur.
    """
    total = silences + responses
    if not silences or not responses:
        return 1.0, 1.0
    return (total / (2 * silences)) ** exponent, (total / (2 * responses)) ** exponent
