"""A short run of the fuzzer of media files."""

import fuzz_media


def test_damaged_files_end_in_frames_or_a_named_error():
    counts, bad = fuzz_media.run(files=100, seed=1, backend="pyav", limit=20.0)
    assert sum(counts.values()) >= 20
    assert [entry for entry in bad if entry[1] != "silent"] == []


def test_undamaged_seeds_give_frames(tmp_path):
    seeds = fuzz_media.make_seeds(tmp_path)
    assert len(seeds) >= 40
    outcomes = {name: fuzz_media.run_one(str(tmp_path / name), "pyav") for name in seeds}
    assert {name: outcome for name, outcome in outcomes.items() if outcome[0] != "ok"} == {}
