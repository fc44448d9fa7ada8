"""MOSS-VL: the vision encoder and the decoder as one model, and the same with a language model head.

Axes: B text rows, T text tokens of this call, S text tokens in all (cache included), D hidden size, H query heads, F
frames, P patches, m merge size, V vision tokens (the tokens of each frame and its separator, all samples one after the
other without padding), v those of them that are new in this call.
"""

import inspect
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
from .cache_layers import (
    CACHE,
    cache_of,
    cached_length,
    install_layers,
    static_length,
    vision_state,
)
from .call_positions import read_positions, walk_request
from .checks import nearest_name  # noqa: F401 - transformers 4.57 copies only the files that this file imports itself
from .configuration_moss_vl import MossVLConfig
from .conversation import PLACEHOLDERS  # noqa: F401
from .decoder import MossVLModelOutput, MossVLTextModel
from .generation_batches import answer_turns  # noqa: F401
from .generation_hooks import MossVLGenerateHooks
from .generation_options import GENERATE_DEFAULTS  # noqa: F401
from .generation_queries import Turn  # noqa: F401
from .generation_queue import QueueServer  # noqa: F401
from .generation_utils import MossVLGenerationMixin
from .media import Grid, Media, choose_grid, frame_groups, read_media
from .options import OPTIONS  # noqa: F401
from .patches import normalise  # noqa: F401
from .pretrained_model import MossVLPreTrainedModel
from .signatures import image_kind  # noqa: F401
from .vision_encoder import MossVLVisionModel, with_separators
from .vision_plan import plan_call
from .vision_request import VisionRequest, count_vision_tokens, read_request
from .vision_sequence import VisionState  # noqa: F401
from .xrope import rotate  # noqa: F401


logger = logging.get_logger(__name__)


IGNORED = -100  # the label that transformers' losses ignore


@dataclass
class MossVLCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """`MossVLModelOutput` with `logits` [B, kept tokens, vocab] in place of the last hidden state, and `loss` if
    labels are given."""

    rope_deltas: Optional[torch.LongTensor] = None


