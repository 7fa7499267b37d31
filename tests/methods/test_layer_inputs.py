"""GPM and null-space Adam: the rules for bases, what stays and what moves, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    LevitConfig,
    LevitForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from pgp_hf import set_trainable
from pgp_hf.data.images import ImageCollator
from pgp_hf.methods import GPM, GPMConfig, MethodState, NullSpaceAdam, NullSpaceAdamConfig, create
from pgp_hf.methods.layer_inputs import above
from pgp_hf.methods.linear_layers import Guard, add, joined, linear_layers, packed, put, same_input, unpacked
from pgp_hf.models import PlainModel, stream_model
from pgp_hf.projection import Basis, NullSpaceProjector, SecondMoment

pytestmark = pytest.mark.usefixtures("without_figures")
NAMES = ["gpm", "null_space_adam"]
E = torch.eye(3, dtype=torch.float64)
Q, K, V = (f"vit.layers.0.attention.{one}_proj" for one in "qkv")


def moment(*rows):
    return SecondMoment(len(rows[0])).update(torch.tensor(rows, dtype=torch.float64))


def diagonal(*values):
    return SecondMoment(len(values)).update(torch.tensor(values, dtype=torch.float64).sqrt().diag())


def span(basis):
    return basis.columns @ basis.columns.mT


# ---- worked numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_first_task_keeps_as_many_directions_as_its_energy_needs(name):
    """The released code of GPM keeps one too few, here 2."""
    for energy, rank in ((0.97, 3), (0.9, 2), (0.6, 1)):
        assert create(name, energy=energy).extended(Basis.empty(3), diagonal(9, 4, 1)).rank == rank


def test_a_later_task_of_gpm_counts_what_its_basis_holds():
    old, task = (
        GPM(GPMConfig(0.9)).extended(Basis.empty(3), diagonal(9, 4, 1)),
        moment((1, 1, 1), (0, 0, 2), (0, 0, 2)),
    )
    assert span(old).diagonal().tolist() == pytest.approx([1, 1, 0])
    assert float(old.captured(task)) == pytest.approx(2 / 11)
    assert task.residual(0, old.columns)[0].tolist() == pytest.approx([9, 0, 0], abs=1e-12)
    assert GPM(GPMConfig(0.9)).extended(old, task).rank == 3
    assert GPM(GPMConfig(0.18)).extended(old, task).rank == 2  # .1818 is enough


def test_null_space_adam_pools_and_so_a_task_may_drown():
    """One task of energy 100 along e1, one of energy 1 along e2: GPM counts each by itself."""
    first, second = diagonal(100, 0, 0), diagonal(0, 1, 0)
    gpm = GPM(GPMConfig(0.9)).extended(Basis.empty(3), first)
    assert GPM(GPMConfig(0.9)).extended(gpm, second).rank == 2
    first.update(E[1:2])
    assert NullSpaceAdam(NullSpaceAdamConfig(0.9)).extended(gpm, first).rank == 1
    assert NullSpaceAdam(NullSpaceAdamConfig(0.995)).extended(gpm, first).rank == 2


def test_rows_count_one_by_one_and_not_by_their_mean():
    """Of x = +e1, -e1, e2, e2 the mean is e2 / 2, by which the released code of Adam-NSCL leaves e1 free."""
    layer, moments = nn.Linear(2, 1, bias=False), {}
    for rows in ([[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]):
        add(moments, "layer", layer, (torch.tensor([rows]),))
    assert moments["layer"].sum.tolist() == [[2, 0], [0, 2]] and moments["layer"].rows == 4


def test_the_constant_of_the_bias_is_part_of_a_row():
    layer, moments = nn.Linear(2, 1), {}
    add(moments, "layer", layer, (torch.tensor([[[1.0, 2.0]]]),))
    assert moments["layer"].sum.tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]


def test_a_movement_is_projected_row_by_row():
    layer = nn.Linear(3, 2, bias=False)
    start = joined([layer]).clone()
    projector = NullSpaceProjector({"layer": Basis(E[:, :2])})
    projector.anchor([("layer", start)])
    moved = start + torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    projector.project_updates_([("layer", moved)])
    with torch.no_grad():
        put([layer], moved)
    assert torch.allclose(layer.weight - start, torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 6.0]]), atol=1e-6)


def test_layers_are_joined_with_their_biases_and_taken_apart_again():
    layers = [nn.Linear(3, 2), nn.Linear(3, 1)]
    matrix = joined(layers)
    assert matrix.shape == (3, 4) and torch.equal(matrix[:2, 3], layers[0].bias)
    with torch.no_grad():
        put(layers, torch.arange(12.0).reshape(3, 4))
    assert layers[0].weight.tolist() == [[0, 1, 2], [4, 5, 6]] and layers[0].bias.tolist() == [3, 7]
    assert layers[1].weight.tolist() == [[8, 9, 10]] and layers[1].bias.tolist() == [11]


@pytest.mark.parametrize(("a", "free", "left"), [(1.5, 1, 0.0004), (2, 2, 0.0013), (10, 3, 0.0058), (50, 4, 0.0235)])
def test_a_compares_with_the_smallest_eigenvalue(a, free, left):
    seen = diagonal(100, 10, 2, 0.5, 0.1, 0.05)
    basis = NullSpaceAdam(NullSpaceAdamConfig(a=a)).extended(Basis.empty(6), seen)
    assert basis.dim - basis.rank == free
    assert 1 - float(basis.captured(seen)) == pytest.approx(left, abs=5e-5)  # R of the paper
    assert torch.allclose(
        span(basis), torch.diag(torch.tensor([1.0] * (6 - free) + [0.0] * free, dtype=torch.float64))
    )


@pytest.mark.parametrize("a", [2, 50])
def test_one_dead_direction_leaves_a_nothing_else(a):
    assert above(diagonal(100, 10, 2, 0.5, 0.1, 0.05, 1e-9), a).rank == 6


def test_behind_a_layer_norm_a_leaves_the_one_direction_that_no_input_has():
    generator = torch.Generator().manual_seed(0)
    gamma, beta = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    rows = nn.functional.layer_norm(torch.randn(500, 16, generator=generator, dtype=torch.float64), (16,), gamma, beta)
    seen = SecondMoment(17).update(torch.cat([rows, torch.ones(500, 1)], 1))
    assert [above(seen, a).rank for a in (10, 30, 50)] == [16] * 3
    assert Basis.empty(17).extend(seen, 0.95).rank < 16


def test_projected_gradients_leak_under_adam_and_projected_updates_do_not():
    """Share of 100 steps' movement that is along a protected direction."""
    leaks = {}
    for apply_to in ("gradient", "update"):
        torch.manual_seed(1)
        weight = nn.Parameter(torch.zeros(1, 3, dtype=torch.float64))
        protected = nn.functional.normalize(torch.randn(3, 1, dtype=torch.float64), dim=0)
        projector = NullSpaceProjector({"w": Basis(protected)}, apply_to=apply_to)
        projector.anchor([("w", weight)])
        optimizer = torch.optim.Adam([weight], lr=0.01)
        projector.attach(optimizer, lambda weight=weight: [("w", weight)])
        target = torch.randn(1, 3, dtype=torch.float64) * torch.tensor([1.0, 3.0, 10.0])
        for _ in range(100):
            optimizer.zero_grad()
            (weight - target).square().sum().backward()
            optimizer.step()
        leaks[apply_to] = ((weight.detach() @ protected).norm() / weight.detach().norm()).item()
    assert leaks["gradient"] > 1e-2 and leaks["update"] < 1e-12


