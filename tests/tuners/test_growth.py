"""Classes and tasks that nobody foresaw: adapters, LoRA and whole models grow, and keep what they know to the bit."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import tiny
import torch
from foreign import SharedTokenConfig, registered_tuner
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokens import tokenizer
from torch import nn
from torch.nn import functional as F

from pgp_hf import L2PConfig
from pgp_hf.models import PlainModel, load_weights, open_head, stream_model, weights
from pgp_hf.tuners.base import PromptConfig

NAMES = {label: f"class {label}" for label in range(6)}
TASKS = [[0, 1], [2, 3], [4, 5]]
NEW = ["class 6", "class 7", "a bird", "class 9", "class 10"]
PIXELS = tiny.images(20)

PLAIN = ("full", "last:1", "head", "lora:2")
KINDS = [(adapter, head) for adapter in (*tiny.ADAPTERS, "foreign") for head in ("linear", "statistics")]
KINDS += [(name, "linear") for name in PLAIN]
PROMPTS = [kind for kind in KINDS if kind[0] not in PLAIN]


@pytest.fixture(scope="module", autouse=True)
def registered():
    with registered_tuner():
        yield


def made(kind, head="linear", attention="sdpa", **settings):
    """A model of six classes that has learned nothing."""
    if kind in PLAIN:
        model = tiny.plain(kind, tiny.backbone(attention=attention)).eval()
    elif kind == "foreign":
        model = tiny.model(SharedTokenConfig(head=head, **settings), attention=attention)
    else:
        model = tiny.model(kind, head=head, attention=attention, **settings)
    stream_model(model).prepare_stream(TASKS, NAMES)
    if kind == "clip":
        model.base_model.tokenizer = tokenizer
    return model


def learn(model, task, classes, steps=2, seed=0):
    """Train a task by hand."""
    learner = stream_model(model)
    learner.begin_task(task)
    learner.training_starts()
    optimizer = torch.optim.AdamW(learner.trainable().values(), lr=0.05)
    optimizer.register_step_post_hook(lambda *_: learner.after_step())
    pixels = tiny.images(4 * len(classes), seed=100 + task + seed)
    labels, targets = torch.tensor(classes).repeat(4), torch.arange(len(classes)).repeat(4)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(pixel_values=pixels)
        loss = F.cross_entropy(learner.class_logits(output)[:, classes], targets)
        if (pull := learner.auxiliary_loss(output)) is not None:
            loss = loss + pull.mean()
        loss.backward()
        optimizer.step()
    model.eval()
    learner.end_task(task)
    if getattr(learner, "statistics", None) is not None:
        learner.learn_statistics(learner.statistics.fresh().update(tiny.features(model, pixels), labels))


def taught(kind, head="linear", **settings):
    """A model that has learned three tasks of two classes, a step each."""
    model = made(kind, head, **settings)
    for task, classes in enumerate(TASKS):
        learn(model, task, classes, steps=1)
    return model


@torch.no_grad()
def logits(model, pixels=PIXELS):
    return stream_model(model).class_logits(model(pixel_values=pixels))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def grown_names(before, after):
    """Names of the tensors that have grown; all of the numbers that were there must be there still."""
    assert before.keys() == after.keys()
    grown = set()
    for name, old in before.items():
        new = after[name]
        assert old.dtype == new.dtype and old.ndim == new.ndim, name
        if old.shape != new.shape:
            grown.add(name)
        assert torch.equal(new[tuple(slice(size) for size in old.shape)], old), name
    return grown


def grow(model, names=NEW, seed=3):
    stream_model(model).add_classes(names, seed)
    return model


# ---- nothing that is known changes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        ("sdpa", torch.float32),
        ("eager", torch.bfloat16),
        pytest.param("sdpa", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("eager", torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("kind", "head"), KINDS)
def test_what_is_known_stays(kind, head, attention, dtype):
    model = taught(kind, head, attention=attention).to(dtype)
    learner, pixels = stream_model(model), PIXELS.to(dtype)
    before, known, random = state(model), logits(model, pixels), torch.random.get_rng_state()
    learns, digest = {name: value.requires_grad for name, value in model.named_parameters()}, learner.digest()
    learner.add_classes(NEW[:2], seed=3)
    learner.add_task(3, [5, 6, 7], seed=3)
    learner.add_classes(NEW[2:], seed=3)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert learner.class_names == {**NAMES, **dict(enumerate(NEW, 6))}
    assert {name: value.requires_grad for name, value in model.named_parameters()} == learns
    assert learner.digest() == digest and (kind not in PLAIN or learner.name == kind)
    grown = grown_names(before, state(model))
    parts = (
        "classifier",
        "statistics.default.counts",
        "statistics.default.means",
        "expert",
        "dualprompt_key",
        "clip_prompt",
    )
    assert grown and all(any(part in name for part in parts) for name in grown)
    after = logits(model, pixels)
    assert after.shape == (20, 11) and after.dtype == known.dtype
    if head == "statistics":
        assert torch.isneginf(after[:, 6:]).all() and after[:, :6].isfinite().all()
    largest = known.float().abs().max()
    assert (after[:, :6].float() - known.float()).abs().max() <= 1e-6 * largest
    assert torch.equal(after[:, :6].argmax(-1), known.argmax(-1))


@pytest.mark.parametrize(("kind", "head"), KINDS)
def test_features_stay_to_the_bit(kind, head):
    model, found = taught(kind, head), []
    watch = stream_model(model).watch_features(found.append)
    logits(model)
    grow(model)
    stream_model(model).add_task(3, [6, 7], seed=3)
    logits(model)
    watch.remove()
    assert len(found) == 2 and torch.equal(*found)


@pytest.mark.parametrize(("kind", "head"), KINDS)
def test_growing_in_steps_is_growing_at_once(kind, head):
    once, steps = taught(kind, head), taught(kind, head)
    grow(once)
    for task in (3, 4, 5):
        stream_model(once).add_task(task, [task], seed=3)
    torch.manual_seed(99)
    grow(steps, NEW[:2])
    stream_model(steps).add_task(5, [5], seed=3)
    grow(steps, NEW[2:])
    ours, theirs = state(once), state(steps)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert torch.equal(logits(once), logits(steps))


@pytest.mark.parametrize("kind", [*PLAIN, "l2p", "dualprompt"])
def test_new_rows_depend_on_seed_and_class_alone(kind):
    rows = []
    for seed, before in ((3, "l2p"), (3, kind), (4, kind)):
        model = grow(taught(before), seed=seed)
        rows.append([weights(model)[name][6:] for name in sorted(weights(model)) if "classifier" in name])
    assert all(torch.equal(a, b) for a, b in zip(rows[0], rows[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(rows[1], rows[2], strict=True))


def test_a_new_entry_depends_on_seed_and_index_alone():
    found = []
    for size, seed in ((3, 5), (4, 5), (3, 6)):
        model = made("dualprompt", pool_size=size)
        stream_model(model).add_task(5, [0], seed)
        found.append([c["default"].narrow(axis, 4, 2) for c, axis in model.base_model._entries()])
    assert len(found[0]) == 3
    for first, other, seeded in zip(*found, strict=True):
        assert torch.equal(first, other) and not torch.equal(first, seeded)
        assert -1 <= first.min() < -0.5 and 0.5 < first.max() <= 1


def test_the_other_heads_grow_too():
    """The head beneath PEFT's wrapper, and every adapter's copy and statistics."""
    model = taught("l2p", "statistics")
    model.add_adapter("other", tiny.config("l2p", head="statistics", pool_size=3))
    plain, pixels = tiny.backbone(), PIXELS
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(pixel_values=pixels).logits, plain(pixel_values=pixels).logits)
        before = state(model)
        grow(model)
        grown = grown_names(before, state(model))
        shown = model(pixel_values=pixels).logits
    stem = "base_model.model.classifier."
    assert {f"{stem}{part}.weight" for part in ("original_module", "modules_to_save.default")} <= grown
    assert f"{stem}modules_to_save.other.bias" in grown
    assert torch.allclose(shown[:, :6], plain(pixel_values=pixels).logits, rtol=0, atol=1e-5) and shown.shape[1] == 11
    model.set_adapter("other")
    assert model.base_model.class_names == {**dict(enumerate(model.base_model.class_names.values()))}
    assert len(model.base_model.class_names) == 11 and len(model.base_model.statistics.counts) == 11
    fresh = tiny.model(tiny.config("l2p", id2label=model.base_model.class_names))
    assert model.base_model.class_names.keys() == fresh.base_model.class_names.keys()


def test_adapters_of_clip_grow_alone():
    model = taught("clip", "statistics")
    model.add_adapter("other", tiny.config("clip"))
    grow(model)
    assert len(model.peft_config["default"].class_tokens) == 11 and len(model.peft_config["other"].class_tokens) == 6
    assert logits(model).shape == (20, 11)
    model.set_adapter("other")
    assert logits(model).shape == (20, 6)


@pytest.mark.parametrize(("kind", "head"), PROMPTS)
def test_without_the_adapter_the_model_is_as_it_was(kind, head):
    model = taught(kind, head)
    grow(model)
    stream_model(model).add_task(3, [6], seed=3)
    plain = tiny.backbone(tiny.ADAPTERS.get(kind, "classification"))
    inputs = {"input_ids": torch.tensor([[38, 3, 39]])} if kind == "clip" else {}
    with torch.no_grad(), model.disable_adapter():
        shown, expected = (one(pixel_values=PIXELS, **inputs) for one in (model, plain))
    name = "image_embeds" if kind == "clip" else "logits"
    assert torch.allclose(shown[name][:, :6], expected[name][:, :6], rtol=0, atol=1e-6 * expected[name].abs().max())
    removed = model.unload()
    assert type(removed) is type(plain)


# ---- it goes on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "head"), KINDS)
def test_it_learns_on(kind, head):
    model = taught(kind, head)
    learner = stream_model(model)
    grow(model, NEW[:2])
    learner.add_task(3, [6, 7], seed=3)
    before = {name: value.detach().clone() for name, value in learner.trainable().items()}
    learn(model, 3, [6, 7], steps=3)
    moved = {name for name, value in learner.trainable().items() if not torch.equal(value, before[name])}
    assert moved
    if kind != "clip":
        weight = next(name for name in before if "classifier" in name and name.endswith("weight"))
        rows = (learner.trainable()[weight] - before[weight]).abs().sum(1)
        assert (rows[6:] > 0).all()
    assert logits(model)[:, :8].isfinite().all()
    learner.add_classes(NEW[2:], seed=3)  # and once more
    learner.add_task(4, [8], seed=3)
    learn(model, 4, [8, 9], steps=1)
    assert logits(model).shape == (20, 11)


@pytest.mark.parametrize("kind", ["dualprompt", "clip"])
def test_finished_entries_never_move(kind):
    model = taught(kind)
    stream_model(model).add_task(3, [6, 7], seed=3)
    grow(model, NEW[:2])
    before = weights(model)
    finished = {
        name: (value.clone(), 1 if "expert" in name else 0)
        for name, value in before.items()
        if any(part in name for part in ("expert", "dualprompt_key", "context"))
    }
    assert finished and all(value.shape[axis] == 4 for value, axis in finished.values())
    learn(model, 3, [6, 7])
    for name, (value, axis) in finished.items():
        now = weights(model)[name]
        assert torch.equal(now.narrow(axis, 0, 3), value.narrow(axis, 0, 3)), name
        assert not torch.equal(now, value), name


@pytest.mark.parametrize("kind", ["dualprompt", "clip"])
def test_entries_that_are_free_are_taken_first(kind):
    model = made(kind)  # of three
    before = state(model)
    for task in range(3):
        stream_model(model).add_task(task, [0], seed=3)
    assert not grown_names(before, state(model)) and model.base_model.adapter_config.added_entries is None
    stream_model(model).add_task(3, [0], seed=3)
    config = model.base_model.adapter_config
    assert (config.pool_size, config.added_entries, config.entries) == (3, 1, 4)
    with pytest.raises(ValueError, match="task 5 has no entry: pool_size=4"):
        stream_model(model).begin_task(4)


def test_an_entry_is_not_chosen_before_its_task():
    """Also in an adapter that no task has trained, where prediction chooses among all that there are."""
    model = made("dualprompt")
    known = logits(model)
    stream_model(model).add_task(3, [6], seed=3)
    with torch.no_grad():
        model.base_model.layer.dualprompt_key["default"][3:] = model.base_model.query(PIXELS).mean(0)
    assert torch.equal(logits(model), known)


@pytest.mark.parametrize("kind", ["dualprompt", "clip"])
def test_a_stream_known_in_advance_draws_what_it_drew(kind):
    model = made(kind, grow_pool=True)
    torch.manual_seed(5)
    stream_model(model).prepare_stream([[label] for label in range(6)], NAMES)
    config = model.base_model.adapter_config
    assert (config.pool_size, config.added_entries) == (6, None)
    torch.manual_seed(5)
    for container, axis in model.base_model._entries():
        value = container["default"]
        drawn = model.base_model._fresh(*(3 if i == axis else size for i, size in enumerate(value.shape)))
        assert torch.equal(value.narrow(axis, 3, 3), drawn)


@pytest.mark.parametrize(("kind", "head"), KINDS)
def test_it_is_saved_and_loaded(kind, head, tmp_path):
    model = taught(kind, head)
    grow(model)
    learner = stream_model(model)
    learner.add_task(3, [6, 7], seed=3)
    learn(model, 3, [6, 7], steps=1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    names = {str(label): name for label, name in learner.class_names.items()}
    if kind in ("full", "last:1", "head"):
        assert json.loads((tmp_path / "config.json").read_text())["id2label"] == names
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(logits(loaded), expected) and loaded.num_labels == 11
        return
    shapes = {name: value.shape for name, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {name: value.shape for name, value in weights(model).items()}
    if kind == "lora:2":
        base = tiny.backbone(num_labels=11)
    else:
        assert json.loads((tmp_path / "adapter_config.json").read_text())["id2label"] == names
        base = tiny.backbone(tiny.ADAPTERS.get(kind, "classification"))
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    stream_model(loaded).resume_after(3)
    assert torch.equal(logits(loaded), expected)
    if kind == "clip":
        loaded.base_model.tokenizer = tokenizer
    before = state(loaded)
    stream_model(loaded).add_classes(["one more"], seed=3)  # a loaded one, which is frozen, grows as well
    assert grown_names(before, state(loaded)) and not any(p.requires_grad for p in loaded.parameters())
    again = grow(model, ["one more"])
    ours, theirs = weights(again), weights(loaded)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("kind", ["l2p", "dualprompt"])
def test_it_is_loaded_by_its_folder_alone(kind, tmp_path):
    tiny.backbone().save_pretrained(tmp_path / "backbone")
    base = tiny.backbone().from_pretrained(tmp_path / "backbone")
    model = tiny.model(kind, base)
    grow(model)
    model.save_pretrained(tmp_path / "adapter")
    from pgp_hf import load_pretrained

    tiny.processor().save_pretrained(tmp_path / "adapter")
    classifier = load_pretrained(tmp_path / "adapter")
    assert classifier.id2label == model.base_model.class_names and len(classifier.id2label) == 11
    assert torch.equal(logits(classifier.model), logits(model.eval()))


def test_a_copy_grows_alone():
    model = taught("dualprompt", "statistics")
    other = copy.deepcopy(model)
    before = state(model)
    grow(other)
    stream_model(other).add_task(3, [6], seed=3)
    assert not grown_names(before, state(model)) and len(stream_model(model).class_names) == 6
    assert grown_names(before, state(other))


def test_parameters_of_a_run_that_went_on_can_be_replayed():
    """The same calls on a new model make the shapes that a revision's tensors need."""
    model = taught("dualprompt", "statistics")
    grow(model)
    stream_model(model).add_task(3, [6], seed=3)
    learn(model, 3, [6, 7], steps=1)
    other = grow(made("dualprompt", "statistics"), seed=77)
    stream_model(other).add_task(3, [6], seed=78)
    load_weights(other, weights(model))
    stream_model(other).resume_after(3)
    assert torch.equal(logits(other), logits(model))
    assert (
        stream_model(other).settings()
        == stream_model(model).settings()
        == stream_model(made("dualprompt", "statistics")).settings()
    )


