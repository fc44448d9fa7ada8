"""Random scenes of the drawn world that several test files check."""

import math
import random

from moss_vl.training.nano.world import random_clip, random_picture


PICTURES = [random_picture(random.Random(f"picture {i}")) for i in range(300)]
CLIPS = [random_clip(random.Random(f"clip {i}")) for i in range(200)]
MORE_CLIPS = [random_clip(random.Random(f"more {i}")) for i in range(1000)]
MOVING = [clip for clip in MORE_CLIPS if any(thing.moves is not None for thing in clip.things)][:200]


def starts_of(thing) -> list[float]:
    """Times at which an event of the thing begins."""
    starts = [
        thing.appears,
        thing.disappears,
        *(event[0] for event in (thing.changes, thing.moves) if event is not None),
    ]
    return [start for start in starts if 0 < start < math.inf]
