"""A tuner that the package does not have, defined here: registered, it is trained, saved, loaded, resumed and described."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import tiny
import torch
from peft import PeftModel
from peft import mapping as registry
from safetensors.torch import load_file
from torch import Tensor, nn

from pgp_hf import ProjectionConfig, load_pretrained
from pgp_hf.models import KeepsClassStatistics, Protectable, SelectsPrompts, StreamModel, stream_model
from pgp_hf.tuners import L2PConfig, L2PModel, register
from pgp_hf.tuners.base import AdapterCard, PromptConfig, PromptLayer, ViTPromptTuner
from pgp_hf.tuners.base.consistency import consistency_rows
from pgp_hf.tuners.base.layer import strip_prompts

PROMPT = "base_model.model.vit.embeddings.shared_token_prompt"
HEAD = "base_model.model.classifier"


@dataclass
class SharedTokenConfig(PromptConfig):
    """Configure one learned token that all images share."""

    method_name = "SHARED_TOKEN"

    scale: float = field(default=0.5, metadata={"help": "standard deviation of the token's initial values"})

    @classmethod
    def card(cls, settings):
        return AdapterCard(parts=f"one token, drawn with a standard deviation of {settings['scale']}", selects=False)


class SharedTokenEmbeddings(PromptLayer):
    adapter_layer_names = ("shared_token_prompt",)

    def update_layer(self, adapter_name: str, config: SharedTokenConfig) -> None:
        token = config.scale * torch.randn(1, self.position_embeddings.shape[-1])
        self.add_parameters(adapter_name, config.inference_mode, shared_token_prompt=token)

    def forward(self, pixel_values: Tensor, *args, **kwargs) -> Tensor:
        embeddings = self.base_layer(pixel_values, *args, **kwargs)
        if self.adapter is None:
            return embeddings
        token = self.expand_to_batch("shared_token_prompt", len(embeddings))
        return torch.cat([embeddings[:, :1], token, embeddings[:, 1:]], dim=1)


class SharedTokenModel(ViTPromptTuner):
    prefix = "shared_"  # not its name with an underscore, which PEFT would take by default
    pool_size = 1

    def _targets(self, config: SharedTokenConfig, stem: str, backbone: nn.Module) -> list[str]:
        return [f"{stem}embeddings"]

    def _wrap(self, config: SharedTokenConfig, adapter_name: str, target: nn.Module, name: str) -> PromptLayer:
        layer = target if isinstance(target, SharedTokenEmbeddings) else SharedTokenEmbeddings(target)
        layer.update_layer(adapter_name, config)
        return layer

    def _select(self, query: Tensor, config: SharedTokenConfig) -> Tensor:
        return query.new_zeros(len(query))

    def _after_backbone(self, backbone, args, output):
        if self.layer.adapter is not None:
            strip_prompts(output, 1)
        return output

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        return {PROMPT: self.layer.shared_token_prompt[self.adapter]}

    @torch.no_grad()
    def protected_rows(self, pixel_values: Tensor, prompt_query=None) -> Iterator[tuple[str, str, Tensor]]:
        yield PROMPT, "prompt", self.layer(pixel_values).flatten(0, 1)

    @torch.no_grad()
    def attention_rows(self, pixel_values: Tensor, prompt_query=None) -> Iterator[tuple[str, str, Tensor]]:
        first = self.backbone.layers[0]
        width, _ = consistency_rows(self.layer(pixel_values), [first.layernorm_before], first.attention, 1)
        yield PROMPT, "prompt", width.flatten(0, 2)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Register the tuner for these tests alone: others ask which adapters there are."""
    register(SharedTokenConfig, SharedTokenModel)
    yield
    for known in (
        registry.PEFT_TYPE_TO_CONFIG_MAPPING,
        registry.PEFT_TYPE_TO_TUNER_MAPPING,
        registry.PEFT_TYPE_TO_PREFIX_MAPPING,
    ):
        del known["SHARED_TOKEN"]


def model(**settings) -> PeftModel:
    return tiny.model(SharedTokenConfig(**{"head": "statistics", **settings}))


def trainer(folder, **kwargs):
    return tiny.trainer(folder, model=model(), stream=tiny.stream(num_tasks=2), **kwargs)


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_figures):
    """A finished run of two tasks: its trainer and its folder."""
    folder = tmp_path_factory.mktemp("foreign")
    made = trainer(folder)
    made.train()
    return made, folder