# ---- L2P's pool ------------------------------------------------------------------------------------------------------


def selected(model):
    logits(model)
    return stream_model(model).selected_prompts


def test_the_pool_grows_with_the_tasks():
    model = taught("l2p", grow_pool=3)  # entries for three tasks, known in advance
    tuner, config = model.base_model, model.base_model.adapter_config
    assert (config.pool_size, config.added_entries, config.learned_entries, tuner.pool_size) == (5, 6, 11, 11)
    before, known = selected(model), logits(model)
    tuner.add_task(3, [6, 7], seed=3)
    assert (config.pool_size, config.added_entries, config.learned_entries, tuner.pool_size) == (5, 9, 11, 14)
    assert torch.equal(selected(model), before) and torch.equal(logits(model), known)
    tuner.begin_task(3)
    with torch.no_grad():  # now they can be selected
        tuner.layer.l2p_key["default"][11:] = tuner.query(PIXELS)[:3]
    assert (selected(model)[:3] >= 11).any(-1).all()
    with tuner.as_before_task(3):
        assert (selected(model) < 11).all()
    assert tuner.pool_size == 14 and config.settings()["pool_size"] == 5
    assert config.settings()["grow_pool"] == 3 and "added_entries" not in config.settings()


def test_entries_of_later_tasks_are_not_selected():
    model = made("l2p", grow_pool=4)
    tuner = model.base_model
    with torch.no_grad():  # an entry of each task for every image
        tuner.layer.l2p_key["default"][9:] = tuner.query(PIXELS)[:4]
    assert (selected(model) < 5).all()
    tuner.begin_task(0)
    assert (selected(model) < 5).all()
    tuner.begin_task(1)
    assert (selected(model) < 9).all() and (selected(model) >= 5).any()
    model.train()(pixel_values=PIXELS)
    assert (tuner.selected_prompts < 9).all()
    model.eval()
    tuner.begin_task(2)
    assert (selected(model) >= 9).any()
    tuner.resume_after(0)
    assert (selected(model) < 5).all()
    assert tuner.as_before_task(1) is not None and made("l2p").base_model.as_before_task(1) is None


