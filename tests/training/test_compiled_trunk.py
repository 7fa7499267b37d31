"""Frozen blocks that are compiled: the same run, few graphs, nothing of it in a file, and clear refusals."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from pgp_hf import ProjectionConfig, methods
from pgp_hf.projection.conditions import Context, functional
from pgp_hf.training.settings import check_same_settings
from pgp_hf.tuners.base import compiled


@pytest.fixture
def graphs(monkeypatch):
    """Compile by a backend that runs a graph as it is; return the number of tokens that enters each."""
    found = []

    def backend(graph, inputs):
        shapes = [value.shape for value in inputs if isinstance(value, torch.Tensor) and value.dim() == 3]
        found.append(shapes[0][1] if shapes else None)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    return found


def trunk(model, *sizes):
    return compiled.Trunk(lambda: model.base_model.blocks, lambda: sizes)


def passed(model, pixels):
    """Return the scores of a pass, and its gradients."""
    model.zero_grad()
    scores = model.base_model.class_logits(model(pixel_values=pixels))
    scores.square().mean().backward()
    gradients = [value.grad for value in model.base_model.trainable().values() if value.grad is not None]
    return [scores.detach(), *gradients]


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


LAST = [17, 1, 21, 5]  # tokens of a query and of a pass, whose last block gets what is read, and attends to all


@pytest.mark.parametrize(
    ("adapter", "settings", "half", "tokens"),
    [
        ("l2p", {}, False, LAST),
        pytest.param("l2p", {"attention": "eager"}, True, LAST, marks=pytest.mark.slow),
        # the blocks of a query, and those of a pass, which have prefixes of two lengths
        pytest.param("dualprompt", {"attention": "eager"}, True, [17, 17, 17], marks=pytest.mark.slow),
        pytest.param("clip", {"attention": "eager"}, True, [20], marks=pytest.mark.slow),
    ],
)
def test_blocks_of_a_form_share_a_graph_and_give_the_same(graphs, adapter, settings, half, tokens):
    model, pixels = tiny.model(adapter, **settings).train(), tiny.images(4)
    if adapter == "l2p":
        model.base_model.read_last_block()
    model.base_model.prepare_stream([[0, 1], [2, 3], [4, 5]], dict(enumerate("abcdef")))
    model.base_model.begin_task(0)
    names, own = list(model.state_dict()), trunk(model, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected, odd = passed(model, pixels), passed(model, pixels[:3])
        with own.running(), own.running():
            assert same(passed(model, pixels), expected) and graphs == tokens
            assert same(passed(model, pixels[:3]), odd)  # a last batch, which is not compiled
            assert list(model.state_dict()) == names
            for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                for name, value in copied.named_parameters():
                    value.data.zero_() if name.endswith("fc2.weight") else None
                passed(copied, pixels)
            assert same(passed(model, pixels), expected)  # a copy runs its own blocks
    assert graphs == tokens
    assert all("forward" not in vars(block) for block in model.base_model.blocks)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "adapter"), families.ADAPTED)
def test_every_family_compiles(graphs, name, adapter):
    model, pixels = tiny.model(adapter, base=families.make(name)).train(), tiny.images(4)

    def outputs():
        torch.manual_seed(0)  # DINOv3 moves positions at random in training
        return passed(model, pixels)

    expected = outputs()
    with trunk(model, 4).running():
        assert same(outputs(), expected) and len(graphs) == {"l2p": 2, "dualprompt": 3}[adapter]
        assert same(outputs(), expected) and len(graphs) == {"l2p": 2, "dualprompt": 3}[adapter]


def test_graphs_may_run_backward_more_than_once():
    """As those of several probes do, which inductor's refuse where buffers are given away."""
    with trunk(tiny.model(), 4).running():
        assert torch._functorch.config.donated_buffer is False


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("adapter", tiny.ADAPTERS)
def test_probes_go_backward_through_one_graph(adapter):
    model, pixels = tiny.model(adapter), tiny.images(4)
    model.base_model.prepare_stream([[0, 1], [2, 3], [4, 5]], dict(enumerate("abcdef")))
    model.base_model.begin_task(0)
    model.base_model.end_task(0)
    context = Context(ProjectionConfig(method="functional", probes=3), images=range(4))

    def rows():
        return [seen.rows for seen in functional(model.base_model, {"pixel_values": pixels}, context)]

    expected = rows()
    with trunk(model, 4).running():
        found = rows()
    assert len(found) == len(expected) and all(
        apart(one, two) < 1e-4 for one, two in zip(expected, found, strict=True)
    )