def test_a_symmetric_matrix_is_kept_by_its_triangle():
    matrix = diagonal(1, 2, 3).update(torch.tensor([[1.0, 2.0, 3.0]])).sum
    assert packed(matrix).shape == (6,) and torch.equal(unpacked(packed(matrix), 3), matrix)


# ---- which layers share a basis --------------------------------------------------------------------------------------


class Readers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.apart, self.bare, self.twice, self.idle = (nn.Linear(3, 3) for _ in range(6))
        self.bare = nn.Linear(3, 3, bias=False)
        self.changed = nn.Linear(3, 3)

    def forward(self, x):
        found = self.first(x) + self.second(x) + self.bare(x) + self.apart(x.clone()) + self.twice(x)
        found = found + self.twice(x.clone())
        x.add_(1)
        return found + self.changed(x)


@torch.no_grad()
def test_layers_share_a_basis_if_they_read_the_same_tensor():
    made = Readers()
    found = same_input(dict(made.named_children()), lambda: made(torch.ones(2, 3)))
    assert found == [["first", "second"], ["bare"], ["apart"], ["twice"], ["changed"]]
    assert not any(layer._forward_pre_hooks for layer in made.children())


@pytest.fixture(scope="module", params=NAMES)
def run(request, tmp_path_factory, without_figures):
    folder = tmp_path_factory.mktemp(request.param)
    own = tiny.trainer(folder, model=tiny.plain(), method=create(request.param, energy=0.8), save_full_weights="all")
    own.train()
    return own, folder


