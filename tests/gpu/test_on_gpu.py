"""A run on an accelerator is the run on the CPU, to rounding; nothing in a step waits for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import substitute
import tiny
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.registry import lookup_backend
from transformers import TrainerCallback

from pgp_hf import ProjectionConfig, load_pretrained, methods
from pgp_hf.projection import Basis, SecondMoment
from pgp_hf.projection.moments import FrequentDirections
from pgp_hf.tuners.base import compiled

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("without_figures")]

SGD = {"optim": "sgd", "learning_rate": 0.1}  # Adam makes steps of gradients that are zero but for rounding
ADAPTERS = ("l2p", "dualprompt", "clip")
METHODS = {
    "derpp": {"memory_size": 6},
    "icarl": {"memory_size": 12},
    "bic": {"memory_size": 16, "validation_share": 0.25},
    "der_mcg": {"memory_size": 12, "tuning_epochs": 4, "gate_epochs": 2, "gate_batch_size": 6},
    "gpm": {"energy": 0.8},
    "null_space_adam": {"energy": 0.8},
}


def train(folder: Path, on_cpu: bool, adapter: str = "l2p", **settings):
    """Return the trainer of a finished run of three tasks."""
    settings = {"use_cpu": on_cpu, "compensate_drift": True, "num_train_epochs": 1, **SGD, **settings}
    if "method" not in settings:
        settings["projection"] = settings.get("projection") or ProjectionConfig(energy=0.9, key_energy=0.9)
        settings["model"] = tiny.model(adapter, head="statistics")
    else:
        settings.pop("compensate_drift")
    substitute.choose(on_cpu)
    trainer = tiny.trainer(folder, **settings)
    trainer.train()
    if not on_cpu:
        assert {p.device.type for p in trainer.model.parameters()} == {trainer.args.device.type} != {"cpu"}
    return trainer


def agree(one: Path, two: Path, tolerance: float = 1e-3) -> None:
    """Compare all that two runs have learned after each task."""
    for task in ("task-1", "task-2", "task-3"):
        a, b = (load_file(run / task / "adapter_model.safetensors") for run in (one, two))
        assert a.keys() == b.keys()
        for name in a:
            if name.endswith("calibration"):  # losses of scores, for temperatures as low as 0.01
                continue
            apart = (a[name].double() - b[name].double()).norm() / a[name].double().norm().clamp_min(1e-12)
            assert apart < tolerance, (task, name, float(apart))
        if (one / task / "projection.safetensors").exists():
            a, b = (load_file(run / task / "projection.safetensors") for run in (one, two))
            for name in a:
                assert a[name].shape == b[name].shape
                assert torch.allclose(a[name] @ a[name].mT, b[name] @ b[name].mT, atol=2e-2), (task, name)
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    first, second = (np.array(r["accuracy_matrix"], dtype=float) for r in results)  # None becomes NaN
    assert np.nanmax(np.abs(first - second)) <= 12.5 + 1e-9  # one of a task's eight test images
    assert np.abs(np.array(results[0]["drift"]) - np.array(results[1]["drift"])).max() < 1e-3


def leaks(folder: Path, t: int) -> list[str]:
    """Return the parameters that task t moved along protected directions by more than the rounding of their values."""
    before, after = (load_file(folder / f"task-{i}" / "adapter_model.safetensors") for i in (t - 1, t))
    described = json.loads((folder / f"task-{t - 1}" / "projection.json").read_text())
    found = []
    for name, basis in load_file(folder / f"task-{t - 1}" / "projection.safetensors").items():
        plain = name.removesuffix(".T")
        moved = (after[plain] - before[plain]).double()
        rows = (moved if plain == name else moved.mT).reshape(described[name]["shape"])
        rounding = 4 * torch.finfo(torch.float32).eps * after[plain].norm()
        if (rows @ basis.double()).norm() > rounding + 1e-6 * moved.norm():
            found.append(name)
    return found


def may_wait(device: torch.device, may: bool) -> None:
    """Let the host wait for the device, or raise at every operation for which it would."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default" if may else "error")
    else:
        substitute.let_wait(may)


class Unwaited(TrainerCallback):
    """Let nothing wait from the beginning of each step to its end, but for the first two, in which much is made once."""

    def __init__(self, device):
        self.device, self.steps = device, 0

    def on_step_begin(self, args, state, control, **kwargs):
        may_wait(self.device, state.global_step < 2)

    def on_step_end(self, args, state, control, **kwargs):
        may_wait(self.device, True)
        self.steps += state.global_step > 2


# ---- equality with the CPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("method", ["pgp", "functional"])
def test_a_run_is_that_on_the_cpu(tmp_path, adapter, method, device):
    """Prompts, keys, head, class statistics with drift compensation, bases, accuracies and drift."""
    projection = ProjectionConfig(method=method, energy=0.9, key_energy=0.9)
    for place in ("cpu", "gpu"):
        train(tmp_path / place, place == "cpu", adapter, projection=projection)
    agree(tmp_path / "cpu", tmp_path / "gpu")
    assert not leaks(tmp_path / "gpu", 2) + leaks(tmp_path / "gpu", 3)


