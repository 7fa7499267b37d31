"""Image processors from a file: one that would fill the memory, or makes no pixels, is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny

from pgp_hf.inference.backbone import load_processor


def saved(folder: Path, **changes: Any) -> Any:
    tiny.processor().save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return SimpleNamespace(folder=folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"height": 4096, "width": 1}},
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}, "do_center_crop": True},
        {"do_resize": False, "size": {"height": 9000, "width": 9000}},
        {"do_center_crop": False, "crop_size": {"height": 9000, "width": 9000}},
        {"do_normalize": False, "image_std": [0, 0, 0]},
    ],
    ids=str,
)
def test_sound_settings_are_accepted(tmp_path, changes):
    assert load_processor(saved(tmp_path, **changes), None, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_std": [0, 0, 0]}, r"not finite of an image: .*image_std=\(0, 0, 0\)"),
        ({"image_std": [0.5, 1e-300, 0.5]}, "not finite of an image"),
        ({"image_mean": [1e300, 0, 0]}, "not finite of an image"),
        ({"rescale_factor": 1e308}, "not finite of an image"),
        ({"rescale_factor": "a"}, ""),
        ({"image_mean": [0.5]}, "3 elements"),
        ({"resample": 99}, "resampling filter"),
        ({"size": 20000}, "size has height=20000: expected a whole number of pixels from 1 to 4096"),
        ({"size": {"height": 20, "width": 10**9}}, "size has width=1000000000"),
        ({"size": {"shortest_edge": 10**9}}, "size has shortest_edge=1000000000"),
        ({"size": {"height": 0, "width": 20}}, "size has height=0"),
        ({"size": {"height": -20, "width": 20}}, "size has height=-20"),
        ({"size": {"height": 2.5, "width": 20}}, "size has height=2.5"),
        ({"size": "x"}, "size"),
        ({"crop_size": {"height": 10**6, "width": 3}, "do_center_crop": True}, "crop_size has height=1000000"),
    ],
    ids=str,
)
def test_others_are_refused(tmp_path, changes, message):
    with np.errstate(all="raise"), pytest.raises(ValueError, match=rf"preprocessor_config.json \(.*{message}"):
        load_processor(saved(tmp_path, **changes), None, {})
