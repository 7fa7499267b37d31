"""Scores of the statistics head that are as sure as they are right: one temperature, found by images that are left out."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from pgp_hf import load_pretrained
from pgp_hf.heads import ClassStatistics
from pgp_hf.heads.calibration import TEMPERATURES, best_temperature, calibration_error, losses


def classes(count=60, of=5, dim=8, seed=0, start=0, width=1.0):
    """Features and labels of classes with two clusters each, which one Gaussian describes badly."""
    generator = torch.Generator().manual_seed(seed)
    means = width * torch.randn(2, 20, dim, generator=torch.Generator().manual_seed(9))
    labels = start + torch.arange(count * of) % of
    cluster = torch.randint(2, (len(labels),), generator=generator)
    return means[cluster, labels] + torch.randn(len(labels), dim, generator=generator), labels


def gathered(x, y, total=5, **settings):
    return ClassStatistics(total, x.shape[1], **settings).update(x, y)


# ---- left out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shrinkage", "tolerance"), [(0.0, 1e-6), (0.1, 0.05)])  # the trace in the shrinkage stays
def test_an_image_is_scored_as_if_it_had_never_been_seen(shrinkage, tolerance):
    x, y = classes(count=12)
    found = gathered(x, y, shrinkage=shrinkage)._left_out(x, y)
    within = gathered(x, y, shrinkage=shrinkage)(x)
    for i in (0, 7, 31):
        rest = torch.arange(len(x)) != i
        expected = gathered(x[rest], y[rest], shrinkage=shrinkage)(x[i : i + 1])[0]
        apart = [(scores - scores[y[i]]).double() for scores in (found[i], expected, within[i])]
        error, without = ((one - apart[1]).abs().max() for one in (apart[0], apart[2]))
        assert error <= tolerance * without + 1e-4  # far closer than the scores that know the image


def test_an_image_says_less_about_itself_than_the_others_do():
    x, y = classes(count=4)  # in 8 dimensions, so that each image counts
    statistics = gathered(x, y)
    assert (statistics._left_out(x, y).argmax(-1) == y).sum() < (statistics(x).argmax(-1) == y).sum()


# ---- the temperature -------------------------------------------------------------------------------------------------


def test_scores_become_as_sure_as_they_are_right_and_keep_their_order():
    # few images in many dimensions
    statistics = gathered(*(learned := classes(count=14, dim=24, width=0.6)))
    before = {name: value.clone() for name, value in statistics.state_dict().items() if name != "calibration"}
    assert statistics.temperature == 1.0
    statistics.calibrate(*learned)
    assert all(torch.equal(value, statistics.state_dict()[name]) for name, value in before.items())
    x, y = classes(count=400, dim=24, width=0.6, seed=5)
    logits = statistics(x)
    right = logits.argmax(-1) == y

    def error(temperature):
        return calibration_error((logits / temperature).softmax(-1).amax(-1), right)

    assert statistics.temperature > 1.5
    assert error(statistics.temperature) <= error(1.0) / 2
    assert torch.equal((logits / statistics.temperature).sort(stable=True).indices, logits.sort(stable=True).indices)


def test_later_tasks_count_more_and_none_is_needed_again():
    first, second = classes(count=30, of=2), classes(count=30, of=3, start=2)
    statistics = gathered(*first).calibrate(*first)
    early = statistics.calibration.clone()
    statistics.merge(gathered(*second)).calibrate(*second)
    alone = gathered(*first).merge(gathered(*second)).calibrate(*second)
    assert torch.allclose(statistics.calibration, early / 2 + alone.calibration)
    scores = alone._left_out(*second)
    assert torch.allclose(alone.calibration, losses(scores, second[1]))
    assert alone.temperature == best_temperature(losses(scores, second[1])) != 1.0


def test_of_temperatures_that_the_images_cannot_tell_apart_the_least_sure_is_taken():
    scores, labels = torch.tensor([[4.0, 0.0]] * 9 + [[0.0, 4.0]]), torch.zeros(10, dtype=torch.int64)
    few, many = losses(scores, labels), losses(scores.repeat(400, 1), labels.repeat(400))
    best = float(TEMPERATURES[int(few.argmin())])  # one of ten is wrong: 4 / ln 9 = 1.82
    assert best == pytest.approx(1.82, rel=0.07) and best < best_temperature(few) < 4.5
    assert best_temperature(many) == pytest.approx(best, rel=0.08)  # more images leave less of a choice
    assert best_temperature(torch.zeros_like(few)) == 1.0


def test_classes_without_images_do_not_compete_and_single_images_are_left_alone():
    x, y = classes(count=20, of=3, start=1)
    few, several = gathered(x, y, total=4), gathered(x, y + 3, total=9)
    assert torch.allclose(few.calibrate(x, y).calibration, several.calibrate(x, y + 3).calibration)
    assert few.calibration.isfinite().all()
    single = ClassStatistics(2, 8).update(x[:1], torch.tensor([1]))
    single.calibrate(x[:1], torch.tensor([1])).calibrate(x[:0], y[:0])
    assert torch.equal(single.calibration, torch.zeros(len(TEMPERATURES), dtype=torch.float64))
    assert single.temperature == 1.0


def test_shares_of_the_images_sum_up():
    x, y = classes(count=20)
    whole, share = gathered(x, y).calibrate(x, y).calibration, gathered(x, y)
    other = gathered(x, y).calibrate(x[50:], y[50:]).calibration
    assert torch.allclose(share.calibrate(x[:50], y[:50], lambda tensor: tensor + other).calibration, whole)


def test_many_images_are_sampled(monkeypatch):
    x, y = classes(count=80)
    full = gathered(x, y).calibrate(x, y).calibration
    monkeypatch.setattr("pgp_hf.heads.statistics.TESTED", 101)
    sampled = gathered(x, y).calibrate(x, y).calibration
    assert torch.allclose(sampled, losses(gathered(x, y)._left_out(x, y)[::4], y[::4]))
    assert 0.7 < float(sampled.min() / full.min()) * 4 < 1.4


# ---- the error -------------------------------------------------------------------------------------------------------


def test_the_error_is_the_gap_between_scores_and_shares_of_right_answers():
    assert calibration_error(torch.full((1000,), 0.9), torch.arange(1000) % 2 == 0) == pytest.approx(0.4, abs=1e-6)
    confidence = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    right = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < confidence
    assert calibration_error(confidence, right) < 0.01
    # too sure of some and not sure enough of others does not cancel
    assert calibration_error(torch.tensor([0.2] * 50 + [0.8] * 50), torch.arange(100) < 50) == pytest.approx(0.8)
    assert calibration_error(torch.tensor([0.25]), torch.tensor([True])) == 0.75


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_figures):
    return tiny.finished_run(tmp_path_factory.mktemp("run"), head="statistics")


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_results_have_the_error_before_and_after(run):
    stream = tiny.stream()
    for task in (1, 3):
        folder = run / f"task-{task}"
        clf = load_pretrained(folder)
        temperature = clf.model.base_model.statistics.temperature
        seen = [stream.test(j)[i] for j in range(task) for i in range(8)]
        pixels = clf.processor([item["image"] for item in seen], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = clf.model(pixel_values=pixels).logits.double()
        right = logits.argmax(-1) == torch.tensor([item["label"] for item in seen])
        found = results(folder)["calibration_error"]
        for scale, when in ((temperature, "before"), (1.0, "after")):
            assert found[when] == pytest.approx(
                calibration_error((logits * scale).softmax(-1).amax(-1), right), abs=1e-4
            )
    assert results(run) == results(run / "task-3")


def test_a_linear_head_has_no_such_error(tmp_path, without_figures):
    tiny.trainer(tmp_path, num_train_epochs=1, stream=tiny.stream(num_tasks=2)).train()
    assert "calibration_error" not in results(tmp_path)


def test_an_adapter_of_an_earlier_version_loads_and_is_not_calibrated(run, tmp_path):
    names = ("adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json")
    for name in names:
        (tmp_path / name).write_bytes((run / name).read_bytes())
    new = load_pretrained(tmp_path)
    tensors = load_file(tmp_path / names[1])
    (added,) = [name for name in tensors if name.endswith("calibration")]
    save_file({name: tensor for name, tensor in tensors.items() if name != added}, tmp_path / names[1])
    old = load_pretrained(tmp_path)
    assert new.model.base_model.statistics.temperature != 1.0 == old.model.base_model.statistics.temperature
    images = [tiny.stream().test(0)[i]["image"] for i in range(3)]
    assert [a[0]["label"] for a in new.predict(images)] == [b[0]["label"] for b in old.predict(images)]
    for clf in (old, new):  # over the same model as well: nothing of another adapter is left
        clf.model.load_adapter(str(tmp_path), "default")
        assert clf.model.base_model.statistics.temperature == 1.0
    PeftModel.from_pretrained(tiny.backbone(), tmp_path)
