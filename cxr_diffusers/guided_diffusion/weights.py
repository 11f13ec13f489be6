"""The originals' tensors under the names that diffusers gives them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from .architecture import Architecture

Change = Callable[[torch.Tensor], torch.Tensor]
Move = tuple[str, Sequence[int], dict[str, Change]]  # (original name, shape, {diffusers name: change})

RESIDUAL_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@torch.no_grad()
def convert_weights(
    state_dict: Mapping[str, torch.Tensor], unet: torch.nn.Module, architecture: Architecture, new_order: bool
) -> dict[str, torch.Tensor]:
    """{original name: tensor} -> {diffusers name: float32 tensor} for `unet`, which may lie on the meta device.

    `unet` may be a `NoisyClassifier`: an encoder under the UNet's names, and a head.

    `new_order`: whether the rows of the qkv tensors are [all Q, K, V], or [q, k, v] head by head.
    Raises ValueError naming every tensor that is missing, unexpected, of the wrong shape, or not finite.
    """
    moves = [*plain_moves(unet, architecture), *attention_moves(unet, architecture, new_order)]
    moves += head_moves(unet, architecture)
    expected = {old: shape for old, shape, _ in moves}
    expected |= class_shapes(architecture)
    check_tensors(state_dict, expected)
    converted = {}
    for old, _, targets in moves:
        for new, change in targets.items():
            converted[new] = change(state_dict[old].float()).contiguous()
    if architecture.num_classes is not None:
        converted["class_embedding.weight"] = class_table(state_dict, architecture)
    return converted


def check_tensors(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless the state_dict has exactly the tensors {name: shape} of `expected`, all finite."""
    wrong = [f"missing {name} {list(expected[name])}" for name in sorted(set(expected) - set(state_dict))]
    wrong += [f"unexpected {name} {list(state_dict[name].shape)}" for name in sorted(set(state_dict) - set(expected))]
    for name in sorted(set(expected) & set(state_dict)):
        if tuple(state_dict[name].shape) != tuple(expected[name]):
            wrong.append(f"{name}: expected shape {list(expected[name])}, got {list(state_dict[name].shape)}")
        elif not torch.isfinite(state_dict[name]).all():
            wrong.append(f"{name} holds NaN or infinity")
    if wrong:
        rest = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{len(wrong)} tensors do not fit: {'; '.join(wrong[:8])}{rest}")


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def plain_moves(unet: torch.nn.Module, architecture: Architecture) -> Iterator[Move]:
    """Tensors that only change their name: (original name, shape, {diffusers name: change})."""
    modules = dict(ENDS)
    residual = dict(residual_blocks(architecture))
    (residual if architecture.updown else modules).update(resamplers(architecture))
    for old, new in residual.items():
        modules |= {f"{old}.{a}": f"{new}.{b}" for a, b in RESIDUAL_BLOCK.items()}
    wanted = unet.state_dict()
    for old, new in modules.items():
        for end in ("weight", "bias"):
            if f"{new}.{end}" in wanted:  # a block has a conv_shortcut only if the channels change
                yield f"{old}.{end}", wanted[f"{new}.{end}"].shape, {f"{new}.{end}": same}


def attention_moves(unet: torch.nn.Module, architecture: Architecture, new_order: bool) -> Iterator[Move]:
    """The same for attention: its 1x1 convolutions over the flattened image become linear layers."""
    modules = dict(unet.named_modules())
    for old, new in attention_blocks(architecture):
        if new not in modules:
            continue
        channels, heads = modules[new].to_q.in_features, modules[new].heads
        for end, tail in (("weight", (channels, 1)), ("bias", ())):
            yield f"{old}.norm.{end}", (channels,), {f"{new}.group_norm.{end}": same}
            yield f"{old}.proj_out.{end}", (channels, *tail), {f"{new}.to_out.0.{end}": as_linear}
            thirds: dict[str, Change] = {
                f"{new}.to_{name}.{end}": partial(part, index=i, count=3, heads=heads, new_order=new_order)
                for i, name in enumerate("qkv")
            }
            yield f"{old}.qkv.{end}", (3 * channels, *tail), thirds
            if architecture.class_matrix:
                tail = (4 * architecture.model_channels, 1) if end == "weight" else ()
                halves: dict[str, Change] = {
                    f"{new}.processor.to_{name}.{end}": partial(part, index=i, count=2, heads=heads)
                    for i, name in enumerate("kv")
                }
                yield f"{old}.encoder_kv.{end}", (2 * channels, *tail), halves


