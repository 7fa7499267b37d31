"""CLIP prompts: a context per task, one image prompt, class names as the head."""

from __future__ import annotations

import copy
import json
import re

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pgp_hf import ClipPromptConfig, L2PConfig, ProjectionConfig

pytestmark = pytest.mark.usefixtures("without_figures")

NAMES = [f"class_{c}" for c in "abcdef"]


class Tokenizer:
    """A token a letter, and names of different lengths."""

    def __call__(self, texts):
        return {
            "input_ids": [
                [38, *(ord(letter) % 37 for letter in text[: 7 + i % 3]), 39] for i, text in enumerate(texts)
            ]
        }


def config(**kwargs):
    return ClipPromptConfig.for_classes(
        Tokenizer(), NAMES, **{"pool_size": 3, "text_length": 4, "image_length": 3, **kwargs}
    )


def make(attention="sdpa", **kwargs):
    return tiny.model(config(**kwargs), kind="clip", attention=attention)


@pytest.fixture
def images():
    return tiny.images()


def texts():
    """All class names as a batch, padded."""
    rows = config().class_tokens
    width = max(map(len, rows))
    ids = torch.tensor([row + [39] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("how", ["empty", "disabled", "unloaded"])
def test_without_prompts_it_is_zero_shot_clip_to_the_bit(images, attention, how):
    base = tiny.backbone("clip", attention)
    expected = base(pixel_values=images, **texts())
    if how == "empty":
        output = tiny.model(config(text_length=0, image_length=0), copy.deepcopy(base))(pixel_values=images)
    else:
        model = tiny.model(config(), copy.deepcopy(base))
        assert not torch.equal(model(pixel_values=images).logits_per_image, expected.logits_per_image)
        with model.disable_adapter():
            output = (model.unload() if how == "unloaded" else model)(pixel_values=images, **texts())
    assert torch.equal(output.logits_per_image, expected.logits_per_image)
    assert torch.equal(output.logits_per_text, expected.logits_per_text)


def test_prompts_equal_a_forward_pass_written_out(images):
    """Image prompts behind CLS before the pre-norm, contexts before the name, cosine times the logit scale."""
    model = make("eager")
    tuner = model.base_model
    tuner.prepare_stream([[0, 3], [1, 2], [4, 5]], NAMES)
    tuner.begin_task(1)
    logits = model(pixel_values=images).logits_per_image
    plain = tiny.backbone("clip", "eager")
    vision, text = plain.vision_model, plain.text_model
    tokens = vision.embeddings(images)
    prompt = tuner.layer.clip_prompt_image["default"].expand(5, -1, -1)
    hidden = vision.pre_layrnorm(torch.cat([tokens[:, :1], prompt, tokens[:, 1:]], 1))
    for layer in vision.encoder.layers:
        hidden = layer(hidden, None)
    image = plain.visual_projection(vision.post_layernorm(hidden[:, 0]))
    features = []
    for c, row in enumerate(config().class_tokens):
        embedded = text.embeddings.token_embedding(torch.tensor(row))
        if c in (1, 2):  # the running task's classes have its context; the others no context yet
            context = tuner.text_layer.clip_prompt_context["default"][1]
            embedded = torch.cat([embedded[:1], context, embedded[1:]])
        hidden = (embedded + text.embeddings.position_embedding.weight[: len(embedded)])[None]
        causal = torch.full((len(embedded), len(embedded)), -torch.inf).triu(1)[None, None]
        for layer in text.encoder.layers:
            hidden = layer(hidden, causal)
        features.append(plain.text_projection(text.final_layer_norm(hidden)[0, -1]))
    cosine = torch.nn.functional.cosine_similarity(image[:, None], torch.stack(features)[None], dim=-1)
    assert torch.allclose(logits, cosine * plain.logit_scale.exp(), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_beneath_half_precision(images, dtype):
    """Two digits, as bfloat16 has them, give many classes the same score, and the first of them would win."""
    model = tiny.model(config(), base=tiny.backbone("clip").to(dtype))
    tuner = model.base_model
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values=images.to(dtype))
        again = tuner.score_features(output.image_embeds)
        linear = tuner.linear_logits(output.image_embeds)
    table = tuner.text_layer.clip_prompt_features["default"].double()
    image = output.image_embeds.double()
    expected = image @ (table / table.norm(dim=-1, keepdim=True)).T * tuner.model.logit_scale.double().exp()
    assert output.image_embeds.dtype == torch.bfloat16 and output.logits_per_image.dtype == torch.float32
    assert torch.allclose(output.logits_per_image.double(), expected, rtol=1e-5, atol=1e-5)
    for scores in (again, linear):  # of embeddings that are brought to length 1 once more
        assert scores.dtype == torch.float32 and torch.allclose(scores.double(), expected, rtol=0.02, atol=0.02)


def test_finished_tasks_keep_their_text_features(images):
    model = make()
    tuner = model.base_model
    tuner.prepare_stream([[0, 3], [1, 2], [4, 5]], NAMES)
    zero_shot = tuner.text_layer.clip_prompt_features["default"].clone()
    assert torch.equal(zero_shot, tuner.zero_shot_features())
    tuner.begin_task(0)
    with torch.no_grad():
        tuner.text_layer.clip_prompt_context["default"][0] += 1
    live = model(pixel_values=images).logits_per_image
    assert torch.equal(tuner.text_layer.clip_prompt_features["default"], zero_shot)
    tuner.end_task(0)
    table = tuner.text_layer.clip_prompt_features["default"]
    assert [not torch.equal(a, b) for a, b in zip(table, zero_shot, strict=True)] == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    assert torch.allclose(model(pixel_values=images).logits_per_image, live, atol=1e-4)


def test_gradients_reach_the_running_context_and_the_image_prompt(images):
    model = make()
    model.base_model.prepare_stream([[0, 3], [1, 2], [4, 5]], NAMES)
    model.base_model.begin_task(1)
    model.train()
    model(pixel_values=images).logits_per_image[:, [1, 2]].logsumexp(1).sum().backward()
    moved = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[-2] for name in moved} == {"clip_prompt_context", "clip_prompt_image"}
    context = next(g for name, g in moved.items() if "context" in name)
    assert (context.abs().sum((1, 2)) > 0).tolist() == [False, True, False]


def test_outputs_keep_their_shapes_and_text_can_still_be_given(images):
    model = make("eager")
    base = tiny.backbone("clip", "eager")
    plain, prompted = (
        m.vision_model(images, output_hidden_states=True, output_attentions=True)
        for m in (base, model.base_model.model)
    )
    assert prompted.last_hidden_state.shape == plain.last_hidden_state.shape
    assert [h.shape for h in prompted.hidden_states] == [h.shape for h in plain.hidden_states]
    assert [a.shape for a in prompted.attentions] == [a.shape for a in plain.attentions]
    own = model(pixel_values=images, **texts())
    assert torch.allclose(own.text_embeds, base(pixel_values=images, **texts()).text_embeds)
    assert isinstance(model(pixel_values=images, return_dict=False), tuple)


def test_predictions_do_not_depend_on_neighbours(images):
    model = make()
    together = model(pixel_values=images).logits_per_image
    alone = torch.cat([model(pixel_values=image[None]).logits_per_image for image in images.flip(0)]).flip(0)
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    trainer = tiny.trainer(folder, model=make(), weight_decay=0.1)
    trainer.train()
    return trainer, folder


def test_a_stream_is_learned_and_loads_as_it_was(run, images):
    trainer, folder = run
    results = json.loads((folder / "results.json").read_text())
    assert results["method"] == "clip_prompt" and "prompt_usage" not in results
    assert results["projection_rank"][0] > 0
    card = (folder / "README.md").read_text()
    assert "CLIPModel.from_pretrained" in card and "4 context tokens per task" in card and "linear head" not in card
    trained = trainer.model.eval()
    loaded = PeftModel.from_pretrained(tiny.backbone("clip"), folder).eval()
    assert torch.equal(loaded(pixel_values=images).logits_per_image, trained(pixel_values=images).logits_per_image)
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        "base_model.model.text_model.embeddings.clip_prompt_context",
        "base_model.model.text_model.embeddings.clip_prompt_features",
        "base_model.model.vision_model.embeddings.clip_prompt_image",
    }


