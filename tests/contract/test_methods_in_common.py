"""What every registered method has in common, on the first model that it goes with."""

from __future__ import annotations

import pytest
import tiny
import torch
from pairs import METHODS, NEUTRAL, NEVER_NEUTRAL, make_method, make_model, model_for
from safetensors.torch import load_file

from pgp_hf.data.scenarios import SCENARIOS
from pgp_hf.methods import create

pytestmark = pytest.mark.usefixtures("without_figures")


def most(methods, without):
    """Return parameters for methods; those `without` are slow, and whichever comes new is not."""
    return tiny.some_of(sorted(methods), *(set(methods) - set(without)))


def trainer(folder, method, **settings):
    name = settings.pop("model", None) or model_for(method, folder)
    data = tiny.data(train=4, test=2)
    scenario = settings.pop("scenario", "class_incremental")
    return tiny.trainer(
        folder / "run",
        model=make_model(name, folder),
        method=settings.pop("own", None) or make_method(method),
        stream=tiny.stream(num_tasks=2, dataset=data, scenario=scenario),
        **{"num_train_epochs": 1, **settings},
    )


def weights(folder):
    (file,) = [*(folder / "run" / "task-2").glob("*model.safetensors")]
    return load_file(file)


@pytest.mark.parametrize(  # in tests of their own, those that are left out by default
    "method", most(METHODS.keys() - NEVER_NEUTRAL, without=("derpp", "ewc", "fine_tuning", "lwf"))
)
def test_with_neutral_settings_it_is_fine_tuning(tmp_path, method):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    model = model_for(method, tmp_path)
    trainer(tmp_path / "a", method, own=create(method, **NEUTRAL[method]), model=model).train()
    trainer(tmp_path / "b", "fine_tuning", model=model).train()
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(  # which needs most of what a method does in a step
    "method", most(METHODS, without=("bic", "der_mcg", "fine_tuning", "icarl", "joint", "null_space_adam"))
)
def test_accumulation_changes_nothing(tmp_path, method):
    found = []
    for batch, steps in ((8, 1), (2, 4)):
        folder = tmp_path / str(batch)
        folder.mkdir()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        trainer(folder, method, optim="sgd", **sizes).train()
        found.append({**weights(folder), **load_file(folder / "run" / "task-2" / "method.safetensors")})
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():  # places of images are integers, and equal
        two = found[1][name]
        if name.endswith(".basis"):  # of eigenvectors, the span counts
            one, two = one @ one.mT, two @ two.mT
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-5 if one.is_floating_point() else 0), name


@pytest.mark.parametrize("scenario", most(SCENARIOS, without=("class_incremental",)))  # which the contract trains
@pytest.mark.parametrize("method", METHODS)
def test_every_scenario_works_or_is_refused(tmp_path, method, scenario):
    if scenario not in METHODS[method].scenarios:
        with pytest.raises(ValueError, match=f"method '{method}' is not defined for scenario='{scenario}': it has"):
            trainer(tmp_path, method, scenario=scenario)
        return
    made = trainer(tmp_path, method, scenario=scenario, num_train_epochs=2)
    made.train()
    assert made.results.images_trained >= 24 * (1 if scenario == "online" else 2)
    for task in range(2):
        own = made.stream.tasks[task].classes
        others = [label for label in range(tiny.CLASSES) if label not in own]
        scores = torch.as_tensor(made.predict(made.stream.test(task)).predictions)
        never = scores[:, others] <= torch.finfo(scores.dtype).min
        assert never.all() if scenario == "task_incremental" else not never.any()


@pytest.mark.parametrize("method", METHODS)
def test_it_is_described(method):
    made = make_method(method)
    card = made.describe()
    assert card.title and card.sentence and card.sentence[0].islower() and not card.sentence.endswith(".")
    assert all(limit.endswith(".") for limit in card.limits)
    assert all(field.metadata.get("help") for field in made.config_class.__dataclass_fields__.values())
    assert made.settings().keys() >= made.config_class.__dataclass_fields__.keys()
