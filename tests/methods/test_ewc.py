"""Elastic weight consolidation: the Fisher information, the penalty, and a stream learned with both."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pgp_hf.methods import EWC, EWCConfig, MethodState, create
from pgp_hf.methods.ewc import Quadratic, label_weights, squared_gradients
from pgp_hf.runs.revision import Revision

pytestmark = pytest.mark.usefixtures("without_figures")
PROMPT = "base_model.model.vit.embeddings.l2p_prompt"


def trainer(folder, method, **settings):
    return tiny.trainer(folder, method=method, **settings)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_figures):
    folder = tmp_path_factory.mktemp("ewc")
    own = trainer(folder, create("ewc", strength=300.0))
    own.train()
    return own, folder


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory, without_figures):
    folder = tmp_path_factory.mktemp("ft")
    trainer(folder, None).train()
    return folder


# ---- worked numbers --------------------------------------------------------------------------------------------------


def regression(labels, keys=((0,),)):
    """The Fisher information of softmax regression with W = (.5, -.5) on x = (1, 1, 2), y = (0, 1, 0)."""
    parameter, total = torch.tensor([0.5, -0.5], requires_grad=True), torch.zeros(2)
    for key in keys:
        for i, (x, y) in enumerate(((1.0, 0), (1.0, 1), (2.0, 0))):
            own = label_weights(parameter * x, y, labels, (*key, i))
            total += squared_gradients(parameter * x, own, [parameter])[0]
    return (total / (3 * len(keys))).tolist()


def test_fisher_information_of_softmax_regression():
    assert regression("exact") == pytest.approx([0.271066] * 2, abs=1e-6)
    assert regression("true") == pytest.approx([0.221204] * 2, abs=1e-6)
    sampled = regression("sampled", [(seed,) for seed in range(2000)])
    assert sampled == pytest.approx([0.271066] * 2, abs=0.015)  # neither .221 nor, by the likeliest label, .067


def test_a_drawn_label_is_a_function_of_its_key():
    logits, state = torch.tensor([0.3, -0.2, 1.0, 0.1]), torch.get_rng_state()
    draws = [int(label_weights(logits, 0, "sampled", (1, 2, image)).argmax()) for image in range(60)]
    assert draws == [int(label_weights(logits, 3, "sampled", (1, 2, image)).argmax()) for image in range(60)]
    assert set(draws) == {0, 1, 2, 3} and torch.equal(torch.get_rng_state(), state)
    assert draws != [int(label_weights(logits, 0, "sampled", (1, 3, image)).argmax()) for image in range(60)]


def test_gradients_of_float16_models_do_not_underflow():
    parameter = torch.ones(1, requires_grad=True)
    logits = (parameter.half() * 3e-8)[0] * torch.tensor([1.0, -1.0])
    found = squared_gradients(logits, torch.tensor([1.0, 0.0]), [parameter])[0].item()
    assert found == pytest.approx((3e-8) ** 2, rel=0.5) and found > 0  # 3e-8 is half the smallest float16


def test_penalty_and_gradient():
    theta = torch.tensor([1.5, 3.0], requires_grad=True)
    term = Quadratic({"w": torch.tensor([0.2, 0.0])}, {"w": torch.ones(2)})
    penalty = 10 * term({"w": theta})
    penalty.backward()
    assert penalty.item() == pytest.approx(0.25) and theta.grad.tolist() == pytest.approx([1.0, 0.0])


def test_the_optimum_between_an_old_and_a_new_task():
    theta = torch.zeros(1, requires_grad=True)
    term = Quadratic({"w": torch.tensor([0.5])}, {"w": torch.zeros(1)})
    for _ in range(200):
        loss = (theta - 2).square().sum() / 2 + 4 * term({"w": theta})
        (gradient,) = torch.autograd.grad(loss, [theta])
        theta.data -= 0.2 * gradient
    assert theta.item() == pytest.approx(2 / 3, abs=1e-5)


@pytest.mark.parametrize(
    ("mode", "gamma", "penalty"), [("separate", 1.0, 2.5), ("online", 1.0, 1.0), ("online", 0.5, 0.75)]
)
def test_separate_penalties_are_not_one(mode, gamma, penalty):
    method = EWC(EWCConfig(mode=mode, gamma=gamma))
    for anchor in (0.0, 1.0):
        method.consolidate({"w": torch.ones(1)}, {"w": torch.tensor([anchor])})
    assert sum(term({"w": torch.tensor([2.0])}).item() for term in method.terms) == pytest.approx(penalty)


# ---- a stream --------------------------------------------------------------------------------------------------------


def test_without_strength_it_is_fine_tuning(run, fine_tuned, tmp_path):
    trainer(tmp_path, EWC(EWCConfig(strength=0.0))).train()
    for t in (1, 2, 3):
        assert same(weights(tmp_path / f"task-{t}"), weights(fine_tuned / f"task-{t}"))
    assert same(weights(run[1] / "task-1"), weights(fine_tuned / "task-1"))  # no random number is used up
    assert not same(weights(run[1] / "task-2"), weights(fine_tuned / "task-2"))


def test_it_holds_what_it_is_for(run, fine_tuned):
    def moved(folder):
        return (weights(folder / "task-2")[PROMPT] - weights(folder / "task-1")[PROMPT]).norm()

    assert moved(run[1]) < 0.7 * moved(fine_tuned)


def test_what_is_kept_are_shared_parameters_as_the_task_left_them(run):
    own, folder = run
    for t in (1, 2, 3):
        tensors, content = Revision.read(folder / f"task-{t}").method()
        assert set(tensors) == {f"0.fisher.{PROMPT}", f"0.anchor.{PROMPT}"}  # neither the head nor what only selects
        assert torch.equal(tensors[f"0.anchor.{PROMPT}"], weights(folder / f"task-{t}")[PROMPT])
        assert (tensors[f"0.fisher.{PROMPT}"] >= 0).all() and tensors[f"0.fisher.{PROMPT}"].max() > 0
        assert content["settings"]["strength"] == 300.0 and content["state"] == {}
    card = (folder / "README.md").read_text()
    assert "Elastic weight consolidation (EWC)" in card and "strength=300.0" in card and "PNAS 2017" in card


@pytest.mark.parametrize("head", ["linear", "statistics"])
def test_fisher_information_is_that_of_single_images(tmp_path, head):
    own = trainer(tmp_path, create("ewc", labels="true"), model=tiny.model(head=head), num_train_epochs=1)
    own.train_task(0)
    stream, model = tiny.stream(), own.model.eval()
    classes, prompt, total = list(stream.tasks[0].classes), own.stream_model.trainable()[PROMPT], 0
    for item in stream.train(0):
        pixels = own.processing_class([item["image"]], return_tensors="pt")["pixel_values"]
        found = []
        watch = own.stream_model.watch_features(found.append)
        model(pixel_values=pixels)
        watch.remove()
        logits = own.stream_model.linear_logits(found[0])[0, classes]
        log_p = logits.log_softmax(-1)[classes.index(item["label"])]
        total = total + torch.autograd.grad(log_p, [prompt])[0].square()
    assert torch.allclose(own.method.terms[0].fisher[PROMPT], total / len(stream.train(0)), rtol=1e-4, atol=1e-9)


def test_the_end_of_a_task_consumes_no_random_number(tmp_path):
    own = trainer(tmp_path, create("ewc"), num_train_epochs=1)
    states = []
    end_task = own.method.end_task

    def watched(context):
        states.append(torch.get_rng_state())
        end_task(context)
        states.append(torch.get_rng_state())

    own.method.end_task = watched
    own.train_task(0)
    assert torch.equal(*states) and all(p.grad is None or not p.grad.any() for p in own.model.parameters())


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.task == 1 and state.global_step == 6:
            raise KeyboardInterrupt


def test_separate_penalties_are_resumed_within_a_task(tmp_path):
    """The online form is part of the contract of all methods."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    settings = {"strength": 300.0, "mode": "separate"}
    trainer(straight, create("ewc", **settings)).train()
    stop = StopAt()
    stop.trainer = trainer(broken, create("ewc", **settings), callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        stop.trainer.train()
    trainer(broken, create("ewc", **settings)).train(resume_from_checkpoint=True)
    for t in (1, 2, 3):
        assert same(weights(broken / f"task-{t}"), weights(straight / f"task-{t}"))
        files = [load_file(folder / f"task-{t}/method.safetensors") for folder in (broken, straight)]
        assert same(*files) and len(files[0]) == 2 * t


@pytest.mark.parametrize("adapter", tiny.some_of(["dualprompt", "clip"], "clip"))
def test_other_adapters(tmp_path, adapter):
    own = trainer(tmp_path, create("ewc", max_images=5), model=tiny.model(adapter), num_train_epochs=1)
    own.train()
    (term,) = own.method.terms
    assert set(term.fisher) >= set(own.stream_model.prompt_parameters())
    assert not [name for name in term.fisher if "classifier" in name or "text" in name]


def test_a_model_that_shares_nothing_says_so(tmp_path):
    own = trainer(tmp_path, create("ewc"), model=tiny.model("clip", image_length=0), num_train_epochs=1)
    with pytest.warns(UserWarning, match="EWC has nothing to hold"):
        own.train_task(0)
    assert own.method.terms == []


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0 is out of range"),
        ({"strength": float("nan")}, "strength=nan is not a number"),
        ({"gamma": 1.5}, r"gamma=1.5 is outside \[0, 1\]"),
        ({"mode": "both"}, "mode='both' is unknown: choose one of online, separate"),
        ({"labels": "argmax"}, "labels='argmax' is unknown: choose one of sampled, exact, true"),
        ({"max_images": 0}, "max_images=0 is out of range"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        create("ewc", **settings)


def test_a_state_of_another_method():
    with pytest.raises(ValueError, match="holds 'logits'"):
        EWC().load_state(MethodState({"logits": torch.zeros(1)}, {}))
    with pytest.raises(ValueError, match="incomplete"):
        EWC().load_state(MethodState({"0.fisher.w": torch.zeros(1)}, {}))