def test_queries_keys_and_values_share_a_basis_and_nothing_else_does(run):
    own, _ = run
    groups = sorted(sorted(one.layers) for one in own.method.inputs.values())
    expected = []
    for i in (0, 1):
        stem = f"vit.layers.{i}"
        expected.append(sorted(f"{stem}.attention.{one}_proj" for one in "qkv"))
        expected += [[f"{stem}.{one}"] for one in ("attention.o_proj", "mlp.fc1", "mlp.fc2")]
    assert groups == sorted(expected)


# ---- a stream --------------------------------------------------------------------------------------------------------


def weights(folder):
    return load_file(folder / "model.safetensors")


def moved(folder, t, since):
    a, b = weights(folder / f"task-{since}"), weights(folder / f"task-{t}")
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_only_linear_layers_and_the_head_move_after_the_first_task(run):
    _, folder = run
    linear = {name.rsplit(".", 1)[0] for name, value in weights(folder).items() if value.ndim == 2}
    found = moved(folder, 3, since=1)
    assert {name.rsplit(".", 1)[0] for name in found} == linear and len(found) == 2 * len(linear)


def test_old_rows_of_the_head_stay(run):
    own, folder = run
    a, b = weights(folder / "task-1"), weights(folder / "task-3")
    old = list(own.stream.tasks[0].classes)
    assert torch.equal(a["classifier.weight"][old], b["classifier.weight"][old])


def test_the_first_task_is_that_of_fine_tuning(run, tmp_path):
    """The bases are made without a random number."""
    tiny.trainer(tmp_path, model=tiny.plain(), method=None, save_full_weights="all").train_task(0)
    a, b = weights(tmp_path / "task-1"), weights(run[1] / "task-1")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ranks_are_recorded_and_those_of_gpm_never_fall(run):
    own, folder = run
    content = json.loads((folder / "method.json").read_text())["state"]["inputs"]
    tensors = load_file(folder / "method.safetensors")
    largest = [0, 0, 0]
    for name, entry in content.items():
        ranks = entry["rank_per_task"]
        assert len(ranks) == 3 and entry["rank"] == ranks[-1]
        assert tensors[f"{name}.basis"].shape == (entry["dim"], entry["rank"])
        assert entry["rows"] == 3 * 16 * 17  # 16 images a task, 17 tokens each
        assert own.method.name != "gpm" or ranks == sorted(ranks)
        largest = [max(pair) for pair in zip(largest, ranks, strict=True)]
    assert own.results.rank == largest == json.loads((folder / "results.json").read_text())["projection_rank"]
    assert content[Q]["layers"] == [Q, K, V] and min(largest) > 0


def test_the_card_says_what_is_not_promised(run):
    card = (run[1] / "README.md").read_text()
    assert run[0].method.describe().title in card and "energy=0.8" in card
    assert "old features move along the directions that were left free" in card
    assert "LayerNorms, embeddings and convolutions of the backbone learned from the first task alone" in card


