"""Class means that follow the drift of features, in the head and in runs."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import processes
import pytest
import tiny
import torch
from transformers import TrainerCallback

from pgp_hf import PGPTrainer, ProjectionConfig
from pgp_hf.data.images import ImageCollator
from pgp_hf.heads.statistics import ClassStatistics

pytestmark = pytest.mark.usefixtures("without_figures")

DIM = 7


def statistics(classes=4, n=60, seed=0):
    torch.manual_seed(seed)
    features, labels = torch.randn(n, DIM) + 5, torch.arange(n) % (classes - 1)  # the last class has none
    return ClassStatistics(classes, DIM).update(features + labels[:, None], labels)


def others(n=400, seed=1):
    torch.manual_seed(seed)
    return torch.randn(n, DIM, dtype=torch.float64) * 2 + 4


def test_a_common_shift_is_followed_exactly():
    head, x = statistics(), others(3)
    before, shift = head.means.clone(), torch.arange(DIM).double()
    head.compensate_drift(x, x + shift)
    assert torch.allclose(head.means[:3], before[:3] + shift, rtol=1e-12)
    assert (head.means[3] == 0).all()  # a class without features stays unseen


def test_no_movement_moves_nothing_and_nothing_else_ever_moves():
    head, x = statistics(), others(5)
    means, counts, scatter = head.means.clone(), head.counts.clone(), head.scatter.clone()
    assert torch.equal(head.compensate_drift(x, x.clone()).means, means)
    head.compensate_drift(x, x * 1.5)
    assert torch.equal(head.counts, counts) and torch.equal(head.scatter, scatter)
    assert not torch.equal(head.means, means)


def test_it_is_ridge_regression():
    """Against the normal equations with the penalty written out as further observations."""
    head, x = statistics(), others(30)
    moved = torch.tanh(x) + 0.1 * torch.randn_like(x)
    means = head.means[:3].clone()
    m, d = x.mean(0), moved.mean(0)
    ridge = (x - m).square().sum() / DIM
    rows = torch.cat([x - m, ridge.sqrt() * torch.eye(DIM).double()])
    answers = torch.cat([moved - d, torch.zeros(DIM, DIM).double()])
    turn = torch.linalg.lstsq(rows, answers).solution
    head.compensate_drift(x, x + moved)
    assert torch.allclose(head.means[:3], means + d + (means - m) @ turn, atol=1e-10)


def test_linear_drift_is_followed_better_than_by_a_common_shift():
    head, x = statistics(), others()
    turn = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64)).Q * 0.5
    means = head.means[:3].clone()
    moved = head.compensate_drift(x, x + x @ turn).means[:3]
    error = (moved - (means + means @ turn)).norm()
    assert error < (means + (x @ turn).mean(0) - (means + means @ turn)).norm() and error < (means @ turn).norm() / 2


def test_the_classifier_follows():
    head, x = statistics(), others(20)
    points = torch.randn(6, DIM) + 5
    expected = head(points)
    head.compensate_drift(x, x + 3)
    assert torch.allclose(head(points + 3), expected, atol=1e-4) and not torch.allclose(head(points), expected)


def test_shares_of_processes_are_the_whole():
    x = others(40)
    moved = x + torch.tanh(x)
    whole = statistics().compensate_drift(x, moved).means
    found = processes.run(
        2,
        lambda rank, reduce, gather, broadcast: (
            statistics().compensate_drift(x[rank::2], moved[rank::2], reduce).means
        ),
    )
    assert torch.allclose(found[0], whole, rtol=1e-12) and torch.equal(found[0], found[1])


def test_many_features_are_summed_in_pieces():
    head, x = statistics(), others(9000)
    moved = x + torch.tanh(x)
    order = torch.randperm(9000)
    assert torch.allclose(
        head.compensate_drift(x, moved).means, statistics().compensate_drift(x[order], moved[order]).means, rtol=1e-9
    )


def test_no_images_move_nothing():
    head = statistics()
    means = head.means.clone()
    assert torch.equal(head.compensate_drift(torch.zeros(0, DIM), torch.zeros(0, DIM)).means, means)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3, 5), r"\(3, 5\) before and \(3, 5\) after: expected \(N, 7\) twice"),
        (torch.zeros(3, 7), torch.zeros(2, 7), r"\(3, 7\) before and \(2, 7\) after"),
        (torch.zeros(3, 7), torch.full((3, 7), float("nan")), "not finite"),
    ],
)
def test_features_that_do_not_fit(before, after, message):
    with pytest.raises(ValueError, match=message):
        statistics().compensate_drift(before, after)


# ---- in a run --------------------------------------------------------------------------------------------------------


def trainer(folder, method="l2p", compensate=True, **kwargs) -> PGPTrainer:
    sizes = {"pool_size": 3} if method == "dualprompt" else {}
    return tiny.trainer(
        folder,
        model=tiny.model(method, head="statistics", **sizes),
        projection=ProjectionConfig(method="none"),
        compensate_drift=compensate,
        **kwargs,
    )


def head_inputs(run: PGPTrainer, t: int) -> torch.Tensor:
    """What the head reads of a task's training images, one batch, written without the trainer."""
    images = run.stream.train(t)
    run.model.eval()
    return tiny.features(run.model, ImageCollator(tiny.processor())(list(images))["pixel_values"])


