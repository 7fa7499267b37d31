"""Compute forward transfer as an `evaluate` module; the formula is `pgp_hf.metrics.forward_transfer`."""

import datasets
import evaluate

from pgp_hf import metrics

DESCRIPTION = """
Mean head start on a task right before its training, over the untrained model:
1/t * sum_{1 <= i <= t} (A[i-1][i] - baseline[i]).
"""

INPUTS = """
Args:
    accuracy_matrix (list of lists of float): entry [i][j] is the accuracy on task j after training task i, in percent
        or as a fraction; None where not evaluated. A run in progress has fewer rows than columns.
    baseline (list of float): accuracy of the untrained model on each task, in the unit of the matrix.
Returns:
    forward_transfer (float), in the unit of the matrix.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/pgp_hf/metrics/forward_transfer")
    >>> metric.compute(accuracy_matrix=[[90.0, 55.0], [80.0, 95.0]], baseline=[50.0, 50.0])
    {'forward_transfer': 5.0}
"""

CITATION = """
Lopez-Paz and Ranzato. Gradient episodic memory for continual learning. NeurIPS 2017.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class ForwardTransfer(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"accuracy_matrix": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, accuracy_matrix: list[list[float | None]], baseline: list[float | None]) -> dict[str, float]:
        return {"forward_transfer": metrics.forward_transfer(accuracy_matrix, baseline)}