def head_moves(classifier: torch.nn.Module, architecture: Architecture) -> Iterator[Move]:
    """The same for a classifier's head; a UNet has none."""
    if not architecture.pool:
        return
    width, logits = architecture.block_out_channels[-1], architecture.out_channels
    if architecture.pool == "adaptive":
        yield "out.3.weight", (logits, width, 1, 1), {"head.to_out.weight": as_linear}
        yield "out.3.bias", (logits,), {"head.to_out.bias": same}
        return
    positions = (architecture.image_size // 2 ** (len(architecture.block_out_channels) - 1)) ** 2
    yield "out.2.positional_embedding", (width, positions + 1), {"head.positional_embedding": torch.t}
    for old, new, rows in (("qkv_proj", "to_qkv", 3 * width), ("c_proj", "to_out", logits)):
        yield f"out.2.{old}.weight", (rows, width, 1), {f"head.{new}.weight": as_linear}
        yield f"out.2.{old}.bias", (rows,), {f"head.{new}.bias": same}


def as_linear(tensor: torch.Tensor) -> torch.Tensor:
    """(rows, columns, 1) or (rows, columns, 1, 1) -> (rows, columns); a bias stays as it is."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor


def part(tensor: torch.Tensor, index: int, count: int, heads: int, new_order: bool = False) -> torch.Tensor:
    """The rows of q, k or v (`index` 0, 1, 2) of a qkv tensor (or of k or v of two), head after head."""
    tensor = as_linear(tensor)
    if new_order:
        return tensor.chunk(count)[index]
    return tensor.unflatten(0, (heads, count, -1))[:, index].flatten(0, 1)


def residual_blocks(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """(original prefix, diffusers prefix) of each residual block, those that resample left out."""
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.2", "mid_block.resnets.1"
    for old, new in places(architecture):
        yield f"{old}.0", new.format("resnets")


def attention_blocks(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """(original prefix, diffusers prefix) of each place where attention may be."""
    yield "middle_block.1", "mid_block.attentions.0"
    for old, new in places(architecture):
        yield f"{old}.1", new.format("attentions")


def places(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """(original prefix, diffusers prefix) of the blocks of all levels; the original lists downsamplers among them."""
    n = architecture.layers_per_block
    for i in range(len(architecture.block_out_channels)):
        for j in range(n):
            yield f"input_blocks.{1 + i * (n + 1) + j}", f"down_blocks.{i}.{{}}.{j}"
        for j in range(n + 1):
            yield f"output_blocks.{i * (n + 1) + j}", f"up_blocks.{i}.{{}}.{j}"


def resamplers(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """(original prefix, diffusers prefix) of the block between two levels: a convolution or a residual block."""
    n, levels = architecture.layers_per_block, len(architecture.block_out_channels)
    op, conv = ("", "") if architecture.updown else (".op", ".conv")
    for i in range(levels - 1):
        yield f"input_blocks.{(i + 1) * (n + 1)}.0{op}", f"down_blocks.{i}.downsamplers.0{conv}"
        # the decoder counts from the coarsest level; its upsampler follows the last block's attention, if there is any
        index = 2 if levels - 1 - i in architecture.attention_levels else 1
        yield f"output_blocks.{i * (n + 1) + n}.{index}{conv}", f"up_blocks.{i}.upsamplers.0{conv}"


def class_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    if architecture.num_classes is None:
        return {}
    narrow, wide = architecture.model_channels, 4 * architecture.model_channels
    if not architecture.class_mlp:
        return {"label_emb.weight": (architecture.num_classes, wide)}
    return {
        "label_emb.weight": (architecture.num_classes, narrow),
        "cond_embed.0.weight": (wide, narrow),
        "cond_embed.0.bias": (wide,),
        "cond_embed.2.weight": (wide, wide),
        "cond_embed.2.bias": (wide,),
    }


def class_table(state_dict: Mapping[str, torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """The rows of the class embedding; for the fork after its class MLP, with a row of zeros for the null label."""
    table = state_dict["label_emb.weight"].float()
    if not architecture.class_mlp:
        return table
    mlp = [state_dict[f"cond_embed.{layer}.{end}"].float() for layer in (0, 2) for end in ("weight", "bias")]
    hidden = F.silu(F.linear(table, mlp[0], mlp[1]))
    rows = F.linear(hidden, mlp[2], mlp[3])
    return torch.cat([rows, torch.zeros(1, rows.shape[1])])
