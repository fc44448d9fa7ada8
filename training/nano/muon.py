"""The optimizer of train_nano.py: Muon for the matrices of the layers, AdamW for all other parameters."""

from collections import defaultdict

import torch


FAST = 5.0  # factor of AdamW's rate in the language model: the gains of its norms sharpen attention


class Muon:
    """Orthogonalised momentum for matrices (K. Jordan and others, Muon, 2024), AdamW for everything else.

    The model may compute in bfloat16: the trained weights are float32 copies, which `step` writes back to it.
    """

    def __init__(
        self,
        named_parameters,
        rate: float = 0.02,
        adam_rate: float = 6e-4,
        momentum: float = 0.95,
        decay: float = 0.02,
    ):
        self.rate, self.adam_rate, self.momentum, self.decay = rate, adam_rate, momentum, decay
        self.parameters = dict(named_parameters)
        self.weights = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}
        self.moments = {
            name: [torch.zeros_like(weight) for _ in range(1 if self.is_matrix(name) else 2)]
            for name, weight in self.weights.items()
        }
        self.steps = dict.fromkeys(self.weights, 0)
        self.dtype = next(iter(self.parameters.values())).dtype

    def is_matrix(self, name: str) -> bool:
        return self.parameters[name].ndim == 2 and ("blocks" in name or "layers" in name)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with both rates times `scale`. Parameters without a gradient do not change."""
        by_shape = defaultdict(list)  # shape -> (update, weight) of matrices, which are orthogonalised together
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            parameter.grad = None
            self.steps[name] += 1
            if self.is_matrix(name):
                for update, weight in self._momentum_updates(name, gradient):
                    by_shape[update.shape].append((update, weight))
            else:
                self._adam_step(name, gradient, scale)
        for shape, pairs in by_shape.items():
            self._matrix_step(shape, pairs, scale)
        for name, parameter in self.parameters.items():
            if self.is_matrix(name):
                parameter.copy_(self.weights[name])

    def _momentum_updates(self, name: str, gradient: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(Nesterov momentum, weight) of a matrix; of a fused qkv matrix, one pair for each of its three parts."""
        (moment,) = self.moments[name]
        moment.lerp_(gradient, 1 - self.momentum)
        update, weight = gradient.lerp(moment, self.momentum), self.weights[name]
        if name.endswith("qkv.weight"):
            return list(zip(update.chunk(3), weight.chunk(3), strict=True))
        return [(update, weight)]

    def _matrix_step(self, shape, pairs, scale: float) -> None:
        updates = orthogonal(torch.stack([update for update, _ in pairs]).to(self.dtype)).float()
        for update, (_, weight) in zip(updates, pairs, strict=True):
            rate = scale * self.rate * max(1, shape[0] / shape[1]) ** 0.5
            weight.mul_(1 - scale * self.rate * self.decay).sub_(update, alpha=rate)

    def _adam_step(self, name: str, gradient: torch.Tensor, scale: float) -> None:
        first, second = self.moments[name]
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.02)
        steps, weight = self.steps[name], self.weights[name]
        update = first / (1 - 0.9**steps) / ((second / (1 - 0.98**steps)).sqrt() + 1e-8)
        fast = name.startswith(("lm_head", "model.language_model", "tutor.facts"))
        weight.sub_(update, alpha=scale * self.adam_rate * (FAST if fast else 1))
        self.parameters[name].copy_(weight)

    def state_dict(self) -> dict:
        return {"weights": self.weights, "moments": self.moments, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.weights, self.moments, self.steps = state["weights"], state["moments"], state["steps"]
        for name, parameter in self.parameters.items():
            parameter.copy_(self.weights[name])


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns] -> approximately the nearest (semi-)orthogonal matrices.

    Five Newton-Schulz iterations with Muon's coefficients.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).contiguous()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x
