"""Classify images by CLIP against all class names, each with the context of its own task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoTokenizer
from transformers.utils.generic import ModelOutput

from ...heads.growing import new_names
from ...runs.digest import tensor_sha256
from ..base.consistency import consistency_rows
from ..base.entries import TaskEntryTuner
from ..base.head import check_modules_to_save
from ..base.layer import strip_prompts
from ..base.structure import check_clip
from .config import ClipPromptConfig, tokenize
from .layer import ClipImagePrompt, ClipTextContext

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPVisionModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPOutput


class ClipPromptModel(TaskEntryTuner):
    """Add CLIP prompts to a `CLIPModel` of any size.

    `model(pixel_values)` without text classifies: `logits_per_image` `(B, C)` holds the cosine of the image with every
    class name times the model's logit scale. The text features of classes whose task has ended are read from a table,
    those of classes that no task has introduced yet are zero-shot; the running task's are computed with its context. With
    `input_ids` the model is CLIP with image prompts. No task id enters a prediction.
    """

    prefix = "clip_prompt_"
    adapter_config: ClipPromptConfig
    layer: ClipImagePrompt
    _live: list[int] | None = None  # classes whose text features are computed in each pass
    _last_texts: tuple[Any, dict[str, Tensor]] = (None, {})  # of which rows and device, and the tensors
    _last_live: tuple[Any, Tensor] = (None, torch.empty(0))
    _classifies = False
    _as_tuple = False
    _tasks: Mapping[int, Sequence[int]] = MappingProxyType({})
    _tokenizer: Any = None
    _head_hook: RemovableHandle | None = None  # on the image embeddings, for one forward pass
    _scores: Tensor | None = None  # of the statistics head, in that pass

    # ---- injection -----------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        model, config = self.model, cast(ClipPromptConfig, peft_config)
        check_clip(model)
        self._check_width(config, model.config.vision_config.hidden_size)
        self._check_tokens(config.class_tokens or [], config.text_length)
        check_modules_to_save(model, config)
        config.target_modules = ["vision_model.embeddings", "text_model.embeddings"]
        return config

    def _check_tokens(self, names: Sequence[Sequence[int]], text_length: int) -> None:
        """Raise ValueError for class names that the text tower cannot read."""
        room = self.model.config.text_config.max_position_embeddings
        longest = max((len(tokens) for tokens in names), default=0)
        if longest > room:
            raise ValueError(
                f"the longest class name takes {longest} tokens, and the text tower has {room} positions, so that no "
                f"text_length leaves room for it: shorten the name, or its template, to at most {room} tokens."
            )
        if longest + text_length > room:
            raise ValueError(
                f"the longest class name takes {longest + text_length} tokens with text_length={text_length}, the text "
                f"tower has {room} positions: shorten text_length to at most {room - longest}."
            )
        words = self.model.config.text_config.vocab_size
        strange = [token for tokens in names for token in tokens if not 0 <= token < words]
        if strange:
            raise ValueError(f"class_tokens hold {strange[0]!r}, the text tower knows the tokens 0 to {words - 1}.")

    def _wrap(
        self, config: ClipPromptConfig, adapter_name: str, target: nn.Module, name: str
    ) -> ClipImagePrompt | ClipTextContext:
        if name.startswith("vision_model"):
            image = target if isinstance(target, ClipImagePrompt) else ClipImagePrompt(target)
            image.update_layer(adapter_name, config)
            return image
        text = target if isinstance(target, ClipTextContext) else ClipTextContext(target)
        text.update_layer(adapter_name, config, self.model.config.projection_dim)
        return text

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._install_hooks(
            [
                model.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True),
                self.backbone.register_forward_hook(self._after_backbone),
                model.register_forward_hook(self._after_model),
            ]
        )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter as PEFT does, and let its classes start zero-shot."""
        # here, because PEFT calls `_post_injection_hook` for the first adapter alone
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = cast(ClipPromptConfig, self.peft_config[adapter_name])
        table = self.text_layer.clip_prompt_features[adapter_name]
        if not config.inference_mode and table.device.type != "meta" and len(table):
            table.copy_(self._text_features(range(len(table)), None, config))

    # ---- the parts -----------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> CLIPVisionModel:
        """Return the vision tower."""
        return self.model.vision_model

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the frozen blocks of the vision tower, whose batches are as large in every task."""
        blocks: nn.ModuleList = self.backbone.encoder.layers
        return blocks

    @property
    def text_layer(self) -> ClipTextContext:
        """Return the wrapped embeddings of the text tower, which hold the contexts."""
        return self.model.text_model.embeddings

    def class_logits(self, output: ModelOutput) -> Tensor:
        return output["logits_per_image"]

    def watch_features(self, callback: Callable[[Tensor], object]) -> RemovableHandle:
        """Call `callback` with the image embeddings `(B, P)` that the class names are compared with."""
        return self.model.visual_projection.register_forward_hook(partial(_show_output, callback))

    def _head_width(self, config: ClipPromptConfig) -> int:
        return self.model.config.projection_dim

    def linear_logits(self, features: Tensor) -> Tensor:
        """Return the cosines with the stored text features times the logit scale, `(B, C)`."""
        return self._cosines(_unit(features), self._table(features).t())

    def _scores_of(self, image: Tensor, table: Tensor) -> Tensor:
        """Return the scores `(C, B)` of image embeddings at length 1 with text features at length 1."""
        return self._cosines(table, image.t())

    def _cosines(self, one: Tensor, other: Tensor) -> Tensor:
        # at least float32, since half precision has too few digits to rank classes
        precision = torch.promote_types(one.dtype, other.dtype)
        with torch.autocast(one.device.type, enabled=False):
            return one.to(precision) @ other.to(precision) * self.model.logit_scale.to(precision).exp()

    def _table(self, image: Tensor) -> Tensor:
        table = self.text_layer.clip_prompt_features[self.adapter]
        return _unit(table.to(torch.promote_types(image.dtype, torch.float32)))

    # ---- what the head reads, again ------------------------------------------------------------------------------

    def feature_states(self, batches: Sequence[Tensor | None]) -> list[str | None]:
        """Return a digest of the image prompt, which all images share; contexts of class names change no image embedding."""
        if self.layer.adapter is None or self._live:
            return [None] * len(batches)
        learns = (value for name, value in self.trainable().items() if not name.endswith("clip_prompt_context"))
        return [" ".join([self.adapter, *map(tensor_sha256, learns)])] * len(batches)

    @torch.no_grad()
    def score_features(self, features: Tensor) -> Tensor:
        """Return the scores `(B, C)` of image embeddings `(B, P)`, as a pass in evaluation has them."""
        if self.uses_statistics_head and (statistics := self.statistics) is not None:
            scores: Tensor = statistics(features)
            return scores
        image = _unit(features)
        return self._scores_of(image, self._table(image)).t()

    @torch.no_grad()
    def frozen_features(self, pixel_values: Tensor) -> Tensor:
        """Return image embeddings `(B, P)`, not normalised."""
        self.layer.bypass = True
        try:
            interpolate = self.adapter_config.interpolate_pos_encoding
            return self.model.get_image_features(pixel_values, interpolate_pos_encoding=interpolate).pooler_output
        finally:
            self.layer.bypass = False

    def zero_shot_features(self) -> Tensor:
        """Return the text features `(C, P)` of the class names without any context."""
        config = self.adapter_config
        return self._text_features(range(len(config.class_tokens or [])), None, config)

    # ---- classes that nobody foresaw -----------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer of class names: the one that was set, or else that of the backbone.

        Raises:
            ValueError: there is none where the backbone came from.
        """
        if self._tokenizer is None:
            config = self.adapter_config
            source = self.model.name_or_path or config.base_model_name_or_path
            pinned = config.revision if source == config.base_model_name_or_path else None
            try:
                if not source:
                    raise OSError("nothing says where the backbone came from")
                self._tokenizer = AutoTokenizer.from_pretrained(
                    source, revision=pinned or "main", trust_remote_code=False
                )
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(
                    f"no tokenizer for new class names can be loaded from {source or 'the backbone'} ({error}): set the "
                    "checkpoint's own, model.base_model.tokenizer = AutoTokenizer.from_pretrained(...)."
                ) from error
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @torch.no_grad()
    def add_classes(self, names: Sequence[str], seed: int) -> None:
        """Let the active adapter know more classes, which are zero-shot until their task has ended.

        Args:
            names: of the new classes, whose ids follow those before.
            seed: not used: a name's text features are not random.

        Raises:
            TypeError: an adapter without class names, or names that are not strings.
            ValueError: a name that is known or too long, or another tokenizer than that of the names before.
        """
        config, adapter = self.adapter_config, self.adapter
        new = new_names(names, self.class_names, self.model)
        tokens = self._new_tokens(new, config)
        grown = copy.copy(config)
        grown.class_tokens = [*(config.class_tokens or []), *tokens]
        table = self.text_layer.clip_prompt_features[adapter]
        # one by one: the text features of a batch round by its longest name
        rows = [self._text_features([len(table) + i], None, grown).to(table) for i in range(len(new))]
        self.text_layer.clip_prompt_features[adapter] = torch.cat([table, *rows])
        config.class_tokens = grown.class_tokens
        self._name_new_classes(adapter, config, new)

    def _new_tokens(self, new: Sequence[str], config: ClipPromptConfig) -> list[list[int]]:
        """Tokenize new class names, in the way that those before were."""
        known = list((config.id2label or {}).values())
        found = tokenize(self.tokenizer, [*known, *new], config.template) if new else []
        for name, tokens, own in zip(known, found, config.class_tokens or [], strict=False):
            if tokens != list(own):
                raise ValueError(
                    f"the tokenizer makes {tokens} of the class name {name!r} with template={config.template or '{}'!r}, "
                    f"the adapter has {list(own)}: set model.base_model.tokenizer and the configuration's template to those "
                    "that its class names were made with."
                )
        self._check_tokens(found, config.text_length)
        return found[len(known) :]

    @torch.no_grad()
    def open_head(self) -> None:
        """Forget the active adapter's class names, if it has any, for `add_classes` to add others."""
        config, adapter = self.adapter_config, self.adapter
        table = self.text_layer.clip_prompt_features[adapter]
        self.text_layer.clip_prompt_features[adapter] = table[:0].clone()
        config.id2label, config.class_tokens = {}, []
        if config.head == "statistics":
            self._add_statistics(self.layer, config, adapter)

    # ---- tasks ---------------------------------------------------------------------------------------------------

    def _entries(self) -> Iterator[tuple[nn.ParameterDict, int]]:
        yield self.text_layer.clip_prompt_context, 0

    def _fresh(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        return 0.02 * torch.randn(*shape, generator=generator)

    def prepare_stream(self, tasks: list[list[int]], names: Mapping[int, str]) -> None:
        super().prepare_stream(tasks, names)
        self._tasks = dict(enumerate(tasks))

    def add_task(self, task: int, classes: Sequence[int], seed: int) -> None:
        super().add_task(task, classes, seed)
        self._tasks = {**self._tasks, task: list(classes)}

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        if self.adapter_config.text_length:
            self._live = list(self._tasks[task])

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Keep the text features of the task's classes: its context is final."""
        super().end_task(task)
        if self._live:
            features = self._text_features(self._live, task, self.adapter_config)
            table = self.text_layer.clip_prompt_features[self.adapter]
            table[self._live] = features.to(table)
        self._live = None

    def resume_after(self, task: int) -> None:
        super().resume_after(task)
        self._live = None

    # ---- a forward pass ------------------------------------------------------------------------------------------

    def _texts(self, classes: Sequence[int], context: int, config: ClipPromptConfig) -> dict[str, Tensor]:
        """Return token ids `(N, S)` of class names behind `context` placeholders, with the attention mask."""
        names = [(config.class_tokens or [])[label] for label in classes]
        rows = [[start, *[start] * context, *rest] for start, *rest in names]
        device, (known, texts) = self.model.logit_scale.device, self._last_texts
        if known == (rows, device):  # in each step the same: a device need not be given them again
            return dict(texts)
        width = max(map(len, rows))
        # the end token pads: the tower pools at its first occurrence
        ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        texts = {"input_ids": ids, "attention_mask": mask}
        if not ids.is_inference():  # which training could not use
            self._last_texts = (rows, device), texts
        return dict(texts)

    @torch.no_grad()
    def _text_features(self, classes: Sequence[int], entry: int | None, config: ClipPromptConfig) -> Tensor:
        """Return projected text features `(N, P)` with the context of an entry, or zero-shot for None."""
        layer, training = self.text_layer, [m for m in self.model.text_model.modules() if m.training]
        before, layer.entry = layer.entry, entry
        try:
            for module in training:
                module.training = False
            texts = self._texts(classes, 0 if entry is None else config.text_length, config)
            return self.model.get_text_features(**texts, return_dict=True).pooler_output
        finally:
            layer.entry = before
            for module in training:
                module.training = True

    def _before_model(
        self, model: CLIPModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._classifies, self._scores = False, None
        self._remove_head_hook()  # there is one if the pass before failed
        if self.text_layer.adapter is None or args or kwargs.get("input_ids") is not None:
            return None
        config, kwargs = self.adapter_config, dict(kwargs)
        if kwargs.get("pixel_values") is not None:
            self._check_size(kwargs["pixel_values"])
        kwargs.pop("num_items_in_batch", None)
        if not config.class_tokens:
            raise ValueError(
                "the adapter has no class names: make its configuration by ClipPromptConfig.for_classes(tokenizer, "
                "names), learn a first task, or pass input_ids."
            )
        return_dict = kwargs.get("return_dict")
        self._as_tuple = not (model.config.return_dict if return_dict is None else return_dict)
        if config.interpolate_pos_encoding:
            kwargs.setdefault("interpolate_pos_encoding", True)
        self._classifies = True
        if self.uses_statistics_head:
            self._head_hook = self.watch_features(self._score)
        self.text_layer.entry = self._task if self._live else None
        # `CLIPModel` has no pass without text: when no task is running, the text tower gets one class whose result is not used
        texts = self._texts(self._live or [0], config.text_length if self._live else 0, config)
        return args, {**kwargs, **texts, "return_dict": True}

    def _after_backbone(
        self, backbone: CLIPVisionModel, args: tuple[Any, ...], output: BaseModelOutputWithPooling
    ) -> BaseModelOutputWithPooling | None:
        n = self.layer.inserted
        if n == 0 or self.layer.adapter is None:
            return None
        strip_prompts(output, n)
        return output

    def _remove_head_hook(self) -> None:
        if self._head_hook is not None:
            self._head_hook.remove()
            self._head_hook = None

    def _score(self, features: Tensor) -> None:
        self._remove_head_hook()
        if (statistics := self.statistics) is not None:
            self._scores = statistics(features)

    def _after_model(self, model: CLIPModel, args: tuple[Any, ...], output: CLIPOutput) -> Any:
        if not self._classifies:
            return None
        self._classifies, self.text_layer.entry = False, None
        image = output["image_embeds"]
        table = self._table(image)
        if self._live:
            known, live = self._last_live
            if known != (self._live, table.device):
                live = torch.tensor(self._live, device=table.device)
                self._last_live = (None if live.is_inference() else (list(self._live), table.device)), live
            table = table.index_copy(0, live, output["text_embeds"].to(table.dtype))
        logits = self._scores_of(image, table)
        if self._scores is not None:
            logits, self._scores = self._scores.t(), None
        output.text_embeds, output.logits_per_text, output.logits_per_image = table, logits, logits.t()
        return output.to_tuple() if self._as_tuple else output

    # ---- what a projection protects ------------------------------------------------------------------------------

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        """Return the image prompt, by its name in `adapter_model.safetensors`; finished text contexts never move."""
        prompt = self.layer.clip_prompt_image[self.adapter]
        return {"base_model.model.vision_model.embeddings.clip_prompt_image": prompt} if len(prompt) else {}

    def token_offsets(self) -> dict[str, Tensor]:
        return {name: prompt.new_zeros(()) for name, prompt in self.prompt_parameters().items()}

    @torch.no_grad()
    def protected_rows(self, pixel_values: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the tokens that the image prompt meets: CLS, prompts and patches before the pre-norm, `(B * S, d)`."""
        pixel_values = pixel_values.to(self.layer.class_embedding.dtype)
        tokens = self.layer(pixel_values, interpolate_pos_encoding=self.adapter_config.interpolate_pos_encoding)
        for name in self.prompt_parameters():
            yield name, "prompt", tokens.flatten(0, 1)

    @torch.no_grad()
    def attention_rows(self, pixel_values: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """Yield rows for the first attention as `consistency_rows` has them, behind the pre-norm and the layer's norm.

        There are rows along the width, `(B * H * S, d)`, and rows over the tokens of the prompt, `(B * H * S, L)`.
        """
        pixel_values = pixel_values.to(self.layer.class_embedding.dtype)
        tokens = self.layer(pixel_values, interpolate_pos_encoding=self.adapter_config.interpolate_pos_encoding)
        first = cast("CLIPEncoderLayer", self.backbone.encoder.layers[0])
        norms = [self.backbone.pre_layrnorm, first.layer_norm1]
        for name in self.prompt_parameters():
            width, length = consistency_rows(tokens, norms, first.self_attn, self.layer.inserted)
            yield name, "prompt", width.flatten(0, 2)
            yield f"{name}.T", "value", length.flatten(0, 2)


def _show_output(
    callback: Callable[[Tensor], object], projection: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    callback(output)


def _unit(features: Tensor) -> Tensor:
    """Return features at length 1, by the same operations as `CLIPModel`, so that they agree to the bit."""
    return features / features.pow(2).sum(dim=-1, keepdim=True).pow(0.5)
