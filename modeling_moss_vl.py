"""MOSS-VL: the vision encoder and the decoder as one model, and the same with a language model head.

Axes: B rows, T text tokens of this call, S text tokens in all (cache included), D hidden size, H query heads, N
frames, P patches, m merge size, V vision tokens (the tokens of each frame and its separator, all samples one after the
other without padding), v those of them that are new in this call. docs/architecture.md has the steps of a call and a
glossary.
"""

from dataclasses import dataclass, replace
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutputWithCrossAttentions,
)
from transformers.utils import logging

from .attention import check_implementations, check_ready_mask
from .block_attention import attend_in_blocks  # noqa: F401
from .cache_layers import (
    CACHE,
    CacheContents,
    JointCache,
    cache_contents,
    cache_of,
    cached_length,
    check_vision_dtype,
    drop_frames,
    fork_cache,
    install_layers,
    static_length,
    vision_state,
)
from .call_positions import read_positions, walk_request
from .checks import nearest_name  # noqa: F401 - transformers 4.57 copies only the files that this file imports itself
from .configuration_moss_vl import MossVLConfig
from .conversation import PLACEHOLDERS  # noqa: F401
from .decode_step import (
    check_capacity,
    compile_settings,
    compiled_step,
    keep_token,
    read_step,
    run_step,
    static_cache,
)
from .decoder import (
    MossVLCrossAttention,
    MossVLCrossAttentionLayer,
    MossVLModelOutput,
    MossVLRMSNorm,
    MossVLSelfAttention,
    MossVLSelfAttentionLayer,
    MossVLTextAttention,
    MossVLTextMLP,
    MossVLTextModel,
)
from .generation_batches import answer_turn  # noqa: F401
from .generation_hooks import MossVLGenerateHooks
from .generation_options import GENERATE_DEFAULTS  # noqa: F401
from .generation_queries import Turn  # noqa: F401
from .generation_queue import QueueServer  # noqa: F401
from .generation_rows import AnswerRow  # noqa: F401
from .generation_sessions import SessionState  # noqa: F401
from .generation_streams import BatchStream  # noqa: F401
from .generation_utils import MossVLGenerationMixin
from .int8_states import Int8States  # noqa: F401
from .joint_decoding import finish_step, plan_step, read_joint, read_tokens, undone_on_error
from .media import Grid, Media, choose_grid, frame_groups, read_media
from .options import OPTIONS  # noqa: F401
from .patches import normalise  # noqa: F401
from .pretrained_model import MossVLPreTrainedModel
from .realtime_events import Event  # noqa: F401
from .realtime_protocol import Protocol  # noqa: F401
from .realtime_sampling import Sampler  # noqa: F401
from .realtime_scheduler import Scheduler  # noqa: F401
from .realtime_session import MossVLRealtimeMixin
from .realtime_stream import RealtimeStream  # noqa: F401
from .signatures import image_kind  # noqa: F401
from .static_layers import StaticTextLayer  # noqa: F401
from .vision_encoder import (
    MossVLVisionAttention,
    MossVLVisionBlock,
    MossVLVisionMerger,
    MossVLVisionMLP,
    MossVLVisionModel,
    MossVLVisionPatchEmbed,
    MossVLVisionPatchProjection,
    concatenate,
    with_separators,
)
from .vision_plan import plan_call
from .vision_request import VisionRequest, count_vision_tokens, read_request
from .vision_sequence import VisionState  # noqa: F401
from .xrope import rotate  # noqa: F401


logger = logging.get_logger(__name__)


IGNORED = -100  # the label that transformers' losses ignore


@dataclass
class MossVLCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """`MossVLModelOutput` with `logits` [B, kept, vocab] in place of the last hidden state, and `loss` if labels are
    given."""

    rope_deltas: Optional[torch.LongTensor] = None


