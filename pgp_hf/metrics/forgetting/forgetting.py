"""Compute forgetting as an `evaluate` module; the formula is `pgp_hf.metrics.forgetting`."""

import datasets
import evaluate

from pgp_hf import metrics

DESCRIPTION = """
Mean drop from each earlier task's best accuracy so far, the current row excluded, to its accuracy now:
1/t * sum_{i < t} (max_{i <= j <= t-1} A[j][i] - A[t][i]). More is worse; negative when earlier tasks got better.
"""

INPUTS = """
Args:
    accuracy_matrix (list of lists of float): entry [i][j] is the accuracy on task j after training task i, in percent
        or as a fraction; None where not evaluated. A run in progress has fewer rows than columns.
Returns:
    forgetting (float), in the unit of the matrix.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/pgp_hf/metrics/forgetting")
    >>> metric.compute(accuracy_matrix=[[90.0, None], [80.0, 95.0]])
    {'forgetting': 10.0}
"""

CITATION = """
Prompt gradient projection for continual learning, Equation 36, with the sign of the tables.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Forgetting(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"accuracy_matrix": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, accuracy_matrix: list[list[float | None]]) -> dict[str, float]:
        return {"forgetting": metrics.forgetting(accuracy_matrix)}