def run(folder, compile_trunk, adapter="dualprompt", settings=None, **arguments):
    """Return the trainer of a run of three tasks, whose last training batches are incomplete."""
    model = tiny.model(adapter, head="statistics", **(settings or {}))
    defaults = {"num_train_epochs": 1, "per_device_eval_batch_size": 2, "per_device_train_batch_size": 3}
    with tiny.without_figures():
        trainer = tiny.trainer(folder, model=model, compile_trunk=compile_trunk, **{**defaults, **arguments})
        trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("adapter", "settings", "tasks"),
    [
        ("l2p", {"grow_pool": 2}, 2),
        pytest.param("l2p", {"grow_pool": 2}, 3, marks=pytest.mark.slow),
        # a mixture of experts, one of which is added for each task
        pytest.param(
            "dualprompt", {"selection": "mixture", "pool_size": 1, "grow_pool": True}, 3, marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_is_the_same_and_later_tasks_compile_nothing(tmp_path, graphs, adapter, settings, tasks):
    plain, counts = {}, []
    data = tiny.stream(dataset=tiny.data(train=2, test=2), num_tasks=tasks)
    for compile_trunk in (False, True):
        folder, watch = tmp_path / str(compile_trunk), Watch(graphs, counts)
        trainer = run(folder, compile_trunk, adapter, settings, stream=data, compensate_drift=True, callbacks=[watch])
        assert trainer.results.training["compile_trunk"] is compile_trunk
        for name in ("adapter_model.safetensors", "projection.safetensors"):
            found = load_file(folder / f"task-{tasks}" / name)
            expected = plain.setdefault(name, found)
            assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    after = counts[tasks:]
    assert counts[:tasks] == [0] * tasks and 4 < after[0] < 10 and set(after) == {after[0]}
    assert all("forward" not in vars(block) for block in trainer.stream_model.blocks)
    kept = [{path.name for path in (tmp_path / str(one) / "queries").glob("*.safetensors")} for one in (False, True)]
    assert kept[0] and kept[1] and not kept[0] & kept[1]


class Watch(TrainerCallback):
    def __init__(self, graphs, counts):
        self.graphs, self.counts = graphs, counts

    def on_task_end(self, args, state, control, **kwargs):
        self.counts.append(len(self.graphs))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{"torch_compile": True}, {"torch_compile_backend": "eager"}, {"torch_compile_mode": "default"}]
)
def test_the_whole_model_is_not_compiled(tmp_path, given, monkeypatch):
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    with pytest.raises(ValueError, match=rf"{next(iter(given))}=.*leave it out. compile_trunk=True compiles"):
        tiny.arguments(tmp_path, **given)
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ  # which would be for all trainers to come
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="ACCELERATE_DYNAMO_BACKEND=INDUCTOR.*compile_trunk=True"):
        tiny.arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert tiny.arguments(tmp_path).compile_trunk is False


def test_what_cannot_be_compiled_is_refused_before_training(tmp_path, monkeypatch, graphs):
    for model in (tiny.plain(), tiny.plain("head")):
        method = methods.create("fine_tuning")
        with pytest.raises(ValueError, match="compile_trunk=True is for prompts on a frozen backbone.*'(full|head)'"):
            tiny.trainer(tmp_path, model=model, method=method, compile_trunk=True)
    model = tiny.model()
    model.base_model.blocks[1].forward = nn.Identity().forward
    with pytest.raises(ValueError, match="a ViTLayer of this model has a forward of its own.*device_map"):
        tiny.trainer(tmp_path, model=model, compile_trunk=True)

    def broken(graph, inputs):
        raise OSError("no compiler was found\nand much else")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    with pytest.raises(ValueError, match=r"nothing can be compiled here \(.*no compiler was found\): .*g\+\+.*out\.$"):
        tiny.trainer(tmp_path, compile_trunk=True)


def test_what_fails_later_names_the_option(graphs, monkeypatch):
    model, pixels = tiny.model(), tiny.images(4)
    hook = model.base_model.blocks[0].mlp.register_forward_hook(lambda *args: torch._dynamo.graph_break())
    own = trunk(model, 4)
    with own.running(), pytest.raises(RuntimeError, match="compile_trunk=True: a ViTLayer cannot be compiled.*hooks"):
        model.base_model.query(pixels)
    hook.remove()
    monkeypatch.setattr(compiled, "LIMIT", 1)
    own = trunk(model, 4, 3)
    with torch.no_grad(), own.running():  # which would go on uncompiled
        model.base_model.query(pixels)
        with pytest.raises(RuntimeError, match="compile_trunk=True: a ViTLayer cannot be compiled"):
            model.base_model.query(pixels[:3])