def test_the_attention_condition_is_that_of_the_cpu(tmp_path, device):
    projection = ProjectionConfig(method="attention", energy=0.9, key_energy=0.9, value_energy=0.5, ln_penalty=0.1)
    for place in ("cpu", "gpu"):
        train(tmp_path / place, place == "cpu", "l2p", projection=projection)
    agree(tmp_path / "cpu", tmp_path / "gpu")


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - {"projected_prompts"}))
def test_every_method_learns_there(tmp_path, name, device):
    for place in ("cpu", "gpu"):
        model, method = tiny.plain(), methods.create(name, **METHODS.get(name, {}))
        settings = {"model": model, "method": method, "learning_rate": 0.01}
        trainer = train(tmp_path / place, place == "cpu", **settings)
        assert trainer.folder.finished_tasks() == 3
    last = [load_file(tmp_path / place / "model.safetensors") for place in ("cpu", "gpu")]
    one, two = (torch.cat([weights[key].double().flatten() for key in sorted(weights)]) for weights in last)
    assert (one - two).norm() < 1e-4 * one.norm()


def test_bases_and_their_leakage(device):
    """Bases in float64 there: the subspace, the energies, and what is left along them after a projection."""
    rows = torch.randn(3, 200, 24, generator=torch.Generator().manual_seed(1)) * torch.linspace(2, 0.01, 24)
    for kind in (SecondMoment, FrequentDirections):
        found = []
        for place in ("cpu", device):
            moment = kind(24, (3,), place).update(rows.to(place))
            basis = Basis.empty(24, (3,), place).extend(moment, 0.95)
            movement = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2)).double().to(place)
            left = basis.project(movement)
            assert float((left @ basis.columns).norm() / movement.norm()) < 1e-12
            assert basis.columns.device.type == torch.device(place).type
            found.append((basis.columns @ basis.columns.mT).cpu())
        assert torch.allclose(*found, atol=1e-9)


# ---- precision, resuming, loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_autocast_leaves_what_learns_in_full_precision(tmp_path, adapter, device):
    if device.type != "cuda":
        pytest.skip("bf16 is a matter of the real device")
    exact = train(tmp_path / "exact", False, adapter)
    half = train(tmp_path / "half", False, adapter, bf16=True)
    assert {p.dtype for p in half.stream_model.trainable().values()} == {torch.float32}
    assert all(b.columns.dtype == torch.float64 for b in half.projection.bases.values())
    assert not leaks(tmp_path / "half", 2) + leaks(tmp_path / "half", 3)
    assert half.results.to_dict()["training"]["bf16"] is True
    pixels = tiny.images(6).to(device)
    with torch.no_grad():
        outputs = [
            run.stream_model.class_logits(run.model.eval()(pixel_values=pixels)).float() for run in (exact, half)
        ]
        with torch.autocast("cuda", torch.bfloat16):
            outputs.append(half.stream_model.class_logits(half.model(pixel_values=pixels)).float())
    finite = [torch.isfinite(found) for found in outputs]
    assert all(bool(found.any()) for found in finite)


