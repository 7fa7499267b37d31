"""`auto_find_batch_size`: the size that was found holds outside training too, and the run is one that began with it."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import tiny
import torch
from transformers import TrainerCallback

from pgp_hf import ProjectionConfig, methods

pytestmark = pytest.mark.usefixtures("without_figures")

OUT = "CUDA out of memory. Tried to allocate 20.00 MiB"


class Memory:
    """Raise an out-of-memory error for batches that are too large."""

    def __init__(self, model, training, passes=10**6, after=0):
        self.training, self.passes, self.after = training, passes, after
        self.calls, self.largest = 0, 0
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.register_forward_pre_hook(self.check, with_kwargs=True, prepend=True)
        self.model = model

    def check(self, module, args, kwargs):
        batch = len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])
        training = self.model.training and torch.is_grad_enabled()
        self.calls += training
        if batch > (self.training if training else self.passes) and (not training or self.calls > self.after):
            raise torch.OutOfMemoryError(OUT)
        if not training:
            self.largest = max(self.largest, batch)


def run(folder, model, size, **settings):
    """Train two tasks."""
    stream = tiny.stream(dataset=tiny.data(classes=4), num_tasks=2)
    return tiny.trainer(folder, model=model, stream=stream, per_device_train_batch_size=size, **settings)


def l2p(**settings):
    return tiny.model(base=tiny.backbone(num_labels=4), **settings)


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.stream_model.trainable().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


MODELS = {
    "l2p": (l2p, lambda: {"projection": ProjectionConfig(method="functional", energy=0.9)}),
    "pgp": (l2p, dict),
    "statistics": (lambda: l2p(head="statistics"), lambda: {"compensate_drift": True}),
    "ewc": (lambda: tiny.plain(base=tiny.backbone(num_labels=4)), lambda: {"method": methods.create("ewc")}),
    "icarl": (
        lambda: tiny.plain(base=tiny.backbone(num_labels=4)),
        lambda: {"method": methods.create("icarl", memory_size=4)},
    ),
}


@pytest.mark.parametrize("kind", tiny.some_of(MODELS, "icarl"))
@pytest.mark.parametrize("after", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_run_whose_size_was_found_is_one_that_began_with_it(kind, after, tmp_path):
    """Whether the first step or a later one is too large, and whatever has been learned by then."""
    make, settings = MODELS[kind]
    straight = run(tmp_path / "straight", make(), 5, **settings())
    straight.train()
    model = make()
    memory = Memory(model, training=5, after=after)
    found = run(tmp_path / "found", model, 8, auto_find_batch_size=True, **settings())
    found.train()
    assert found._train_batch_size == 5 and memory.calls > after
    assert same(weights(found), weights(straight))
    assert tiny.same_results(
        {**found.results.to_dict(), "training": None}, {**straight.results.to_dict(), "training": None}
    )
    assert found.results.images_trained == straight.results.images_trained


def test_steps_go_on_with_the_size_that_was_found(tmp_path):
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    how = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    model = l2p()
    Memory(model, training=5)
    found = run(tmp_path, model, 8, auto_find_batch_size=True, callbacks=[Stop()], **how)
    with pytest.raises(KeyboardInterrupt):
        found.train()
    with pytest.raises(
        ValueError, match="trained with 5 images in each step, in batches of 5 .* now there would be 8: go"
    ):
        run(tmp_path, l2p(), 8, **how).train(resume_from_checkpoint=True)
    other = run(tmp_path, l2p(), 4, auto_find_batch_size=True, gradient_accumulation_steps=2, **how)
    with pytest.raises(ValueError, match="and now there would be 10: go on with"):
        other.train(resume_from_checkpoint=True)
    again = run(tmp_path, l2p(), 8, auto_find_batch_size=True, callbacks=[Stop()], **how)
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=True)
    assert again.results.images_trained == 2 * 5


@pytest.mark.parametrize("kind", tiny.some_of(MODELS, "l2p"))
def test_passes_outside_training_fit_as_well(kind, tmp_path):
    make, settings = MODELS[kind]
    expected = run(tmp_path / "expected", make(), 2, per_device_eval_batch_size=16, cache_queries=False, **settings())
    expected.train()
    model = make()
    memory = Memory(model, training=2, passes=3)
    found = run(
        tmp_path / "found",
        model,
        2,
        per_device_eval_batch_size=16,
        cache_queries=False,
        auto_find_batch_size=True,
        **settings(),
    )
    with pytest.warns(UserWarning, match="16 images in a batch do not fit into memory outside training: trying 8"):
        found.train()
    assert memory.largest <= 3
    assert found.results.matrix == expected.results.matrix and found.results.rank == expected.results.rank
    for name, value in weights(expected).items():
        np.testing.assert_allclose(weights(found)[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", tiny.some_of(["gpm", "l2p", "pgp"], "pgp"))
def test_a_method_that_fails_half_way_begins_again_from_what_it_remembered(kind, tmp_path):
    """What a task's images show must not be taken in twice."""

    def learn(folder, fails):
        make, settings = MODELS.get(kind) or (MODELS["ewc"][0], lambda: {"method": methods.create(kind)})
        trainer = run(folder, make(), 8, auto_find_batch_size=True, **settings())
        method = trainer.method
        end, calls = method.end_task, []

        def end_task(context):
            calls.append(context.task)
            failing = fails and calls.count(context.task) == 1
            if failing and kind != "gpm":

                def views(limit, whole=context.views):
                    yield next(whole(limit))
                    raise torch.OutOfMemoryError(OUT)

                context = dataclasses.replace(context, views=views)
            end(context)
            if failing:
                raise torch.OutOfMemoryError(OUT)

        method.end_task = end_task
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        return trainer, calls

    (straight, once), (again, twice) = learn(tmp_path / "a", False), learn(tmp_path / "b", True)
    assert (once, twice) == ([0, 1], [0, 0, 1, 1])
    state, other = straight.method.state(), again.method.state()
    assert state.tensors.keys() == other.tensors.keys() and state.values == other.values
    for name, value in state.tensors.items():
        torch.testing.assert_close(other.tensors[name], value, rtol=0, atol=1e-5)
    if kind != "gpm":
        (bases, info), (other_bases, other_info) = (one.method.projection.state() for one in (straight, again))
        assert info == other_info  # images counted, and ranks
        for name, columns in bases.items():
            found, expected = (own @ own.mT for own in (other_bases[name], columns))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_without_the_option_and_for_other_errors_nothing_is_tried_again(tmp_path):
    model = l2p(head="statistics")
    Memory(model, training=8, passes=3)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path / "off", model, 8, cache_queries=False).train()
    trainer = run(tmp_path / "on", l2p(), 8, auto_find_batch_size=True)
    with pytest.raises(RuntimeError, match="something else"):
        trainer._sizes.fit(lambda: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings():  # not even a single image fits
        warnings.simplefilter("ignore")
        trainer._sizes.fit(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError(OUT)))
    assert trainer._sizes.evaluation == 1


def test_a_method_sees_batches_of_the_size_that_was_found(tmp_path):
    """Its backward passes would not fit otherwise."""
    model, method, sizes = tiny.plain(base=tiny.backbone(num_labels=4)), methods.create("fine_tuning"), []
    Memory(model, training=5)
    method.end_task = lambda context: sizes.append([len(batch.labels) for batch, _ in context.views(None)])
    run(tmp_path, model, 8, method=method, auto_find_batch_size=True).train()
    assert sizes == [[5, 5, 5, 1]] * 2


def test_what_a_task_began_with_is_kept_for_its_training_alone(tmp_path):
    trainer, seen = tiny.trainer(tmp_path, auto_find_batch_size=True, num_train_epochs=1), []
    evaluate = trainer.evaluate_stream
    trainer.evaluate_stream = lambda: (seen.append(trainer._beginning), evaluate())[1]
    trainer.train_task(0)
    assert seen == [None] and trainer._beginning is None