def test_bases_hold_the_energy_of_what_the_layers_read(run):
    """Of the last task, for GPM; of all tasks together, for null-space Adam. Rows are those of unaugmented images."""
    own, _ = run
    tasks = [2] if own.method.name == "gpm" else [0, 1, 2]
    layer = dict(own.model.named_modules())[Q]
    if own.method.name == "null_space_adam":
        seen = unpacked(own.method.inputs[Q].moment, 25)
        assert seen[-1, -1] == 3 * 16 * 17
        share = (span(own.method.inputs[Q].basis) * seen).sum() / seen.trace()
    else:
        moments = {}
        hook = layer.register_forward_pre_hook(lambda module, inputs: add(moments, Q, module, inputs))
        for t in tasks:
            images = own.stream.train(t)
            pixels = own.data_collator([images[i] for i in range(len(images))])["pixel_values"]
            with torch.no_grad():
                own.model.eval()(pixel_values=pixels)
        hook.remove()
        share = own.method.inputs[Q].basis.captured(moments[Q])
    assert 0.8 - 1e-6 <= float(share) < 1


def test_max_images_are_observed(tmp_path):
    own = tiny.trainer(tmp_path, model=tiny.plain(), method=create("gpm", max_images=5), num_train_epochs=1)
    own.train_task(0)
    assert {one.rows for one in own.method.inputs.values()} == {5 * 17}


def test_the_last_blocks_alone(tmp_path):
    made = tiny.trainer(
        tmp_path,
        model=tiny.plain("last:1"),
        method=create("gpm", energy=0.8),
        num_train_epochs=1,
        save_full_weights="all",
    )
    made.train()
    assert all(name.startswith("vit.layers.1.") for one in made.method.inputs.values() for name in one.layers)
    found = moved(tmp_path, 3, since=1)
    assert len(found) == 2 * 7 and all(".layer.1." in name or name.startswith("classifier.") for name in found)
    assert not any("norm" in name for name in found)


def test_mixed_precision(tmp_path):
    own = tiny.trainer(tmp_path, model=tiny.plain(), method=create("gpm", energy=0.9), bf16=True, num_train_epochs=1)
    own.train_task(0)
    before = {name: value.clone() for name, value in own.model.state_dict().items()}
    own.train_task(1)
    after = own.model.state_dict()
    basis = own.method.inputs[Q].basis.columns[:, : own.method.inputs[Q].ranks[0]].float()
    for name in (Q, K, V):
        step = torch.cat(
            [
                after[f"{name}.weight"] - before[f"{name}.weight"],
                (after[f"{name}.bias"] - before[f"{name}.bias"])[:, None],
            ],
            1,
        )
        assert step.norm() > 1e-2 and (step @ basis).norm() < 1e-5 * step.norm()


# ---- old features ----------------------------------------------------------------------------------------------------


class Double(ImageCollator):
    def __call__(self, items):
        batch = super().__call__(items)
        return {**batch, "pixel_values": batch["pixel_values"].double()}


def change(folder, name="gpm", model=None, side=tiny.SIDE, learning_rate=0.01, **settings):
    """Relative change of the features of the first task's images by 50 steps on the second's.

    In float64; a task has two images, of five tokens each, so that the inputs of a layer span few dimensions.
    """
    processor = ViTImageProcessorPil(size={"height": side, "width": side})
    own = tiny.trainer(
        folder,
        model=set_trainable((model or tiny.backbone(patch_size=10)).double(), "all"),
        method=create(name, energy=1.0),
        stream=tiny.stream(dataset=tiny.data(train=1, test=1)),
        processing_class=processor,
        data_collator=Double(processor),
        per_device_train_batch_size=2,
        max_steps=50,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        save_strategy="no",
        **settings,
    )
    own.train_task(0)
    images = own.stream.train(0)
    pixels = own.data_collator([images[i] for i in range(len(images))])["pixel_values"]
    features = []
    for task in (None, 1):
        if task:
            before = {key: value.clone() for key, value in own.model.state_dict().items()}
            own.train_task(task)
        watch = own.stream_model.watch_features(lambda found: features.append(found.clone()))
        with torch.no_grad():
            own.model.eval()(pixel_values=pixels)
        watch.remove()
    after = own.model.state_dict()
    moved = [(after[f"{layer}.weight"] - before[f"{layer}.weight"]).norm() for layer in own.method.inputs]
    assert max(moved) > 1e-2, "nothing has learned"
    return ((features[1] - features[0]).norm() / features[0].norm()).item()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("gpm", {"weight_decay": 0.1}, marks=pytest.mark.slow),
        ("null_space_adam", {"weight_decay": 0.1}),
        ("gpm", {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1})}),
    ],
    ids=["gpm under AdamW", "null-space Adam", "gpm under SGD"],
)
def test_features_of_old_images_stay_where_all_inputs_are_spanned(tmp_path, name, settings):
    assert change(tmp_path, name, **settings) < 1e-12


