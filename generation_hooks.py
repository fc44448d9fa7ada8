"""Overrides of transformers' `GenerationMixin`: how `generate` checks a prompt, prepares the inputs of each call, and
continues a cache."""

import copy
import inspect
from typing import Optional

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache, StaticCache
from transformers.generation import GenerationMode
from transformers.utils import logging

from .cache_layers import CACHE, cache_of, cached_length, can_quantize, vision_state
from .checks import nearest_name
from .int8_states import dtype_of_settings
from .media import choose_grid, read_media
from .vision_plan import whole_mask
from .vision_request import media_of_new_turn, pads_of_samples, read_request
from .vision_sequence import VisionState


logger = logging.get_logger(__name__)

MEDIA_INPUTS = ("pixel_values", "image_mean", "image_std", "image_features", "grid_thw", "media_nums_per_sample")
MEDIA_KWARGS = (*MEDIA_INPUTS, "cross_attention_mask")
PROMPT_KWARGS = (*MEDIA_KWARGS, "image_grid_thw", "position_ids", "prompt_length", "rows_per_sample")
NOT_OF_FORWARD = ("labels", "token_type_ids", "mm_token_type_ids", "tokenizer", "assistant_tokenizer")
# Whether `generate` passes the number of new tokens, so that it accepts the tokens of a new turn alone. transformers 5
# does, transformers 4 does not.
TAKES_NEW_TURN = "next_sequence_length" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters


