"""CvtConfig: the architecture of a CvT as a configuration of transformers."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .architecture import (
    DTYPES,
    FIELDS,
    LIBRARY,
    MODEL_TYPE,
    VARIANTS,
    Architecture,
    plain_fields,
    refuse_code,
    with_activation,
)
from .files import model_folder, named_in_errors
from .hub import published, resolved


class CvtConfig(Architecture, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a CvT.

    Every list has one value per stage; the number of stages is the length of `depth`.

    Args:
        num_channels: channels of the image.
        image_size: height and width, in pixels, of the images that a learned position embedding is
            for, as a number or two; nothing else needs it, and any other size works too.
        patch_sizes: kernel of the convolutional token embedding, in pixels of the stage's input.
        patch_stride: its stride.
        patch_padding: its padding.
        embed_dim: width of the tokens; a multiple of `num_heads`.
        num_heads: attention heads.
        depth: number of blocks.
        mlp_ratio: hidden width of the MLP as a multiple of `embed_dim`.
        attention_drop_rate: dropout on the attention weights.
        drop_rate: dropout on the tokens at the head of a stage, after the attention, and twice in
            the MLP.
        drop_path_rate: stochastic depth of the stage's last block; it rises linearly from 0.
        qkv_bias: whether the query, key and value Linears have a bias.
        cls_token: whether the stage has a class token.
        position_embedding: `none`, as in the paper's models, or `learned`: a vector added to each
            token of the image, as its ablations vary; at other sizes than `image_size` it is
            interpolated. `none` alone fits any number of stages.
        qkv_projection_method: `dw_bn` (depthwise convolution and BatchNorm), `avg` (average pooling
            of key and value) or `linear` (none).
        kernel_qkv: kernel of the projection, for query, key and value.
        padding_kv: padding of the key and value projection.
        stride_kv: its stride.
        padding_q: padding of the query projection.
        stride_q: its stride.
        hidden_act: activation of the MLP: `gelu`, as transformers computes, or `quick_gelu`, as the
            authors do.
        init: initialisation of the Linears, `trunc_norm` or `xavier`.
        initializer_range: standard deviation of `trunc_norm`, class tokens and the classifier.
        layer_norm_eps: epsilon of every LayerNorm. A config.json without `hidden_act` was written
            by transformers, whose 1e-12 never took effect; it is read as 1e-5.
        thresholds: of `multi_label_classification`, the score of each class from which on
            `cvt.Classifier` predicts it; `cvt train` chooses them on the validation images.
        kwargs: fields of transformers' `PreTrainedConfig`; `out_features`, `out_indices` of
            `CvtBackbone`.

    Raises:
        ValueError: a field is illegal; names the field, its stage and the value.

    Example:
        >>> from cvt import CvtConfig
        >>> config = CvtConfig.from_variant("cvt-13", num_labels=5)
        >>> config.embed_dim, config.depth, config.hidden_act
        ([64, 192, 384], [1, 2, 10], 'quick_gelu')
        >>> CvtConfig(embed_dim=[64, 192, 100])
        Traceback (most recent call last):
            ...
        ValueError: stage 3: embed_dim[2] = 100 is not divisible by num_heads[2] = 6
    """

    model_type = MODEL_TYPE

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in (("dtype", self.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
            if value is not None and str(value).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"{name} = {value!r}: must be one of {', '.join(DTYPES)}")
        kwargs.pop("stage_names", None)  # derived, but other libraries write it
        maps = [kwargs.pop(name, None) for name in ("out_features", "out_indices")]
        super().__post_init__(**kwargs)
        self.validate()
        self.set_output_features_output_indices(*maps)

    @property
    def output_attentions(self) -> bool:
        """Whether models return attentions by default. Works with every `attn_implementation`."""
        return bool(self._output_attentions)

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = value

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> "CvtConfig":
        """The authors' `cvt-13`, `cvt-21` or `cvt-w24`, or our small `cvt-7` and `cvt-digits`.

        All have QuickGELU and 1000 classes.

        Args:
            name: a key of `VARIANTS`.
            overrides: fields to set otherwise.

        Raises:
            ValueError: there is no such variant, or a field is illegal.

        Example:
            >>> from cvt import CvtConfig
            >>> CvtConfig.from_variant("cvt-21").depth
            [1, 4, 16]
        """
        if name not in VARIANTS:
            raise ValueError(f"no CvT variant is called {name!r}; there are {', '.join(VARIANTS)}")
        classes = {} if "id2label" in overrides else {"num_labels": 1000}
        return cls(**{"hidden_act": "quick_gelu", **classes, **VARIANTS[name], **overrides})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; short names work too, and published checkpoints carry QuickGELU."""
        with resolved(pretrained_model_name_or_path, kwargs) as source:
            config_dict, kwargs = super().get_config_dict(source, **kwargs)
        if not config_dict:
            name = Path(pretrained_model_name_or_path)
            best = model_folder(name)
            hint = "" if best == name else f"; the best model of this run is {best}"
            raise OSError(f"{pretrained_model_name_or_path} has no config.json{hint}")
        if "hidden_act" not in config_dict and published(pretrained_model_name_or_path):
            config_dict["hidden_act"] = "quick_gelu"
            config_dict["layer_norm_eps"] = 1e-5
        return with_activation(config_dict, kwargs.get("hidden_act")), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "CvtConfig":
        """As in transformers; a `config_dict` without `hidden_act` comes from its own CvtConfig.

        What names the classes of a folder's code, `auto_map`, is left out: this is the class.

        Raises:
            ValueError: a field is illegal, or asks for quantisation or for code from the hub, which
                only an argument of `from_pretrained` may; or the activation does not follow from
                the fields, and no `hidden_act` is given.
        """
        refuse_code(config_dict)
        hidden_act = kwargs.get("hidden_act")
        if published(kwargs.get("name_or_path", "")):  # as AutoConfig passes it
            hidden_act = hidden_act or "quick_gelu"
        config_dict = with_activation(config_dict, hidden_act, is_file=False)
        here = ("library_name",) if cls.is_remote_code() else ("library_name", "auto_map")
        config_dict = {n: value for n, value in config_dict.items() if n not in here}
        # Overrides go through the constructor, which checks them; transformers sets them after it.
        maps = ("out_features", "out_indices")
        given = {n: kwargs.pop(n) for n in (*FIELDS, *maps) if n in kwargs}
        labels, count = config_dict.get("id2label"), kwargs.get("num_labels")
        if count is not None and labels is not None and len(labels) != count:
            of_labels = ("id2label", "label2id", "thresholds")  # of other classes
            config_dict = {n: value for n, value in config_dict.items() if n not in of_labels}
        depth, saved = given.get("depth"), config_dict.get("depth", cls.depth)
        resized = isinstance(depth, list | tuple) and len(depth) != len(saved)
        if resized or given.keys() & set(maps):  # the saved choice of maps is of other stages
            config_dict = {n: value for n, value in config_dict.items() if n not in maps}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """As in transformers, for a file; with `library_name` in place of `transformers_version`.

        transformers' own CvtConfig keeps the one and adds the other: a file with both is of a model
        that it loaded and saved, and may have trained, with GELU.
        """
        fields = super().to_diff_dict() | {"library_name": LIBRARY}
        unset = [n for n in fields if fields[n] is None and getattr(Architecture, n, "") is None]
        return {n: fields[n] for n in fields if n not in ("transformers_version", *unset)}

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "CvtConfig":
        """As in transformers."""
        fields = cls._dict_from_json_file(json_file)
        with named_in_errors(json_file):
            return cls.from_dict(with_activation(fields))

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """By this, which is private, transformers reads every config.json; it does not check it.

        Raises:
            ValueError: the file is not the configuration of a CvT; names it.
        """
        with named_in_errors(json_file):
            return plain_fields(super()._dict_from_json_file(json_file))
