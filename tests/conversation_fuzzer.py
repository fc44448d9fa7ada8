"""Random conversations on a cache, checked against the float64 model: chunks, padding anywhere, media early and late,
masks, forks, repeats, selections, reorders, crops, dropped frames, tokens that become padding, and joint calls of
forks. By hand, for many seeds: `python tests/conversation_fuzzer.py --seeds 0 5000`.

A conversation is a batch of rows over one cache. Whatever is done to it, the logits of every real token of a row must
be those that the oracle gives for the row's tokens, frames and visibility alone.
"""

import argparse
import copy
import random
import sys
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import DynamicCache, StaticCache


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oracle import Oracle
from tiny import IMAGE_PAD, PATCH, make_model

from moss_vl import vision_sequence
from moss_vl.cache_layers import cache_contents, drop_frames, fork_cache


V5 = int(transformers.__version__.split(".")[0]) >= 5
GRIDS = [(2, 2), (2, 4), (4, 2), (4, 4)]  # patches of a frame
TOLERANCE = 2e-5  # of the largest logit: float32 against float64
VISION_TOKENS = 4000  # space of a static cache, free space included
SLOTS = 96  # of a static cache


class Frame:
    """One frame: its pixels, and the vision tokens of the oracle."""

    def __init__(self, rng, oracle, grid):
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        self.pixels = torch.randn(grid[0] * grid[1], 3 * PATCH * PATCH, generator=generator)
        self.encoded = (oracle.encode(self.pixels, *grid), grid[0] // 2, grid[1] // 2)


class Row:
    """One row of the batch: its real tokens, its frames, the visible frames of each token, and the logits of the
    model."""

    def __init__(self):
        self.ids, self.at, self.visible, self.logits = [], [], [], []  # at: index in the cache
        self.frames, self.pads_at, self.waiting = [], [], []
        self.dropped = 0  # of `frames`
        self.sample = object()

    @property
    def last_visible(self) -> frozenset:
        return frozenset(frame for frame in self.visible[-1] if frame >= self.dropped) if self.visible else frozenset()

    @property
    def given(self) -> int:
        """Frames of the conversation, dropped and waiting ones included."""
        return len(self.frames) + len(self.waiting)

    def copy(self) -> "Row":
        other = copy.copy(self)
        for name in ("ids", "at", "visible", "logits", "frames", "pads_at", "waiting"):
            setattr(other, name, list(getattr(self, name)))
        return other


class Conversation:
    def __init__(self, rng, model, oracle, rows: int, static: bool):
        self.rng, self.model, self.oracle, self.static = rng, model, oracle, static
        self.rows = [Row() for _ in range(rows)]
        self.cache = DynamicCache()
        if static:
            config = model.config.text_config
            sizes = {"max_cache_len": SLOTS, "config": config}
            self.cache = rng.choice([lambda: StaticCache(**sizes), lambda: model.static_cache(SLOTS, VISION_TOKENS)])()
        self.mask = torch.zeros(rows, 0, dtype=torch.long)
        self.calls = []  # (end, whether frames came with it)
        self.had_blank = False  # a blank medium may be an image of zeros whose `image_pad` comes later

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    # one call

    def call(self):
        rng = self.rng
        length = rng.choice([1, 1, 2, 3, 5])
        real = [self.pattern(length) for _ in self.rows]
        if not any(any(row) for row in real):
            real[0] = [True] * length
        of_sample = {}
        for index, row in enumerate(self.rows):
            of_sample.setdefault(row.sample, []).append(index)
        new, ids, pads = {}, [None] * len(self.rows), [None] * len(self.rows)
        with_media = rng.random() < 0.5
        for sample, indices in of_sample.items():
            first = self.rows[indices[0]]
            twins = all((self.rows[i].ids, self.rows[i].at) == (first.ids, first.at) for i in indices)
            new[sample] = []
            if with_media and twins and rng.random() < 0.7:
                for _ in range(rng.choice([1, 1, 2])):
                    grid = rng.choice(GRIDS)
                    new[sample].append([Frame(rng, self.oracle, grid) for _ in range(rng.choice([1, 1, 2]))])
            frames = [*first.waiting, *(frame for medium in new[sample] for frame in medium)]
            for i in indices:
                if twins and frames:
                    real[i] = real[indices[0]]
                if i == indices[0] or not (twins and frames):
                    tokens = [at for at, is_real in enumerate(real[i]) if is_real]
                    count = rng.randint(0, min(len(frames), len(tokens))) if twins else 0
                    if rng.random() < 0.6:
                        count = min(len(frames), len(tokens)) if twins else 0
                    pads[i] = sorted(rng.sample(tokens, count))
                    ids[i] = [IMAGE_PAD if at in pads[i] else rng.randint(1, 180) for at in range(length)]
                else:
                    pads[i], ids[i] = pads[indices[0]], list(ids[indices[0]])
        media, medium_counts = self.media(of_sample, new, pads)
        waits = any(row.waiting for row in self.rows)
        self.had_blank |= any(
            count and not new[sample]
            for sample, count in zip(of_sample, media.get("media_nums_per_sample", ()), strict=False)
        )
        if length == 1 and self.length and not media and not waits and not self.had_blank and rng.random() < 0.2:
            ids = [[IMAGE_PAD]] * len(self.rows)  # written tokens are text, whatever their ids
        inputs = {"input_ids": torch.tensor(ids), **media}
        self.mask = torch.cat([self.mask, torch.tensor(real).long()], dim=1)
        if not self.mask.all() or rng.random() < 0.3:
            inputs["attention_mask"] = self.mask
        for sample, indices in of_sample.items():
            frames = [frame for medium in new[sample] for frame in medium]
            for i in indices:
                self.rows[i].waiting += frames
        before = [row.given - sum(map(len, new[row.sample])) for row in self.rows]  # frames known before
        visible_frames = self.read_text(ids, real, pads)
        cross_mask = (
            self.cross_mask(real, visible_frames, before, medium_counts if media else None)
            if rng.random() < 0.3
            else None
        )
        if cross_mask is not None:
            inputs["cross_attention_mask"] = cross_mask
        out = self.model(**inputs, past_key_values=self.cache, use_cache=True)
        for i, row in enumerate(self.rows):
            row.logits += [out.logits[i, at] for at in range(length) if real[i][at]]
            row.visible += [visible_frames[i][at] for at in range(length) if real[i][at]]
        self.calls.append((self.length, any(new.values())))

    def pattern(self, length: int) -> list[bool]:
        kind = self.rng.random()
        if kind < 0.6:
            return [True] * length
        cut = self.rng.randint(0, length)
        if kind < 0.75:
            return [at >= cut for at in range(length)]
        if kind < 0.9:
            return [at < cut for at in range(length)]
        return [self.rng.random() < 0.6 for _ in range(length)]

    def media(self, of_sample, new, pads):
        """The call's media, and the number of frame columns of a processor's mask."""
        pixels, grids, counts, medium_counts = [], [], [], []
        blanks = self.rng.random() < 0.5
        for sample, indices in of_sample.items():
            media = new[sample]
            for medium in media:
                pixels += [frame.pixels for frame in medium]
                grids.append([len(medium), medium[0].encoded[1] * 2, medium[0].encoded[2] * 2])
            # A medium of zeros is blank if the text pads_at no frame.
            blank = not media and blanks and not pads[indices[0]] and any(new.values())
            if blank:
                pixels.append(torch.zeros(16, 3 * PATCH * PATCH))
                grids.append([1, 4, 4])
            counts.append(len(media) + blank)
            medium_counts.append(sum(map(len, media)) + blank)
        if not grids or not any(new.values()):
            return {}, medium_counts
        for media in new.values():  # frames of a medium share its size
            for medium in media:
                assert len({frame.encoded[1:] for frame in medium}) == 1
        return {
            "pixel_values": torch.cat(pixels),
            "grid_thw": torch.tensor(grids),
            "media_nums_per_sample": counts,
        }, medium_counts

    def read_text(self, ids, real, pads):
        """Appends the tokens; returns the visible frames of each token of the call without a mask."""
        start, out = self.length - len(ids[0]), []
        for row, tokens, is_real, columns in zip(self.rows, ids, real, pads, strict=True):
            frames, of_row = row.last_visible, []
            for at, token in enumerate(tokens):
                if not is_real[at]:
                    of_row.append(frozenset())
                    continue
                if at in columns:
                    row.pads_at.append(len(row.ids))
                    frames = frames | {len(row.frames)}
                    row.frames.append(row.waiting.pop(0))
                row.ids.append(token)
                row.at.append(start + at)
                of_row.append(frames)
            out.append(of_row)
        return out

    def cross_mask(self, real, visible_frames, before, medium_counts):
        """A random mask; changes `visible_frames` to what it leaves visible. None if the drawn form would be read as
        another."""
        rng, length = self.rng, len(real[0])
        start = self.length - length
        total, history = (
            max(1, 1, *counts)
            for counts in ((row.given - row.dropped for row in self.rows), (row.given for row in self.rows))
        )
        new_frames = max(1, *medium_counts, 1) if medium_counts is not None else None
        form = rng.choice(["new", "all", "whole"])
        rows = rng.choice([length, length, rng.randint(0, length)])
        if form == "new" and new_frames is None:
            return None
        if form == "all" and start and new_frames == total:  # such a mask is one over the new frames
            return None
        if form == "whole" and start and start + rows <= length:  # such a mask is one for the tokens of the call
            return None
        of_new = form == "new" and start
        first_row = start if form == "whole" else 0
        columns = new_frames if of_new else total
        # Columns may also count the frames that were dropped, if that is clear from their number.
        counts_dropped = not of_new and history != total and rng.random() < 0.5
        if counts_dropped and not (form == "all" and start and new_frames == history):
            columns = history
        else:
            counts_dropped = False
        mask, by_text = (
            torch.ones(len(self.rows), 1, first_row + rows, columns, dtype=torch.bool),
            [list(row) for row in visible_frames],
        )
        for i, row in enumerate(self.rows):
            first = before[i] if of_new else row.dropped  # number of the first frame of the mask
            column = 0 if counts_dropped else first  # number of the frame of its first column
            if counts_dropped:
                mask[i, 0, :, :first] = rng.random() < 0.5  # without effect
            previous = row.last_visible
            for at in range(length):
                if not real[i][at]:
                    continue
                placed = {f for f, pad in enumerate(row.pads_at) if row.at[pad] <= start + at and f >= row.dropped}
                if at < rows:
                    allowed = {f for f in placed if f >= first}
                    visible = {f for f in allowed if rng.random() < 0.7}
                    kept = {f for f in visible_frames[i][at] if f < first}
                    for f in visible:
                        mask[i, 0, first_row + at, f - column] = False
                    visible_frames[i][at] = frozenset(visible | kept)
                else:
                    late = {f for f in placed if row.at[row.pads_at[f]] >= start + rows}
                    visible_frames[i][at] = frozenset(previous | late)
                previous = visible_frames[i][at]
            # A mask that ends early and makes frames visible one after the other, in the end all, is read as a
            # processor's mask of other padding.
            count = row.given - first
            shown = ~mask[i, 0, first_row:, first - column :]
            visible = [[f for f in range(min(count, shown.shape[1])) if shown[at, f]] for at in range(rows)]
            while visible and not visible[-1]:
                visible.pop()
            visible = visible[next((at for at, frames in enumerate(visible) if frames), 0) :]
            rises = (
                visible
                and visible[-1] == list(range(count))
                and all(
                    frames == list(range(len(frames))) and len(frames) - len(last) in (0, 1)
                    for last, frames in zip([[], *visible], visible, strict=False)
                )
            )
            if rows < length and (form == "new" or not start) and (rises or not count):
                visible_frames[i] = by_text[i]
        return mask

    # a token of a joint call

    def can_write(self) -> bool:
        """Whether the conversation can take part in a joint call: one row without padding."""
        return len(self.rows) == 1 and bool(self.length and self.mask.all())

    def write(self, token: int, logits: torch.Tensor) -> None:
        """Notes a token that a joint call has added to the cache. Whatever its id, it places no frame."""
        [row] = self.rows
        row.visible.append(row.last_visible)
        row.ids.append(token)
        row.at.append(self.length)
        row.logits.append(logits)
        self.mask = torch.cat([self.mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
        self.calls.append((self.length, False))

    # operations on the cache

    def repeat(self):
        if len(self.rows) <= 2:
            self.cache.batch_repeat_interleave(2)
            self.take([i for i in range(len(self.rows)) for _ in range(2)])

    def select(self):
        if self.rng.random() < 0.5:
            keep = [self.rng.random() < 0.7 for _ in self.rows]
            keep[self.rng.randrange(len(keep))] = True
            self.cache.batch_select_indices(torch.tensor(keep))
            self.take([i for i, kept in enumerate(keep) if kept])
        else:
            rows = [self.rng.randrange(len(self.rows)) for _ in range(self.rng.randint(1, 3))]
            self.cache.batch_select_indices(torch.tensor(rows))
            self.take(rows)

    def reorder(self):
        rows = (
            [self.rng.randrange(len(self.rows)) for _ in self.rows]
            if self.rng.random() < 0.5
            else self.rng.sample(range(len(self.rows)), len(self.rows))
        )
        self.cache.reorder_cache(torch.tensor(rows))
        self.take(rows)

    def take(self, rows):
        self.rows, self.mask = [self.rows[i].copy() for i in rows], self.mask[rows]

    def crop(self):
        length = self.rng.randint(max(1, self.length - 6), self.length)
        self.cache.crop(length - self.length if V5 or (self.rng.random() < 0.5 and length < self.length) else length)
        whole = not any(end > length and gave for end, gave in self.calls)
        whole = whole and not any(row.at[pad] >= length for row in self.rows for pad in row.pads_at)
        for row in self.rows:
            kept = sum(at < length for at in row.at)
            row.ids, row.at, row.visible, row.logits = (
                row.ids[:kept],
                row.at[:kept],
                row.visible[:kept],
                row.logits[:kept],
            )
            row.pads_at = [pad for pad in row.pads_at if pad < kept]
            row.frames = row.frames[: len(row.pads_at)]
            row.dropped = min(row.dropped, len(row.frames))
            row.waiting = row.waiting if whole else []
        self.mask = self.mask[:, :length]
        self.calls = [(min(end, length), gave) for end, gave in self.calls]

    def take_back(self):
        """From now on the last tokens of a row are padding in the mask, as of an ended row: the row continues without
        them."""
        index = self.rng.randrange(len(self.rows))
        row, count = self.rows[index], self.rng.randint(1, 2)
        if (
            len(row.ids) > count
            and not any(pad >= len(row.ids) - count for pad in row.pads_at)
            and len(set(row.visible[-count - 1 :])) == 1
        ):
            self.mask[index, row.at[-count:]] = 0
            for name in ("ids", "at", "visible", "logits"):
                setattr(row, name, getattr(row, name)[:-count])

    def drop(self):
        """Drops the oldest frames of each sample."""
        samples = list(dict.fromkeys(row.sample for row in self.rows))
        counts = []
        for sample in samples:
            rows = [row for row in self.rows if row.sample is sample]
            counts.append(self.rng.randint(0, len(rows[0].frames) - rows[0].dropped))
            for row in rows:
                row.dropped += counts[-1]
        equal = len(set(counts)) == 1 and self.rng.random() < 0.5
        drop_frames(self.cache, self.model.config.text_config, counts[0] if equal else counts)
        contents = cache_contents(self.cache, self.model.config.text_config)
        first_rows = [next(row for row in self.rows if row.sample is sample) for sample in samples]
        assert contents.frames == [len(row.frames) - row.dropped for row in first_rows]
        assert contents.waiting == [len(row.waiting) for row in first_rows]
        assert contents.dropped == [row.dropped for row in first_rows]

    def fork(self) -> "Conversation":
        other = copy.copy(self)
        other.rows, other.calls, other.mask = [row.copy() for row in self.rows], list(self.calls), self.mask.clone()
        other.cache = copy.deepcopy(self.cache) if self.rng.random() < 0.3 else fork_cache(self.cache)
        if self.rng.random() < 0.5:  # the copy continues as this conversation
            self.cache, other.cache = other.cache, self.cache
        return other

    def check(self, where: str):
        for index, row in enumerate(self.rows):
            if not row.ids:
                continue
            expected = self.oracle.logits(row.ids, [frame.encoded for frame in row.frames], row.pads_at, row.visible)
            got = torch.stack(row.logits).double()
            error = (got - expected).abs().amax(-1) / expected.abs().max()
            worst = int(error.argmax())
            assert error[worst] < TOLERANCE, (
                f"{where}: row {index} is off by {error[worst]:.2g} at token {worst} of {len(row.ids)} (cache index "
                f"{row.at[worst]}, visible frames {sorted(row.visible[worst])}, frames at {row.pads_at})"
            )


def write_together(rng, talks: list[Conversation]) -> None:
    """A token in each of these conversations, in one call."""
    tokens = [IMAGE_PAD if rng.random() < 0.1 else rng.randint(1, 180) for _ in talks]
    logits = talks[0].model.decode_rows(tokens, [talk.cache for talk in talks])
    for talk, token, of_row in zip(talks, tokens, logits, strict=True):
        talk.write(token, of_row)


@torch.no_grad()
def converse(seed: int, model, oracle) -> int:
    """One random conversation and its forks. Returns the number of operations; AssertionError, with the seed, if
    logits are wrong."""
    rng = random.Random(seed)
    with mock.patch.object(vision_sequence, "VISION_BUFFER", rng.choice([2, 8, 256])):  # with few, frames move often
        return converse_with(rng, seed, model, oracle)


def converse_with(rng, seed: int, model, oracle) -> int:
    static = rng.random() < 0.15
    branches = [Conversation(rng, model, oracle, rng.choice([1, 2, 2, 3]), static)]
    branches[0].call()
    done = ["call"]
    for _ in range(rng.randint(3, 9)):
        at = rng.randrange(len(branches))
        talk = branches[at]
        names = (
            ["call"] * 7
            + ["reorder", "fork", "take_back", "drop", "drop"]
            + ([] if static else ["repeat", "select", "crop", "crop"])
        )
        name = rng.choice(names)
        if talk.length > SLOTS - 8:
            break
        done.append(f"{name}[{at}]")
        try:
            result = getattr(talk, name)()
            writing = [talk for talk in branches if talk.can_write() and talk.length < SLOTS - 8]
            if writing and rng.random() < 0.4:
                done.append(f"write{[branches.index(talk) for talk in writing]}")
                write_together(rng, writing)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__} {error} after {' '.join(done)}") from error
        if name == "fork" and len(branches) < 3:
            branches.append(result)
    for at, talk in enumerate(branches):
        talk.check(f"seed {seed}, branch {at}, {model.config._attn_implementation}, {' '.join(done)}")
    return len(done)


def make_pair(attn_implementation: str):
    """A model small enough for many conversations, and its oracle. Cross-attention is the second and the last but one
    layer."""
    text = {
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }
    model = make_model(attn_implementation, text=text, vision=vision)
    return model, Oracle(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 200), metavar=("FIRST", "END"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs, wrong = [make_pair(name) for name in ("eager", "sdpa")], 0
    for seed in range(*args.seeds):
        try:
            converse(seed, *pairs[seed % 2])
        except AssertionError as error:
            wrong += 1
            print(error)
    print(f"transformers {transformers.__version__}: {args.seeds[1] - args.seeds[0]} conversations, {wrong} wrong")
    sys.exit(wrong > 0)
