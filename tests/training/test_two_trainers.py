"""Two trainers of one process: each computes in its own precision, whatever was made in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from pgp_hf import PGPTrainer

pytestmark = pytest.mark.usefixtures("without_figures")


def queries(folder: Path) -> list[str]:
    """Names of the files with queries, which are digests of all that the queries depend on, such as the precision."""
    found = sorted(path.name for path in (folder / "queries").glob("queries-*"))
    assert found
    return found


@pytest.mark.parametrize("bf16", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_trainer_of_another_precision_changes_nothing(tmp_path, bf16):
    alone, beside = (tiny.trainer(tmp_path / name, bf16=bf16, max_steps=1) for name in ("alone", "beside"))
    alone.train_task(0)
    other = tiny.trainer(tmp_path / "other", bf16=not bf16)
    beside.train_task(0)
    assert queries(tmp_path / "alone") == queries(tmp_path / "beside")
    assert tiny.same_results(alone.results.to_dict(), beside.results.to_dict())
    assert other.accelerator.mixed_precision == ("no" if bf16 else "bf16")


def test_arguments_that_are_made_in_between(tmp_path):
    """They clear accelerate's state, as transformers makes them."""
    first = tiny.trainer(tmp_path / "first", max_steps=1)
    args = tiny.arguments(tmp_path / "second", bf16=True)
    first.train_task(0)
    assert first.evaluate()["eval_task_1_accuracy"] == first.results.matrix[0][0]
    assert len(first.predict(first.stream.test(0)).predictions) == 8
    second = PGPTrainer(tiny.model(), args, tiny.stream(), processing_class=tiny.processor())
    assert first.evaluate()["eval_task_1_accuracy"] == first.results.matrix[0][0]
    assert second.accelerator.mixed_precision == "bf16"


def test_arguments_of_both_come_first(tmp_path):
    both = [tiny.arguments(tmp_path / str(bf16), bf16=bf16) for bf16 in (False, True)]
    made = [PGPTrainer(tiny.model(), args, tiny.stream(), processing_class=tiny.processor()) for args in both]
    assert [trainer.args.bf16 for trainer in made] == [False, True]
    assert made[1].accelerator.mixed_precision == "bf16"