class MossVLModel(MossVLPreTrainedModel):
    """Vision encoder, separator and decoder, without a head.

    The separator is a parameter, and PEFT's `modules_to_save` silently skips parameters. To train the separator
    together with adapters, call `model.get_base_model().model.separator_token.requires_grad_(True)` after
    `get_peft_model`. Then save `model.merge_and_unload()`, because the folder of an adapter does not hold it.
    """

    def __init__(self, config: MossVLConfig, cross_attention_implementation: Optional[str] = None):
        super().__init__(config, cross_attention_implementation)
        self.visual = MossVLVisionModel._from_config(config.vision_config)
        self.language_model = MossVLTextModel._from_config(config.text_config)
        self.separator_token = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.step_settings: Optional[tuple] = None  # of torch.compile, for decode steps
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def get_decoder(self):
        return self.language_model

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.LongTensor,
        vision_chunked_length: Optional[int] = None,
        image_mean: Optional[list[list[float]]] = None,
        image_std: Optional[list[list[float]]] = None,
    ) -> BaseModelOutputWithPooling:
        """Features [P / m^2, D] of all frames, without separators; see `MossVLVisionModel.forward`."""
        features = self.visual(pixel_values, grid_thw, vision_chunked_length, image_mean, image_std)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)

    def get_rope_index(
        self,
        input_ids: torch.LongTensor,
        grid_thw: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        media_nums_per_sample: Optional[list[int]] = None,
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """XRoPE positions of whole prompts.

        Returns:
            Text positions [3, B, T]; vision positions [3, B, longest V], 0 after the end of shorter samples;
            rope_deltas [B].
        """
        media = read_media(self.config.vision_config, grid_thw=grid_thw, media_nums_per_sample=media_nums_per_sample)
        request = read_request(self.config.image_token_id, None, 0, input_ids, attention_mask, media)
        positions = walk_request(request)
        lengths = [request.tokens_placed(sample) for sample in range(len(request.new_frames))]
        per_sample = [part.T for part in positions.vision.split(lengths, dim=1)]
        padded = nn.utils.rnn.pad_sequence(per_sample, batch_first=True)  # [B, V, 3]
        return positions.text.expand(3, -1, -1), padded.permute(2, 0, 1), positions.rope_delta

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        cache: Optional[Cache] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        pixel_values: Optional[torch.FloatTensor] = None,
        grid_thw: Optional[torch.LongTensor] = None,
        media_nums_per_sample: Optional[list[int]] = None,
        cross_attention_mask: Optional[torch.BoolTensor] = None,
        vision_chunked_length: Optional[int] = None,
        vision_cache_dtype: Optional[str] = None,
        rows_per_sample: int = 1,
        prompt_length: Optional[int] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        past_key_values: Optional[Cache] = None,
        image_features: Optional[torch.FloatTensor] = None,
        image_mean: Optional[list[list[float]]] = None,
        image_std: Optional[list[list[float]]] = None,
        image_grid_thw: Optional[torch.LongTensor] = None,
    ) -> MossVLModelOutput:
        """See `MossVLForConditionalGeneration.forward`."""
        config = self.config
        others = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "pixel_values": pixel_values,
            "image_features": image_features,
            "grid_thw": grid_thw,
            "image_grid_thw": image_grid_thw,
            "media_nums_per_sample": media_nums_per_sample,
            "cross_attention_mask": cross_attention_mask,
            "prompt_length": prompt_length,
            "rows_per_sample": rows_per_sample if rows_per_sample != 1 else None,
            "output_attentions": output_attentions,
        }
        joint = read_joint(cache, past_key_values, others, input_ids, inputs_embeds)
        if joint is not None:
            return self._forward_joint(input_ids, inputs_embeds, joint, output_hidden_states)
        text = inputs_embeds if input_ids is None else input_ids
        cache = cache_of(cache, past_key_values)
        grid_thw = choose_grid(grid_thw, image_grid_thw)

        # A decode step has a shorter way. Other arguments are left to the way of a whole call.
        alone = ("attention_mask", "prompt_length")
        others = [value for name, value in others.items() if name not in alone]
        if not any(value is not None and value is not False for value in (*others, vision_cache_dtype)):
            outputs = self._forward_step(input_ids, inputs_embeds, cache, attention_mask, output_hidden_states)
            if outputs is not None:
                return outputs

        # 1. Read and check the call, before anything heavy runs.
        self._check_inputs(text, attention_mask, cache, grid_thw, pixel_values, image_features)
        use_cache = check_vision_dtype(cache, config.text_config, vision_cache_dtype, use_cache)
        use_cache = self._check_use_cache(cache, use_cache)
        with_cache = cache is not None or use_cache is True  # the default of `use_cache` is chosen in step 4
        media = read_media(
            config.vision_config, pixel_values, grid_thw, image_features, image_mean, image_std, media_nums_per_sample
        )
        request = read_request(
            config.image_token_id,
            state=vision_state(cache, config.text_config),
            past_length=cached_length(cache),
            text=text,
            attention_mask=attention_mask,
            media=media,
            cross_attention_mask=cross_attention_mask,
            rows_per_sample=rows_per_sample,
            prompt_length=prompt_length,
            whole_prompt=not with_cache,
        )
        if self.training and not with_cache:
            request = self._with_blank_media(request)

        # 2. Positions of text and vision tokens, and which text tokens see which vision tokens.
        positions = read_positions(request, position_ids, attention_mask, with_cache)
        state, call = plan_call(request, positions)
        check_capacity(cache, call.length)

        # 3. Encode the new frames.
        vision_states, waiting = self._encode(request, vision_chunked_length)

        # 4. Run the decoder, with a new cache if one is wanted and none was given.
        if use_cache is None:
            use_cache = config.text_config.use_cache and not self.training and positions.text_starts is None
        if use_cache and cache is None:
            cache = DynamicCache()
        state_layer = None if cache is None else install_layers(cache, config.text_config, vision_cache_dtype)
        if state_layer is not None and call.shifts():
            state_layer.state = None  # if the call fails, tokens have moved in some of the layers only
        needs_mask = attention_mask is not None and (attention_mask.ndim == 4 or request.text.padding.anywhere)
        if attention_mask is None and state.is_token is not None:  # the padding that the cache knows
            attention_mask, needs_mask = state.known_mask(state.length), True
        outputs = self.language_model(
            input_ids if inputs_embeds is None else None,  # not embedded here: FSDP gathers the weights in that call
            attention_mask=attention_mask if needs_mask else None,  # kernels are faster without a mask
            position_ids=positions.text,
            cache=cache,
            inputs_embeds=inputs_embeds,
            vision_states=vision_states,
            vision_position_ids=positions.vision,
            vision_call=call,
            text_index=positions.text_index,
            output_attentions=config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )

        # 5. Keep in the cache what the next call needs.
        if state_layer is not None:
            last_ids = None if input_ids is None else input_ids[:, -1].clone()
            state_layer.state = replace(state, waiting=waiting, last_ids=last_ids)
        outputs.rope_deltas, outputs.text_starts = positions.rope_delta, positions.text_starts
        return outputs

    def _forward_step(
        self,
        input_ids: Optional[torch.LongTensor],
        inputs_embeds: Optional[torch.FloatTensor],
        cache: Optional[Cache],
        attention_mask: Optional[torch.Tensor],
        output_hidden_states: Optional[bool],
    ) -> Optional[MossVLModelOutput]:
        """A decode step (decode_step.py), or None if the call is none."""
        config, text = self.config, inputs_embeds if input_ids is None else input_ids
        wants_more = config.output_attentions or output_hidden_states or config.output_hidden_states
        if text is None or wants_more or (input_ids is not None and inputs_embeds is not None):
            return None
        dtype = self.language_model.embed_tokens.weight.dtype if inputs_embeds is None else inputs_embeds.dtype
        step = read_step(config, cache, text, attention_mask, dtype)
        if step is None:
            return None
        run = run_step
        if self.step_settings is not None:
            run = compiled_step(self.step_settings, static_length(cache) is not None)
        hidden_states = run(self.language_model, input_ids, inputs_embeds, step.positions, step.plan, step.cache)
        keep_token(config, cache, step, input_ids)
        return MossVLModelOutput(
            last_hidden_state=hidden_states if self.step_settings is None else hidden_states.clone(),
            **{CACHE: cache},
            rope_deltas=step.state.rope_delta,
        )

    def _forward_joint(
        self,
        input_ids: Optional[torch.LongTensor],
        inputs_embeds: Optional[torch.FloatTensor],
        joint: JointCache,
        output_hidden_states: Optional[bool],
    ) -> MossVLModelOutput:
        """One token for each cache of a `JointCache`; see joint_decoding.py. If it fails, no cache has changed."""
        config = self.config
        self._check_use_cache(joint, None)
        step = plan_step(config, joint, inputs_embeds if input_ids is None else input_ids)
        with undone_on_error(joint, config):
            outputs = self.language_model(
                input_ids,
                position_ids=step.positions,
                cache=joint,
                inputs_embeds=inputs_embeds,
                vision_call=step.call,
                output_hidden_states=bool(output_hidden_states),
                vision_calls_of_rows=step.rows,
            )
        finish_step(joint, config, step, input_ids)
        outputs.rope_deltas = step.rope_deltas
        return outputs

    def _check_inputs(
        self,
        text: Optional[torch.Tensor],
        attention_mask: Optional[torch.Tensor],
        cache: Optional[Cache],
        grid_thw,
        pixel_values: Optional[torch.Tensor],
        image_features,
    ) -> None:
        """Checks that inputs are complete and fit the model and the cache.

        Raises:
            ValueError: for the first input that is missing or does not fit.
        """
        if text is None:
            raise ValueError("Neither `input_ids` nor `inputs_embeds` was given; expected one of them.")
        if grid_thw is not None:
            check_implementations(self.config)  # before the vision encoder runs; the text model checks its own
        if attention_mask is not None and attention_mask.ndim == 4:
            check_ready_mask(attention_mask, self.config.text_config.num_attention_heads, *text.shape[:2], cache)
        if grid_thw is not None and len(grid_thw) and pixel_values is None and image_features is None:
            raise ValueError(
                "`grid_thw` came without `pixel_values` or `image_features`; expected one of them, as the processor "
                "returns it."
            )
        slots, past_length, length = static_length(cache), cached_length(cache), text.shape[1]
        if slots is not None and past_length + length > slots:
            raise ValueError(
                f"The static cache has {slots} slots and holds {past_length} tokens, and the call has {length}; "
                f"expected a cache of at least {past_length + length} slots."
            )

    def _check_use_cache(self, cache: Optional[Cache], use_cache: Optional[bool]) -> Optional[bool]:
        """The caller's `use_cache`; False in training with gradient checkpointing.

        Raises:
            ValueError: if a cache is given with gradient checkpointing in training.
        """
        if not (self.training and torch.is_grad_enabled() and self.language_model.gradient_checkpointing):
            return use_cache
        if cache is not None:
            raise ValueError(
                "A cache was given to a model in training with gradient checkpointing; expected none: layers that "
                "run again in the backward pass cannot use it. Call `model.eval()`, compute under "
                "`torch.no_grad()`, or call `model.gradient_checkpointing_disable()`."
            )
        if use_cache:
            logger.warning_once(
                "`use_cache=True` does not go with gradient checkpointing in training; no cache is returned."
            )
        return False

    def _with_blank_media(self, request: VisionRequest) -> VisionRequest:
        """Adds blank media to a training call without frames. They are encoded and attended to, and the output of that
        attention is multiplied by 0. So all parameters get gradients on every rank, and every rank gathers the same
        sharded weights: otherwise ranks with frames would wait for the others forever."""
        if any(request.new_frames):
            return request
        if request.media.pixel_values is not None:
            return request.with_blank(request.media)
        return request.with_blank(self._blank_frame(request.text.is_token.device)) if has_other_ranks() else request

    def _blank_frame(self, device: torch.device) -> Media:
        """One frame of zeros, of the smallest size."""
        config = self.config.vision_config
        side = config.spatial_merge_size
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        pixel_values = torch.zeros(side * side, values, device=device)
        return Media(Grid([(1, side, side)]), side, per_sample=[1], pixel_values=pixel_values)

    def _encode(
        self, request: VisionRequest, vision_chunked_length: Optional[int]
    ) -> tuple[Optional[torch.Tensor], list[Optional[torch.Tensor]]]:
        """Encodes the new frames of a call.

        Returns:
            Vision states [v, D] of the frames that the call places, or None. In each sample, frames that waited come
            before new ones.
            For each sample, the vision states of the frames that still wait after the call, or None.
        """
        waiting, device = request.state.waiting, request.text.is_token.device
        if request.blank is not None:
            return self._encode_media(request.blank, vision_chunked_length, device), waiting
        if not any(request.new_frames):
            if not request.state.is_waiting():
                return None, waiting
            return self._split_placed(request, [None] * len(waiting))
        states = self._encode_media(request.media, vision_chunked_length, device)
        sizes = [count_vision_tokens(frames) for frames in request.media.frames()]
        placed = [request.tokens_placed(sample) for sample in range(len(sizes))]
        if placed == sizes and not request.state.is_waiting():
            return states, waiting
        parts = states.split(sizes)
        new = [part if frames else None for part, frames in zip(parts, request.new_frames, strict=True)]
        return self._split_placed(request, new)

    def _encode_media(self, media: Media, vision_chunked_length: Optional[int], device: torch.device) -> torch.Tensor:
        """Vision states [v, D] of media, each frame with its separator. Media that were encoded before are moved to
        `device`."""
        if media.image_features is not None:
            features = media.image_features.to(device)
            return with_separators(features, frame_groups(media.grid), media.merge_size, self.separator_token)
        return self.visual(
            media.pixel_values,
            media.grid,
            vision_chunked_length,
            media.image_mean,
            media.image_std,
            self.separator_token,
        )

    @staticmethod
    def _split_placed(
        request: VisionRequest, new: list[Optional[torch.Tensor]]
    ) -> tuple[Optional[torch.Tensor], list[Optional[torch.Tensor]]]:
        """Divides the vision states of waiting and new frames into those of frames that the call places and those of
        frames that wait after it.

        Args:
            new: for each sample, vision states [v, D] of its new frames, or None.

        Returns:
            As `_encode`.
        """
        placed, waiting = [], []
        for sample, parts in enumerate(zip(request.state.waiting, new, strict=True)):
            parts = [part for part in parts if part is not None]
            if not parts:
                waiting.append(None)
                continue
            states, count = concatenate(parts), request.tokens_placed(sample)
            if count:
                placed.append(states[:count])
            waiting.append(states[count:] if len(states) > count else None)
        return concatenate(placed) if placed else None, waiting