def test_new_entries_of_the_pool_depend_on_seed_and_index_alone():
    first, steps = (made("l2p", grow_pool=2) for _ in range(2))  # 5 + 4
    stream_model(first).add_task(5, [0], seed=3)
    random = torch.random.get_rng_state()
    for task in (3, 4, 5):
        stream_model(steps).add_task(task, [0], seed=3)
    assert torch.equal(torch.random.get_rng_state(), random)
    for name in ("l2p_prompt", "l2p_key"):
        ours, theirs = (weights(m)[f"base_model.model.vit.embeddings.{name}"] for m in (first, steps))
        assert len(ours) == 15 and torch.equal(ours[9:], theirs[9:])
    stream_model(steps).add_task(4, [0], seed=3)  # again: nothing
    assert len(weights(steps)["base_model.model.vit.embeddings.l2p_key"]) == 15


def test_a_grown_pool_is_saved_and_loaded(tmp_path):
    model = made("l2p", grow_pool=2)
    stream_model(model).add_task(3, [0], seed=3)
    learn(model, 1, [2, 3])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.backbone(), tmp_path).eval()
    config = loaded.base_model.adapter_config
    assert (config.pool_size, config.added_entries, config.learned_entries) == (5, 6, 7)
    assert torch.equal(logits(loaded), logits(model))
    stream_model(loaded).resume_after(1)
    assert config.learned_entries == 7
    stream_model(loaded).prepare_stream(TASKS, NAMES)  # what is there already is not added again
    assert config.entries == 11 and "11 prompts" in L2PConfig.card(config.to_dict()).parts