def test_finished_contexts_and_features_never_move(run):
    trainer, folder = run
    tasks = [load_file(folder / f"task-{t}" / "adapter_model.safetensors") for t in (1, 2, 3)]
    context = "base_model.model.text_model.embeddings.clip_prompt_context"
    features = "base_model.model.text_model.embeddings.clip_prompt_features"
    for done in (0, 1):
        classes = list(trainer.stream.tasks[done].classes)
        for later in tasks[done + 1 :]:
            assert torch.equal(tasks[done][context][done], later[context][done])
            assert torch.equal(tasks[done][features][classes], later[features][classes])
    assert not torch.equal(tasks[0][context][2], tasks[2][context][2])


def test_the_image_prompt_moves_outside_its_basis(run):
    _, folder = run
    name = "base_model.model.vision_model.embeddings.clip_prompt_image"
    before, after = (load_file(folder / t / "adapter_model.safetensors")[name].double() for t in ("task-1", "task-3"))
    bases = load_file(folder / "task-1" / "projection.safetensors")
    assert set(bases) == {name}
    moved = after - before
    assert moved.norm() > 1e-3 and (moved @ bases[name]).norm() < 1e-5 * moved.norm()


def test_protected_rows_are_the_tokens_before_the_pre_norm(images):
    model = make()
    ((name, role, rows),) = model.base_model.protected_rows(images)
    tokens = tiny.backbone("clip").vision_model.embeddings(images)
    prompt = model.base_model.layer.clip_prompt_image["default"].expand(5, -1, -1)
    assert role == "prompt" and name in model.base_model.prompt_parameters()
    assert torch.allclose(rows, torch.cat([tokens[:, :1], prompt, tokens[:, 1:]], 1).flatten(0, 1))


