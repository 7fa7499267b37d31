"""DINOv2, with and without registers: its head reads CLS and the mean of the patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .family import CLS, Family


class DINOFamily(Family):
    """A model whose positions fit any size of image, and which has no layer on top of CLS."""

    def set_positions(self, kwargs: dict[str, Any], interpolate: bool) -> None:
        kwargs.pop("interpolate_pos_encoding", None)  # it would reach the attention as an argument

    def pooled(self, backbone: Any, hidden: Tensor) -> Tensor:
        return hidden[:, 0]


_SHARED: dict[str, Any] = {
    "head_input": f"{CLS} and the mean of the patches",
    "layers": "encoder.layer",
    "norm": "norm1",
    "parts": 2,
}
DINOV2 = DINOFamily("DINOv2", ("Dinov2Model",), "Dinov2ForImageClassification", "facebook/dinov2-base", **_SHARED)
DINOV2_REGISTERS = DINOFamily(
    "DINOv2 with registers",
    ("Dinov2WithRegistersModel",),
    "Dinov2WithRegistersForImageClassification",
    "facebook/dinov2-with-registers-base",
    **_SHARED,
)
