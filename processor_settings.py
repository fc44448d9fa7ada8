"""Settings of the image and the video processor: what their JSON files, constructors and `from_pretrained` accept.

A setting is an option (options.py) that a processor stores. Both processors read settings with these functions.
"""

from collections.abc import Iterable

from transformers.utils import logging

from .checks import positive_int
from .options import FIXED, canonical, drop_fixed, read_options, reject_unknown
from .resizing import EDGES, SIZE_NAMES


logger = logging.get_logger(__name__)

# Keywords of `from_pretrained` that transformers uses itself.
LOADING_KEYS = {"return_unused_kwargs", "use_fast", "backend", "trust_remote_code", "code_revision"}
# Keywords that say where the files of a checkpoint are. transformers 4.57 also passes them to `from_dict`, which has
# no use for them.
HUB_KEYS = {
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
    "resume_download",
    "use_auth_token",
    "_from_auto",
    "_from_pipeline",
}
# Keys that transformers writes into a processor's file.
SERVICE_KEYS = {
    "auto_map",
    "image_processor_type",
    "video_processor_type",
    "processor_class",
    "feature_extractor_type",
}


def known_settings(file: dict, cls: type) -> dict:
    """The settings in a processor's file under the names of options.py; pixel limits keep their names for
    `merge_settings`.

    Drops two kinds of keys with a warning: keys that `cls` does not know, and other names of an option that disagree
    with its main name in the same file.
    """
    settings, options = {}, {}
    for name, value in file.items():
        if name in SIZE_NAMES or name in FIXED or is_service_key(name):
            settings[name] = value
        elif name in cls.stored_names:
            main = file.get(canonical(name))
            if value is not None and main is not None and value != main:
                logger.warning_once(
                    f"{cls.__name__}: {name}={value!r} has no effect, since {canonical(name)}={main!r} is there too"
                )
            else:
                options[name] = value
        elif value is not None:
            logger.warning_once(f"{cls.__name__}: {name}={value!r} has no effect")
    return {**settings, **read_options(options, cls.stored_names, cls.__name__)}


def split_keywords(kwargs: dict, cls: type) -> tuple[dict, dict]:
    """Splits the keyword arguments of a processor's `from_dict` into (those for transformers, settings under the names
    of options.py).

    A pipeline also passes keywords for the model: these are dropped.

    Raises:
        ValueError: for a keyword that neither accepts.
    """
    kwargs = drop_fixed(kwargs, cls.__name__)
    settings = {name: kwargs.pop(name) for name in cls.option_names if name in kwargs}
    require_settings(settings, cls.setting_names, cls.__name__)
    unknown = [name for name in kwargs if name not in LOADING_KEYS | HUB_KEYS and name[:1] != "_"]
    if kwargs.get("_from_pipeline") is not None:
        kwargs = {name: value for name, value in kwargs.items() if name not in unknown}
    elif not kwargs.get("return_unused_kwargs"):
        reject_unknown(unknown, cls.setting_names, cls.__name__)
    return kwargs, read_options(settings, cls.setting_names, cls.__name__)


def merge_settings(settings: dict, given: dict) -> dict:
    """Settings of a file, overridden by given ones. A given pixel limit replaces the other names of the limit."""
    given = {name: value for name, value in given.items() if value is not None}
    size, given_size = dict(settings.get("size") or {}), dict(given.pop("size", None) or {})
    merged = dict(settings)
    for edge, alias in EDGES.items():
        if {edge, alias} & given.keys() or edge in given_size:
            for names in (size, merged):
                names.pop(edge, None)
                names.pop(alias, None)
    return {**merged, "size": {**size, **given_size}, **given}


def require_settings(options: dict, setting_names: Iterable[str], what: str) -> None:
    """Raises ValueError for an option that only a call takes and that a processor does not store."""
    for name, value in options.items():
        if value is not None and name not in setting_names:
            raise ValueError(f"{what}: {name} is an option of a call, not a setting; pass it to the call")


def is_service_key(name: str) -> bool:
    return name in SERVICE_KEYS or name[:1] == "_"


def fixed_step(name: str) -> property:
    """An attribute for a step of preprocessing that is always (or never) done. Other software reads it. Writing
    another value raises ValueError."""

    def get(processor):
        return FIXED[name]

    def put(processor, value):
        drop_fixed({name: value}, type(processor).__name__)

    return property(get, put)


class FixedSteps:
    """The attributes of an image or video processor that cannot be changed."""

    do_resize = fixed_step("do_resize")
    do_rescale = fixed_step("do_rescale")
    do_normalize = fixed_step("do_normalize")
    do_convert_rgb = fixed_step("do_convert_rgb")
    do_center_crop = fixed_step("do_center_crop")
    do_pad = fixed_step("do_pad")
    resample = fixed_step("resample")
    rescale_factor = fixed_step("rescale_factor")


def size_edge(edge: str) -> property:
    """The attribute `min_pixels` or `max_pixels` of a processor, which reads and writes a key of its `size`.

    Writing replaces the dict, which a caller may share.
    """

    def get(processor) -> int:
        return processor.size[edge]

    def put(processor, value):
        processor.size = {**processor.size, edge: positive_int(edge, value)}

    return property(get, put)
