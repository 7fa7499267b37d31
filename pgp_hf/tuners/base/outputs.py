"""Model outputs that carry the pull term."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from transformers.utils.generic import ModelOutput


@functools.cache
def _with_similarity(base: type[ModelOutput]) -> type[ModelOutput]:
    # distributed wrappers rebuild outputs by `type(output)(**fields)`: an additional field needs a real subclass
    namespace = {
        "__annotations__": {"prompt_similarity": torch.Tensor | None},
        "prompt_similarity": None,
        "__module__": __name__,
    }
    return dataclasses.dataclass(type(f"Prompted{base.__name__}", (base,), namespace))


def add_similarity(output: ModelOutput, similarity: torch.Tensor, **changes: Any) -> ModelOutput:
    """`output` with the field `prompt_similarity` `(B,)`: each image's summed cosine with its selected keys."""
    return _with_similarity(type(output))(**{**output, **changes, "prompt_similarity": similarity})
