"""Settings of a processor's file that have no effect."""

import logging

from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


def test_an_unknown_setting_is_warned_of_once_and_dropped(caplog):
    """No warning for settings of this package or of transformers, nor for null."""
    logging.Logger.warning_once.cache_clear()
    settings = MossVLVideoProcessor(num_frames=5).to_dict()
    with caplog.at_level(logging.WARNING):
        made = MossVLVideoProcessor.from_dict(settings | {"do_pad": None})
        assert not [message for message in caplog.messages if "no effect" in message]
        made = MossVLVideoProcessor.from_dict(settings | {"made_up": 3, "other": "x"})
    assert made.num_frames == 5 and not hasattr(made, "made_up") and "made_up" not in made.to_dict()
    warnings = [message for message in caplog.messages if "no effect" in message]
    assert len(warnings) == 2 and "made_up=3" in warnings[0] and "other='x'" in warnings[1]
