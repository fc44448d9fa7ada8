"""Image processor: images of one sample to patches.

Axes: h rows, w columns, p patch size, t temporal patch size, P patches. The steps are in docs/processing.md.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .checks import flag, positive_int, shorten, tensor_format, three_floats
from .conversation import SOURCE_KEYS, read_medium
from .downloads import download  # noqa: F401 - transformers 4.57 copies only the files that this file imports itself
from .image_files import open_image  # noqa: F401
from .image_reading import MAX_SOURCE_PIXELS, ProbedImage, probe_image, split_array
from .options import drop_fixed, layered, names_of, read_options, reject_unknown
from .patches import join_patches, patchify
from .processor_settings import (
    FixedSteps,
    is_service_key,
    known_settings,
    merge_settings,
    require_settings,
    size_edge,
    split_keywords,
)
from .resizing import ANY_SIZE, DEFAULT_SIZE, fit_size, pixel_limits, read_fixed_size, resize_rows
from .signatures import image_kind  # noqa: F401
from .threads import in_threads


IMAGE_THREADS = 4  # upper limit of threads that decode and resize the images of a sample


@dataclass(frozen=True)
class ImageOptions:
    """The options that hold for a call or for one image, checked and complete."""

    min_pixels: int
    max_pixels: int
    multi_image_max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    fixed_size: tuple[int, int] | None  # (h, w) after the resize
    allow_http: bool
    allow_private_hosts: bool
    max_source_pixels: int

    @property
    def factor(self) -> int:
        return self.patch_size * self.merge_size

    def fit(self, height: int, width: int, max_pixels: float) -> tuple[int, int]:
        """(h, w) after the resize of an image whose share of the sample's pixels is `max_pixels`."""
        max_pixels = min(max(max_pixels, self.min_pixels), self.max_pixels)
        return self.fixed_size or fit_size(height, width, self.factor, self.min_pixels, max_pixels)


