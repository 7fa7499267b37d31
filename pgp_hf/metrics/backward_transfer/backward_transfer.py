"""Compute backward transfer as an `evaluate` module; the formula is `pgp_hf.metrics.backward_transfer`."""

import datasets
import evaluate

from pgp_hf import metrics

DESCRIPTION = """
Mean change of each earlier task's accuracy since it was learned: 1/t * sum_{i < t} (A[t][i] - A[i][i]).
"""

INPUTS = """
Args:
    accuracy_matrix (list of lists of float): entry [i][j] is the accuracy on task j after training task i, in percent
        or as a fraction; None where not evaluated. A run in progress has fewer rows than columns.
Returns:
    backward_transfer (float), in the unit of the matrix.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/pgp_hf/metrics/backward_transfer")
    >>> metric.compute(accuracy_matrix=[[90.0, None], [80.0, 95.0]])
    {'backward_transfer': -10.0}
"""

CITATION = """
Lopez-Paz and Ranzato. Gradient episodic memory for continual learning. NeurIPS 2017.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class BackwardTransfer(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"accuracy_matrix": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, accuracy_matrix: list[list[float | None]]) -> dict[str, float]:
        return {"backward_transfer": metrics.backward_transfer(accuracy_matrix)}
