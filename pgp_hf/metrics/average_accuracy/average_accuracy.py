"""Compute average accuracy as an `evaluate` module; the formula is `pgp_hf.metrics.average_accuracy`."""

import datasets
import evaluate

from pgp_hf import metrics

DESCRIPTION = """
Unweighted mean, over the tasks seen so far, of the current model's accuracy: 1/(t+1) * sum_{j <= t} A[t][j].
"""

INPUTS = """
Args:
    accuracy_matrix (list of lists of float): entry [i][j] is the accuracy on task j after training task i, in percent
        or as a fraction; None where not evaluated. A run in progress has fewer rows than columns.
Returns:
    average_accuracy (float), in the unit of the matrix.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/pgp_hf/metrics/average_accuracy")
    >>> metric.compute(accuracy_matrix=[[90.0, None], [80.0, 95.0]])
    {'average_accuracy': 87.5}
"""

CITATION = """
Prompt gradient projection for continual learning, Equation 35.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class AverageAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"accuracy_matrix": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, accuracy_matrix: list[list[float | None]]) -> dict[str, float]:
        return {"average_accuracy": metrics.average_accuracy(accuracy_matrix)}
