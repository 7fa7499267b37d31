"""Compute learning accuracy as an `evaluate` module; the formula is `pgp_hf.metrics.learning_accuracy`."""

import datasets
import evaluate

from pgp_hf import metrics

DESCRIPTION = """
Mean accuracy of each task right after it was learned: 1/(t+1) * sum_{i <= t} A[i][i].
"""

INPUTS = """
Args:
    accuracy_matrix (list of lists of float): entry [i][j] is the accuracy on task j after training task i, in percent
        or as a fraction; None where not evaluated. A run in progress has fewer rows than columns.
Returns:
    learning_accuracy (float), in the unit of the matrix.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/pgp_hf/metrics/learning_accuracy")
    >>> metric.compute(accuracy_matrix=[[90.0, None], [80.0, 95.0]])
    {'learning_accuracy': 92.5}
"""

CITATION = """
Riemer et al. Learning to learn without forgetting by maximizing transfer and minimizing interference. ICLR 2019.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class LearningAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"accuracy_matrix": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, accuracy_matrix: list[list[float | None]]) -> dict[str, float]:
        return {"learning_accuracy": metrics.learning_accuracy(accuracy_matrix)}