def test_registering_is_idempotent_and_guards_names():
    register(SharedTokenConfig, SharedTokenModel)
    assert registry.PEFT_TYPE_TO_TUNER_MAPPING["SHARED_TOKEN"] is SharedTokenModel
    assert registry.PEFT_TYPE_TO_PREFIX_MAPPING["SHARED_TOKEN"] == "shared_"
    namesake = dataclass(type("Namesake", (L2PConfig,), {}))
    with pytest.raises(RuntimeError, match="already has a method 'l2p' .*L2PConfig.*Namesake.* choose another"):
        register(namesake, L2PModel)
    lower = dataclass(type("LowerCase", (PromptConfig,), {"method_name": "Lower"}))
    with pytest.raises(ValueError, match="LowerCase has method_name='Lower': .* as 'LOWER' is"):
        register(lower, SharedTokenModel)


def test_it_is_met_by_the_protocols():
    tuner = stream_model(model())
    assert isinstance(tuner, SharedTokenModel) and tuner.name == "shared_token"
    assert all(isinstance(tuner, kind) for kind in (StreamModel, Protectable, KeepsClassStatistics, SelectsPrompts))
    assert set(tuner.trainable()) == {PROMPT, f"{HEAD}.weight", f"{HEAD}.bias"}
    assert tuner.settings()["scale"] == 0.5 and "id2label" not in tuner.settings()


def test_a_run_learns_and_projects(run):
    made, folder = run
    results = made.results.to_dict()
    assert results["method"] == "shared_token" and len(results["accuracy_matrix"][1]) == 2
    assert results["heads"].keys() == {"linear", "statistics"}
    start = model().base_model.trainable()[PROMPT].detach()
    first, last = (load_file(folder / task / "adapter_model.safetensors")[PROMPT] for task in ("task-1", "task-2"))
    basis = load_file(folder / "task-1" / "projection.safetensors")[PROMPT].double()
    assert not torch.equal(start, first)
    moved = (last - first).double()
    assert moved.norm() > 1e-4 and (moved @ basis).norm() < 1e-5 * moved.norm()
    assert ((first - start).double() @ basis).norm() > 1e-2 * (first - start).norm()  # nothing held the first task


def test_its_card_says_what_it_is(run):
    card = (run[1] / "README.md").read_text()
    assert "one token, drawn with a standard deviation of 0.5" in card and "SHARED_TOKEN" in card.upper()


def test_its_folder_is_a_classifier(run):
    made, folder = run
    loaded = load_pretrained(folder, backbone=tiny.backbone())
    assert loaded.classes == made.stream.class_order
    photos = [made.stream.test(t)[i]["image"] for t in range(2) for i in range(3)]
    pixels = tiny.processor()(photos, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = made.model.eval()(pixel_values=pixels).logits
        assert torch.equal(loaded.model(pixel_values=pixels).logits, expected)
        bare = PeftModel.from_pretrained(tiny.backbone(), folder).eval()
        assert torch.equal(bare(pixel_values=pixels).logits, expected)
        with loaded.model.disable_adapter():  # the token has its part in it
            assert not torch.allclose(loaded.model(pixel_values=pixels).logits, expected)


@pytest.mark.parametrize("method", ["attention", "functional"])
def test_other_projections_take_it(tmp_path, method):
    made = trainer(tmp_path, projection=ProjectionConfig(method=method, energy=0.7), num_train_epochs=1)
    made.train()
    assert made.results.to_dict()["projection_rank"][0] > 0


def test_resumed_is_straight(run, tmp_path):
    made, folder = run
    trainer(tmp_path).train_task(0)
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.same_results(made.results.to_dict(), resumed.results.to_dict())
    for file in ("adapter_model.safetensors", "projection.safetensors"):
        straight, again = load_file(folder / file), load_file(tmp_path / file)
        assert straight.keys() == again.keys() and all(torch.equal(straight[name], again[name]) for name in straight)


def test_another_setting_is_not_continued(run, tmp_path):
    other = tiny.trainer(tmp_path, model=model(scale=0.25), stream=tiny.stream(num_tasks=2))
    with pytest.raises(ValueError, match="has scale=0.5, this one 0.25"):
        other.train(resume_from_checkpoint=str(run[1]))