def test_a_pool_of_fixed_size_never_grows():
    model = taught("l2p")
    before = state(model)
    stream_model(model).add_task(7, [0], seed=3)
    config = model.base_model.adapter_config
    assert not grown_names(before, state(model))
    assert config.learned_entries is None and config.added_entries is None and config.grow_pool is None


@pytest.mark.parametrize("adapter", tiny.ADAPTERS)
def test_older_files_have_none_of_the_new_fields(adapter, tmp_path):
    model = tiny.model(adapter)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    old = {k: v for k, v in content.items() if k not in ("added_entries", "template")}
    if adapter == "l2p":
        old = {k: v for k, v in old.items() if k not in ("learned_entries", "grow_pool")}
    assert len(old) < len(content)
    file.write_text(json.dumps(old))
    loaded = PeftModel.from_pretrained(tiny.backbone(tiny.ADAPTERS[adapter]), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    own = stream_model(model).settings()
    assert all(old.get(name) == value for name, value in own.items())  # as resuming compares them


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grow_pool": 0}, "grow_pool=0 is out of range: it must be finite, and at least 1"),
        ({"added_entries": -1}, "added_entries=-1 is out of range: it must be finite, and at least 0"),
        ({"learned_entries": 4}, "learned_entries=4 is out of range: expected 10 to 10"),
        ({"learned_entries": 13, "added_entries": 2, "grow_pool": 1}, "expected 10 to 12"),
    ],
)
def test_numbers_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        L2PConfig(**settings)


