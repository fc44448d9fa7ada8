"""The optimizer of train_nano.py: Muon for the matrices of the layers, AdamW for all other parameters.

Parameters of one section have gradients in the same steps. The matrices of a section with equal shapes are one tensor,
and all its other parameters one vector, so a step takes few operations.
"""

import math
from collections import defaultdict

import torch


FAST = 5.0  # factor of AdamW's rate in the language model: the gains of its norms sharpen attention
ENCODER = (
    "model.visual",
    "tutor.sights",
    "tutor.ink",
)  # parameters of the encoder's section; else the language model's


class Muon:
    """Orthogonalised momentum for matrices (K. Jordan and others, Muon, 2024), AdamW for everything else.

    The model may compute in bfloat16: the trained weights are float32 copies, which `step` writes back to it.

    Args:
        named_parameters: (name, parameter) pairs.
        rate: of matrices, per step.
        adam_rate: of all other parameters, per step.
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
        named_parameters = list(named_parameters)
        self.scale = torch.ones((), device=named_parameters[0][1].device)
        stacks, rests = defaultdict(dict), defaultdict(dict)
        for name, parameter in named_parameters:
            section = "encoder" if name.startswith(ENCODER) else "language model"
            if parameter.ndim == 2 and ("blocks" in name or "layers" in name):
                parts = 3 if name.endswith("qkv.weight") else 1  # query, key and value have a matrix each
                rows, columns = parameter.shape[0] // parts, parameter.shape[1]
                stacks[f"{section} {rows}x{columns}"][name] = parameter
            else:
                rests[section][name] = parameter
        self.stacks = {key: MatrixStack(parameters, key) for key, parameters in stacks.items()}
        self.vectors = {key: Vector(parameters) for key, parameters in rests.items()}

    def set_scale(self, scale: float) -> None:
        """Sets the factor of both rates. It is a tensor, so a recorded step reads its present value."""
        self.scale.fill_(scale)

    def clear(self) -> None:
        """Removes gradients that a step which failed has left."""
        for group in (*self.stacks.values(), *self.vectors.values()):
            for parameter in group.parameters:
                parameter.grad = None

    def step(self) -> None:
        """One update. Sections without gradients do not change."""
        for stack in self.stacks.values():
            stack.step(self.scale * self.rate, self.momentum, self.decay)
        for vector in self.vectors.values():
            vector.step(self.scale * self.adam_rate)

    def state_dict(self) -> dict:
        return {key: group.state for key, group in (self.stacks | self.vectors).items()}

    def load_state_dict(self, state: dict) -> None:
        for key, group in (self.stacks | self.vectors).items():
            group.load(state[key])


class Group:
    """Parameters that are updated together. `state` has their float32 copies and moments as one tensor each."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], shape: tuple[int, ...], moments: int):
        self.parameters, self.shape = list(parameters.values()), shape
        self.sizes = [len(parameter.view(shape)) for parameter in self.parameters]
        weights = torch.cat([parameter.detach().view(shape).float() for parameter in self.parameters])
        self.state = {
            "weights": weights,
            "moments": [torch.zeros_like(weights) for _ in range(moments)],
            "steps": torch.zeros((), device=weights.device),
        }

    def take_gradients(self) -> torch.Tensor | None:
        """All gradients as one float32 tensor, and removes them; None if no parameter has one."""
        gradients = [parameter.grad for parameter in self.parameters]
        if all(gradient is None for gradient in gradients):
            return None
        for parameter in self.parameters:
            parameter.grad = None
        parts = zip(self.parameters, gradients, strict=True)
        parts = [torch.zeros_like(parameter) if gradient is None else gradient for parameter, gradient in parts]
        self.state["steps"].add_(1)
        return torch.cat([part.reshape(self.shape) for part in parts]).float()

    def load(self, state: dict) -> None:
        self.state["weights"].copy_(state["weights"])
        self.state["steps"].copy_(state["steps"])
        for moment, saved in zip(self.state["moments"], state["moments"], strict=True):
            moment.copy_(saved)
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        parts = self.state["weights"].split(self.sizes)
        torch._foreach_copy_([parameter.data.view(self.shape) for parameter in self.parameters], list(parts))


class MatrixStack(Group):
    """Matrices [n, rows, columns], for Muon."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], key: str):
        rows, columns = map(int, key.split()[-1].split("x"))
        super().__init__(parameters, (-1, rows, columns), 1)
        self.aspect = max(1, rows / columns) ** 0.5
        self.dtype = self.parameters[0].dtype

    @torch.no_grad()
    def step(self, rate: torch.Tensor, momentum: float, decay: float) -> None:
        gradient = self.take_gradients()
        if gradient is None:
            return
        weights, [moment] = self.state["weights"], self.state["moments"]
        moment.lerp_(gradient, 1 - momentum)
        update = orthogonal(gradient.lerp_(moment, momentum).to(self.dtype))  # of Nesterov's momentum
        weights.mul_(1 - rate * decay).sub_(update * (rate * self.aspect))
        self.write_back()


class Vector(Group):
    """Parameters of any shape as one vector, for AdamW without decay."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        super().__init__(parameters, (-1,), 2)
        fast = [name.startswith(("lm_head", "model.language_model", "tutor.facts")) for name in parameters]
        factors = torch.tensor([FAST if each else 1.0 for each in fast])
        sizes = torch.tensor(self.sizes)
        self.factors = factors.repeat_interleave(sizes).to(self.state["weights"].device)

    @torch.no_grad()
    def step(self, rate: torch.Tensor) -> None:
        gradient = self.take_gradients()
        if gradient is None:
            return
        weights, [first, second], steps = (self.state[name] for name in ("weights", "moments", "steps"))
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square_(), 0.02)
        unbiased = [1 - (steps * math.log(decay)).exp() for decay in (0.9, 0.98)]
        spread = (second / unbiased[1]).sqrt_().add_(1e-8)
        weights.sub_(first.mul(self.factors).div_(spread).mul_(rate / unbiased[0]))
        self.write_back()


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