@pytest.mark.parametrize("method", tiny.some_of(tiny.ADAPTERS, "l2p", "clip"))
def test_old_means_follow_the_new_tasks_images(tmp_path, method):
    run = trainer(tmp_path / "a", method)
    run.train_task(0)
    expected = copy.deepcopy(run.tuner.statistics)
    before = head_inputs(run, 1)
    run.train_task(1)
    with run.tuner.as_before_task(1) or nullcontext():
        after = head_inputs(run, 1)
    expected.compensate_drift(before, after)
    old = expected.counts > 0
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(run.tuner.statistics.means[old], expected.means[old], atol=1e-5)
    assert run.results.to_dict()["compensate_drift"] is True
    plain = trainer(tmp_path / "b", method, compensate=False)
    for t in range(2):
        plain.train_task(t)
    assert "compensate_drift" not in plain.results.to_dict()
    assert not torch.allclose(plain.tuner.statistics.means[old], expected.means[old], atol=1e-4)
    for name, value in plain.tuner.prompt_parameters().items():  # training is the same
        assert torch.equal(run.tuner.prompt_parameters()[name], value)


def test_old_images_do_not_select_the_new_entry(tmp_path):
    run = trainer(tmp_path, "dualprompt")
    for t in range(2):
        run.train_task(t)
    with run.tuner.as_before_task(1):
        head_inputs(run, 1)
        assert (run.tuner.selected_prompts == 0).all()
    head_inputs(run, 1)
    assert (run.tuner.selected_prompts == 1).any() and run.tuner.adapter_config.learned_entries == 2


def test_frozen_prompts_have_nothing_to_follow(tmp_path):
    finals = []
    for compensate in (False, True):
        run = tiny.trainer(
            tmp_path / str(compensate),
            model=tiny.model(head="statistics"),
            projection=ProjectionConfig(method="frozen"),
            compensate_drift=compensate,
        )
        run.train()
        finals.append(run.tuner.statistics.means)
    assert torch.equal(*finals)


class StopInTheSecondTask(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.task == 1 and state.epoch == 2:
            raise KeyboardInterrupt


def test_resumed_in_the_middle_of_a_task_is_straight(tmp_path):
    straight = trainer(tmp_path / "a")
    straight.train()
    stop = StopInTheSecondTask()
    first = stop.trainer = trainer(tmp_path / "b", callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert first.folder.last_checkpoint(1) is not None
    second = trainer(tmp_path / "b")
    second.train(resume_from_checkpoint=True)
    assert torch.equal(second.tuner.statistics.means, straight.tuner.statistics.means)
    assert tiny.same_results(second.results.to_dict(), straight.results.to_dict())
    with pytest.raises(ValueError, match="compensate_drift=True, this one False"):
        trainer(tmp_path / "b", compensate=False).train(resume_from_checkpoint=True)


def test_a_linear_head_has_no_means(tmp_path):
    with pytest.raises(ValueError, match="compensate_drift=True.*this model has head='linear'.*head='statistics'"):
        tiny.trainer(tmp_path, compensate_drift=True)