def test_a_task_without_its_entries_is_refused():
    tuner = made("l2p", grow_pool=2).base_model
    with pytest.raises(ValueError, match=r"task 4 selects among 11 entries .* there are 9: call add_task\(3"):
        tuner.begin_task(3)


# ---- CLIP's names ----------------------------------------------------------------------------------------------------


def test_new_names_are_zero_shot_until_they_are_learned():
    model = taught("clip")
    tuner = grow(model).base_model
    config = tuner.adapter_config
    assert config.class_tokens[6:] == tokenizer(NEW)["input_ids"]
    table = tuner.text_layer.clip_prompt_features["default"].clone()
    assert torch.allclose(table[6:], tuner.zero_shot_features()[6:], rtol=0, atol=1e-5)
    tuner.add_task(3, [6, 8], seed=3)
    learn(model, 3, [6, 8])
    now = tuner.text_layer.clip_prompt_features["default"]
    changed = [label for label in range(11) if not torch.equal(now[label], table[label])]
    assert changed == [6, 8]


def test_names_go_into_the_template():
    texts = []

    def listening(given):
        texts.append(given)
        return tokenizer([text.removeprefix("a photo of a ") for text in given])

    config = type(tiny.config("clip")).for_classes(listening, ["class 0", "class_1"], "a photo of a {}", text_length=2)
    assert config.template == "a photo of a {}" and "template" not in config.settings()
    model = tiny.model(config, kind="clip")
    model.base_model.tokenizer = listening
    grow(model, ["class 2"])
    assert texts[-1] == ["a photo of a class 0", "a photo of a class 1", "a photo of a class 2"]
    assert model.base_model.adapter_config.class_tokens[2] == [38, 2, 3, 4, 39]