class MossVLModel(MossVLPreTrainedModel):
    """Vision encoder, separator and decoder, without a head.

    The separator is a parameter. PEFT's `modules_to_save` takes modules only and silently skips it. To train it beside
    adapters, call `model.get_base_model().model.separator_token.requires_grad_(True)` after `get_peft_model`, and save
    `model.merge_and_unload()`, as the folder of an adapter holds adapters only.
    """

    def __init__(self, config: MossVLConfig, cross_attention_implementation: Optional[str] = None):
        super().__init__(config, cross_attention_implementation)
        self.visual = MossVLVisionModel._from_config(config.vision_config)
        self.language_model = MossVLTextModel._from_config(config.text_config)
        self.separator_token = nn.Parameter(torch.zeros(config.text_config.hidden_size))
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
        """Vision tokens [P / m^2, D] of all frames, before separators; see `MossVLVisionModel.forward`."""
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
        config, text = self.config, input_ids if input_ids is not None else inputs_embeds
        cache, grid_thw = cache_of(cache, past_key_values), choose_grid(grid_thw, image_grid_thw)
        self._check_inputs(text, attention_mask, cache, grid_thw, pixel_values, image_features)
        use_cache = self._choose_use_cache(cache, use_cache)
        incremental = use_cache is True or cache is not None
        media = read_media(
            config.vision_config, pixel_values, grid_thw, image_features, image_mean, image_std, media_nums_per_sample
        )
        request = read_request(
            config.image_token_id,
            vision_state(cache, config.text_config),
            cached_length(cache),
            text,
            attention_mask,
            media,
            cross_attention_mask,
            rows_per_sample,
            prompt_length,
            whole_prompt=not incremental,
        )
        if self.training and not incremental:
            request = self._with_blank_media(request)
        positions = read_positions(request, position_ids, attention_mask, with_cache=incremental)
        state, call = plan_call(request, positions)
        if use_cache is None:
            use_cache = config.text_config.use_cache and not self.training and positions.text_starts is None
        cache = DynamicCache() if use_cache and cache is None else cache

        vision_states, waiting = self._encode(request, vision_chunked_length)
        state_layer = None if cache is None else install_layers(cache, config.text_config)
        hides_tokens = attention_mask is not None and (attention_mask.ndim == 4 or request.text.padding.anywhere)
        outputs = self.language_model(
            input_ids if inputs_embeds is None else None,  # embedded there, where FSDP gathers the sharded weights
            attention_mask=attention_mask if hides_tokens else None,
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
        if state_layer is not None:
            last_ids = None if input_ids is None else input_ids[:, -1].clone()
            state_layer.state = replace(state, waiting=waiting, last_ids=last_ids)
        outputs.rope_deltas, outputs.text_starts = positions.rope_delta, positions.text_starts
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
        """Refuses what is missing or does not fit the model or the cache, before anything is read.

        Raises:
            ValueError: what is wrong.
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

    def _choose_use_cache(self, cache: Optional[Cache], use_cache: Optional[bool]) -> Optional[bool]:
        """`use_cache`, or False with gradient checkpointing in training.

        Raises:
            ValueError: if a cache is given with gradient checkpointing in training.
        """
        if not (self.training and torch.is_grad_enabled() and self.language_model.gradient_checkpointing):
            return use_cache
        if cache is not None:
            raise ValueError(
                "A cache was given to a model in training with gradient checkpointing; expected none: layers that "
                "are run again in the backward pass cannot use it. Call `model.eval()`, compute under "
                "`torch.no_grad()`, or call `model.gradient_checkpointing_disable()`."
            )
        if use_cache:
            logger.warning_once(
                "`use_cache=True` does not go with gradient checkpointing in training; no cache is returned."
            )
        return False

    def _with_blank_media(self, request: VisionRequest) -> VisionRequest:
        """The request of a training step. If it has no frames, blank media are encoded and read times 0: then every
        parameter gets a gradient on every rank, and no rank waits for another to gather the weights that are sharded
        among them."""
        if any(request.new_frames):
            return request
        if request.media.pixel_values is not None:
            return request.with_blank(request.media)
        return request.with_blank(self._blank_frame(request.text.is_token.device)) if has_other_ranks() else request

    def _blank_frame(self, device: torch.device) -> Media:
        """One frame of zeros, as small as a frame can be."""
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
            Vision states [v, D] of the frames that the call places, those that waited first in each sample, or None;
            and for each sample the states of the frames that wait after the call.
        """
        waiting, device = request.state.waiting, request.text.is_token.device
        if request.blank is not None:
            return self._encode_media(request.blank, vision_chunked_length, device), waiting
        if not any(request.new_frames) and not request.state.is_waiting():
            return None, waiting
        if not any(request.new_frames):
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
        """Vision states [v, D] of media, each frame with its separator. device: of media that come encoded."""
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
        """Divides vision states of waiting and `new` frames, per sample [v, D] or None, as `_encode` returns them."""
        placed, waiting = [], []
        for sample, parts in enumerate(zip(request.state.waiting, new, strict=True)):
            states = join([part for part in parts if part is not None])
            count = request.tokens_placed(sample)
            if count:
                placed.append(states[:count])
            waiting.append(states[count:] if states is not None and len(states) > count else None)
        return join(placed), waiting


def join(parts: list[torch.Tensor]) -> Optional[torch.Tensor]:
    """Concatenates tensors; no copy of a single one, None for none."""
    if not parts:
        return None
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def has_other_ranks() -> bool:
    """Whether this process trains together with others, which wait for its gradients."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def kept_rows(logits_to_keep: Union[int, torch.Tensor], length: int) -> Union[slice, torch.Tensor]:
    """The tokens of a call whose logits are computed: a slice of `length`, or indices [rows].

    Raises:
        ValueError: for indices outside the call.
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


def check_labels(labels: Optional[torch.Tensor], shape) -> None:
    """ValueError unless there is a label for each of [B, T] tokens, or no labels."""
    if labels is not None and tuple(labels.shape) != tuple(shape):
        raise ValueError(
            f"`labels` has shape {list(labels.shape)}; expected {list(shape)}: a label for each token of this call, "
            "-100 where there is none, whatever `logits_to_keep` leaves out."
        )


def row_targets(
    labels: torch.Tensor, attention_mask: Optional[torch.Tensor], text_starts: Optional[torch.Tensor]
) -> torch.Tensor:
    """What each token of a call predicts, [B, T]: the label of the next token that is no padding, or -100.

    Args:
        labels, attention_mask: see `MossVLForConditionalGeneration.forward`.
        text_starts: bool [B, T], for packed rows True at the first token of each text, which no token predicts.
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


MODEL_ARGUMENTS = tuple(inspect.signature(MossVLModel.forward).parameters)[1:]  # all but `self`


class MossVLForConditionalGeneration(
    MossVLPreTrainedModel, MossVLGenerationMixin, MossVLGenerateHooks, GenerationMixin
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
        """One pass over text and the frames that come with it.

        A prompt may come in parts: with `use_cache=True` (or a cache) frames may come before the text reaches their
        `image_pad`, or with the part that does. Without a cache, text and frames have to match.

        Args:
            input_ids: [B, T], one `image_pad` per frame. `inputs_embeds` [B, T, D] may replace the embeddings; with
                frames, `input_ids` is needed as well, to place them.
            attention_mask: [B, S], cache included, 0 at padding on either side; or a ready 4D mask for self-attention.
            position_ids: [B, T] or [3, B, T], in place of XRoPE's text positions. Positions that only count the tokens
                of a row are replaced by XRoPE's. If they start again within a row, the row holds packed texts, which
                see only themselves and their frames.
            cache: any transformers cache, empty or filled by this model.
            labels: [B, T], -100 ignored; next-token cross-entropy, shifted inside. The token before it that is no
                padding predicts each token, so that a sample's loss is the same in every batch; labels of padding are
                ignored.
            logits_to_keep: logits of the last n tokens only (0: all), of the tokens at these indices, or of those
                where a bool [T] is True. The loss is that of these tokens, each with the label of the next token of
                the whole sequence.
            pixel_values: [P, channels * time * patch * patch], the media of all samples in the order of the text;
                float, or uint8 with `image_mean` and `image_std`.
            grid_thw: [media, 3], (frames, patch rows, patch columns).
            media_nums_per_sample: media of each sample; counted from the text if it is missing.
            cross_attention_mask: bool [B, 1, T, F], True = hidden; default: a token sees the frames placed at or
                before it. The mask may hide any frame, and shows none to padding or before its `image_pad`. If it has
                fewer rows than tokens, the default holds for the later tokens, and for all if a processor made it for
                other padding. On a filled cache, a mask of at most T rows is about the frames that come with the call,
                if it has as many columns as these; else about all.
            vision_chunked_length: frames that the vision encoder takes at once, default 64 (in training: all).
            rows_per_sample: text rows that share each sample's media, as beams do.
            prompt_length: tokens of the whole prompt; `image_pad` ids after it are text that the model wrote.
            num_items_in_batch: labels in the whole batch, by which `Trainer` wants the loss divided.
            past_key_values: the older name of `cache`.
            image_features: the output of `get_image_features`, or its `pooler_output` [P / m^2, D], in place of
                `pixel_values`.
            image_mean, image_std: three numbers per medium, to normalise uint8 pixels on the encoder's device.
            image_grid_thw: another name of `grid_thw`, by which generic trainers look for it.
            token_type_ids, mm_token_type_ids: accepted, as some processors return them, and not needed.

        Raises:
            ValueError: for counts and shapes that do not fit each other, before anything is computed.
        """
        arguments = locals()
        text, kept = input_ids if input_ids is not None else inputs_embeds, slice(None)
        if text is not None:
            kept = kept_rows(logits_to_keep, text.shape[1])
            check_labels(labels, text.shape[:2])
        outputs = self.model(**{name: arguments[name] for name in MODEL_ARGUMENTS})
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            targets = row_targets(labels, attention_mask, outputs.text_starts)
            kept = kept.to(targets.device) if isinstance(kept, torch.Tensor) else kept
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=targets[:, kept].contiguous(),
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

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: ValueError."""
        raise ValueError(
            "Continuous batching (`generate_batch`, `init_continuous_batching`) was asked for; expected `generate` "
            "on a left-padded batch, `offline_batch_generate` or `offline_generate`. Its paged cache holds text "
            "alone, and it passes no media."
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching


MossVLForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "MossVLForConditionalGeneration",
    "MossVLModel",
    "MossVLPreTrainedModel",
    "MossVLTextModel",
    "MossVLVisionModel",
]
