"""A tokenizer for the tiny CLIP, which knows the class names of `tiny` and makes up the tokens of others."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence


def tokenizer(texts: Sequence[str]) -> dict[str, list[list[int]]]:
    """Return `input_ids` as CLIP's tokenizer does: "class 3" as in `tiny`, any other text by its words' sums."""
    return {"input_ids": [[38, *_words(text), 39] for text in texts]}


def _words(text: str) -> list[int]:
    if found := re.fullmatch(r"class (\d+)", text):
        number = int(found[1])
        return [token % 38 for token in range(number, number + 1 + number % 3)]
    return [zlib.crc32(word.encode()) % 38 for word in text.split()]