def test_the_tokenizer_is_that_of_the_backbone():
    from transformers import CLIPModel

    from pgp_hf import ClipPromptConfig, embedded

    folder = embedded.clip_path()
    from transformers import AutoTokenizer

    config = ClipPromptConfig.for_classes(AutoTokenizer.from_pretrained(folder), ["zero", "one"], text_length=2)
    model = get_peft_model(CLIPModel.from_pretrained(folder), config).eval()
    names = ["two", "three"]
    model.base_model.add_classes(names, seed=0)
    whole = ClipPromptConfig.for_classes(model.base_model.tokenizer, ["zero", "one", *names])
    assert model.base_model.adapter_config.class_tokens == whole.class_tokens


@pytest.mark.parametrize("template", ["a photo", "{} or {}", "{0}", "{:>99}", "{} {x}"])
def test_a_template_has_one_place_for_the_name(template):
    with pytest.raises(ValueError, match=r"template=.*expected a text with one \{\} for the class name"):
        type(tiny.config("clip")).for_classes(tokenizer, ["cat"], template)


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        (
            ["class 6 " * 30],
            None,
            r"the longest class name takes \d+ tokens, .*no text_length leaves room.*shorten the name, or its template",
        ),
        (["x"], "tokenizer", "the tokenizer makes .* of the class name 'class 0' with template='{}'"),
        (["x"], "none", "no tokenizer for new class names can be loaded from the backbone"),
    ],
)
def test_names_that_the_text_tower_cannot_have(names, change, message):
    model = taught("clip", "statistics")
    if change == "tokenizer":
        model.base_model.tokenizer = lambda texts: {"input_ids": [[38, 1, 39] for _ in texts]}
    elif change == "none":
        model.base_model.tokenizer = None
    refused(model, ValueError, message, names)


# ---- a stream that begins with nothing -------------------------------------------------------------------------------


def bases():
    return {
        "pre-trained": tiny.backbone(),
        "of no class": tiny.backbone(num_labels=0),
        "bare": tiny.backbone("backbone"),
        "bare with pooler": tiny.backbone("backbone", seed=8),
    }