@pytest.mark.parametrize("adapter", ["l2p", "dualprompt"])
def test_a_resumed_run_is_the_run(tmp_path, adapter, device):
    settings = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 0.01}
    train(tmp_path / "straight", False, adapter, **settings)

    class Stop(Exception):
        pass

    def broken(trainer):
        step = trainer.training_step

        def training_step(*args, **kwargs):
            if trainer.task == 1 and trainer.state.global_step == 3:
                raise Stop
            return step(*args, **kwargs)

        trainer.training_step = training_step
        return trainer

    def made(folder):
        projection = ProjectionConfig(energy=0.9, key_energy=0.9)
        model = tiny.model(adapter, head="statistics")
        given = {"use_cpu": False, "compensate_drift": True, "num_train_epochs": 1, **settings}
        return tiny.trainer(folder, model=model, projection=projection, **given)

    with pytest.raises(Stop):
        broken(made(tmp_path / "resumed")).train()
    resumed = made(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    agree(tmp_path / "straight", tmp_path / "resumed", 1e-4)


def test_a_run_of_the_gpu_is_loaded_and_learns_on(tmp_path, device):
    backbone = tmp_path / "backbone"
    tiny.backbone().save_pretrained(backbone)
    model = tiny.model(head="statistics")
    model.base_model.adapter_config.base_model_name_or_path = str(backbone)
    trainer = tiny.trainer(tmp_path / "run", model=model, use_cpu=False, num_train_epochs=1)
    trainer.train()
    photos = [item["image"] for item in tiny.data()["test"].select(range(12))]
    on_cpu, there = load_pretrained(tmp_path / "run"), load_pretrained(tmp_path / "run")
    there.model.to(device)
    scores = []
    for found in (on_cpu, there):
        rows = found.predict(photos, top_k=6)
        scores.append([sorted((each["label"], each["score"]) for each in row) for row in rows])
    assert [[label for label, _ in row] for row in scores[0]] == [[label for label, _ in row] for row in scores[1]]
    pairs = zip(*([score for row in found for _, score in row] for found in scores), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-3
    again = type(trainer).from_pretrained(
        tmp_path / "run", args=tiny.arguments(tmp_path / "on", use_cpu=False), test_dataset=tiny.data()["test"]
    )
    more = tiny.data(classes=8)
    new = {split: more[split].filter(lambda label: label > 5, input_columns="label") for split in ("train", "test")}
    again.learn(new["train"], new["test"])
    assert again.folder.finished_tasks() == 4


# ---- a step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["l2p", "dualprompt"])  # in CLIP's text tower, transformers reads the padding mask
@pytest.mark.parametrize("method", ["pgp", "functional"])
def test_no_step_waits_for_the_device(tmp_path, adapter, method, device):
    """From a batch on the device to parameters that are projected: the host only enqueues."""
    projection = ProjectionConfig(method=method, energy=0.9, key_energy=0.9, apply_to="both")
    watch = Unwaited(device)
    model = tiny.model(adapter, head="statistics")
    images = {"exact_images": False, "process_on_device": True, "augmentation": "crop_flip"}
    trainer = tiny.trainer(
        tmp_path,
        model=model,
        projection=projection,
        use_cpu=False,
        callbacks=[watch],
        **(images if method == "pgp" else {}),
    )
    trainer.train_task(0)
    try:
        trainer.train_task(1)
    finally:
        may_wait(device, True)
    assert watch.steps == 12


# ---- compiled blocks -------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(device, monkeypatch):
    """Count what is compiled: by inductor, which the substitute does not have, and whose graphs run there as they are."""
    compile_graph, found = lookup_backend("inductor" if device.type == "cuda" else "eager"), []

    def backend(graph, inputs):
        found.append(graph)
        return compile_graph(graph, inputs)

    monkeypatch.setattr(compiled, "BACKEND", backend)
    return found


@pytest.mark.parametrize(("adapter", "last_block"), [("l2p", "read"), ("dualprompt", "full"), ("clip", "full")])
def test_a_compiled_run_is_the_run_and_waits_for_nothing(tmp_path, adapter, last_block, device, graphs):
    """Prompts, keys and class statistics to 1e-3 of their norm; later tasks compile nothing."""
    sizes = {"per_device_eval_batch_size": 8, "save_strategy": "no", "last_block": last_block}
    train(tmp_path / "plain", False, adapter, **sizes)
    counts, watch = [], Unwaited(device)

    class Count(TrainerCallback):
        def on_task_end(self, args, state, control, **kwargs):
            counts.append(len(graphs))

    # in CLIP's text tower, transformers reads the padding mask
    callbacks = [Count()] if adapter == "clip" else [Count(), watch]
    try:
        train(tmp_path / "compiled", False, adapter, compile_trunk=True, callbacks=callbacks, **sizes)
    finally:
        may_wait(device, True)
    agree(tmp_path / "plain", tmp_path / "compiled")
    assert not leaks(tmp_path / "compiled", 2) + leaks(tmp_path / "compiled", 3)
    assert 2 < counts[0] <= 16 and len(set(counts)) == 1
    assert watch.steps == (0 if adapter == "clip" else 6)


@pytest.mark.parametrize("adapter", ["l2p", "dualprompt"])
def test_compiled_blocks_in_bf16_leave_what_learns_in_full_precision(tmp_path, adapter, device, graphs):
    if device.type != "cuda":
        pytest.skip("bf16 is a matter of the real device")
    for name in ("plain", "compiled"):
        trainer = train(tmp_path / name, False, adapter, bf16=True, compile_trunk=name == "compiled")
        assert {p.dtype for p in trainer.stream_model.trainable().values()} == {torch.float32}
        assert all(b.columns.dtype == torch.float64 for b in trainer.projection.bases.values())
    assert not leaks(tmp_path / "compiled", 2) + leaks(tmp_path / "compiled", 3)
    one, two = (load_file(tmp_path / name / "task-1" / "adapter_model.safetensors") for name in ("plain", "compiled"))
    for name in one:
        if not name.endswith("calibration"):
            assert (one[name] - two[name]).norm() < 2e-2 * one[name].norm().clamp_min(1e-12), name


def test_batches_are_pinned(tmp_path, device):
    if device.type != "cuda":
        pytest.skip("memory is pinned for CUDA alone")
    trainer = tiny.trainer(tmp_path, use_cpu=False)
    assert trainer.args.dataloader_pin_memory
    trainer.train_dataset = trainer._passes().augmented(0)
    assert next(
        iter(torch.utils.data.DataLoader(trainer.train_dataset, 4, collate_fn=trainer.data_collator, pin_memory=True))
    )["pixel_values"].is_pinned()
