"""The media of a call: pixels or features, the grid of each medium, and the sample that each medium belongs to.

Axes: P patches of all media, m merge size, D hidden size of the decoder.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple, Optional

import torch


class Grid(tuple):
    """`grid_thw` after it was checked: (frames, patch rows, patch columns) per medium."""

    @classmethod
    def read(cls, grid_thw, merge_size: int) -> "Grid":
        """Checks a tensor or nested list [media, 3]. A `Grid` was checked before and is returned unchanged.

        Raises:
            ValueError: for a row that is not (frames, patch rows, patch columns) of whole merge blocks.
        """
        if isinstance(grid_thw, Grid):
            return grid_thw
        rows = grid_thw.tolist() if isinstance(grid_thw, torch.Tensor) else [[int(n) for n in row] for row in grid_thw]
        for row in rows:
            if len(row) != 3 or min(row) < 1 or row[1] % merge_size or row[2] % merge_size:
                raise ValueError(
                    f"`grid_thw` has the row {row}; expected (frames, patch rows, patch columns), frames >= 1 and "
                    f"patch rows and columns that are positive multiples of the merge size {merge_size}."
                )
        return cls(tuple(row) for row in rows)

    def frames(self) -> int:
        return sum(t for t, _, _ in self)

    def patches(self) -> list[int]:
        """Patches of each medium."""
        return [t * h * w for t, h, w in self]


@dataclass(frozen=True)
class Media:
    """Images and videos, in the order of the text. Without pixels and features, only positions can be computed.

    Attributes:
        grid: (frames, patch rows, patch columns) per medium; empty if there are no media.
        merge_size: m of the vision config.
        per_sample: number of media per sample; None until `assign` counts them, if the caller did not pass it.
        pixel_values: [P, values], float, or uint8 with `image_mean` and `image_std`.
        image_features: [P / m^2, D], encoded media in place of their pixels.
        image_mean, image_std: three numbers per medium, to normalise uint8 pixels.
    """

    grid: Grid
    merge_size: int
    per_sample: Optional[list[int]] = None
    pixel_values: Optional[torch.Tensor] = None
    image_features: Optional[torch.Tensor] = None
    image_mean: Optional[list] = None
    image_std: Optional[list] = None

    def __len__(self) -> int:
        return len(self.grid)

    def assign(self, pads: list[int]) -> "Media":
        """These media with the number of media per sample, counted from the text if the caller did not pass it.

        Args:
            pads: `image_pad` tokens of each sample.

        Raises:
            ValueError: if the numbers do not fit the samples or the grid.
        """
        if not self:
            return replace(self, per_sample=[0] * len(pads))
        numbers = count_media(self.grid, pads) if self.per_sample is None else self.per_sample
        if len(numbers) != len(pads) or min(numbers) < 0 or sum(numbers) != len(self):
            raise ValueError(
                f"`media_nums_per_sample` is {self.per_sample}; expected {len(pads)} numbers, one per sample, that "
                f"sum to the {len(self)} media of `grid_thw`, for texts with {pads} `image_pad` tokens. Pass on all "
                "that the processor returned."
            )
        return replace(self, per_sample=numbers)

    def numbers(self) -> list[range]:
        """The indices of each sample's media."""
        return [range(first, end) for first, end in pairwise(accumulate(self.per_sample, initial=0))]

    def frames(self) -> list[list[tuple[int, int]]]:
        """Merged grid (H, W) of each frame, per sample."""
        m = self.merge_size
        return [
            [(h // m, w // m) for t, h, w in self.grid[numbers.start : numbers.stop] for _ in range(t)]
            for numbers in self.numbers()
        ]

    def take(self, numbers) -> "Media":
        """The media with these indices, as media of one sample."""
        patches = self.grid.patches()
        tokens = [count // self.merge_size**2 for count in patches]
        return replace(
            self,
            grid=Grid(self.grid[number] for number in numbers),
            per_sample=[len(numbers)],
            pixel_values=take_parts(self.pixel_values, patches, numbers),
            image_features=take_parts(self.image_features, tokens, numbers),
            image_mean=None if self.image_mean is None else [self.image_mean[number] for number in numbers],
            image_std=None if self.image_std is None else [self.image_std[number] for number in numbers],
        )

    def with_recalled(self, recalled: list[list["Media"]]) -> "Media":
        """These media, with each sample's `recalled` media (unplaced ones of earlier calls) before its new ones."""
        parts = []
        for earlier, numbers in zip(recalled, self.numbers(), strict=True):
            parts += [*earlier, self.take(numbers)] if numbers else earlier
        counts = [new + len(earlier) for new, earlier in zip(self.per_sample, recalled, strict=True)]
        return join_media(parts, counts)

    def is_zero(self) -> bool:
        """Whether a single medium has only zeros, as normalised pixels or as features."""
        values = self.image_features if self.pixel_values is None else self.pixel_values
        return not (
            values.any() or (self.image_mean is not None and any(number != 0 for number in self.image_mean[0]))
        )

    def has_form_of(self, other: "Media") -> bool:
        """Whether both have the same grid and the same kind of pixels or features."""
        return self.grid == other.grid and self.fields().keys() == other.fields().keys()

    def clone(self) -> "Media":
        """A copy whose tensors are copies, so that it does not keep the tensors of the whole call in memory."""
        copies = {name: values.clone() for name, values in self.fields().items() if isinstance(values, torch.Tensor)}
        return replace(self, **copies)

    def fields(self) -> dict:
        """Pixels or features and their statistics by name, without those that are None."""
        names = ("pixel_values", "image_features", "image_mean", "image_std")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def as_kwargs(self) -> dict:
        """These media as arguments of `MossVLForConditionalGeneration.forward`; empty if there are none."""
        counts = {} if self.per_sample is None else {"media_nums_per_sample": self.per_sample}
        return {**self.fields(), "grid_thw": self.grid, **counts} if self else {}


def read_media(
    config,
    pixel_values: Optional[torch.Tensor] = None,
    grid_thw=None,
    image_features=None,
    image_mean=None,
    image_std=None,
    media_nums_per_sample=None,
) -> Media:
    """Reads and checks the media of a call. Arguments as in `MossVLForConditionalGeneration.forward`; `config` is the
    vision config.

    Raises:
        ValueError: for shapes and dtypes that do not fit each other or the config.
    """
    features = getattr(image_features, "pooler_output", image_features)  # or the output of `get_image_features`
    merge_size = config.spatial_merge_size
    if grid_thw is None:
        if pixel_values is not None or features is not None:
            name = "pixel_values" if pixel_values is not None else "image_features"
            raise ValueError(
                f"`{name}` came without `grid_thw`; expected both, `grid_thw` as the processor returns it."
            )
        return Media(Grid(()), merge_size)
    if not len(grid_thw) and all(rows is None or not len(rows) for rows in (pixel_values, features)):
        return Media(Grid(()), merge_size)
    grid = Grid.read(grid_thw, merge_size)
    check_pixels(config, grid, pixel_values, image_mean, image_std)
    if features is not None:
        check_features(config, grid, features, pixel_values)
    per_sample = None
    if media_nums_per_sample is not None:  # pipelines make a list of lists
        listed = (row if isinstance(row, (list, tuple)) else [row] for row in media_nums_per_sample)
        per_sample = [int(number) for row in listed for number in row]
    return Media(grid, merge_size, per_sample, pixel_values, features, image_mean, image_std)


def check_pixels(config, grid: Grid, pixel_values: Optional[torch.Tensor], image_mean=None, image_std=None) -> None:
    """Refuses pixels that do not fit the grid or the vision config, and statistics that do not fit the pixels.

    Raises:
        ValueError: what does not fit.
    """
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches = sum(grid.patches())
    if not grid or (pixel_values is not None and tuple(pixel_values.shape) != (patches, width)):
        got = None if pixel_values is None else list(pixel_values.shape)
        raise ValueError(
            f"`pixel_values` has shape {got}; expected [{patches}, {width}]: one row per patch of `grid_thw` "
            f"({patches} patches), {width} values per patch of this model. Take both from one processor call."
        )
    is_uint8 = pixel_values is not None and pixel_values.dtype == torch.uint8
    for name, given in (("image_mean", image_mean), ("image_std", image_std)):
        shape = None if given is None else [len(given), *{len(row) for row in given}]
        if shape != ([len(grid), 3] if is_uint8 else None):
            expected = "none: `pixel_values` are not uint8"
            if is_uint8:
                expected = f"[{len(grid)}, 3]: `pixel_values` are uint8 pixels, which the model has to normalise"
            raise ValueError(
                f"`{name}` has shape {shape}; expected {expected}. Take all from one processor call with "
                f"do_normalize=False."
            )


def check_features(config, grid: Grid, features: torch.Tensor, pixel_values: Optional[torch.Tensor]) -> None:
    """Refuses encoded media that do not fit the grid, or are given together with pixels.

    Raises:
        ValueError: what does not fit.
    """
    tokens = sum(grid.patches()) // config.spatial_merge_size**2
    if pixel_values is not None:
        raise ValueError(
            "`image_features` and `pixel_values` were both given; expected one: encoded media, or their pixels."
        )
    if tuple(features.shape) != (tokens, config.out_hidden_size):
        raise ValueError(
            f"`image_features` has shape {list(features.shape)}; expected [{tokens}, {config.out_hidden_size}], what "
            f"`get_image_features` returns for media of this `grid_thw`."
        )


def count_media(grid: Grid, pads: list[int]) -> list[int]:
    """Number of media per sample: each sample takes as many frames as it has `image_pad` tokens. A sample without any
    takes a blank medium, if there is one for every such sample."""
    if len(pads) == 1:
        return [len(grid)]
    # Frames of a sample without `image_pad`: 1, if the frames suffice for a blank medium in every such sample.
    blank = int(grid.frames() == sum(pads) + pads.count(0))
    numbers, media = [], iter(grid)
    for count in pads:
        missing, number = count or blank, 0
        while missing > 0 and (medium := next(media, None)) is not None:
            missing, number = missing - medium[0], number + 1
        numbers.append(number)
    return numbers


def choose_grid(grid_thw, image_grid_thw):
    """The grid, under either of its two names.

    Raises:
        ValueError: if both names were used.
    """
    if grid_thw is not None and image_grid_thw is not None:
        raise ValueError("The grid was given twice, as `grid_thw` and as `image_grid_thw`; expected one of them.")
    return image_grid_thw if grid_thw is None else grid_thw


def take_parts(rows: Optional[torch.Tensor], sizes: list[int], numbers) -> Optional[torch.Tensor]:
    """Splits `rows` into parts of these sizes and joins those with the indices `numbers`; a view for one part."""
    if rows is None:
        return None
    parts = rows.split(sizes)
    return parts[numbers[0]] if len(numbers) == 1 else torch.cat([parts[number] for number in numbers])


def join_media(parts: list[Media], per_sample: list[int]) -> Media:
    """Joins media in their order.

    Raises:
        ValueError: if pixels, uint8 pixels and features are mixed.
    """
    names = parts[0].fields().keys()
    if any(part.fields().keys() != names for part in parts):
        raise ValueError(
            f"Media of one call are {[sorted(part.fields()) for part in parts]}; expected all as pixels of one kind, "
            "or all encoded."
        )
    joined = {}
    for name in names:
        values = [getattr(part, name) for part in parts]
        joined[name] = (
            torch.cat(values) if isinstance(values[0], torch.Tensor) else [row for rows in values for row in rows]
        )
    grid = Grid(row for part in parts for row in part.grid)
    return replace(parts[0], grid=grid, per_sample=per_sample, **joined)


class FrameGroup(NamedTuple):
    """`frames` consecutive frames that share a grid of `rows` x `columns` patches."""

    frames: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        return self.frames * self.rows * self.columns


def frame_groups(grid_thw: Iterable[Sequence[int]]) -> list[FrameGroup]:
    """[[t, h, w], ...] -> groups of consecutive frames with equal grids."""
    groups: list[FrameGroup] = []
    for t, h, w in grid_thw:
        if groups and groups[-1][1:] == (h, w):
            groups[-1] = groups[-1]._replace(frames=groups[-1].frames + t)
        else:
            groups.append(FrameGroup(t, h, w))
    return groups