@pytest.mark.parametrize("base", bases())
@pytest.mark.parametrize(("kind", "head"), [kind for kind in KINDS if kind[0] not in ("clip", "last:1")])
def test_any_head_is_opened(kind, head, base, tmp_path):
    body = bases()[base]
    bare = "bare" in base
    if kind in PLAIN:
        if kind == "lora:2":
            model = get_peft_model(body, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        else:
            model = body.requires_grad_(kind == "full")
            if not bare:
                body.classifier.requires_grad_(True)
    else:
        config = SharedTokenConfig(head=head) if kind == "foreign" else tiny.config(kind, head=head)
        model = tiny.model(config, body)
    own = stream_model(model).trainable()
    prompts = {name: value for name, value in own.items() if "classifier" not in name and "pooler" not in name}
    shown = features_of(body if kind in PLAIN else model, bare)
    random = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_head(model)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert (opened is model) == (not bare or isinstance(model, PeftModel))
    learner = stream_model(opened)
    assert learner.class_names == {} and not any(p.is_meta for p in opened.parameters())
    now = {id(value) for value in learner.trainable().values()}
    assert all(id(value) in now for value in prompts.values())  # the same parameters, not copies
    assert torch.allclose(features_of(opened, False), shown, rtol=0, atol=1e-5)
    learner.prepare_stream([], {})
    learner.add_classes(NEW[:3], seed=3)
    learner.add_task(0, [0, 1, 2], seed=3)
    assert any("classifier" in name for name in learner.trainable())
    learn(opened, 0, [0, 1, 2])
    expected = logits(opened)
    assert expected.shape == (20, 3) and learner.class_names == dict(enumerate(NEW[:3]))
    opened.save_pretrained(tmp_path)
    if isinstance(opened, PeftModel):
        fresh = tiny.backbone(num_labels=3, seed=8 if "pooler" in base else 7)
        fresh.vit.load_state_dict(
            {n: v for n, v in bases()[base].state_dict().items() if "pooler" not in n}
        ) if bare else None
        loaded = PeftModel.from_pretrained(fresh, tmp_path)
    else:
        loaded = type(opened).from_pretrained(tmp_path)
    loaded.eval()
    if kind in ("dualprompt",):
        stream_model(loaded).resume_after(0)
    assert torch.equal(logits(loaded), expected)
    if isinstance(opened, PeftModel):
        assert stream_model(loaded).digest() == learner.digest()  # it is on the backbone that it was trained on
    else:
        learner.check()
        assert learner.name == kind


@torch.no_grad()
def features_of(model, bare):
    """What the head reads, also where there is none."""
    model.eval()
    stream_model(model).begin_task(0)  # a statistics head has nothing to say yet
    if bare:
        return model(pixel_values=PIXELS).last_hidden_state[:, 0]
    found = []
    watch = stream_model(model).watch_features(found.append)
    model(pixel_values=PIXELS)
    watch.remove()
    return found[0]


@pytest.mark.parametrize("head", ["linear", "statistics"])
@pytest.mark.parametrize("named", [False, True])
def test_clip_is_opened(named, head, tmp_path):
    names = {} if named else {"class_tokens": None, "id2label": None}
    model = tiny.model("clip", head=head, **names)
    assert open_head(model) is model and model.base_model.class_names == {}
    model.base_model.tokenizer = tokenizer
    with pytest.raises(ValueError, match="no class names.*learn a first task"):
        logits(model)
    assert model.base_model.text_layer.clip_prompt_features["default"].shape == (0, 16)
    grow(model, NEW[:3])
    stream_model(model).add_task(0, [0, 1, 2], seed=3)
    learn(model, 0, [0, 1, 2])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.backbone("clip"), tmp_path).eval()
    assert logits(model).shape == (20, 3) and torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("head", ["linear", "statistics"])
def test_opened_by_steps_is_opened_at_once(head):
    """From zero rows, in whatever steps: the same head, whatever head the backbone had."""
    models = [tiny.model("l2p", tiny.backbone(num_labels=count), head=head) for count in (0, 2, 6)]
    for model, steps in zip(models, ([5], [2, 3], [1, 1, 3]), strict=True):
        open_head(model)
        start = 0
        for step in steps:
            grow(model, NEW[start : start + step])
            start += step
    heads = [{name: value for name, value in weights(model).items() if "classifier" in name} for model in models]
    assert heads[0].keys() and all(
        torch.equal(value, other[name]) for other in heads[1:] for name, value in heads[0].items()
    )