class MossVLGenerateHooks:
    """Overrides of `GenerationMixin`, which comes after this class among the bases of the model.

    `_expand_inputs_for_generation` moves the arguments that belong to the prompt (`PROMPT_KWARGS`) into one entry of
    the model kwargs, `prompt_kwargs`, because transformers 5 does not prefill in chunks if it sees `pixel_values`. The
    entry also has

        past_length: text tokens in the cache before the prompt.
        media_as_given: on a filled cache, the media as the caller gave them. An assistant model starts without a
            cache, so it needs those of the whole conversation.
    """

    # Private hooks of transformers, in the order in which `generate` calls them

    def _validate_model_kwargs(self, model_kwargs):
        """transformers checks that all model kwargs are used. This override names the nearest known argument in the
        error. Media are checked later, against the prompt, in `_expand_inputs_for_generation`."""
        known = set(inspect.signature(self.forward).parameters)
        for name in [name for name, value in model_kwargs.items() if value is not None and name not in known]:
            near = nearest_name(name, {*known, *self.generation_config.to_dict()})
            hint = f"; did you mean `{near}`?" if near else ""
            raise ValueError(f"`{name}` is neither an input of this model nor a setting of `generate`{hint}")
        super()._validate_model_kwargs(model_kwargs)

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        """transformers 5 drops an `attention_mask` of ones. This override keeps the caller's mask: its length shows
        whether `input_ids` is the whole conversation or a new turn."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        return inputs, name, {**model_kwargs, "prompt_kwargs": {"attention_mask": model_kwargs.get("attention_mask")}}

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """transformers repeats the rows of every tensor for beams and several answers. This override repeats rows of
        text only, because rows of a sample share its media. Before that, it checks the prompt and drops media that the
        cache holds."""
        prompt = {name: model_kwargs.pop(name, None) for name in PROMPT_KWARGS}
        prompt = {name: value for name, value in prompt.items() if value is not None}
        cache, past_length = model_kwargs.get(CACHE), cached_length(model_kwargs.get(CACHE))
        attention_mask = (model_kwargs.pop("prompt_kwargs", None) or {}).get("attention_mask")  # the caller's
        if attention_mask is None:
            attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.ndim == 2 and (attention_mask[:, -1] == 0).any():
            raise ValueError(
                "`attention_mask` ends in padding, so the rows are padded on the right, and a new token would come "
                "after the padding; expected padding on the left. Call the processor with padding_side='left'."
            )
        if "image_grid_thw" in prompt:
            prompt["grid_thw"] = choose_grid(prompt.get("grid_thw"), prompt.pop("image_grid_thw"))
        if input_ids is not None and input_ids.shape[1]:
            prompt = self._read_prompt(cache, past_length, input_ids, attention_mask, prompt)
        if expand_size > 1:
            if past_length:
                cache.batch_repeat_interleave(expand_size)
            else:
                prompt["rows_per_sample"] = expand_size
            for name, axis in (("cross_attention_mask", 0), ("position_ids", -2)):
                if name in prompt and prompt[name].shape[axis] == len(input_ids):  # otherwise one row serves all
                    prompt[name] = prompt[name].repeat_interleave(expand_size, dim=axis)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "prompt_kwargs": prompt}

    def _get_cache(self, cache_implementation, batch_size, max_cache_len, model_kwargs):
        """transformers 4 keeps a static cache on the model, which two threads would share. This override makes one per
        call."""
        offloading = "offloaded" in cache_implementation
        return StaticCache(config=self.config.text_config, max_cache_len=max_cache_len, offloading=offloading)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        """transformers makes the cache that `generation_config` asks for. This override adds that a quantized cache of
        8 bits also keeps the vision tokens in 8 bits. It makes a plain text cache if it was generation_config.json
        that asked for a quantized one, and the package is not installed, or the way of generating takes tokens back or
        reorders rows, which a quantized cache cannot do. A given cache is used in any case."""
        if generation_config.cache_implementation == "quantized":
            is_given = model_kwargs.get(CACHE) is not None
            makes_cache = not is_given and generation_config.use_cache is not False
            if makes_cache and model_kwargs.get("vision_cache_dtype") is None:
                model_kwargs["vision_cache_dtype"] = dtype_of_settings(generation_config)
            from_file = self.generation_config.cache_implementation == "quantized"
            if from_file and (is_given or not can_quantize(generation_config) or not keeps_tokens(generation_mode)):
                generation_config = copy.copy(generation_config)
                generation_config.cache_implementation = None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config, *args, **kwargs):
        """transformers compiles the whole forward on CUDA if the cache is static, anew for each size of a prompt. This
        override never does, as `compile_decode` compiles the steps once for all."""
        if generation_config.compile_config is not None:
            raise ValueError(
                "`compile_config` is not supported: it would compile the whole forward, anew for each prompt. Call "
                "`model.compile_decode(...)` with these settings once; for CUDA graphs, also pass "
                f"`{CACHE}=model.static_cache(...)`."
            )
        return False

    def _get_candidate_generator(
        self, generation_config, input_ids, *args, model_kwargs, assistant_model=None, **kwargs
    ):
        """transformers passes the model kwargs to the assistant of assisted generation. This override passes the
        arguments of the prompt under their public names, if the assistant accepts them. It leaves out the frame mask:
        without it more candidates may be rejected, but the output is the same."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "`assistant_early_exit` is not supported: this model's layers differ, and an early exit would skip "
                "its cross-attention. Pass `assistant_model=` or `prompt_lookup_num_tokens=`."
            )
        prompt = model_kwargs.get("prompt_kwargs") or {}
        media = prompt.get("media_as_given", prompt)
        public = {name: value for name, value in model_kwargs.items() if name != "prompt_kwargs"}
        public |= {name: media[name] for name in MEDIA_INPUTS if name in media}
        public |= {name: prompt[name] for name in ("position_ids",) if name in prompt}
        if assistant_model is not None and assistant_model.config.model_type == self.config.model_type:
            public["prompt_length"] = prompt.get("prompt_length")
            if prompt.get("past_length"):
                self._check_media_for_assistant(input_ids[:, : prompt.get("prompt_length")], media.get("grid_thw", ()))
        elif assistant_model is not None:
            accepted = inspect.signature(assistant_model.forward).parameters
            public = {name: value for name, value in public.items() if name in accepted or name not in MEDIA_KWARGS}
        return super()._get_candidate_generator(
            generation_config, input_ids, *args, model_kwargs=public, assistant_model=assistant_model, **kwargs
        )

    def _prefill_chunking(self, input_ids, generation_config, **model_kwargs):
        """transformers 4 prefills in chunks from the first token on, whatever the cache holds. This override refuses a
        filled cache."""
        if length := cached_length(model_kwargs.get(CACHE)):
            raise ValueError(
                f"`prefill_chunk_size` came with a cache that holds {length} tokens; expected an empty one: "
                "transformers 4 prefills in chunks from the first token on. Leave `prefill_chunk_size` out, or use "
                "transformers 5."
            )
        return super()._prefill_chunking(input_ids, generation_config, **model_kwargs)

    def _prepare_position_ids_for_generation(self, *args, **kwargs):
        """transformers 5 counts tokens for `position_ids`. This override returns None, as forward computes XRoPE's."""

    def prepare_inputs_for_generation(
        self,
        input_ids,
        cache=None,
        attention_mask=None,
        inputs_embeds=None,
        cache_position=None,
        next_sequence_length=None,
        is_first_iteration=False,
        use_cache=True,
        prompt_kwargs=None,
        position_ids=None,
        past_key_values=None,
        **kwargs,
    ):
        """transformers makes the inputs of the next call of forward. This override makes them from the tokens that the
        cache does not hold, and the arguments of the prompt that these tokens need.

        transformers 4 passes the new tokens as `cache_position`, transformers 5 their number as
        `next_sequence_length`. The `position_ids` that transformers makes are not XRoPE's and are not used; the
        caller's are in `prompt_kwargs`.
        """
        cache, prompt = cache_of(cache, past_key_values), prompt_kwargs or {}
        past_length = cached_length(cache)
        inputs = {name: value for name, value in kwargs.items() if name not in NOT_OF_FORWARD}
        if inputs_embeds is not None and past_length == 0:
            length = inputs_embeds.shape[1]
            inputs |= {
                "inputs_embeds": inputs_embeds,
                "input_ids": input_ids if input_ids.shape[1] == length else None,
            }
        else:
            new = cache_position.shape[0] if cache_position is not None else next_sequence_length
            if new is None and past_length and input_ids.shape[1] >= prompt.get("prompt_length", past_length + 1):
                # Assisted generation on a kept cache passes the whole conversation.
                new = input_ids.shape[1] - past_length
            inputs["input_ids"] = input_ids if new is None else input_ids[:, -new:]
            length = inputs["input_ids"].shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            is_step = past_length and length == 1 and "past_length" not in prompt
            # A step continues the mask of the prompt, which the cache knows; so no step has to compare both.
            attention_mask = None if is_step else attention_mask[:, : past_length + length]
        return {
            **inputs,
            **inputs_of_prompt(prompt, past_length, length),
            CACHE: cache,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
        }

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        """transformers updates the model kwargs after a call. With a cache, this override drops the arguments of the
        prompt, whose media are then in the cache. Without a cache, it extends the caller's positions by the new
        tokens."""
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder, num_new_tokens=num_new_tokens
        )
        prompt = model_kwargs.get("prompt_kwargs") or {}
        if model_kwargs.get("use_cache", True):
            model_kwargs["prompt_kwargs"] = {name: value for name, value in prompt.items() if name == "prompt_length"}
        elif "position_ids" in prompt:
            positions = prompt["position_ids"]
            positions = extend_positions(positions, positions.shape[-1] + num_new_tokens)
            model_kwargs["prompt_kwargs"] = prompt | {"position_ids": positions}
        return model_kwargs

    # Steps of the hooks

    def _read_prompt(
        self,
        cache: Optional[Cache],
        past_length: int,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor],
        prompt: dict,
    ) -> dict:
        """Checks the whole prompt, because forward may get it in chunks.

        Returns:
            The arguments of the prompt with `past_length` and `prompt_length`, after which tokens are generated. On a
            filled cache the media are those of the new turn, the frame mask covers all frames of the conversation, and
            `media_as_given` is added.
        """
        new = new_tokens(past_length, input_ids, attention_mask)
        state = vision_state(cache, self.config.text_config)
        if state is not None and new is not input_ids:
            check_last_token(state, past_length, input_ids, attention_mask)
        given = {name: prompt[name] for name in MEDIA_KWARGS if name in prompt}
        length = prompt.get("prompt_length", past_length + new.shape[1])
        media = read_media(self.config.vision_config, **{name: prompt.get(name) for name in MEDIA_INPUTS})
        frame_mask = prompt.get("cross_attention_mask")
        if state is not None and media:
            text = new[:, : max(length - past_length, 0)]
            pads = pads_of_samples(state, (text == self.config.image_token_id).sum(1).tolist())
            media = media_of_new_turn(state, media.assign(pads), pads)
            if not media and frame_mask is not None and frame_mask.shape[2] <= text.shape[1]:
                frame_mask = None  # its columns are frames that the cache holds, and the new turn has no frame
        request = read_request(
            self.config.image_token_id,
            state,
            past_length,
            new,
            attention_mask,
            media,
            frame_mask,
            prompt_length=length,
            # The mask covers the new turn. `new` may begin one token earlier, with one that is not in the cache yet.
            mask_at_end=past_length > 0,
        )
        if past_length and request.mask is not None and not request.state.is_waiting():
            frame_mask = whole_mask(request)
        prompt = {name: value for name, value in prompt.items() if name not in MEDIA_KWARGS}
        prompt |= {**media.as_kwargs(), "prompt_length": length, "past_length": past_length}
        if frame_mask is not None:
            prompt["cross_attention_mask"] = frame_mask
        return prompt | {"media_as_given": given} if past_length else prompt

    def _check_media_for_assistant(self, input_ids: torch.Tensor, grid_thw) -> None:
        """Refuses media of the new turn alone, because an assistant starts without a cache.

        Raises:
            ValueError: if the conversation has another number of `image_pad` tokens than the media have frames.
        """
        pads = int((input_ids == self.config.image_token_id).sum())
        frames = sum(int(t) for t, _, _ in grid_thw)
        if pads and pads != frames:
            raise ValueError(
                f"The conversation has {pads} `image_pad` tokens, and {frames} frames were given for the assistant, "
                "which starts without a cache; expected the media of all turns. Pass them, or leave "
                "`assistant_model` out."
            )


