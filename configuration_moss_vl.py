"""Configuration of MOSS-VL: the three config classes and their validation.

Older spellings are normalised here (`rope_theta` + `rope_scaling` become `rope_parameters`), so that the other files
read one form. Dicts and config objects that are passed in are copied, never changed.
"""

import copy
import math
import numbers
import os
import re
from typing import TYPE_CHECKING

from transformers import PretrainedConfig


if TYPE_CHECKING:
    # These lines are read by transformers and never run. transformers 5 caches a model class by its config class, and
    # a config class by the files that it imports. Without these lines, a second folder with the same name and the same
    # configuration file would get the model class of the first one, even if its code differs.
    from .animations import AnimatedImage  # noqa: F401
    from .attention import attend  # noqa: F401
    from .block_attention import attend_in_blocks  # noqa: F401
    from .cache_layers import VisionCacheLayer  # noqa: F401
    from .call_positions import CallPositions  # noqa: F401
    from .checks import nearest_name  # noqa: F401
    from .clip_decoding import decode_clips  # noqa: F401
    from .coded_pictures import PictureReader  # noqa: F401
    from .colours import tone_map_of  # noqa: F401
    from .conversation import PLACEHOLDERS  # noqa: F401
    from .decode_step import StepPlan  # noqa: F401
    from .decoder import MossVLTextModel  # noqa: F401
    from .decord_video import open_decord  # noqa: F401
    from .downloads import download  # noqa: F401
    from .generation_batches import answer_turn  # noqa: F401
    from .generation_hooks import MossVLGenerateHooks  # noqa: F401
    from .generation_options import GENERATE_DEFAULTS  # noqa: F401
    from .generation_queries import Turn  # noqa: F401
    from .generation_queue import QueueServer  # noqa: F401
    from .generation_rows import AnswerRow  # noqa: F401
    from .generation_sessions import SessionState  # noqa: F401
    from .generation_streams import BatchStream  # noqa: F401
    from .generation_utils import MossVLGenerationMixin  # noqa: F401
    from .image_files import open_image  # noqa: F401
    from .image_processing_moss_vl import MossVLImageProcessor  # noqa: F401
    from .image_reading import probe_image  # noqa: F401
    from .int8_states import Int8States  # noqa: F401
    from .joint_decoding import plan_step  # noqa: F401
    from .media import Media  # noqa: F401
    from .modeling_moss_vl import MossVLForConditionalGeneration  # noqa: F401
    from .options import OPTIONS  # noqa: F401
    from .patches import patchify  # noqa: F401
    from .pipeline_moss_vl import MossVLTextGenerationPipeline  # noqa: F401
    from .pretrained_model import MossVLPreTrainedModel  # noqa: F401
    from .processing_moss_vl import MossVLProcessor  # noqa: F401
    from .processor_keywords import sort_options  # noqa: F401
    from .processor_loading import load_parts  # noqa: F401
    from .processor_settings import known_settings  # noqa: F401
    from .realtime_events import Event  # noqa: F401
    from .realtime_protocol import Protocol  # noqa: F401
    from .realtime_sampling import Sampler  # noqa: F401
    from .realtime_scheduler import Scheduler  # noqa: F401
    from .realtime_session import RealtimeSession  # noqa: F401
    from .realtime_stream import RealtimeStream  # noqa: F401
    from .resizing import fit_size  # noqa: F401
    from .samples import Sample  # noqa: F401
    from .signatures import image_kind  # noqa: F401
    from .static_layers import StaticTextLayer  # noqa: F401
    from .text_rows import token_rows  # noqa: F401
    from .threads import in_threads  # noqa: F401
    from .video_files import Video  # noqa: F401
    from .video_packets import FrameIndex  # noqa: F401
    from .video_processing_moss_vl import MossVLVideoProcessor  # noqa: F401
    from .video_reading import open_video  # noqa: F401
    from .video_sampling import ClipPlan  # noqa: F401
    from .vision_encoder import MossVLVisionModel  # noqa: F401
    from .vision_plan import plan_call  # noqa: F401
    from .vision_request import VisionRequest  # noqa: F401
    from .vision_sequence import VisionState  # noqa: F401
    from .xrope import xrope_rotary  # noqa: F401

