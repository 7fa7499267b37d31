"""The `evaluate` modules: they load without a network, agree with the functions and never replace them."""

from __future__ import annotations

import inspect
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")

import evaluate

from pgp_hf import metrics

N = None
FOLDER = Path(metrics.__file__).parent

MATRIX = [[90, 20, N], [80, 95, 30], [85, 75, 70]]
BASELINE = [10, 12, 14]
HAND = {  # worked out by hand from MATRIX and BASELINE
    "average_accuracy": 230 / 3,
    "forgetting": 12.5,
    "forgetting_clipped": 12.5,
    "backward_transfer": -12.5,
    "forward_transfer": 12.0,
    "learning_accuracy": 85.0,
}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Caches in a temporary folder, and any attempt to connect fails the test."""

    def refuse(*args):
        raise AssertionError(f"tried to connect: {args}")

    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("evaluate")
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache / "modules"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(cache / "metrics"))
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(sys, "path", list(sys.path))
        yield


def arguments(name: str) -> dict:
    return {"baseline": BASELINE} if name == "forward_transfer" else {}


def test_one_folder_a_metric():
    assert {path.parent.name for path in FOLDER.glob("*/*.py")} == set(metrics.NAMES) == set(HAND)
    assert not list(FOLDER.glob("*/__init__.py"))  # an importable folder would compete with the function of its name


@pytest.mark.parametrize("name", HAND)
def test_module_gives_the_hand_computed_value(name):
    module = evaluate.load(str(FOLDER / name))
    for matrix in (MATRIX, np.array(MATRIX, dtype=float)):
        result = module.compute(accuracy_matrix=matrix, **arguments(name))
        assert result == {name: pytest.approx(HAND[name])}
    for row in MATRIX:
        module.add(accuracy_matrix=row)
    assert module.compute(**arguments(name)) == {name: pytest.approx(HAND[name])}


@pytest.mark.parametrize("name", HAND)
def test_load_by_name_agrees_with_the_function(name):
    matrix = [[60, 30, N], [50, 80, 25], [70, 90, 75], [N, N, N]][:3]
    module = metrics.load(name, keep_in_memory=True)
    function = getattr(metrics, name)
    extra = arguments(name)
    assert module.compute(accuracy_matrix=matrix, **extra)[name] == function(matrix, **extra)
    # a run under way: fewer rows than columns
    assert module.compute(accuracy_matrix=matrix[:2], **extra)[name] == function(matrix[:2], **extra)
    assert set(module.features) == {"accuracy_matrix"}
    assert name in module.inputs_description


def test_negative_forgetting_and_its_clipped_variant():
    matrix = [[60, N], [70, 75]]
    assert metrics.load("forgetting").compute(accuracy_matrix=matrix) == {"forgetting": -10.0}
    assert metrics.load("forgetting_clipped").compute(accuracy_matrix=matrix) == {"forgetting_clipped": 0.0}


def test_errors_come_through_and_leave_the_module_usable():
    module = metrics.load("forgetting")
    with pytest.raises(ValueError, match=r"no value at \[1\]\[0\]"):
        module.compute(accuracy_matrix=[[90, N], [N, 95]])
    assert module.compute(accuracy_matrix=[[90, N], [80, 95]]) == {"forgetting": 10.0}
    with pytest.raises(ValueError, match=r"accuracy_matrix\[0\]\[1\]"):
        metrics.load("forward_transfer").compute(accuracy_matrix=[[90, N], [80, 95]], baseline=[50, 50])


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'accuracy'.*average_accuracy, forgetting, .*learning_accuracy"):
        metrics.load("accuracy")


@pytest.mark.parametrize("name", HAND)
def test_loading_never_replaces_the_function(name):
    before = getattr(metrics, name)
    metrics.load(name)
    evaluate.load(str(FOLDER / name / f"{name}.py"))
    assert getattr(metrics, name) is before
    assert inspect.isfunction(before)
    assert f"pgp_hf.metrics.{name}" not in sys.modules