def test_without_layer_norms_held_features_change(tmp_path, monkeypatch):
    def without(self, *args):
        made(self, *args)
        self.still = []

    made = Guard.__init__
    monkeypatch.setattr(Guard, "__init__", without)
    assert change(tmp_path) > 1e-2


def test_with_free_biases_features_change(tmp_path, monkeypatch):
    """Of `[W b]`, W alone is projected."""

    def add_rows(moments, name, layer, inputs):
        moments.setdefault(name, SecondMoment(layer.in_features)).update(inputs[0].flatten(0, -2))

    def put_weights(layers, matrix):
        for layer, part in zip(layers, matrix.split([one.out_features for one in layers]), strict=True):
            layer.weight.copy_(part)

    monkeypatch.setattr("pgp_hf.methods.layer_inputs.add", add_rows)
    monkeypatch.setattr(
        "pgp_hf.methods.linear_layers.joined", lambda layers: torch.cat([one.weight for one in layers]).detach()
    )
    monkeypatch.setattr("pgp_hf.methods.linear_layers.put", put_weights)
    assert change(tmp_path) > 1e-2


SMALL = {"num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48, "initializer_range": 0.2}


def beit():
    """Keys without a bias, while queries and values have one."""
    return BeitForImageClassification(
        BeitConfig(hidden_size=24, image_size=tiny.SIDE, patch_size=10, num_labels=tiny.CLASSES, **SMALL)
    )


def levit():
    """Linear layers among BatchNorms, whose running statistics must not follow new images, and convolutions."""
    sizes = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2] * 3, "depths": [1] * 3, "key_dim": [4] * 3}
    ratios = {"attention_ratio": [2] * 3, "mlp_ratio": [2] * 3, "drop_path_rate": 0}
    return LevitForImageClassification(LevitConfig(image_size=64, num_labels=tiny.CLASSES, **sizes, **ratios))


@pytest.mark.filterwarnings("ignore:.* bases have full rank")
@pytest.mark.parametrize(("make", "side"), [(beit, tiny.SIDE), pytest.param(levit, 64, marks=pytest.mark.slow)])
def test_other_architectures(tmp_path, make, side):
    with tiny.seeded(3):
        model = make()
    assert change(tmp_path, model=model, side=side, learning_rate=0.003) < 1e-10


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny.model, "a l2p prompt adapter leaves its backbone frozen: use PGPTrainer"),
        (lambda: tiny.plain("head"), r"learns its head alone \('head'\): choose pgp_hf.set_trainable"),
        (lambda: tiny.plain("lora:2"), r"learns the factors of LoRA \('lora:2'\): choose pgp_hf.set_trainable"),
    ],
)
def test_models_without_linear_layers_that_learn(name, model, message):
    with pytest.raises(TypeError, match=f"method '{name}'.*{message}"):
        create(name).check(stream_model(model()))


def test_a_backbone_without_linear_layers():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_labels=6, **sizes))
    with pytest.raises(TypeError, match="trained backbone of this ResNetForImageClassification has none"):
        create("gpm").check(PlainModel(model))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gpm", {"energy": 1.01}, r"energy=1.01 is outside \[0, 1\]"),
        ("gpm", {"energy": -0.1}, r"energy=-0.1 is outside \[0, 1\]"),
        ("null_space_adam", {"energy": float("nan")}, "energy=nan is not a number"),
        ("gpm", {"max_images": 0}, "max_images=0 is out of range"),
        ("null_space_adam", {"a": 0.5}, "a=0.5 is out of range"),
        ("null_space_adam", {"a": float("inf")}, "a=inf is out of range"),
        ("gpm", {"a": 10.0}, "method 'gpm' has no setting 'a'"),
    ],
)
def test_settings_out_of_range(name, settings, message):
    with pytest.raises(ValueError, match=message):
        create(name, **settings)


