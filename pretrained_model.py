"""The base class of all MOSS-VL models: attention names, initialisation, gradient checkpointing.

docs/transformers.md lists which behaviour of transformers each override here changes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .attention import attention_kind, is_kernel_name
from .configuration_moss_vl import MossVLConfig, check_parts


logger = logging.get_logger(__name__)


class MossVLLayer(GradientCheckpointingLayer):
    """A layer that gradient checkpointing runs again in the backward pass."""

    def __call__(self, *args, **kwargs) -> Any:
        if torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        # Without gradients there is no backward pass. transformers 4 would checkpoint anyway, and drop the cache.
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

    def __init__(self, config: PretrainedConfig, cross_attention_implementation: Optional[str] = None):
        """
        Args:
            cross_attention_implementation: attention implementation of the cross-attention layers alone. Default: that
                of the config; None there means that of the other layers.
        """
        super().__init__(config)
        text = getattr(config, "text_config", config)
        name = cross_attention_implementation
        if name is None:
            name = getattr(text, "cross_attention_implementation", None)
        if name is not None:
            text.cross_attention_implementation = self._check_and_adjust_attn_implementation(name, is_init_check=True)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers initialises the parameters of known classes only, and these belong to classes of MOSS-VL.
        for name in ("cross_attn_attn_gate", "cross_attn_mlp_gate", "separator_token"):
            if name in module._parameters:
                nn.init.zeros_(module._parameters[name])

    # Gradient checkpointing

    def enable_input_require_grads(self) -> None:
        """Makes the embeddings of text and patches require gradients, so that adapters after frozen layers get
        gradients through reentrant checkpointing. transformers 4 does this for the text only."""
        models = [module for module in self.modules() if isinstance(module, MossVLPreTrainedModel)]
        embeddings = {id(embedding): embedding for embedding in (model.get_input_embeddings() for model in models)}
        self.disable_input_require_grads()
        hooks = [embedding.register_forward_hook(require_gradients) for embedding in embeddings.values()]
        self._require_grads_hooks, self._require_grads_hook = hooks, hooks[0]

    def disable_input_require_grads(self) -> None:
        """Undoes `enable_input_require_grads`."""
        for hook in getattr(self, "_require_grads_hooks", ()):
            hook.remove()
        self._require_grads_hooks = []

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # before transformers 5.24

        def gradient_checkpointing_enable(
            self, gradient_checkpointing_kwargs: Optional[dict[str, Any]] = None, **kwargs
        ) -> None:
            """Makes non-reentrant checkpointing the default, as in transformers 5: with the reentrant default of
            transformers 4, layers after frozen ones get no gradient."""
            if gradient_checkpointing_kwargs is None:
                gradient_checkpointing_kwargs = {"use_reentrant": False}
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    # Attention names
    #
    # transformers resolves a name by three methods:
    #   _can_set_attn_implementation           whether names can be changed after construction
    #   _check_and_adjust_attn_implementation  the name of a model, at construction and later; may load a kernel
    #   get_correct_attn_implementation        called by the former, and for each part in `set_attn_implementation`
    # The overrides change two things. A name that MOSS-VL cannot use is an error (`attention_kind`). For a version of
    # flash-attention that is not installed, sdpa is used with a warning, while transformers raises an error.

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """True, as each call reads the names from the config. transformers would search the source file for a pattern
        that it does not contain."""
        return True

    def _check_and_adjust_attn_implementation(self, attn_implementation: Optional[str], *args, **kwargs) -> str:
        """Returns the name to use. May load a kernel of the `kernels` package.

        Raises:
            ValueError: see `attention_kind`.
        """
        name = attn_implementation
        # The kind of a kernel is known after it is loaded, so its name is checked afterwards.
        if name is not None and not (isinstance(name, str) and is_kernel_name(name)):
            if attention_kind(name) == "function":
                return name  # transformers would look for a kernel if a user's function has "flash" in its name
        name = self._or_sdpa(super()._check_and_adjust_attn_implementation, name, *args, **kwargs)
        attention_kind(name)
        return name

    def get_correct_attn_implementation(self, requested_attention: Optional[str], *args, **kwargs) -> str:
        """Returns the name to use, without loading a kernel.

        Raises:
            ValueError: see `attention_kind`.
        """
        if requested_attention is not None:
            attention_kind(requested_attention)
        return self._or_sdpa(super().get_correct_attn_implementation, requested_attention, *args, **kwargs)

    @staticmethod
    def _or_sdpa(check: Callable, name: Optional[str], *args, **kwargs) -> str:
        """`check(name)`. If it raises an error for a version of flash-attention, warns and checks sdpa instead."""
        try:
            return check(name, *args, **kwargs)
        except (ImportError, ValueError) as error:
            if name is None or not name.startswith("flash_attention"):
                raise
            logger.warning_once(f"{name} cannot be used here, sdpa is used instead. The reason: {error}")
            return check("sdpa", *args, **kwargs)

    def set_attn_implementation(
        self,
        attn_implementation: str | dict[str, str],
        *,
        cross_attention_implementation: Optional[str] = None,
        **kwargs,
    ) -> None:
        """Changes the attention implementation of the whole model, or of the parts that a dict names. Unlike
        transformers, checks all names before it changes anything.

        Args:
            attn_implementation: a name, or {"text_config": name, "vision_config": name}.
            cross_attention_implementation: a name for the cross-attention layers alone. Without it, a name for the
                whole model holds for these layers as well, and a dict does not change them.

        Raises:
            ValueError: if a name is not allowed.
        """
        is_dict = isinstance(attn_implementation, dict)
        check = partial(self._check_and_adjust_attn_implementation, **kwargs)
        if is_dict:
            check_parts(self.config, attn_implementation)
            attn_implementation = {part: check(name) for part, name in attn_implementation.items() if name is not None}
        else:
            attn_implementation = check(attn_implementation)
        if cross_attention_implementation is not None:
            cross_attention_implementation = check(cross_attention_implementation)
        if cross_attention_implementation is not None or not is_dict:
            text = getattr(self.config, "text_config", self.config)
            text.cross_attention_implementation = cross_attention_implementation
        super().set_attn_implementation(attn_implementation, **kwargs)


def require_gradients(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    """A forward hook: lets gradients pass layers that come after a frozen embedding."""
    output.requires_grad_(True)
