"""Workers of the data loader that persist: each evaluation has its own images, and no more workers than one loader's."""

from __future__ import annotations

import multiprocessing

import pytest
import tiny

from pgp_hf.training.callbacks import StreamCallback

pytestmark = pytest.mark.usefixtures("without_figures")

WORKERS = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}


class Count(StreamCallback):
    """Count the workers that are alive as each task ends, and the largest number ever."""

    def __init__(self):
        self.at_ends, self.most = [], 0

    def on_prediction_step(self, *args, **kwargs):
        self.most = max(self.most, len(multiprocessing.active_children()))

    def on_task_end(self, *args, **kwargs):
        self.at_ends.append(len(multiprocessing.active_children()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, without_figures):
    count = Count()
    trainer = tiny.trainer(
        tmp_path_factory.mktemp("run"),
        stream=tiny.stream(dataset=tiny.data(train=2, test=2)),
        callbacks=[count],
        num_train_epochs=2,
        eval_strategy="epoch",
        cache_queries=False,
        **WORKERS,
    )
    trainer.train()
    return trainer, count


def test_each_evaluation_is_of_its_own_images(trained):
    trainer, _ = trained
    expected = trainer.results.matrix[-1]
    assert len(set(expected)) > 1, "the tasks must be told apart"
    for _ in range(2):
        found = [trainer.evaluate(trainer.stream.test(j))["eval_accuracy"] for j in range(3)]
        assert found == pytest.approx(expected)
        together = trainer.evaluate()
        assert [together[f"eval_task_{j + 1}_accuracy"] for j in range(3)] == pytest.approx(expected)
        named = trainer.evaluate({"last": trainer.stream.test(2), "first": trainer.stream.test(0)})
        assert [named["eval_first_accuracy"], named["eval_last_accuracy"]] == pytest.approx([expected[0], expected[2]])
    labels = [trainer.predict(trainer.stream.test(j)).label_ids.tolist() for j in range(3)]
    assert labels == [trainer.stream.test(j).labels.tolist() for j in range(3)]


def test_workers_do_not_pile_up(trained):
    trainer, count = trained
    training = WORKERS["dataloader_num_workers"]
    assert count.at_ends == [training] * 3 and count.most <= 2 * training
    assert trainer.args.dataloader_persistent_workers is True  # as it was set


def test_results_are_those_without_workers(trained, tmp_path):
    alone = tiny.trainer(
        tmp_path, stream=tiny.stream(dataset=tiny.data(train=2, test=2)), num_train_epochs=2, cache_queries=False
    )
    alone.train()
    assert alone.results.matrix == trained[0].results.matrix