def test_a_convolutional_head_grows_at_its_end():
    from transformers import ResNetConfig, ResNetForImageClassification

    with tiny.seeded(1):
        model = ResNetForImageClassification(
            ResNetConfig(num_labels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
        ).eval()
    before, known = state(model), logits(model)
    grow(model)
    assert grown_names(before, state(model)) == {"classifier.1.weight", "classifier.1.bias"}
    assert (logits(model)[:, :3] - known).abs().max() <= 1e-6 * known.abs().max()
    assert logits(open_head(model)).shape == (20, 0)


# ---- refused before anything changes ---------------------------------------------------------------------------------


def refused(model, error, message, names=("new",), call=None):
    before, learner = state(model), stream_model(model)
    named = copy.deepcopy(learner.class_names)
    configs = {n: c.to_dict() for n, c in model.peft_config.items()} if isinstance(model, PeftModel) else {}
    with pytest.raises(error, match=message):
        open_head(model) if call == "open" else learner.add_classes(list(names), seed=3)
    after = state(model)
    assert before.keys() == after.keys() and not grown_names(before, after)
    assert stream_model(model).class_names == named
    assert configs == ({n: c.to_dict() for n, c in model.peft_config.items()} if configs else {})


@pytest.mark.parametrize(("kind", "head"), KINDS)
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["x", "class 3"], ValueError, "there is a class 'class 3' already"),
        (["x", "y", "x"], ValueError, "there is a class 'x' already"),
        (["x", 7], TypeError, r"expected a sequence of strings"),
    ],
)
def test_names_that_do_not_do(kind, head, names, error, message):
    refused(made(kind, head), error, message, names)


def test_a_string_is_not_a_sequence_of_names():
    with pytest.raises(TypeError, match="names='bird'.*expected a sequence of strings"):
        made("full") and stream_model(made("full")).add_classes("bird", seed=0)


@pytest.mark.parametrize("call", [None, "open"])
def test_a_frozen_head_cannot_grow(call):
    model = tiny.model("l2p", modules_to_save=[])
    refused(model, ValueError, r"modules_to_save=\[\] leaves the head frozen", call=call)
    lora = get_peft_model(tiny.backbone(), LoraConfig(target_modules=["q_proj"], modules_to_save=["layernorm"]))
    message = "leaves the head frozen" if call else "the head of this LoRA model does not learn"
    refused(lora, ValueError, message, call=call)


def test_a_head_that_is_not_linear_cannot_grow():
    model = tiny.backbone()
    model.classifier = nn.Sequential(nn.Linear(24, 6), nn.Tanh())
    refused(model, TypeError, "the head ends in a Tanh, which cannot grow")
    refused(model, TypeError, "the head ends in a Tanh, which cannot grow", call="open")
    normed = tiny.backbone()
    nn.utils.parametrizations.weight_norm(normed.classifier)
    refused(normed, TypeError, "cannot grow by a class")


def test_a_sharded_head_cannot_grow():
    model = tiny.backbone()
    model.classifier.weight = nn.Parameter(model.classifier.weight[:3].detach().clone())
    refused(model, ValueError, r"the head's weight is sharded \(shape \(3, 24\) here, 6 x 24 as a whole\)")


def test_a_head_of_another_size_cannot_grow():
    model = tiny.backbone()
    model.config.id2label = {0: "cat", 1: "dog"}
    refused(model, ValueError, "the head has 6 rows for 2 class names")


@pytest.mark.parametrize("base", [tiny.backbone("backbone"), tiny.backbone(num_labels=0)])
def test_without_a_head_nothing_grows(base):
    model = tiny.model("l2p", copy.deepcopy(base))
    with pytest.raises(TypeError, match=rf"{type(base).__name__} has no classifier that could grow: .*open_head"):
        model.base_model.add_classes(["new"], seed=3)
    clip = tiny.model("clip", class_tokens=None, id2label=None)
    with pytest.raises(TypeError, match="CLIPModel has no classifier that could grow"):
        clip.base_model.add_classes(["new"], seed=3)


@pytest.mark.parametrize("adapter", ["l2p", "lora"])
def test_adapters_that_share_a_head_are_not_robbed_of_it(adapter):
    config = (
        tiny.config("l2p")
        if adapter == "l2p"
        else LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])
    )
    model = get_peft_model(tiny.backbone(), config)
    model.add_adapter("other", copy.deepcopy(config))
    refused(model, ValueError, "the adapters default, other share the head", call="open")
    model.delete_adapter("other")
    assert len(stream_model(open_head(model)).class_names) == 0


def test_a_backbone_that_gets_no_head():
    with pytest.raises(
        TypeError, match="CLIPModel has no classifier, and transformers has no model that puts one on it"
    ):
        open_head(tiny.backbone("clip"))


def test_outside_the_package_everything_is_inherited():
    tuner = made("foreign", "statistics").base_model
    assert not {"add_classes", "add_task", "open_head"} & set(vars(type(tuner)))
    assert not {"add_classes", "add_task"} & set(vars(PromptConfig))
    assert isinstance(stream_model(made("full")), PlainModel) and AutoPeftModel is not None