def test_a_warns_of_itself_and_needs_no_energy(tmp_path):
    with pytest.warns(
        UserWarning, match="a=10.0 compares eigenvalues.*Leave a out to choose directions by energy"
    ) as seen:
        own = tiny.trainer(
            tmp_path, model=tiny.plain(), method=create("null_space_adam", a=10.0, energy=0.0), num_train_epochs=1
        )
    assert [warning.filename for warning in seen if "compares" in str(warning.message)][0].endswith("tiny.py")
    own.train_task(0)
    assert own.method.inputs[Q].basis.rank == 24  # of 25


@pytest.mark.parametrize(("settings", "approximate"), [({"a": 10.0, "energy": 1.0}, True), ({"energy": 1.0}, False)])
def test_the_card_calls_a_approximate_whatever_energy_is(settings, approximate):
    """Energy is then not read."""
    limits = create("null_space_adam", **settings).describe().limits
    assert any("The protection is approximate" in limit for limit in limits) is approximate


def test_full_bases_are_told_once(tmp_path):
    own = tiny.trainer(tmp_path, model=tiny.plain(), method=create("gpm", energy=1.0), num_train_epochs=1)
    with pytest.warns(
        UserWarning, match=r"\d of 8 bases have full rank.*cannot move in later tasks. Lower energy \(1.0\)"
    ):
        own.train_task(0)
    full = sum(one.basis.full for one in own.method.inputs.values())
    assert f"In {full} of 8 bases every direction is protected" in (tmp_path / "README.md").read_text()
    if all(one.basis.full for one in own.method.inputs.values()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            own.method._warn_of_full()


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_another_method_or_a_contradictory_one(run, name):
    state = run[0].method.state()
    if run[0].method.name != name:
        with pytest.raises(
            ValueError, match=r"lacks the tensor '.*\.moment'|does not describe the tensor '.*\.moment'"
        ):
            create(name).load_state(state)
        return
    made = create(name, energy=0.8)
    made.load_state(state)
    assert made.rank == run[0].method.rank and made.state().values == state.values
    with pytest.raises(ValueError, match="lacks the tensor"):
        made.load_state(MethodState({}, state.values))
    with pytest.raises(ValueError, match="does not describe the tensor"):
        made.load_state(MethodState(state.tensors, {}))
    with pytest.raises(ValueError, match=r"inputs=\['x'\]: expected a description"):
        made.load_state(MethodState({}, {"inputs": ["x"]}))
    for spoilt in ({"layers": [K]}, {"rows": "many"}, {"rank_per_task": [1]}):
        entry = {**state.values["inputs"][Q], **spoilt}
        with pytest.raises(ValueError, match="does not fit its basis of shape"):
            made.load_state(MethodState(state.tensors, {"inputs": {**state.values["inputs"], Q: entry}}))
    made.load_state(MethodState({}, {}))
    assert made.rank == 0 and made.state() == MethodState({}, {})


def test_bases_of_layers_that_do_not_learn():
    model = PlainModel(tiny.plain("last:1"))
    assert set(linear_layers(model)) == {
        *(f"vit.layers.1.attention.{one}_proj" for one in "qkvo"),
        *(f"vit.layers.1.mlp.fc{i}" for i in (1, 2)),
    }
    with pytest.raises(ValueError, match=f"belong to '{Q}', which is not a trained linear layer"):
        Guard(model, {Q: [Q]}, {Q: Basis.empty(25)})
    with pytest.raises(ValueError, match=r"has shape \(24, 25\), which is not .* 24"):
        Guard(PlainModel(tiny.plain()), {Q: [Q]}, {Q: Basis.empty(24)})


def test_it_goes_on_from_a_copy_of_a_task(run, tmp_path):
    own, folder = run
    shutil.copytree(folder / "task-2", tmp_path / "copy")
    again = tiny.trainer(tmp_path / "out", model=tiny.plain(), method=create(own.method.name, energy=0.8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a reference that the copy lacks
        again.train(resume_from_checkpoint=str(tmp_path / "copy"))
    for name in ("model", "method"):
        a, b = (load_file(where / f"{name}.safetensors") for where in (folder, tmp_path / "out"))
        assert all(torch.equal(a[key], b[key]) for key in a)
