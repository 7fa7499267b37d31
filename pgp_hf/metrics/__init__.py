"""Compute the metrics of continual learning from an accuracy matrix, with numpy alone.

The same numbers come in two ways: from the plain functions below, and from `evaluate` modules, one in each folder,
which load offline:

```python
from pgp_hf import metrics

matrix = [[90.0, None], [80.0, 95.0]]  # matrix[i][j] = accuracy on task j after training task i
metrics.forgetting(matrix)  # 10.0
metrics.load("forgetting").compute(accuracy_matrix=matrix)  # {"forgetting": 10.0}
```

The folders hold scripts for `evaluate`, not Python packages: importing `pgp_hf.metrics.forgetting.forgetting` would
replace the function of that name with a module. Use [`load`].
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._formulas import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forgetting_clipped,
    forward_transfer,
    learning_accuracy,
    per_task_average_accuracy,
    summarize,
)

if TYPE_CHECKING:
    import evaluate

__all__ = [
    "NAMES",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forgetting_clipped",
    "forward_transfer",
    "learning_accuracy",
    "load",
    "per_task_average_accuracy",
    "summarize",
]

NAMES = (
    "average_accuracy",
    "forgetting",
    "forgetting_clipped",
    "backward_transfer",
    "forward_transfer",
    "learning_accuracy",
)
"""Names of the metrics that come as `evaluate` modules."""


def load(name: str, **kwargs: Any) -> evaluate.EvaluationModule:
    """Load a packaged metric as an `evaluate` module, without a network.

    Args:
        name: one of [`NAMES`].
        **kwargs: passed to `evaluate.load`, for instance `keep_in_memory=True` or `experiment_id="..."`.

    Returns:
        The module; `module.compute(accuracy_matrix=matrix)` returns `{name: value}`. `forward_transfer` takes
        `baseline=` as well.

    Raises:
        ValueError: `name` is not a packaged metric.
    """
    if name not in NAMES:
        raise ValueError(f"Unknown metric {name!r}; the packaged metrics are {', '.join(NAMES)}.")
    import evaluate  # slow, and the plain functions do not need it

    return evaluate.load(str(Path(__file__).parent / name), **kwargs)
