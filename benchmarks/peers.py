"""What benchmarks/model.py compares. Of each implementation

prepare(prompt)       makes its inputs of a prompt
prefill()             returns the logits [1, 1, vocab] of the last token, and keeps the cache
decode(token)         takes a token [1, 1], and returns the logits after it
generate(...)         has transformers' `generate` continue the cache; None in an implementation without it
forget()              frees the cache
"""

from inspect import signature

import torch

from moss_vl.benchmarks.measuring import Clock
from moss_vl.benchmarks.plain import PlainMossVL
from moss_vl.benchmarks.random_models import END, PAD, START, VIDEO_PAD, Prompt
from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.modeling_moss_vl import CACHE


class StepTimes:
    """A stopping criterion of `generate` that stops nothing, and records when each token was chosen."""

    def __init__(self, clock: Clock):
        self.clock, self.times = clock, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.times.append(self.clock.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> list[float]:
        """From each token to the next."""
        return [self.clock.between(*pair) for pair in zip(self.times, self.times[1:], strict=False)]


class Generating:
    """An implementation whose `model` has `generate`."""

    model, cache = None, None

    def generate(self, written: torch.Tensor, count: int, times: StepTimes) -> torch.Tensor:
        """Writes `count` tokens, the most likely ones.

        Args:
            written: ids [1, n] after the prompt, all but the last of which were decoded.

        Returns:
            Ids [1, count].
        """
        ids = torch.cat([self.ids, written], dim=1)
        tokens = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[times],
            **{CACHE: self.cache},
        )
        return tokens[:, ids.shape[1] :]

    def forget(self) -> None:
        self.cache = None


class Ours(Generating):
    def __init__(self, model, clock: Clock):
        self.model, self.clock = model, clock
        self.encoder_times = []  # before and after the encoder of the last prefill
        model.model.visual.register_forward_pre_hook(self._start_encoder)
        model.model.visual.register_forward_hook(self._end_encoder)

    def _start_encoder(self, *args) -> None:
        self.encoder_times = [self.clock.now()]

    def _end_encoder(self, *args) -> None:
        self.encoder_times.append(self.clock.now())

    @property
    def encoder_seconds(self) -> float:
        return self.clock.between(*self.encoder_times)

    def prepare(self, prompt: Prompt) -> None:
        self.ids, self.pixels, self.grid = prompt.ids, prompt.pixels.to(self.model.dtype), prompt.grid

    def prefill(self) -> torch.Tensor:
        self.cache = None
        out = self.model(self.ids, pixel_values=self.pixels, grid_thw=self.grid, use_cache=True, logits_to_keep=1)
        self.cache = out[CACHE]
        return out.logits

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        return self.model(token, **{CACHE: self.cache}).logits


class Plain:
    """The weights of a model of this package in the plain implementation."""

    generate = None

    def __init__(self, model):
        self.plain = PlainMossVL(model)

    def prepare(self, prompt: Prompt) -> None:
        self.inputs = (prompt.ids, prompt.pixels, prompt.frames, prompt.columns, prompt.columns)

    def prefill(self) -> torch.Tensor:
        self.plain.past = {}
        return self.plain.prefill(*self.inputs)

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        return self.plain.decode(token)

    def forget(self) -> None:
        self.plain.past = {}


class Qwen3VL(Generating):
    """transformers' Qwen3VL with the sizes of `config`, without its cross-attention layers. Each frame is an image:
    `vision_start` and the frame's vision tokens replace its `image_pad`, so that it reads as many vision tokens."""

    temporal_patch_size, pad, kind = 1, PAD, 1  # kind: in `mm_token_type_ids`

    def __init__(self, config: MossVLConfig, device: str, dtype: torch.dtype):
        from transformers import Qwen3VLForConditionalGeneration

        torch.manual_seed(0)
        with torch.device(device):
            self.model = Qwen3VLForConditionalGeneration._from_config(
                qwen3vl_config(config, self.temporal_patch_size), dtype=dtype
            ).eval()

    def prepare(self, prompt: Prompt) -> None:
        self.ids, self.media = self.ids_of(prompt), self.media_of(prompt)
        if "mm_token_type_ids" in signature(self.model.forward).parameters:  # transformers 5
            self.media["mm_token_type_ids"] = (self.ids == self.pad).int() * self.kind

    def ids_of(self, prompt: Prompt) -> torch.Tensor:
        ids = []
        for token in prompt.ids[0].tolist():
            ids += [START, *[PAD] * prompt.tokens_per_frame] if token == PAD else [token]
        return torch.tensor([ids], device=prompt.ids.device)

    def media_of(self, prompt: Prompt) -> dict:
        grid = torch.tensor([[1, prompt.columns, prompt.columns]] * prompt.frames, device=prompt.ids.device)
        return {"pixel_values": prompt.pixels, "image_grid_thw": grid}

    def prefill(self) -> torch.Tensor:
        self.cache = None
        out = self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1, **self.media)
        self.cache, self.length = out[CACHE], self.ids.shape[1]
        return out.logits

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        offset = torch.tensor([self.length], device=token.device)
        position = (offset + self.model.model.rope_deltas).view(1, 1, 1).expand(3, 1, 1)
        self.length += 1
        return self.model(input_ids=token, position_ids=position, cache_position=offset, **{CACHE: self.cache}).logits


class Qwen3VLAsShipped(Qwen3VL):
    """The same with two frames per temporal patch, as its checkpoints are, and the frames as a video: half the vision
    tokens, each temporal patch after the words of one frame (its processor writes a time there)."""

    temporal_patch_size, pad, kind = 2, VIDEO_PAD, 2

    def ids_of(self, prompt: Prompt) -> torch.Tensor:
        per_frame = prompt.ids.shape[1] // prompt.frames
        words = prompt.ids.view(prompt.frames, per_frame)[::2, :-1]
        vision = torch.tensor([START, *[VIDEO_PAD] * prompt.tokens_per_frame, END], device=words.device)
        return torch.cat([words, vision.expand(len(words), -1)], dim=1).view(1, -1)

    def media_of(self, prompt: Prompt) -> dict:
        if prompt.frames % 2:
            raise SystemExit(f"Qwen3VL as shipped takes an even number of frames; got {prompt.frames}.")
        steps, patches = prompt.frames // 2, prompt.columns**2
        pixels = prompt.pixels.view(steps, 2, patches, 3, 256).permute(0, 2, 3, 1, 4).reshape(steps * patches, -1)
        grid = torch.tensor([[steps, prompt.columns, prompt.columns]], device=prompt.ids.device)
        return {"pixel_values_videos": pixels, "video_grid_thw": grid}


def qwen3vl_config(config: MossVLConfig, temporal_patch_size: int):
    from transformers import Qwen3VLConfig

    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters
    text_config = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "num_hidden_layers": text.num_hidden_layers - len(text.cross_attention_layers),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": rope["mrope_section"],
        },
    }
    names = (
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "out_hidden_size",
        "deepstack_visual_indexes",
        "num_position_embeddings",
        "patch_size",
        "spatial_merge_size",
    )
    return Qwen3VLConfig(
        text_config=text_config,
        vision_config={
            **{name: getattr(vision, name) for name in names},
            "temporal_patch_size": temporal_patch_size,
        },
        image_token_id=PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
