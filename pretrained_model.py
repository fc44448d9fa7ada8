"""The base class of all MOSS-VL models: attention names, initialisation, gradient checkpointing."""

from functools import partial
from typing import Optional

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .attention import (
    attention_kind,
    is_kernel_name,
)
from .configuration_moss_vl import MossVLConfig, check_parts


logger = logging.get_logger(__name__)


class MossVLLayer(GradientCheckpointingLayer):
    """A layer that gradient checkpointing runs again in the backward pass."""

    def __call__(self, *args, **kwargs):
        if torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        # There is no backward pass. transformers 4 would checkpoint all the same, and keep the cache from the layer.
        return nn.Module.__call__(self, *args, **kwargs)


class MossVLPreTrainedModel(PreTrainedModel):
    config_class = MossVLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MossVLVisionBlock", "MossVLSelfAttentionLayer", "MossVLCrossAttentionLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values", "layer_past"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config, cross_attention_implementation: Optional[str] = None):
        """`cross_attention_implementation`: what `from_pretrained` and `from_config` were given, as `attn_implementation` is, but for the
        cross-attention layers alone."""
        super().__init__(config)
        text = getattr(config, "text_config", config)
        name = getattr(text, "cross_attention_implementation", None)
        name = name if cross_attention_implementation is None else cross_attention_implementation
        if name is not None:
            text.cross_attention_implementation = self._check_and_adjust_attn_implementation(name, is_init_check=True)

    def _init_weights(self, module):
        super()._init_weights(module)
        for name in ("cross_attn_attn_gate", "cross_attn_mlp_gate", "separator_token"):
            if name in module._parameters:
                nn.init.zeros_(module._parameters[name])

    def enable_input_require_grads(self):
        """Makes the embeddings of text and patches require gradients, so that adapters in layers after frozen ones get theirs if
        checkpointing is reentrant. transformers 4 does so for the text alone."""
        models = [module for module in self.modules() if isinstance(module, MossVLPreTrainedModel)]
        embeddings = {id(embedding): embedding for embedding in (model.get_input_embeddings() for model in models)}
        self.disable_input_require_grads()
        hooks = [embedding.register_forward_hook(require_gradients) for embedding in embeddings.values()]
        self._require_grads_hooks, self._require_grads_hook = hooks, hooks[0]

    def disable_input_require_grads(self):
        """Takes back `enable_input_require_grads`."""
        for hook in getattr(self, "_require_grads_hooks", ()):
            hook.remove()
        self._require_grads_hooks = []

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # before transformers 5.24

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
            """Not reentrant unless it is asked for, as in transformers 5: else a trained layer after frozen ones gets no gradient."""
            if gradient_checkpointing_kwargs is None:
                gradient_checkpointing_kwargs = {"use_reentrant": False}
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # read from the config at every call

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        """transformers' check at construction and in `set_attn_implementation`, which may load a kernel: the name that is used."""
        loads_kernel = isinstance(attn_implementation, str) and is_kernel_name(attn_implementation)
        if attn_implementation is not None and not loads_kernel and attention_kind(attn_implementation) == "function":
            return attn_implementation  # transformers takes any name with "flash" in it for a kernel
        name = self._or_sdpa(super()._check_and_adjust_attn_implementation, attn_implementation, *args, **kwargs)
        attention_kind(name)
        return name

    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        """transformers' check of the parts in `set_attn_implementation`, without loading a kernel."""
        if requested_attention is not None:
            attention_kind(requested_attention)
        return self._or_sdpa(super().get_correct_attn_implementation, requested_attention, *args, **kwargs)

    @staticmethod
    def _or_sdpa(check, name: Optional[str], *args, **kwargs) -> str:
        """What `check` makes of the name; sdpa, with a warning, for a version of flash-attention that cannot be used here."""
        try:
            return check(name, *args, **kwargs)
        except (ImportError, ValueError) as error:
            if name is None or not name.startswith("flash_attention"):
                raise
            logger.warning_once(f"{name} cannot be used here, sdpa is used instead. The reason: {error}")
            return check("sdpa", *args, **kwargs)

    def set_attn_implementation(
        self, attn_implementation, *, cross_attention_implementation: Optional[str] = None, **kwargs
    ):
        """Changes the attention functions of the whole model, or by a dict those of the parts that it names.

        Args:
            attn_implementation: a name, or {"text_config": name, "vision_config": name}.
            cross_attention_implementation: another one for the cross-attention layers alone. Without it they follow a name given for the
                whole model, and keep theirs if a dict is given.

        Raises:
            ValueError: for names that are not allowed, before anything is changed.
        """
        of_parts, check = (
            isinstance(attn_implementation, dict),
            partial(self._check_and_adjust_attn_implementation, **kwargs),
        )
        if of_parts:
            check_parts(self.config, attn_implementation)
            attn_implementation = {part: check(name) for part, name in attn_implementation.items() if name is not None}
        else:
            attn_implementation = check(attn_implementation)
        text = getattr(self.config, "text_config", self.config)
        if cross_attention_implementation is not None or not of_parts:
            cross = None if cross_attention_implementation is None else check(cross_attention_implementation)
            text.cross_attention_implementation = cross
        super().set_attn_implementation(attn_implementation, **kwargs)


def require_gradients(module, args, output) -> None:
    """A forward hook: gradients reach what comes after an embedding, though its weights are frozen."""
    output.requires_grad_(True)