def has_other_ranks() -> bool:
    """Whether this process is one of several that train together (torch.distributed)."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def kept_tokens(logits_to_keep: Union[int, torch.Tensor], length: int) -> Union[slice, torch.Tensor]:
    """The tokens of a call whose logits are computed.

    Args:
        length: tokens of the call.

    Returns:
        A slice, or indices [kept].

    Raises:
        ValueError: for indices outside the call, and for values of another type or shape.
    """
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 1:
        if logits_to_keep.dtype == torch.bool and len(logits_to_keep) == length:
            return logits_to_keep.nonzero()[:, 0]
        if not (logits_to_keep.is_floating_point() or logits_to_keep.dtype == torch.bool) and all(
            -length <= index < length for index in logits_to_keep.tolist()
        ):
            return logits_to_keep.long()
    elif isinstance(logits_to_keep, int) and logits_to_keep >= 0:
        return slice(-logits_to_keep, None)
    raise ValueError(
        f"`logits_to_keep` is {logits_to_keep!r}; expected how many of the last tokens to keep (0: all), a tensor "
        f"of indices below {length}, the tokens of this call, or a bool tensor [{length}], True at the tokens to keep."
    )


def check_labels(labels: Optional[torch.Tensor], shape, kept: Union[slice, torch.Tensor]) -> None:
    """Raises ValueError if labels are given that are neither [B, T] nor [B, kept]. `kept`: see `kept_tokens`."""
    rows, length = shape
    count = len(range(length)[kept]) if isinstance(kept, slice) else len(kept)
    if labels is not None and tuple(labels.shape) not in ((rows, length), (rows, count)):
        of_kept = f" (or [{rows}, {count}]: for each token of `logits_to_keep`)" if count != length else ""
        raise ValueError(
            f"`labels` has shape {list(labels.shape)}; expected [{rows}, {length}]: a label for each token of this "
            f"call{of_kept}, -100 for tokens without a loss"
        )


def shift_labels(
    labels: torch.Tensor, attention_mask: Optional[torch.Tensor], text_starts: Optional[torch.Tensor]
) -> torch.Tensor:
    """The target of each token, [B, T]: the label of the next token that is not padding, or -100.

    Args:
        labels, attention_mask: see `MossVLForConditionalGeneration.forward`.
        text_starts: bool [B, T], for packed rows True at the first token of each text. It is the target of no token.
    """
    if text_starts is not None:
        labels = labels.masked_fill(text_starts.to(labels.device), IGNORED)
    if attention_mask is None or attention_mask.ndim != 2:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    length = labels.shape[1]
    is_token = attention_mask[:, attention_mask.shape[1] - length :].to(labels.device).bool()
    index = torch.arange(length, device=labels.device).expand(*labels.shape)
    # is_token [0 1 1 0 1] -> the first token at or after each index [1 1 2 4 4] -> the first one after it [1 2 4 4 -]
    following = index.masked_fill(~is_token, length).flip(1).cummin(1).values.flip(1)
    targets = F.pad(labels, (0, 1), value=IGNORED).gather(1, F.pad(following[:, 1:], (0, 1), value=length))
    return targets.masked_fill(~is_token, IGNORED)


def kept_targets(
    labels: torch.Tensor,
    kept: Union[slice, torch.Tensor],
    length: int,
    attention_mask: Optional[torch.Tensor],
    text_starts: Optional[torch.Tensor],
) -> torch.Tensor:
    """The targets [B, kept] of the kept tokens of a call of T = `length` tokens.

    Args:
        labels: [B, T]; or [B, kept], as trainers shorten them together with the logits.
        attention_mask, text_starts: see `shift_labels`.
    """
    if labels.shape[1] != length:
        if isinstance(kept, torch.Tensor):  # which tokens the labels belong to is not known, only their order
            return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        labels = F.pad(labels, (length - labels.shape[1], 0), value=IGNORED)
    if isinstance(kept, torch.Tensor):
        kept = kept.to(labels.device)
    return shift_labels(labels, attention_mask, text_starts)[:, kept].contiguous()


class MossVLForConditionalGeneration(
    MossVLPreTrainedModel, MossVLGenerationMixin, MossVLRealtimeMixin, MossVLGenerateHooks, GenerationMixin
):
    """MOSS-VL with its language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: MossVLConfig, cross_attention_implementation: Optional[str] = None):
        super().__init__(config, cross_attention_implementation)
        self.model = MossVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def visual(self) -> MossVLVisionModel:
        return self.model.visual

    @property
    def language_model(self) -> MossVLTextModel:
        return self.model.language_model

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_decoder(self):
        return self.model.language_model

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.LongTensor,
        vision_chunked_length: Optional[int] = None,
        image_mean: Optional[list[list[float]]] = None,
        image_std: Optional[list[list[float]]] = None,
    ) -> BaseModelOutputWithPooling:
        """See `MossVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, grid_thw, vision_chunked_length, image_mean, image_std)

    def get_rope_index(
        self,
        input_ids: torch.LongTensor,
        grid_thw: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        media_nums_per_sample: Optional[list[int]] = None,
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """See `MossVLModel.get_rope_index`."""
        return self.model.get_rope_index(input_ids, grid_thw, attention_mask, media_nums_per_sample)

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        cache: Optional[Cache] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: Union[int, torch.Tensor] = 0,
        pixel_values: Optional[torch.FloatTensor] = None,
        grid_thw: Optional[torch.LongTensor] = None,
        media_nums_per_sample: Optional[list[int]] = None,
        cross_attention_mask: Optional[torch.BoolTensor] = None,
        vision_chunked_length: Optional[int] = None,
        vision_cache_dtype: Optional[str] = None,
        rows_per_sample: int = 1,
        prompt_length: Optional[int] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        num_items_in_batch: Optional[Union[int, torch.Tensor]] = None,
        past_key_values: Optional[Cache] = None,
        image_features: Optional[torch.FloatTensor] = None,
        image_mean: Optional[list[list[float]]] = None,
        image_std: Optional[list[list[float]]] = None,
        image_grid_thw: Optional[torch.LongTensor] = None,
        token_type_ids: Optional[torch.LongTensor] = None,
        mm_token_type_ids: Optional[torch.LongTensor] = None,
    ) -> Union[MossVLCausalLMOutput, tuple]:
        """Computes the logits of a text that sees images and video frames, and the loss if labels are given.

        With a cache or `use_cache=True`, a prompt may be split into several calls. A frame then comes with the call
        that has its `image_pad`, or with an earlier call. Without a cache, the text must have one `image_pad` per
        frame.

        Args:
            input_ids: [B, T], with one `image_pad` per frame.
            attention_mask: [B, S], cache included, 0 at padding on either side; or a ready 4D mask for self-attention.
            position_ids: [B, T] or [3, B, T], in place of XRoPE's text positions. Positions that only count the tokens
                of a row are replaced by XRoPE's. If positions start again within a row, the row holds packed texts;
                each text sees only its tokens and its frames.
            cache: any transformers cache, empty or filled by this model; or a `JointCache` of several caches, for one
                token in each, see `decode_rows`.
            inputs_embeds: [B, T, D], in place of the embeddings of `input_ids`. With frames, `input_ids` is needed as
                well, to place the frames.
            labels: [B, T], one per token of `input_ids`, -100 for tokens without a loss. The loss is next-token
                cross-entropy; the model shifts the labels. Padding is skipped: the target of a token is the next token
                that is not padding. Labels [B, kept], shortened like the logits, are the labels of the last n tokens;
                if `logits_to_keep` is a tensor, the target of a kept token is the next of these labels.
            use_cache: whether to return a cache; default: that of the config, but False in training and for packed
                texts.
            logits_to_keep: n for the logits of the last n tokens (0: all), indices of tokens, or bool [T]. The loss
                covers the same tokens. Their targets are still the next tokens of the whole sequence.
            pixel_values: [P, channels * time * patch * patch], the media of all samples in the order of the text;
                float, or uint8 with `image_mean` and `image_std`.
            grid_thw: [media, 3], (frames, patch rows, patch columns).
            media_nums_per_sample: number of media of each sample; default: counted from the text.
            cross_attention_mask: bool [B, 1, T, N], True = hidden. By default a token sees the frames placed at or
                before it. The mask may hide any of these frames; it must hide all frames from padding. If it has fewer
                than T rows, the later tokens follow the default. A mask that a processor made for other padding is
                ignored with a warning. On a filled cache, the columns of a mask of at most T rows are the frames that
                come with the call if their numbers are equal; otherwise they are all frames of the conversation, of
                which those that `drop_frames` dropped may be left out.
            vision_chunked_length: most frames per chunk of the vision encoder; default: 64, in training all.
            vision_cache_dtype: "int8" keeps the keys and values of vision tokens in 8 bits: half the memory. Needed at
                the first call of a cache; later calls use what the cache has. Not with gradients.
            rows_per_sample: number of consecutive rows that share the media of a sample, as beams do.
            prompt_length: tokens of the whole prompt. Later `image_pad` ids were generated and place no frame.
            output_attentions, output_hidden_states, return_dict: as in transformers; default: those of the config.
            num_items_in_batch: number of labels in the whole batch, by which `Trainer` divides the loss.
            past_key_values: the older name of `cache`.
            image_features: the output of `get_image_features`, or its `pooler_output` [P / m^2, D], in place of
                `pixel_values`.
            image_mean, image_std: three numbers per medium, to normalise uint8 pixels on the encoder's device.
            image_grid_thw: another name of `grid_thw`, which generic trainers use.
            token_type_ids, mm_token_type_ids: not used; accepted because processors may return them.

        Raises:
            ValueError: for counts and shapes that do not fit each other, before anything is computed.
        """
        text, kept = inputs_embeds if input_ids is None else input_ids, slice(None)
        if text is not None:
            kept = kept_tokens(logits_to_keep, text.shape[1])
            check_labels(labels, text.shape[:2], kept)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            grid_thw=grid_thw,
            media_nums_per_sample=media_nums_per_sample,
            cross_attention_mask=cross_attention_mask,
            vision_chunked_length=vision_chunked_length,
            vision_cache_dtype=vision_cache_dtype,
            rows_per_sample=rows_per_sample,
            prompt_length=prompt_length,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
            image_features=image_features,
            image_mean=image_mean,
            image_std=image_std,
            image_grid_thw=image_grid_thw,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            length = outputs.last_hidden_state.shape[1]
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=kept_targets(labels, kept, length, attention_mask, outputs.text_starts),
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        result = MossVLCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            rope_deltas=outputs.rope_deltas,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    @torch.no_grad()
    def decode_rows(self, tokens, caches: list[Cache]) -> torch.Tensor:
        """Adds one token to each of several conversations in one call. Prompts and frames are prefilled alone, with
        forward on each cache.

        Args:
            tokens: one id per cache: a list, or a tensor [R] or [R, 1].
            caches: R separate caches that this model filled, one row each, without padding. Text lengths and vision
                tokens may differ.

        Returns:
            The logits [R, vocab] of the next tokens; for each row those that forward on its cache alone gives.

        Raises:
            ValueError: for the first cache that cannot take a token. If the call fails, no cache has changed.
        """
        joint = JointCache(caches)
        ids = read_tokens(tokens, len(joint.caches), self.model.language_model.embed_tokens.weight.device)
        return self(input_ids=ids, **{CACHE: joint}).logits[:, -1]

    def compile_decode(self, **settings) -> None:
        """Compiles later decode steps: calls of one token per row without gradients, as `generate` makes them. The
        first step compiles, which takes a minute for the 11B model; prompts of other lengths, frames and padding use
        the same graph.

        Args:
            settings: those of `torch.compile`, hashable: `mode`, `backend`, `fullgraph`, `dynamic`, `disable`. With
                the modes "reduce-overhead" and "max-autotune", a step on a `static_cache` is a CUDA graph; a growing
                cache, whose steps all have other shapes, uses no CUDA graphs.

        Raises:
            ValueError: for unknown settings, and for a model that is spread over several devices.
        """
        self.model.step_settings = compile_settings(self, settings)

    def static_cache(self, text_length: int, vision_tokens: int) -> Cache:
        """An empty cache of a fixed size, for CUDA graphs: see `decode_step.static_cache`."""
        return static_cache(self.config.text_config, text_length, vision_tokens)

    def fork_cache(self, cache: Cache) -> Cache:
        """A copy of a cache for another question: see `cache_layers.fork_cache`."""
        return fork_cache(cache)

    def drop_frames(self, cache: Cache, count: Union[int, list[int]]) -> None:
        """Drops the oldest `count` frames of each sample of a cache: see `cache_layers.drop_frames`."""
        drop_frames(cache, self.config.text_config, count)

    def cache_contents(self, cache: Cache) -> CacheContents:
        """Text tokens, frames, vision tokens and bytes of a cache."""
        return cache_contents(cache, self.config.text_config)

    def init_continuous_batching(self, *args, **kwargs):
        """Not supported: raises ValueError."""
        raise ValueError(
            "Continuous batching (`generate_batch`, `init_continuous_batching`) is not supported: its paged cache "
            "holds text alone, and it passes no media; expected `generate` on a left-padded batch, "
            "`offline_batch_generate` or `offline_generate`."
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching


MossVLForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "MossVLForConditionalGeneration",
    "MossVLModel",
    "MossVLPreTrainedModel",
    "MossVLTextModel",
    "MossVLVisionModel",
    # layers of the two towers, for code that looks for them here
    "MossVLCrossAttention",
    "MossVLCrossAttentionLayer",
    "MossVLRMSNorm",
    "MossVLSelfAttention",
    "MossVLSelfAttentionLayer",
    "MossVLTextAttention",
    "MossVLTextMLP",
    "MossVLVisionAttention",
    "MossVLVisionBlock",
    "MossVLVisionMerger",
    "MossVLVisionMLP",
    "MossVLVisionPatchEmbed",
    "MossVLVisionPatchProjection",
]
