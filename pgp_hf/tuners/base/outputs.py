"""Add the similarity that the pull term is made of to a model's output."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from transformers.utils.generic import ModelOutput


@functools.cache
def _with_similarity(base: type[ModelOutput]) -> type[ModelOutput]:
    # a class with that field, since wrappers for distributed training rebuild an output by `type(output)(**fields)`:
    # a key that is merely set on the output would make them fail
    namespace = {
        "__annotations__": {"prompt_similarity": torch.Tensor | None},
        "prompt_similarity": None,
        "__module__": __name__,
    }
    return dataclasses.dataclass(type(f"Prompted{base.__name__}", (base,), namespace))


def add_similarity(output: ModelOutput, similarity: torch.Tensor, **changes: Any) -> ModelOutput:
    """Return a copy of an output with one more field.

    Args:
        output: of the model.
        similarity: the field `prompt_similarity`, `(B,)`: each image's summed cosine with its selected keys.
        changes: fields that get another value.
    """
    return _with_similarity(type(output))(**{**output, **changes, "prompt_similarity": similarity})
