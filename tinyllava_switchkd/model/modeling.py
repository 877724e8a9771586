"""TinyLlavaForConditionalGeneration: a vision tower, a connector and a language model."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BaseImageProcessor,
    Cache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from tinyllava_switchkd.constants import IGNORE_INDEX
from tinyllava_switchkd.model.caches import cache_of, with_cache
from tinyllava_switchkd.model.chat import Images, chat, fetch_own
from tinyllava_switchkd.model.configuration import TinyLlavaConfig
from tinyllava_switchkd.model.connector import ConnectorFactory
from tinyllava_switchkd.model.layouts import merge_adapter, open_checkpoint, read_config
from tinyllava_switchkd.model.llm import resolve_llm
from tinyllava_switchkd.model.saving import push_pretrained_model
from tinyllava_switchkd.model.splice import Spliced, splice
from tinyllava_switchkd.model.trust import one_sentence
from tinyllava_switchkd.model.vision_tower import resolve_vision_tower
from tinyllava_switchkd.model.vision_tower.base import flatten_images
from tinyllava_switchkd.model.weights import (
    is_adapter,
    outside_zero_init,
    own_memory,
    refuse,
    refuse_unusable,
    resolve_folder,
    without_load_report,
)


@dataclass
class TinyLlavaOutput(CausalLMOutputWithPast):
    """A language model's output, with the labels and image mask of the spliced sequence.

    Attributes:
        labels: [B, L] labels of the spliced sequence (`IGNORE_INDEX` at image tokens and padding).
        image_mask: [B, L] bool, True at visual tokens.
    """

    labels: Tensor | None = None
    image_mask: Tensor | None = None


class TinyLlavaForConditionalGeneration(PreTrainedModel):
    """A small vision-language model with replaceable parts.

    The sub-modules are `language_model`, `vision_tower` and `connector`; parameters have the names of TinyLLaVA v1's
    checkpoint keys.

    Args:
        config: configuration of the model; with its nested configurations no base model is read.

    Raises:
        ValueError: a name is unknown, or the parts do not fit together.
    """

    config_class = TinyLlavaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # Each part itself refuses attention kernels that it does not support.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = "past_key_values"

    def __init__(self, config: TinyLlavaConfig) -> None:
        super().__init__(config)
        llm_class, _ = resolve_llm(config.llm_model_name_or_path, config.text_config)
        tower_class = resolve_vision_tower(config.vision_model_name_or_path, config.vision_config)
        self.language_model = llm_class(config.text_config)
        self.vision_tower = tower_class(config.vision_config)
        self.connector = ConnectorFactory(config.connector_type)(config)
        # A wrong layer or strategy fails here and not in the first step.
        self.vision_tower.layer_count(config.vision_feature_layer)
        self.num_image_tokens = self.connector.num_tokens(
            self.vision_tower.num_tokens(config.vision_feature_select_strategy)
        )
        self.folder: Path | None = None
        """The checkpoint's folder, for what chat() reads when it is first called."""
        # Set by load_pretrained_model and build_model, read by chat().
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.image_processor: BaseImageProcessor | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights outside the language model and the tower's encoder as PyTorch does."""
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: object,
        config: TinyLlavaConfig | None = None,
        cache_dir: str | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        subfolder: str = "",
        **kwargs: Any,
    ) -> TinyLlavaForConditionalGeneration:
        """Load a checkpoint of any of v1's layouts (full, split, LoRA folder) from a folder or the hub.

        The other arguments (`dtype`, `device_map`, `quantization_config`, `attn_implementation`) are those of
        transformers. Unlike there, a weight that is missing, unexpected or of another shape is an error.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: its weights do not fit its configuration.
        """
        folder = resolve_folder(
            pretrained_model_name_or_path,
            cache_dir=cache_dir,
            force_download=force_download or None,
            local_files_only=local_files_only or None,
            token=token,
            revision=revision,
        )
        folder = kwargs["folder"] = folder / subfolder
        config = config or read_config(folder)
        cls.outline(config, folder)  # a model that cannot be built fails here, before weights are read
        config, tensors = open_checkpoint(folder, config)
        if not is_adapter(folder):
            return cls.from_tensors(config, tensors, pretrained_model_name_or_path, **kwargs)
        # Merging an adapter is exact only before the weights are quantised.
        plain = {name: value for name, value in kwargs.items() if name != "quantization_config"}
        model = cls.from_tensors(config, tensors, pretrained_model_name_or_path, **plain)
        model = merge_adapter(model, folder)
        if kwargs.get("quantization_config") is not None:
            tensors = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
            model = cls.from_tensors(config, tensors, pretrained_model_name_or_path, **kwargs)
        return model

    @classmethod
    def outline(cls, config: TinyLlavaConfig, source: object) -> TinyLlavaForConditionalGeneration | None:
        """The model on the meta device, for its shapes; takes milliseconds and no memory.

        Returns:
            the model; None if the configuration is incomplete, see `VisionTower.complete_config`.

        Raises:
            ValueError: no model can be built from this configuration.
        """
        try:
            tower = resolve_vision_tower(config.vision_model_name_or_path, config.vision_config)
            if not tower.is_complete(config.vision_config):
                return None
            with outside_zero_init(), torch.device("meta"):
                return cls(copy.deepcopy(config))
        except (ValueError, ImportError) as error:
            kind = ImportError if isinstance(error, ImportError) else ValueError
            raise kind(f"The configuration of {source} cannot be built: {' '.join(str(error).split())}") from error
        except Exception as error:  # of torch and transformers, for numbers that do not fit each other
            raise ValueError(f"The configuration of {source} cannot be built ({one_sentence(error)}).") from error

    @classmethod
    def from_tensors(
        cls,
        config: TinyLlavaConfig,
        tensors: dict[str, Tensor],
        source: object,
        *,
        dtype: torch.dtype | str | None = None,
        folder: Path | None = None,
        output_loading_info: bool = False,
        **kwargs: object,
    ) -> Any:
        """Build a model with given weights.

        Args:
            config: configuration of the model.
            tensors: all weights under v1's names (a tied output head may be absent).
            source: where they came from, for error messages.
            dtype: of the weights; None or ``auto`` means the configuration's, otherwise that of the embeddings.
            folder: the checkpoint's folder, if they are those of one.
            output_loading_info: return (model, transformers' loading information) instead.
            kwargs: passed to transformers' `from_pretrained`.

        Raises:
            ValueError: a weight is missing, unexpected or of another shape.
        """
        config = copy.deepcopy(config)
        outline = cls.outline(config, source)
        if outline is not None:
            refuse_unusable(tensors, source, {name for name, _ in outline.named_parameters()})
            shapes = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
            wrong = [
                f"{name} {list(tensor.shape)} instead of {list(shapes[name])}"
                for name, tensor in tensors.items()
                if shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape)
            ]
            refuse(source, (), (), wrong)  # before the model is allocated, which may fail for a wrong size
        if config.text_config.tie_word_embeddings:
            tensors = {name: tensor for name, tensor in tensors.items() if name != "language_model.lm_head.weight"}
        if dtype in (None, "auto"):
            dtype = config.dtype or next((t.dtype for n, t in tensors.items() if "embed" in n), torch.float32)
        with outside_zero_init(), without_load_report():
            model, info = super().from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, together with the other problems
                **kwargs,
            )
        tied = set(model.all_tied_weights_keys)
        wrong = [f"{name} {list(stored)} instead of {list(own)}" for name, stored, own in info["mismatched_keys"]]
        refuse(source, set(info["missing_keys"]) - tied, info["unexpected_keys"], wrong)
        model.vision_tower.restore_buffers()
        own_memory(model, tensors.values())
        model.config.name_or_path = model.name_or_path = str(source)
        model.folder = folder
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: object,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: object,
    ) -> None:
        """Write the checkpoint in v1's layout; a tied output head is left out."""
        if state_dict is None:
            state_dict = self.state_dict()
        if self.config.text_config.tie_word_embeddings:
            state_dict = {name: value for name, value in state_dict.items() if name != "language_model.lm_head.weight"}
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    # transformers finds the embeddings itself, but not the head and the decoder.
    def get_output_embeddings(self) -> nn.Linear:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        self.language_model.set_decoder(decoder)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: object, **kwargs: object) -> nn.Module:
        embeddings = self.language_model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.vocab_size = self.config.text_config.vocab_size = embeddings.num_embeddings
        return embeddings

    def _set_gradient_checkpointing(self, enable: bool = True, *args: object, **kwargs: object) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        self.vision_tower.set_gradient_checkpointing(enable)

    def freeze_unused_parameters(self) -> int:
        """Freeze the vision tower's parameters that no loss reaches, see `VisionTower.freeze_unused`.

        Call it after every ``requires_grad_(True)`` on the tower or the model.

        Returns:
            the number of parameters frozen.
        """
        return self.vision_tower.freeze_unused(self.config.vision_feature_layer)

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the tower's input."""
        return self.vision_tower.image_size

    def vision_features(self, images: Tensor | list[Tensor]) -> Tensor:
        """Images [I, 3, H, W] -> the tower's tokens [I, N, Dv] at the configured layer and strategy."""
        images = flatten_images(images)
        weight = next(self.vision_tower.parameters())
        # Under ZeRO-3 a parameter's device is that of its partition, which may not be where the module computes.
        device = images.device if hasattr(weight, "ds_id") else weight.device
        return self.vision_tower(
            images.to(device=device, dtype=weight.dtype),
            vision_feature_layer=self.config.vision_feature_layer,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
        )

    def encode_images(self, images: Tensor | list[Tensor]) -> Tensor:
        """Images [I, 3, H, W] -> visual tokens in the language model's width [I, K, D]."""
        features = self.vision_features(images)
        weight = next(self.connector.parameters(), features)  # a frozen tower may be kept in another precision
        return self.connector(features.to(weight.dtype))

    def prepare_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_features: Tensor | None = None,
        padding_side: str = "right",
        max_length: int | None = None,
    ) -> Spliced:
        """Encode the images and splice them into the token embeddings, see `splice`.

        Args:
            input_ids: [B, T] with `IMAGE_TOKEN_INDEX` per image.
            attention_mask: [B, T].
            labels: [B, T].
            images: [I, 3, H, W] in the order of the placeholders.
            image_features: [I, K, D] visual tokens, instead of images.
            padding_side: where the spliced sequences are padded.
            max_length: cut spliced sequences to this length; None does not cut.
        """
        if images is not None and image_features is not None:
            raise ValueError("Pass images or image_features, not both.")
        if images is not None:
            image_features = self.encode_images(images)
        return splice(
            input_ids,
            attention_mask,
            labels,
            image_features,
            self.get_input_embeddings(),
            max_length=max_length,
            padding_side=padding_side,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: object = None,
        image_features: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: object,
    ) -> TinyLlavaOutput:
        """Logits and loss of a batch.

        Args:
            input_ids: [B, T] token ids, `IMAGE_TOKEN_INDEX` per image.
            attention_mask: [B, T] ([B, L] together with `inputs_embeds`).
            position_ids: [B, L], only with `inputs_embeds`; splicing counts positions itself.
            past_key_values: the language model's cache.
            inputs_embeds: [B, L, D] embeddings, instead of ids and images.
            labels: [B, T] ([B, L] together with `inputs_embeds`).
            use_cache: return the cache; off by default with labels.
            images: [I, 3, H, W], or a list of images or stacks of images.
            image_sizes: accepted for v1's callers, not used.
            image_features: [I, K, D] outputs of a connector, instead of images.
            logits_to_keep: as in transformers; positions of the spliced sequence whose logits are returned.
            num_items_in_batch: supervised tokens of the whole optimiser step, by which the sum over this batch is
                divided. Without it the loss is the mean over this batch.
            kwargs: passed to the language model (`output_hidden_states`, `output_attentions`, ...).

        Returns:
            a `TinyLlavaOutput`; its loss is 0 (with a graph), never NaN, for a batch without a supervised token.
        """
        image_mask = None
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Pass input_ids, or inputs_embeds.")
            prepared = self.prepare_inputs(input_ids, attention_mask, labels, images, image_features)
            if past_key_values is None:
                attention_mask, position_ids = prepared.attention_mask, prepared.position_ids
            inputs_embeds, image_mask = prepared.inputs_embeds, prepared.image_mask
            labels = None if labels is None else prepared.labels
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **with_cache(past_key_values),
            **kwargs,
        )
        loss = None
        if labels is not None:
            if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                raise ValueError("A loss needs every logit: leave logits_to_keep at 0 when labels are given.")
            loss = causal_lm_loss(outputs.logits, labels, num_items_in_batch)
        return TinyLlavaOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=cache_of(outputs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            labels=labels,
            image_mask=image_mask,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: object = None,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate answers to a batch of prompts.

        Prompts may be padded on either side. After splicing they are padded on the left, so that every row continues
        right after its last token.

        Args:
            inputs: [B, T] prompt ids, `IMAGE_TOKEN_INDEX` per image (`input_ids=` works too).
            images: [I, 3, H, W] in the order of the placeholders.
            image_sizes: accepted for v1's callers, not used.
            attention_mask: [B, T]; needed if prompts are padded.
            image_features: [I, K, D] visual tokens, instead of images.
            kwargs: passed to the language model's `generate`.

        Returns:
            [B, new tokens] ids (only the new ones), or what `return_dict_in_generate` asks for.
        """
        if "inputs_embeds" in kwargs:
            raise ValueError(
                "generate() takes token ids and images; for ready embeddings call language_model.generate."
            )
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        if inputs is None:
            raise ValueError("generate() needs the prompts' token ids.")
        kwargs.pop("position_ids", None)
        prepared = self.prepare_inputs(
            inputs, attention_mask, images=images, image_features=image_features, padding_side="left"
        )
        self._complete_generation_settings(kwargs)
        return self.language_model.generate(
            inputs_embeds=prepared.inputs_embeds, attention_mask=prepared.attention_mask, **kwargs
        )

    def chat(
        self, prompt: str, image: Images = None, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
    ) -> str:
        """Answer a question about an image; see `tinyllava_switchkd.model.chat.chat` for every argument."""
        return chat(self, prompt, image, tokenizer, **kwargs)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the checkpoint with its model card; see `push_pretrained_model`."""
        if self.tokenizer is None:
            fetch_own(self)
        if self.tokenizer is None:
            raise ValueError("The model has no tokenizer to upload with it; load it with load_pretrained_model.")
        processor = self.image_processor or self.vision_tower.image_processor
        return push_pretrained_model(self, self.tokenizer, processor, repo_id, private=private, token=token)

    def _complete_generation_settings(self, kwargs: dict[str, Any]) -> None:
        """Fix, in place, arguments of `generate` for which the language model's defaults are wrong here."""
        given = kwargs.get("generation_config")
        known = given or self.language_model.generation_config
        settings: dict[str, object] = {}
        if kwargs.get("pad_token_id", known.pad_token_id) is None:
            settings["pad_token_id"] = self._pad_token_id()
        if "use_cache" not in kwargs:
            settings["use_cache"] = True  # config.use_cache is off for training; generating without is slow
        penalty = kwargs.pop("repetition_penalty", known.repetition_penalty)
        if penalty is not None and penalty != 1:
            # transformers exempts as many ids as a row has padding; here these would be new ids, not the prompt's.
            spares_none = RepetitionPenaltyLogitsProcessor(float(penalty))
            kwargs["logits_processor"] = LogitsProcessorList([spares_none, *(kwargs.get("logits_processor") or ())])
            settings["repetition_penalty"] = None
        if given is None:
            kwargs |= settings
        else:  # transformers takes either an object or single settings
            kwargs["generation_config"] = copy.deepcopy(given)
            kwargs["generation_config"].update(**settings)

    def _pad_token_id(self) -> int | None:
        eos = self.language_model.generation_config.eos_token_id
        first_eos = eos[0] if isinstance(eos, list) else eos
        return self.config.pad_token_id if self.config.pad_token_id is not None else first_eos


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the next token over supervised positions.

    Args:
        logits: [B, L, V].
        labels: [B, L], `IGNORE_INDEX` at unsupervised positions; shifted by one here.
        num_items_in_batch: divisor; the number of supervised positions of this batch if None.

    Returns:
        scalar float32; 0 if nothing is supervised.
    """
    targets = labels[:, 1:].to(logits.device)  # [B, L-1]
    supervised = targets != IGNORE_INDEX  # [B, L-1]
    picked = logits[:, :-1][supervised].float()  # [S, V]; only supervised rows are copied to float32
    total = F.cross_entropy(picked, targets[supervised], reduction="sum")
    count = supervised.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(total.device)
    return total / count


AutoModelForCausalLM.register(TinyLlavaConfig, TinyLlavaForConditionalGeneration, exist_ok=True)