def test_task_incremental_is_among_the_tasks_own_classes(tmp_path, run):
    trainer = tiny.trainer(tmp_path, model=make(), weight_decay=0.1, stream=tiny.stream(scenario="task_incremental"))
    trainer.train()
    easier, harder = trainer.results.matrix, run[0].results.matrix
    assert easier[0] == harder[0]
    assert all(a >= b for x, y in zip(easier, harder, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.slow  # the contract resumes it too
def test_resumed_is_straight(run, tmp_path):
    _, folder = run
    trainer = tiny.trainer(tmp_path, model=make(), weight_decay=0.1)
    trainer.train_task(0)
    trainer.train_task(1)
    tiny.trainer(tmp_path, model=make(), weight_decay=0.1).train(resume_from_checkpoint=True)
    a, b = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow  # for L2P it is in the tests of the trainer
def test_projection_narrows_drift(tmp_path):
    drifts = {}
    for method in ("none", "pgp"):
        projection = ProjectionConfig(method=method, energy=0.999)
        trainer = tiny.trainer(tmp_path / method, model=make(), projection=projection, learning_rate=0.05)
        trainer.train()
        drifts[method] = trainer.results.drift[-1]
    assert drifts["pgp"] < 0.8 * drifts["none"]


def test_more_tasks_than_contexts(tmp_path):
    with pytest.raises(ValueError, match="3 tasks need as many entries, pool_size=2"):
        tiny.trainer(tmp_path, model=make(pool_size=2))
    trainer = tiny.trainer(tmp_path, model=make(pool_size=2, grow_pool=True))
    assert trainer.tuner.text_layer.clip_prompt_context["default"].shape[0] == 3


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("classification", config, "ViTForImageClassification cannot take CLIP prompts: it has no vision_model"),
        ("clip", lambda: config(text_length=10), r"takes 19 tokens .*18 positions: shorten text_length to at most 9"),
        ("clip", lambda: L2PConfig(), "CLIPModel cannot take visual prompts: it has no patch embeddings"),
        ("clip", lambda: config(image_length=-1), "image_length=-1"),
        ("clip", lambda: ClipPromptConfig(id2label={0: "a"}), "1 class names, but class_tokens for 0"),
    ],
)
def test_what_does_not_fit(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.model(settings(), kind=kind)


def test_one_name_is_not_a_sequence_of_names():
    with pytest.raises(TypeError, match=r"names='cat': expected a sequence of names, .* such as \['cat'\]"):
        ClipPromptConfig.for_classes(None, "cat")


@pytest.mark.parametrize("length", [9, 17, 18, 19, 200])
@pytest.mark.parametrize("text_length", [0, 2, 10, 40])
def test_advice_about_long_class_names_works(length, text_length):
    tokens = [[38, *[5] * (length - 2), 39]]

    def make_with(text_length):
        return tiny.model(
            ClipPromptConfig(class_tokens=tokens, id2label={0: "a"}, text_length=text_length), kind="clip"
        )

    try:
        make_with(text_length)
    except ValueError as error:
        advised = re.search(r"shorten text_length to at most (-?\d+)", str(error))
        if advised:
            make_with(int(advised[1]))
        else:
            assert length > 18 and "shorten the name, or its template, to at most 18 tokens" in str(error)
    else:
        assert length + text_length <= 18


def test_without_class_names_there_is_nothing_to_classify(images):
    model = tiny.model(ClipPromptConfig(), kind="clip")
    assert model(pixel_values=images, **texts()).logits_per_image.shape == (5, 6)
    with pytest.raises(ValueError, match="no class names"):
        model(pixel_values=images)
    with pytest.raises(TypeError, match="class names"):
        tiny.trainer("unused", model=model)


def test_a_second_adapter_starts_zero_shot_too(images):
    model = make()
    own = model(pixel_values=images).logits_per_image
    model.add_adapter("second", config(image_length=0))
    assert torch.equal(model(pixel_values=images).logits_per_image, own)
    model.set_adapter("second")
    with torch.no_grad():
        scores = model(pixel_values=images).logits_per_image
        with model.disable_adapter():
            base = model.base_model
            texts = base.zero_shot_features()
            features = base.frozen_features(images)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    expected = unit(features) @ unit(texts).T * base.model.logit_scale.exp()
    assert torch.allclose(scores, expected, atol=1e-4)
