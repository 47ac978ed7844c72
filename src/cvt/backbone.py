"""CvT as a feature extractor for detection and segmentation heads."""

import math

from torch import Tensor
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from cvt.configuration import CvtConfig
from cvt.modeling import CvtModel, CvtPreTrainedModel, Encoder


class CvtBackbone(BackboneMixin, CvtPreTrainedModel):
    """CvT as a feature extractor for detection and segmentation heads.

    `out_features` or `out_indices` in the config choose the stages, `stage1` to the last;
    `channels` and `strides` describe the maps.

    Example:
        >>> import torch
        >>> from cvt import CvtBackbone, CvtConfig
        >>> config = CvtConfig.from_variant("cvt-13", out_features=["stage1", "stage2", "stage3"])
        >>> backbone = CvtBackbone(config).eval()
        >>> backbone.channels, backbone.strides
        ([64, 192, 384], [4, 8, 16])
        >>> [tuple(each.shape) for each in backbone(torch.zeros(1, 3, 64, 96)).feature_maps]
        [(1, 64, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6)]
    """

    _keys_to_ignore_on_load_unexpected = CvtModel._keys_to_ignore_on_load_unexpected

    def __init__(self, config: CvtConfig) -> None:
        super().__init__(config)
        self.num_features = list(config.embed_dim)
        self.encoder = Encoder(config)
        self.post_init()

    @property
    def out_feature_strides(self) -> dict[str, int]:
        """Stride of every stage's map, in pixels of the image."""
        patch_stride = self.config.patch_stride
        strides = (math.prod(patch_stride[: i + 1]) for i in range(len(patch_stride)))
        return dict(zip(self.stage_names, strides, strict=True))

    @property
    def strides(self) -> list[int]:
        """Stride of every map returned, in pixels of the image."""
        return [self.out_feature_strides[name] for name in self.out_features]

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple:
        """Feature maps of the chosen stages, (B, C, H, W) each; arguments as in `CvtModel`."""
        output = self.encoder(pixel_values, True, output_attentions)
        maps = dict(zip(self.stage_names, output.hidden_states, strict=True))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features),
            hidden_states=output.hidden_states if output_hidden_states else None,
            attentions=output.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()