def keeps_tokens(mode: GenerationMode) -> bool:
    """Whether a way of generating only adds tokens to a cache; warns once if not."""
    if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return True
    logger.warning_once(
        f"generation_config.json asks for a quantized cache, which cannot be used for {mode.value}; the cache is kept "
        "in the dtype of the model, which needs more memory."
    )
    return False


def new_tokens(past_length: int, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor]) -> torch.Tensor:
    """The tokens of `input_ids` that the cache does not hold. `input_ids` is the whole conversation, or a new turn if
    `attention_mask` is of another length.

    Raises:
        ValueError: if there are none, or transformers does not accept a new turn alone.
    """
    if not past_length:
        return input_ids
    length = input_ids.shape[1]
    only_new = attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] != length
    if only_new and not TAKES_NEW_TURN:
        raise ValueError(
            f"`input_ids` has {length} tokens and `attention_mask` {attention_mask.shape[1]}; expected both for those "
            "of the whole conversation: this transformers does not take the tokens of the new turn alone."
        )
    new = input_ids if only_new else input_ids[:, past_length:]
    if not new.shape[1]:
        raise ValueError(
            f"`input_ids` has {length} tokens, and the cache holds {past_length}; expected the whole conversation, "
            "with at least one token that the cache does not hold."
        )
    return new