# The Auto classes that load the model. AutoModelForVision2Seq exists in transformers 4 only, AutoModelForMultimodalLM
# in 5 only.
AUTO_MODELS = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForVision2Seq",
)


def _require(condition: bool, what: str, got, expected: str) -> None:
    if not condition:
        raise ValueError(f"MOSS-VL config: {what}, got {got!r}; expected {expected}. Correct it in config.json.")


def _plain(value):
    """Converts integers of any type (numpy's are not JSON) to int, also inside a list or tuple; returns anything else
    unchanged."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def _require_positive_ints(config: PretrainedConfig, *names: str) -> None:
    for name in names:
        value = _plain(getattr(config, name))
        setattr(config, name, value)
        _require(
            type(value) is int and value > 0, f"`{type(config).base_config_key}.{name}`", value, "a positive integer"
        )


def check_parts(config: PretrainedConfig, names: dict) -> None:
    """Checks the keys of a dict of attention implementations, since transformers ignores unknown ones.

    Raises:
        ValueError: if a key is not a part of the config. "" is the config itself.
    """
    parts = ["", *config.sub_configs]
    for part in names:
        _require(part in parts, "a part in `attn_implementation`", part, f"one of {parts}")


class MossVLVisionConfig(PretrainedConfig):
    """The ViT encoder and its merger.

    Args:
        depth, hidden_size, intermediate_size, num_heads: size of the transformer; the head size must be a multiple of
            4 (2D rotary).
        hidden_act: activation of the MLP in the blocks; that of the merger is always exact GELU.
        patch_size, temporal_patch_size, in_channels: a row of `pixel_values` is one patch of
            `in_channels * temporal_patch_size * patch_size**2` values.
        spatial_merge_size: `m`; m x m patches become one vision token.
        out_hidden_size: width of a vision token, equal to `hidden_size` of the text model.
        num_position_embeddings: number of learned positions, a square. They are interpolated, so the side of the
            square need not be a multiple of `spatial_merge_size`.
        deepstack_visual_indexes: blocks whose output the merger takes besides that of the last block.
        layer_norm_eps: epsilon of every LayerNorm.

    Raises:
        ValueError: if sizes do not fit each other.
    """

    model_type = "moss_vl_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        in_channels=3,
        patch_size=16,
        temporal_patch_size=1,
        spatial_merge_size=2,
        out_hidden_size=4096,
        num_position_embeddings=2304,
        deepstack_visual_indexes=(8, 16, 24),
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        initializer_range=0.02,
        **kwargs,
    ):
        self.depth = depth
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_heads = num_heads
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.spatial_merge_size = spatial_merge_size
        self.out_hidden_size = out_hidden_size
        self.num_position_embeddings = num_position_embeddings
        self.deepstack_visual_indexes = _plain(list(deepstack_visual_indexes))
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self._check()
        super().__init__(**copy.deepcopy(kwargs))

    def _check(self) -> None:
        _require_positive_ints(
            self,
            "depth",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "in_channels",
            "patch_size",
            "temporal_patch_size",
            "spatial_merge_size",
            "out_hidden_size",
            "num_position_embeddings",
        )
        _require(
            self.hidden_size % (4 * self.num_heads) == 0,
            "`vision_config.hidden_size` and `num_heads`",
            (self.hidden_size, self.num_heads),
            "a head size that is a multiple of 4 (2D rotary positions)",
        )
        side = math.isqrt(self.num_position_embeddings)
        _require(
            side * side == self.num_position_embeddings,
            "`vision_config.num_position_embeddings`",
            self.num_position_embeddings,
            "a square number (rows x columns)",
        )
        indexes = self.deepstack_visual_indexes
        _require(
            indexes == sorted(set(indexes)) and all(0 <= index < self.depth for index in indexes),
            "`vision_config.deepstack_visual_indexes`",
            indexes,
            f"rising block numbers from 0 to {self.depth - 1}",
        )


class MossVLTextConfig(PretrainedConfig):
    """The causal decoder, whose `cross_attention_layers` attend to the vision tokens.

    Args:
        cross_attention_layers: rising indices of the gated cross-attention layers, never 0; default 2, 6, 10, ...
        head_dim: default `hidden_size // num_attention_heads`.
        cross_attention_implementation: an attention implementation for the cross-attention layers alone; default: the
            same as for all layers. Like `attn_implementation`, it is not saved.
        rope_parameters: `{rope_type: "default", rope_theta, mrope_section: [t, h, w], mrope_interleaved: True}`; the
            sections are numbers of frequencies that sum to `head_dim // 2`. The older `rope_theta` + `rope_scaling`
            are read as well.

    Raises:
        ValueError: if sizes do not fit each other.
    """

    model_type = "moss_vl_text"
    base_config_key = "text_config"
    ignore_keys_at_rope_validation = {"mrope_section", "mrope_interleaved"}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    pad_token_id = bos_token_id = eos_token_id = None  # if not given; the base class of transformers 5 lacks them

    def __init__(
        self,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=None,
        cross_attention_layers=None,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        attention_bias=False,
        attention_dropout=0.0,
        max_position_embeddings=262144,
        rope_parameters=None,
        rope_theta=None,
        rope_scaling=None,
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=False,
        cross_attention_implementation=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        _require_positive_ints(
            self, "hidden_size", "num_hidden_layers", "num_attention_heads"
        )  # the defaults of others depend on these
        self.num_key_value_heads = num_key_value_heads if num_key_value_heads is not None else num_attention_heads
        self.head_dim = head_dim if head_dim is not None else hidden_size // num_attention_heads
        _require_positive_ints(self, "head_dim")
        if cross_attention_layers is None:
            cross_attention_layers = range(2, num_hidden_layers, 4)
        self.cross_attention_layers = _plain(list(cross_attention_layers))
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.cross_attention_implementation = cross_attention_implementation
        self.rope_parameters = self._normalise_rope(rope_parameters, rope_theta, rope_scaling)
        self._check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, **copy.deepcopy(kwargs))
        # The base class of transformers 4 takes it as an argument, that of transformers 5 does not: set in any case.
        self.tie_word_embeddings = tie_word_embeddings

    def _normalise_rope(self, rope_parameters, rope_theta, rope_scaling) -> dict:
        """Merges the spellings; `rope_parameters` takes precedence."""
        given = copy.deepcopy(dict(rope_scaling or {}) | dict(rope_parameters or {}))
        half = self.head_dim // 2
        spatial = half * 5 // 16  # frequencies of h, and of w: the share of the 11B model, 20 of 64
        return {
            "rope_type": given.pop("rope_type", given.pop("type", "default")),
            "rope_theta": given.pop("rope_theta", rope_theta if rope_theta is not None else 5_000_000.0),
            "mrope_section": _plain(list(given.pop("mrope_section", [half - 2 * spatial, spatial, spatial]))),
            "mrope_interleaved": given.pop("mrope_interleaved", True),
            **{key: value for key, value in given.items() if key != "type"},
        }

    def to_dict(self) -> dict:
        return {name: value for name, value in super().to_dict().items() if name != "cross_attention_implementation"}

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies; servers written for transformers 4 read it."""
        return self.rope_parameters["rope_theta"]

    @property
    def rope_scaling(self) -> dict:
        """`rope_parameters` under its older name."""
        return self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value: dict) -> None:
        self.rope_parameters = self._normalise_rope(value, self.rope_theta, None)

    def _check(self) -> None:
        _require_positive_ints(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "`text_config.num_attention_heads` and `num_key_value_heads`",
            (self.num_attention_heads, self.num_key_value_heads),
            "a multiple (whole groups of query heads)",
        )
        _require(self.head_dim % 2 == 0, "`text_config.head_dim`", self.head_dim, "an even number (rotary pairs)")
        layers = self.cross_attention_layers
        _require(
            bool(layers) and layers == sorted(set(layers)) and layers[0] > 0 and layers[-1] < self.num_hidden_layers,
            "`text_config.cross_attention_layers`",
            layers,
            f"at least one rising layer index from 1 to {self.num_hidden_layers - 1} (layer 0 is always "
            "self-attention)",
        )
        rope, half = self.rope_parameters, self.head_dim // 2
        _require(rope["rope_type"] == "default", "rope type", rope["rope_type"], "'default'")
        _require(rope["mrope_interleaved"] is True, "`mrope_interleaved`", rope["mrope_interleaved"], "true")
        section = rope["mrope_section"]
        _require(
            len(section) == 3
            and all(isinstance(count, int) and count >= 0 for count in section)
            and sum(section) == half
            and 3 * section[1] - 2 < half
            and 3 * section[2] - 1 < half,
            "`mrope_section`",
            section,
            f"[t, h, w] that sum to head_dim / 2 = {half}, h and w at most every third frequency",
        )
        _require(0.0 <= self.attention_dropout < 1.0, "`attention_dropout`", self.attention_dropout, "0 <= p < 1")


