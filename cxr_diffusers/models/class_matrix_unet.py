"""A UNet whose attention sees the class: version 2 of the CFG fork of guided-diffusion."""

import inspect

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import nn


class ClassMatrixUNet(UNet2DModel):
    """`UNet2DModel`, and in each of its attentions keys and values made of the class come before those of the picture.

    The class vector c (the row of the class embedding, which is also added to the time embedding) becomes the matrix
    c c^T, whose rows are as many tokens; a linear layer of each attention makes their keys and values. Arguments,
    configuration and call are `UNet2DModel`'s, but class labels must be given.

    Raises:
        ValueError: no `num_class_embeds`; a call without labels.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config.num_class_embeds is None:
            raise ValueError("expected `num_class_embeds`: this UNet's attention is about classes, got None")
        for attention in self.attentions():
            attention.set_processor(
                ClassMatrixAttention(self.class_embedding.embedding_dim, attention.to_q.in_features)
            )

    # diffusers reads the names of a configuration's entries off this signature
    __init__.__signature__ = inspect.signature(UNet2DModel.__init__)  # type: ignore[attr-defined]

    def attentions(self):
        """Every attention: those of the levels, and of the middle."""
        return [module for module in self.modules() if type(module).__name__ == "Attention"]

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        """As `UNet2DModel`'s."""
        if class_labels is None:
            raise ValueError("expected `class_labels`, got None")
        vectors = self.class_embedding(class_labels).to(sample.dtype)
        for attention in self.attentions():  # diffusers hands an attention inside a UNet nothing but the picture
            attention.processor.vectors = vectors
        return super().forward(sample, timestep, class_labels, return_dict)


class ClassMatrixAttention(nn.Module):
    """An attention processor: softmax(q [k_c, k]^T / sqrt(d)) [v_c, v], with k_c and v_c of the class matrix."""

    def __init__(self, class_channels, channels):
        super().__init__()
        self.to_k = nn.Linear(class_channels, channels)
        self.to_v = nn.Linear(class_channels, channels)
        self.vectors = None  # (B, class_channels), of the call under way

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = hidden_states  # (B, C, H, W)
        tokens = attn.group_norm(x.flatten(2)).transpose(1, 2)
        query = attn.to_q(tokens)
        key = torch.cat([self.of_matrix(self.to_k), attn.to_k(tokens)], dim=1)
        value = torch.cat([self.of_matrix(self.to_v), attn.to_v(tokens)], dim=1)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        found = attn.to_out[0](found).transpose(1, 2).reshape(x.shape)
        return (x + found) / attn.rescale_output_factor

    def of_matrix(self, linear):
        """`linear` of each row c_i c of the matrix: c_i (W c) + b, without the matrix. (B, rows, channels)"""
        return self.vectors[:, :, None] * F.linear(self.vectors, linear.weight)[:, None] + linear.bias
