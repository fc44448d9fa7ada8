"""How transformers' `generate` prepares the calls of a MOSS-VL model: what is checked, what every call gets, what a cache already holds."""

import inspect

import torch
from transformers import GenerationMixin
from transformers.cache_utils import StaticCache

from .cache_layers import CACHE, cache_of, cached_length, vision_state
from .checks import nearest_name
from .vision_sequence import (
    VisionState,
    count_media,
    grid_of,
    pads_of_samples,
    read_grid,
    read_request,
    split_by,
    take_media,
    whole_mask,
)


MEDIA_KWARGS = (
    "pixel_values",
    "image_mean",
    "image_std",
    "image_features",
    "grid_thw",
    "media_nums_per_sample",
    "cross_attention_mask",
)
PROMPT_KWARGS = (*MEDIA_KWARGS, "image_grid_thw", "position_ids", "prompt_length", "rows_per_sample")
# Whether `generate` tells how many tokens are new, and so takes those of a new turn alone; transformers 4 does not.
NEXT_LENGTH = "next_sequence_length" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters

# `save_pretrained` copies the code beside the weights.


class MossVLGenerateHooks:
    """Overrides of `GenerationMixin`, which stands after this class among the bases."""

    # Hooks of `generate`. What belongs to the prompt rides in one entry of the model kwargs, `prompt_kwargs`: transformers 5 does not
    # prefill in chunks if it sees `pixel_values`. Assistants get it under its public names.

    def _validate_model_kwargs(self, model_kwargs):
        """Checks names; media are checked against the prompt in `_expand_inputs_for_generation`."""
        known = set(inspect.signature(self.forward).parameters)
        for name in [name for name, value in model_kwargs.items() if value is not None and name not in known]:
            near = nearest_name(name, {*known, *self.generation_config.to_dict()})
            hint = f"; did you mean `{near}`?" if near else ""
            raise ValueError(f"`{name}` is neither an input of this model nor a setting of `generate`{hint}")
        super()._validate_model_kwargs(model_kwargs)

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        """Keeps the caller's `attention_mask`: transformers 5 drops one of ones, and its length says whether `input_ids` is the whole
        conversation or a new turn."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        return inputs, name, {**model_kwargs, "prompt_kwargs": {"attention_mask": model_kwargs.get("attention_mask")}}

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Checks a prompt and its media, drops the media that the cache holds already, and repeats text rows for beams and answers; the
        media stay as they are, shared by the rows of their sample."""
        prompt = {name: model_kwargs.pop(name, None) for name in PROMPT_KWARGS}
        prompt = {name: value for name, value in prompt.items() if value is not None}
        if "image_grid_thw" in prompt:
            prompt["grid_thw"] = grid_of(prompt.get("grid_thw"), prompt.pop("image_grid_thw"))
        cache, past_length = model_kwargs.get(CACHE), cached_length(model_kwargs.get(CACHE))
        given = (model_kwargs.pop("prompt_kwargs", None) or {}).get("attention_mask")
        attention_mask = model_kwargs.get("attention_mask") if given is None else given
        if attention_mask is not None and attention_mask.ndim == 2 and (attention_mask[:, -1] == 0).any():
            raise ValueError(
                "`attention_mask` ends in padding, so the rows are padded on the right, and a new token would come after the padding; "
                "expected padding on the left. Call the processor with padding_side='left'."
            )
        if input_ids is not None and input_ids.shape[1]:
            prompt = self._read_prompt(cache, past_length, input_ids, attention_mask, prompt)
        if expand_size > 1:
            if past_length:
                cache.batch_repeat_interleave(expand_size)
            else:
                prompt["rows_per_sample"] = expand_size
            for name, axis in (("cross_attention_mask", 0), ("position_ids", -2)):
                if name in prompt and prompt[name].shape[axis] == len(input_ids):  # else one for all rows
                    prompt[name] = prompt[name].repeat_interleave(expand_size, dim=axis)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "prompt_kwargs": prompt}

    def _read_prompt(self, cache, past_length: int, input_ids, attention_mask, prompt: dict) -> dict:
        """What belongs to the prompt, checked as a whole: forward may get it in chunks.

        Adds `past_length`, the text tokens in the cache, and `prompt_length`, which tells the prompt from what the model writes. Of the
        media of the whole conversation only those of the new turn stay (`media_as_given` has all of them, for an assistant); a mask over
        these becomes one over all frames.
        """
        new = input_ids
        if past_length:
            only_new = (
                attention_mask is not None
                and attention_mask.ndim == 2
                and attention_mask.shape[1] != input_ids.shape[1]
            )
            if only_new and not NEXT_LENGTH:
                raise ValueError(
                    f"`input_ids` has {input_ids.shape[1]} tokens and `attention_mask` {attention_mask.shape[1]}; expected as many, those of "
                    f"the whole conversation: this transformers does not take the tokens of the new turn alone."
                )
            new = input_ids if only_new else input_ids[:, past_length:]
            if not new.shape[1]:
                raise ValueError(
                    f"`input_ids` has {input_ids.shape[1]} tokens, and the cache holds {past_length}; expected the whole conversation, with "
                    f"at least one token that the cache does not hold."
                )
        state = vision_state(cache, self.config.text_config)
        if state is not None and new is not input_ids and state.last_ids is not None:
            last = input_ids[:, past_length - 1].to(state.last_ids.device)
            seen = (
                True if attention_mask is None else attention_mask[:, past_length - 1].to(last.device).bool()
            )  # what padding is says nothing
            if ((last != state.last_ids) & seen).any():
                raise ValueError(
                    f"`input_ids` is not the conversation that the cache holds: token {past_length - 1} is {last.tolist()}, and the cache's "
                    f"{state.last_ids.tolist()}; expected the whole conversation, or with transformers 5 the tokens of the new turn and an "
                    f"`attention_mask` for the whole."
                )
        given = {name: prompt[name] for name in MEDIA_KWARGS if name in prompt}
        length = prompt.setdefault("prompt_length", past_length + new.shape[1])
        if state is not None and "grid_thw" in prompt:
            prompt = self._without_known_media(state, new[:, : max(length - past_length, 0)], prompt)
        names = prompt.keys() - {"position_ids", "rows_per_sample"}
        # What the model wrote last is not in the cache yet, and stands before the new turn that a mask is about.
        request = read_request(
            self.config,
            state,
            past_length,
            new,
            attention_mask,
            **{name: prompt[name] for name in names},
            mask_at_end=past_length > 0,
        )
        if past_length and request.mask is not None and not state.is_waiting():
            prompt = prompt | {"cross_attention_mask": whole_mask(request)}
        return {**prompt, "past_length": past_length, **({"media_as_given": given} if past_length else {})}

    def _get_cache(self, cache_implementation, batch_size, max_cache_len, model_kwargs):
        """A static cache of this call's own; transformers 4 would keep one on the model, where two threads would share it."""
        offloading = "offloaded" in cache_implementation
        return StaticCache(config=self.config.text_config, max_cache_len=max_cache_len, offloading=offloading)

    def _prefill_chunking(self, input_ids, generation_config, **model_kwargs):
        """Of transformers 4, which takes up the conversation from its first token, whatever the cache holds."""
        if length := cached_length(model_kwargs.get(CACHE)):
            raise ValueError(
                f"`prefill_chunk_size` came with a cache that holds {length} tokens; expected an empty one: transformers 4 prefills in chunks "
                f"from the first token on. Leave `prefill_chunk_size` out, or use transformers 5."
            )
        return super()._prefill_chunking(input_ids, generation_config, **model_kwargs)

    def _get_candidate_generator(
        self, generation_config, input_ids, *args, model_kwargs, assistant_model=None, **kwargs
    ):
        """The assistant gets what belongs to the prompt under its public names, as far as it takes them, but for the frame mask: without
        it some candidates may be rejected, and none is wrong."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "`assistant_early_exit` is not supported: this model's layers differ, and an early exit would skip its cross-attention. "
                "Pass `assistant_model=` or `prompt_lookup_num_tokens=`."
            )
        public = {name: value for name, value in model_kwargs.items() if name != "prompt_kwargs"}
        prompt = model_kwargs.get("prompt_kwargs") or {}
        given = prompt.get("media_as_given", prompt)
        public |= {name: given[name] for name in given if name in MEDIA_KWARGS and name != "cross_attention_mask"}
        public |= {"position_ids": prompt["position_ids"]} if "position_ids" in prompt else {}
        if assistant_model is not None and assistant_model.config.model_type == self.config.model_type:
            public["prompt_length"] = prompt.get("prompt_length")
            pads = int((input_ids[:, : prompt.get("prompt_length")] == self.config.image_token_id).sum())
            frames = sum(int(t) for t, _, _ in given.get("grid_thw", ()))
            if prompt.get("past_length") and pads and pads != frames:
                raise ValueError(
                    f"The conversation has {pads} `image_pad` tokens, and {frames} frames were given for the assistant, which starts "
                    f"without a cache; expected the media of all turns. Pass these, or leave `assistant_model` out."
                )
        elif assistant_model is not None:
            accepted = inspect.signature(assistant_model.forward).parameters
            public = {name: value for name, value in public.items() if name in accepted or name not in MEDIA_KWARGS}
        return super()._get_candidate_generator(
            generation_config, input_ids, *args, model_kwargs=public, assistant_model=assistant_model, **kwargs
        )

    def _prepare_position_ids_for_generation(self, *args, **kwargs):
        """None: positions are XRoPE's, and forward works them out."""

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
        """The inputs of the next call: the tokens that the cache does not hold yet, with the media they need.

        transformers 4 tells how many tokens are new by `cache_position`, transformers 5 by `next_sequence_length`. The positions
        that transformers makes (`position_ids`) are not XRoPE's; a caller's own are in `prompt_kwargs`.
        """
        cache = cache_of(cache, past_key_values)
        past_length = cached_length(cache)
        if inputs_embeds is not None and past_length == 0:
            kwargs["inputs_embeds"] = inputs_embeds
            kwargs["input_ids"] = input_ids if input_ids.shape[1] == inputs_embeds.shape[1] else None
            length = inputs_embeds.shape[1]
        else:
            new = cache_position.shape[0] if cache_position is not None else next_sequence_length
            if (
                new is None
                and past_length
                and input_ids.shape[1] >= (prompt_kwargs or {}).get("prompt_length", past_length + 1)
            ):
                new = (
                    input_ids.shape[1] - past_length
                )  # assisted generation on a kept cache hands over the whole conversation
            kwargs["input_ids"] = input_ids if new is None else input_ids[:, -new:]
            length = kwargs["input_ids"].shape[1]
        for name in (
            "labels",
            "token_type_ids",
            "mm_token_type_ids",
            "tokenizer",
            "assistant_tokenizer",
        ):  # of `generate`, not of forward
            kwargs.pop(name, None)
        prompt = {name: value for name, value in (prompt_kwargs or {}).items() if name != "media_as_given"}
        if past_length > prompt.pop("past_length", 0):  # a later chunk of the prompt: its media came with the first
            prompt = {
                name: value
                for name, value in prompt.items()
                if name not in MEDIA_KWARGS or name == "cross_attention_mask"
            }
        if past_length:
            prompt.pop("rows_per_sample", None)
        if "position_ids" in prompt and prompt["position_ids"].shape[-1] != length:
            prompt["position_ids"] = counted_on(prompt["position_ids"], past_length + length)[
                ..., past_length : past_length + length
            ]
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, : past_length + length]
        return {
            **kwargs,
            **prompt,
            CACHE: cache,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
        }

    def _without_known_media(self, state: VisionState, new: torch.Tensor, prompt: dict) -> dict:
        """Drops the media that the cache holds already. A later turn may bring those of the whole conversation, or its own.

        Args:
            new: [B, T], the text of the new turn.
        """
        pads = pads_of_samples(state, (new == self.config.image_token_id).sum(1).tolist())
        if "image_features" in prompt:
            prompt = prompt | {
                "image_features": getattr(prompt["image_features"], "pooler_output", prompt["image_features"])
            }
        media = {
            name: prompt[name]
            for name in ("pixel_values", "image_features", "image_mean", "image_std")
            if name in prompt
        }
        statistics = (prompt.get(name) for name in ("pixel_values", "grid_thw"))
        grid = read_grid(*statistics, self.config.vision_config, prompt.get("image_mean"), prompt.get("image_std"))
        nums = count_media(grid, prompt.get("media_nums_per_sample"), pads)
        kept, kept_nums, first = [], [], 0
        for sample, (asked, own) in enumerate(zip(pads, split_by(grid, nums), strict=True)):
            known, frames = len(state.grids[sample]), sum(t for t, _, _ in own)
            wanted = max(0, asked - (known - state.placed[sample]))
            if wanted and frames not in (wanted, known + wanted):
                raise ValueError(
                    f"The new text of sample {sample} asks for {wanted} frames beyond the cache, but its media have {frames}; "
                    f"expected {wanted}, or {known + wanted} with those of the earlier turns."
                )
            kept_nums.append(0)
            for number, (t, _, _) in enumerate(own, first):
                frames -= t  # frames after this medium
                if frames < wanted:
                    kept.append(number)
                    kept_nums[-1] += 1
            first += len(own)
        if len(kept) == len(grid):
            return {**prompt, "media_nums_per_sample": kept_nums}
        mask = prompt.get("cross_attention_mask")
        if not kept and mask is not None and mask.shape[2] <= new.shape[1]:
            prompt = {
                name: value for name, value in prompt.items() if name != "cross_attention_mask"
            }  # of the new turn, without frames
        prompt = {
            name: value for name, value in prompt.items() if name not in {*media, "grid_thw", "media_nums_per_sample"}
        }
        if not kept:
            return prompt
        media = take_media(media, grid, kept, self.config.vision_config.spatial_merge_size)
        return {**prompt, **media, "grid_thw": [grid[number] for number in kept], "media_nums_per_sample": kept_nums}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder, num_new_tokens=num_new_tokens
        )
        prompt = model_kwargs.get("prompt_kwargs") or {}
        if model_kwargs.get("use_cache", True):  # the cache knows the media
            model_kwargs["prompt_kwargs"] = {name: value for name, value in prompt.items() if name == "prompt_length"}
        elif "position_ids" in prompt:
            positions = prompt["position_ids"]
            model_kwargs["prompt_kwargs"] = prompt | {
                "position_ids": counted_on(positions, positions.shape[-1] + num_new_tokens)
            }
        return model_kwargs


def counted_on(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Positions [..., T] of a prompt and, one by one from its last, of what is written after it: [..., length] if that is longer."""
    steps = torch.arange(1, max(0, length - positions.shape[-1]) + 1, device=positions.device, dtype=positions.dtype)
    return torch.cat([positions, positions[..., -1:] + steps], dim=-1)