def _is_saved(reference: str, folder) -> bool:
    """Whether a saved folder holds the class of a reference "module.Class". Saving copies the files beside this one to
    the folder, where other files may lie already."""
    module, _, name = reference.rpartition(".")
    paths = [os.path.join(place, f"{module}.py") for place in (os.path.dirname(__file__), folder)]
    path = next((path for path in paths if os.path.isfile(path)), None)
    if path is None:
        return False
    with open(path, encoding="utf-8") as file:
        return re.search(rf"\b{name}\b", file.read()) is not None


TEXT_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")


def _text_size(name: str) -> property:
    """An attribute of the whole config that reads, and writes with its checks, one of the text config."""

    def get(config) -> int:
        return getattr(config.get_text_config(), name)

    def put(config, value: int) -> None:
        text = config.get_text_config()
        before = getattr(text, name)
        setattr(text, name, value)
        try:
            text._check()
            config._check()
        except ValueError:
            setattr(text, name, before)
            raise

    return property(get, put)


class _Pipelines:
    """A class attribute that returns a new dict at each access, because `pipeline` writes into the dict."""

    def __get__(self, config, owner) -> dict:
        text = {"impl": "pipeline_moss_vl.MossVLTextGenerationPipeline", "pt": ["AutoModelForCausalLM"]}
        return {"text-generation": text}


