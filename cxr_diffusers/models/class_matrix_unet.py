"""A UNet with the class in its attention: version 2 of the CFG fork of guided-diffusion."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn


class ClassMatrixUNet(UNet2DModel):
    """`UNet2DModel` whose attentions have keys and values of the class before those of the image.

    The class vector c (the row of the class embedding, which is also added to the time embedding) becomes the matrix
    c c^T, whose rows are as many tokens; a linear layer of each attention makes their keys and values. Arguments,
    configuration and call are `UNet2DModel`'s, but class labels must be given.

    Raises:
        ValueError: no `num_class_embeds`; a call without labels.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.num_class_embeds is None:
            raise ValueError("expected `num_class_embeds`, which the attention of this UNet needs, got None")
        for attention in self.attentions():
            attention.set_processor(
                ClassMatrixAttention(self.class_embedding.embedding_dim, attention.to_q.in_features)
            )

    # diffusers takes the names of a configuration's entries from this signature
    __init__.__signature__ = inspect.signature(UNet2DModel.__init__).replace(  # type: ignore[attr-defined]
        return_annotation=None
    )

    def attentions(self) -> list[nn.Module]:
        """The attentions of all levels and of the middle."""
        return [module for module in self.modules() if type(module).__name__ == "Attention"]

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple:
        """As in `UNet2DModel`; ValueError without class labels."""
        if class_labels is None:
            raise ValueError("expected `class_labels`, got None")
        vectors = self.class_embedding(class_labels).to(sample.dtype)
        for attention in self.attentions():  # diffusers passes only the image to an attention inside a UNet
            attention.processor.vectors = vectors
        return super().forward(sample, timestep, class_labels, return_dict)


class ClassMatrixAttention(nn.Module):
    """An attention processor: softmax(q [k_c, k]^T / sqrt(d)) [v_c, v], with k_c and v_c of the class matrix."""

    def __init__(self, class_channels: int, channels: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(class_channels, channels)
        self.to_v = nn.Linear(class_channels, channels)
        self.vectors: Tensor | None = None  # (B, class_channels), of the current call

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        x = hidden_states  # (B, C, H, W)
        tokens = attn.group_norm(x.flatten(2)).transpose(1, 2)
        query = attn.to_q(tokens)
        key = torch.cat([self.of_matrix(self.to_k), attn.to_k(tokens)], dim=1)
        value = torch.cat([self.of_matrix(self.to_v), attn.to_v(tokens)], dim=1)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        attended = attn.to_out[0](attended).transpose(1, 2).reshape(x.shape)
        return (x + attended) / attn.rescale_output_factor

    def of_matrix(self, linear: nn.Linear) -> Tensor:
        """`linear` of each row c_i c of the matrix: c_i (W c) + b, without the matrix. (B, rows, channels)"""
        assert self.vectors is not None  # set by the UNet before its forward pass
        return self.vectors[:, :, None] * F.linear(self.vectors, linear.weight)[:, None] + linear.bias