def test_runs_from_before_were_not_compiled(tmp_path):
    before = {"training": {"seed": 3}}
    check_same_settings(before, {"training": {"seed": 3, "compile_trunk": False}}, tmp_path)
    with pytest.raises(ValueError, match="compile_trunk: True, was False"):
        check_same_settings(before, {"training": {"seed": 3, "compile_trunk": True}}, tmp_path)


# ---- with inductor ---------------------------------------------------------------------------------------------------


def apart(one, two):
    return float((one.double() - two.double()).norm() / one.double().norm().clamp_min(1e-12))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("adapter", "more"),
    [("l2p", {"last_block": "read"}), ("dualprompt", {}), ("clip", {})],
)
def test_inductor_is_the_run_to_rounding(tmp_path, adapter, more, half):
    """Prompts and keys in float32, to 1e-4 of their norm, in bf16 to 2e-2; bases in float64, to 1e-3 and 5e-2.

    Class statistics, which are of features, to 1e-4 and 5e-2. In bf16, a run that is not compiled is as far from float32.
    """
    method = "functional" if more else "pgp"
    files = {}
    for compile_trunk in (False, True):
        folder = tmp_path / str(compile_trunk)
        projection = ProjectionConfig(method=method, energy=0.9, key_energy=0.9)
        rate = 0.01 if adapter == "clip" else 0.1  # by larger steps, contexts go any way in bf16
        settings = {"optim": "sgd", "learning_rate": rate, "bf16": half, "projection": projection, **more}
        trainer = run(folder, compile_trunk, adapter, **settings)
        assert {value.dtype for value in trainer.stream_model.trainable().values()} == {torch.float32}
        assert {basis.columns.dtype for basis in trainer.projection.bases.values()} == {torch.float64}
        names = ("adapter_model.safetensors", "projection.safetensors")
        files[compile_trunk] = [load_file(folder / "task-3" / name) for name in names]
    tolerance, of_bases = (2e-2, 5e-2) if half else (1e-4, 1e-3)
    for name, value in files[False][0].items():
        if not name.endswith("calibration"):  # a temperature, from losses of scores
            allowed = max(tolerance, of_bases if half and "statistics" in name else 0)
            assert apart(value, files[True][0][name]) < allowed, name
    for name, basis in files[False][1].items():
        other = files[True][1][name]
        if basis.shape == other.shape:  # a direction more or less where the energy is at its share
            assert apart(basis @ basis.mT, other @ other.mT) < of_bases, name
        assert half or basis.shape == other.shape


@pytest.mark.slow
def test_a_resumed_run_is_the_run_with_inductor(tmp_path):
    run(tmp_path / "straight", True, "l2p", save_strategy="steps", save_steps=2)

    class Stop(Exception):
        pass

    model = tiny.model("l2p", head="statistics")
    settings = {"num_train_epochs": 1, "per_device_eval_batch_size": 2, "per_device_train_batch_size": 3}
    settings |= {"save_strategy": "steps", "save_steps": 2, "compile_trunk": True}
    with tiny.without_figures():
        broken = tiny.trainer(tmp_path / "resumed", model=model, **settings)
        step = broken.training_step

        def training_step(*args, **kwargs):
            if broken.task == 1 and broken.state.global_step == 3:
                raise Stop
            return step(*args, **kwargs)

        broken.training_step = training_step
        with pytest.raises(Stop):
            broken.train()
        again = tiny.trainer(tmp_path / "resumed", model=tiny.model("l2p", head="statistics"), **settings)
        again.train(resume_from_checkpoint=True)
    one, two = (
        load_file(tmp_path / name / "task-3" / "adapter_model.safetensors") for name in ("straight", "resumed")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_without_a_compiler_a_command_says_so_in_one_line(tmp_path):
    code = "import torch; from pgp_hf.training.compiling import check_compiler; check_compiler(torch.device('cpu'))"
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ValueError: compile_trunk=True: nothing can be compiled here")
    assert "C++ compiler" in last and last.endswith("or leave compile_trunk out.")