class MossVLConfig(PretrainedConfig):
    """Configuration of `MossVLForConditionalGeneration`.

    Args:
        text_config, vision_config: a dict or a config object each, which is copied; defaults are those of the 11B
            model.
        image_token_id: `<|image_pad|>`, one per frame in the text.
        video_token_id: `<|video_pad|>`, which the processor replaces.
        vision_seq_pad_multiple: accepted because released checkpoints contain it. Other implementations pad the vision
            sequence to this multiple for kernels that need aligned lengths; here it has no effect.
        tie_word_embeddings: read from here or from `text_config`, and set in both: transformers 4 reads the one and
            transformers 5 the other.

    Raises:
        ValueError: if the parts do not fit each other.
    """

    model_type = "moss_vl"
    sub_configs = {"text_config": MossVLTextConfig, "vision_config": MossVLVisionConfig}
    # Outputs that `Trainer` leaves out of its predictions, which are then the logits alone.
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "rope_deltas",
        "hidden_states",
        "attentions",
        "cross_attentions",
    ]
    pad_token_id = bos_token_id = eos_token_id = None  # as in the text config
    custom_pipelines = _Pipelines()  # task -> pipeline class of this package

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        vision_seq_pad_multiple=1,
        tie_word_embeddings=None,
        **kwargs,
    ):
        self.text_config = self._sub_config("text_config", text_config)
        self.vision_config = self._sub_config("vision_config", vision_config)
        self.image_token_id = _plain(image_token_id)
        self.video_token_id = _plain(video_token_id)
        self.vision_start_token_id = _plain(vision_start_token_id)
        self.vision_end_token_id = _plain(vision_end_token_id)
        self.vision_seq_pad_multiple = _plain(vision_seq_pad_multiple)
        self._check()
        if tie_word_embeddings is None:
            tie_word_embeddings = self.text_config.tie_word_embeddings
        self.text_config.tie_word_embeddings = tie_word_embeddings
        kwargs = copy.deepcopy(kwargs)
        self._check_text_sizes(kwargs)
        kwargs["auto_map"] = self._complete_auto_map(kwargs.get("auto_map") or {})
        self._complete_skip_list(kwargs.get("quantization_config"))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.tie_word_embeddings = tie_word_embeddings

    vocab_size, hidden_size, num_hidden_layers = map(_text_size, TEXT_SIZES)

    def _check_text_sizes(self, given: dict) -> None:
        """Removes the sizes of the text model from the arguments. Raises ValueError if they are not those of
        `text_config`."""
        for name in TEXT_SIZES:
            value, size = given.pop(name, None), getattr(self.text_config, name)
            _require(value is None or value == size, f"`{name}`", value, f"`text_config.{name}` = {size}, or none")

    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value) -> None:
        if isinstance(value, dict):
            check_parts(self, value)
        PretrainedConfig._attn_implementation.fset(self, value)

    @property
    def cross_attention_implementation(self):
        """The value of `text_config`, so that `from_pretrained(..., cross_attention_implementation=...)` can set
        it."""
        return self.text_config.cross_attention_implementation

    @cross_attention_implementation.setter
    def cross_attention_implementation(self, value) -> None:
        self.text_config.cross_attention_implementation = value

    @staticmethod
    def _complete_auto_map(given: dict) -> dict:
        """Adds the Auto classes that a config does not name; released configs name only some. All load one model
        class."""
        model = "modeling_moss_vl.MossVLForConditionalGeneration"
        model = given.get("AutoModelForCausalLM", given.get("AutoModel", model))
        return {"AutoConfig": "configuration_moss_vl.MossVLConfig", **dict.fromkeys(AUTO_MODELS, model), **given}

    @staticmethod
    def _complete_skip_list(quantization_config) -> None:
        """Adds patterns to the list of modules that bitsandbytes does not quantize. transformers 4 finds "cross_attn"
        anywhere in the name of a module, transformers 5 at its start and its end only; but 5 reads patterns."""
        names = quantization_config.get("llm_int8_skip_modules") if isinstance(quantization_config, dict) else None
        patterns = [f".*{name}" for name in names or () if "." not in name]
        if patterns:
            quantization_config["llm_int8_skip_modules"] = list(dict.fromkeys([*names, *patterns]))

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """In `auto_map`, names the code that is saved with the config: references to another repository
        ("owner/name--module.Class") become local, and a class that the saved code lacks becomes that of this code."""
        own = self._complete_auto_map({})

        def localised(name, reference):
            local = reference.split("--")[-1] if isinstance(reference, str) else None
            if local is not None and _is_saved(local, save_directory):
                return local
            return own.get(name, reference)

        self.auto_map = {name: localised(name, reference) for name, reference in self.auto_map.items()}
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _sub_config(self, name: str, value) -> PretrainedConfig:
        if value is None:
            value = {}
        if isinstance(value, dict):
            return self.sub_configs[name](**value)  # the class copies
        # Compares names and not classes: remote code may pass the same class from another copy of this module.
        _require(
            getattr(value, "model_type", None) == self.sub_configs[name].model_type,
            f"`{name}`",
            type(value).__name__,
            f"a dict or a {self.sub_configs[name].__name__}",
        )
        return copy.deepcopy(value)

    def _check(self) -> None:
        _require(
            self.vision_config.out_hidden_size == self.text_config.hidden_size,
            "`vision_config.out_hidden_size`",
            self.vision_config.out_hidden_size,
            f"`text_config.hidden_size` = {self.text_config.hidden_size}",
        )
        ids = (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id)
        vocab_size = self.text_config.vocab_size
        _require(
            all(isinstance(i, int) and 0 <= i < vocab_size for i in ids) and len(set(ids)) == len(ids),
            "image, video, vision_start and vision_end token ids",
            ids,
            f"four different ids below vocab_size = {vocab_size}",
        )
        multiple = self.vision_seq_pad_multiple
        _require(
            isinstance(multiple, int) and multiple > 0, "`vision_seq_pad_multiple`", multiple, "a positive integer"
        )


# Makes `save_pretrained` write this class to `auto_map`, and copy the code to the folder.
MossVLConfig.register_for_auto_class()

__all__ = ["MossVLConfig", "MossVLTextConfig", "MossVLVisionConfig"]