class MossVLImageProcessor(FixedSteps, BaseImageProcessor):
    """Images of one sample -> patches.

    The options of a call are the options for images in options.py. The arguments are settings; each is also an option
    of a call:
        size: {"shortest_edge", "longest_edge"}, the minimum and maximum number of *pixels* of a resized image. Also
            accepted: `min_pixels` or `shortest_edge`, and `max_pixels` or `longest_edge`.
        multi_image_max_pixels: maximum pixels of all images of a sample, shared in proportion to their areas.
        patch_size, temporal_patch_size, merge_size: as in the model; sides become multiples of patch_size *
            merge_size.
        image_mean, image_std: three numbers each, for pixel values scaled to 0..1.
        allow_http: True allows downloads from http(s) URLs.
        allow_private_hosts: True allows downloads from private, loopback, link-local and reserved addresses too.
        max_source_pixels: maximum pixels of an image before the resize, and of the images of a sample that are
            decoded at once; two thirds of it for one image with a palette or transparency, a third for a
            WebP or JPEG 2000.

    The last three are not saved, and ignored in a file: a downloaded checkpoint must not decide them.
    """

    _auto_class = "AutoImageProcessor"  # save_pretrained copies the code
    model_input_names = ["pixel_values", "image_grid_thw"]
    option_names = names_of("image")
    stored_names = names_of("image", stored=True)
    setting_names = (*stored_names, *names_of("image", trusted=True))

    def __init__(
        self,
        size=None,
        multi_image_max_pixels=201326592,
        patch_size=16,
        temporal_patch_size=1,
        merge_size=2,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        min_pixels=None,
        max_pixels=None,
        shortest_edge=None,
        longest_edge=None,
        allow_http=None,
        allow_private_hosts=None,
        max_source_pixels=MAX_SOURCE_PIXELS,
        **kwargs,
    ):
        class_name = type(self).__name__
        kwargs = drop_fixed(kwargs, class_name)
        options = {name: value for name, value in kwargs.items() if name in self.option_names}
        require_settings(options, self.setting_names, class_name)
        given = [name for name, value in kwargs.items() if value is not None]  # transformers writes nulls
        reject_unknown([name for name in given if not is_service_key(name)], self.setting_names, class_name)
        super().__init__(**kwargs)
        low, high = pixel_limits(DEFAULT_SIZE, size, min_pixels, max_pixels, shortest_edge, longest_edge)
        self.size = {"shortest_edge": low, "longest_edge": high}
        self.multi_image_max_pixels = multi_image_max_pixels
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.image_mean = list(three_floats("image_mean", image_mean))
        self.image_std = list(three_floats("image_std", image_std))
        self.allow_http = flag("allow_http", allow_http)
        self.allow_private_hosts = flag("allow_private_hosts", allow_private_hosts)
        self.max_source_pixels = MAX_SOURCE_PIXELS if max_source_pixels is None else max_source_pixels
        self.resolve({})

    @classmethod
    def from_dict(cls, image_processor_dict, **kwargs):
        """Keyword arguments override settings of the file. Drops unknown keys of the file with a warning."""
        kwargs, given = split_keywords(kwargs, cls)
        return super().from_dict(merge_settings(known_settings(image_processor_dict, cls), given), **kwargs)

    def to_dict(self):
        trusted = names_of("image", trusted=True)
        return {name: value for name, value in super().to_dict().items() if name not in trusted}

    min_pixels, max_pixels = size_edge("shortest_edge"), size_edge("longest_edge")

    def resolve(self, options: dict, used: bool = True) -> ImageOptions:
        """The options of a call, completed with the settings of the processor; None means not given. Raises
        ValueError.

        `used` is False for a call without images: its pixel limits may be meant for videos, and are not checked
        against the settings.
        """
        class_name = type(self).__name__
        options = read_options(drop_fixed(options, class_name), self.option_names, class_name)

        def pick(name):
            return options.get(name, getattr(self, name, None))

        limits = {name: options.get(name) for name in ("size", "min_pixels", "max_pixels")}
        low, high = pixel_limits(self.size if used else ANY_SIZE, **limits)
        count_names = (
            "multi_image_max_pixels",
            "patch_size",
            "temporal_patch_size",
            "merge_size",
            "max_source_pixels",
        )
        counts = {name: positive_int(name, pick(name)) for name in count_names}
        return ImageOptions(
            low,
            high,
            **counts,
            **{name: three_floats(name, pick(name)) for name in ("image_mean", "image_std")},
            fixed_size=read_fixed_size(options, counts["patch_size"] * counts["merge_size"], class_name),
            allow_http=flag("allow_http", pick("allow_http")),
            allow_private_hosts=flag("allow_private_hosts", pick("allow_private_hosts")),
        )

    def check(self, images, **options) -> None:
        """Raises ValueError for wrong options of a call or of one image in the list `images`. Opens nothing."""
        self.resolve(options)
        for image in images:
            self.resolve(layered(options, read_medium("image", image)[1]))

    def probe(self, images, **options) -> list[ProbedImage]:
        """The images of one sample with their sizes and options checked, not decoded. `extract` takes the result.

        Raises what `probe_image` raises.
        """
        self.resolve(options)
        return [self._probe_one(image, options) for image in flat_images(images)]

    def _probe_one(self, image, options: dict) -> ProbedImage:
        if isinstance(image, ProbedImage):
            return image
        source, image_options = read_medium("image", image)
        if source is None:
            keys = " or ".join(SOURCE_KEYS["image"])
            raise ValueError(f"an image given as a dict holds its source under {keys}; got {shorten(image)}")
        resolved = self.resolve(layered(options, image_options))
        probed = probe_image(
            source,
            allow_http=resolved.allow_http,
            allow_private_hosts=resolved.allow_private_hosts,
            max_source_pixels=resolved.max_source_pixels,
        )
        return replace(probed, options=image_options) if image_options else probed

    def extract(self, images, **options) -> list[tuple[torch.Tensor, list[int]]]:
        """Per image of one sample: uint8 pixels [P, 3 * t * p * p], and the grid [1, patch rows, patch columns].

        Options of one image (see `read_medium`) hold for that image alone. They do not change the pixel shares of the
        other images.
        """
        probed = self.probe(images, **options)
        area = sum(image.height * image.width for image in probed)

        def extract_one(image: ProbedImage):
            return self._patches_of(image, self.resolve(layered(options, image.options)), area)

        # Memory allocators keep what a thread has freed, so that the largest images of all threads count together.
        # Images up to WHOLE_PIXELS are in memory twice, with four and with three bytes per pixel.
        budget = self.resolve(options).max_source_pixels * 4 / 7
        extracted = {i: extract_one(image) for i, image in enumerate(probed) if 2 * image.cost > budget}
        others = [i for i in range(len(probed)) if i not in extracted]
        if others:
            threads = int(budget // max(1, *(probed[i].cost for i in others)))
            threads = max(1, min(IMAGE_THREADS, torch.get_num_threads(), threads))
            extracted |= zip(others, in_threads(threads, extract_one, [probed[i] for i in others]), strict=True)
        return [extracted[i] for i in range(len(probed))]

    def _patches_of(self, image: ProbedImage, options: ImageOptions, area: int) -> tuple[torch.Tensor, list[int]]:
        """`area`: h * w of all images of the sample, before the resize."""

        def fit(height: int, width: int) -> tuple[int, int]:
            max_pixels = options.multi_image_max_pixels
            if "multi_image_max_pixels" not in image.options:
                max_pixels *= height * width / area
            return options.fit(height, width, max_pixels)

        rows = image.decode(fit)
        height, width = fit(*rows.full_size)
        frame = resize_rows(rows, height, width)[None]
        patches = patchify(frame, options.patch_size, options.merge_size, options.temporal_patch_size)
        return patches, [1, height // options.patch_size, width // options.patch_size]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs=None) -> int:
        """The patches of an image of `height` x `width` pixels that is alone in its sample.

        Servers call it by this name, with the options of a call as `images_kwargs`.
        """
        options = self.resolve(images_kwargs or {})
        height, width = options.fit(height, width, options.multi_image_max_pixels)
        return height // options.patch_size * (width // options.patch_size)

    def preprocess(self, images, return_tensors=None, do_normalize=None, **options) -> BatchFeature:
        """The images of one sample as `pixel_values` float32 [P, 3 * t * p * p] and `image_grid_thw` [images, 3].

        Args:
            images: one image or a list. An image is what `probe_image` takes, or a dict {"image": source, options of
                this image}.
            return_tensors: "pt", which is also the default, or "np".
            do_normalize: False returns uint8 `pixel_values`, with `image_mean` and `image_std`: lists of three numbers
                per image.
            **options: the options for images (options.py).
        """
        tensor_format(return_tensors)
        as_uint8 = wants_uint8(do_normalize)
        resolved = self.resolve(options)
        extracted = self.extract(images, **options)
        grids = torch.tensor([grid for _, grid in extracted])
        # `join_patches` frees each image once it is written; `extracted` must not keep it alive.
        parts = [(extracted.pop(0)[0], resolved.image_mean, resolved.image_std) for _ in range(len(extracted))]
        data = {**join_patches(parts, as_uint8), "image_grid_thw": grids}
        return BatchFeature({name: to_format(x, return_tensors) for name, x in data.items()})


class MossVLImageProcessorFast(MossVLImageProcessor):
    """MossVLImageProcessor under the name in released files."""

    def to_dict(self):
        """Saves the name without "Fast": transformers 4.57 requires torchvision for a name that ends in Fast.
        `auto_map` keeps this class."""
        return {**super().to_dict(), "image_processor_type": MossVLImageProcessor.__name__}


def flat_images(images) -> list:
    """One image, an array [n, h, w, channels], or nested lists -> a flat list. ValueError if it is empty."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = split_array(images)
    if not isinstance(images, (list, tuple)):
        images = [images]
    flat = [one for image in images for one in (flat_images(image) if isinstance(image, (list, tuple)) else [image])]
    if not flat:
        raise ValueError("no image given; expected at least one")
    return flat


def wants_uint8(do_normalize) -> bool:
    """Whether a call asks for uint8 pixels, which the model normalises on its device."""
    flag("do_normalize", do_normalize)
    return do_normalize is False


def to_format(value, return_tensors):
    """For "np" the numpy array that shares the memory of a tensor; every other value unchanged."""
    is_numpy = tensor_format(return_tensors) == "np"
    return value.numpy() if is_numpy and isinstance(value, torch.Tensor) else value


__all__ = ["MossVLImageProcessor", "MossVLImageProcessorFast"]