def check_last_token(
    state: VisionState, past_length: int, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor]
) -> None:
    """Checks that `input_ids` continues the cache, by the last token of the cache.

    Raises:
        ValueError: if `input_ids` has another token there.
    """
    if state.last_ids is None:
        return
    last = input_ids[:, past_length - 1].to(state.last_ids.device)
    is_other = last != state.last_ids
    if attention_mask is not None:  # padding may have any id
        is_other = is_other & attention_mask[:, past_length - 1].to(last.device).bool()
    if is_other.any():
        raise ValueError(
            f"`input_ids` is not the conversation that the cache holds: token {past_length - 1} is {last.tolist()}, "
            f"but {state.last_ids.tolist()} in the cache; expected the whole conversation, or with transformers 5 the "
            "tokens of the new turn and an `attention_mask` for the whole."
        )


def inputs_of_prompt(prompt: dict, past_length: int, length: int) -> dict:
    """The arguments of the prompt for a call of `length` tokens: the media with its first chunk, and the positions of
    these tokens."""
    inputs = {name: value for name, value in prompt.items() if name not in ("media_as_given", "past_length")}
    if past_length > prompt.get("past_length", 0):
        inputs = {name: value for name, value in inputs.items() if name not in MEDIA_INPUTS}
    if past_length:
        inputs.pop("rows_per_sample", None)
    positions = inputs.get("position_ids")
    if positions is not None and positions.shape[-1] != length:
        positions = extend_positions(positions, past_length + length)
        inputs["position_ids"] = positions[..., past_length : past_length + length]
    return inputs


def extend_positions(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Positions [..., T], continued from the last one to [..., length]; unchanged if T is at least `length`."""
    steps = torch.arange(1, max(0, length - positions.shape[-1]) + 1, device=positions.device, dtype=positions.dtype)
    return torch.cat([positions, positions[..., -1:] + steps], dim=-1)
