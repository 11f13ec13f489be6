"""guided-diffusion's UNet, written down once more from its description: one function of named tensors."""

import torch
import torch.nn.functional as F


class OriginalUNet:
    """`net(x, t, labels)` -> the network's output; `net.tensors` are its weights, under the original names.

    mult: channels of each level, in multiples of `base`. attention: the levels that have it, from 0.
    class_matrix: the CFG fork's version 2, whose attention sees c c^T. (No golden output of it lies here.)
    A tensor that is asked for and not there is drawn, so a first forward pass makes a complete random checkpoint.
    test_goldens.py holds it against the outputs of the original program.
    """

    def __init__(
        self,
        tensors=None,
        *,
        mult,
        attention,
        res_blocks=1,
        heads=1,
        head_channels=-1,
        new_order=False,
        scale_shift=False,
        updown=False,
        classes=None,
        class_mlp=False,
        base=32,
        in_channels=1,
        out_channels=2,
        class_matrix=False,
    ):
        self.tensors = {} if tensors is None else tensors
        self.random = torch.Generator().manual_seed(0)
        self.mult, self.attention, self.res_blocks = mult, attention, res_blocks
        self.heads, self.head_channels, self.new_order = heads, head_channels, new_order
        self.scale_shift, self.updown = scale_shift, updown
        self.classes, self.class_mlp = classes, class_mlp
        self.base, self.in_channels, self.out_channels = base, in_channels, out_channels
        self.class_matrix, self.matrix = class_matrix, None

    def get(self, name, *shape):
        if name not in self.tensors:
            tensor = torch.randn(shape, generator=self.random)
            # vectors are biases or the scales of norms, all others keep the variance of what passes through them
            vector = 0.1 * tensor + name.endswith("weight")
            self.tensors[name] = vector if len(shape) == 1 else tensor / tensor[0].numel() ** 0.5
        return self.tensors[name]

    def linear(self, name, x, out):
        return F.linear(x, self.get(f"{name}.weight", out, x.shape[1]), self.get(f"{name}.bias", out))

    def conv(self, name, x, out, kernel=3, stride=1):
        weight = self.get(f"{name}.weight", out, x.shape[1], kernel, kernel)
        return F.conv2d(x, weight, self.get(f"{name}.bias", out), stride, kernel // 2)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.get(f"{name}.weight", x.shape[1]), self.get(f"{name}.bias", x.shape[1]), 1e-5)

    def residual(self, name, x, emb, out, resample=lambda x: x):
        h = resample(F.silu(self.norm(f"{name}.in_layers.0", x)))
        h = self.conv(f"{name}.in_layers.2", h, out)
        e = self.linear(f"{name}.emb_layers.1", F.silu(emb), 2 * out if self.scale_shift else out)[..., None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + e)
        h = self.conv(f"{name}.out_layers.3", F.silu(h), out)
        x = resample(x)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.skip_connection", x, out, kernel=1))

    def attend(self, name, x):
        batch, channels, height, width = x.shape
        heads = self.heads if self.head_channels == -1 else channels // self.head_channels
        weight = self.get(f"{name}.qkv.weight", 3 * channels, channels, 1)
        h = F.conv1d(self.norm(f"{name}.norm", x).flatten(2), weight, self.get(f"{name}.qkv.bias", 3 * channels))
        if self.new_order:
            q, k, v = h.reshape(batch, 3, heads, channels // heads, -1).unbind(1)
        else:
            q, k, v = h.reshape(batch, heads, 3, channels // heads, -1).unbind(2)
        if self.class_matrix:
            weight = self.get(f"{name}.encoder_kv.weight", 2 * channels, self.matrix.shape[1], 1)
            more = F.conv1d(self.matrix, weight, self.get(f"{name}.encoder_kv.bias", 2 * channels))
            more_k, more_v = more.reshape(batch, heads, 2, channels // heads, -1).unbind(2)
            k, v = torch.cat([more_k, k], dim=-1), torch.cat([more_v, v], dim=-1)
        attention = torch.einsum("bhcq,bhck->bhqk", q, k / (channels // heads) ** 0.5).softmax(-1)
        h = torch.einsum("bhqk,bhck->bhcq", attention, v).reshape(batch, channels, -1)
        weight = self.get(f"{name}.proj_out.weight", channels, channels, 1)
        return x + F.conv1d(h, weight, self.get(f"{name}.proj_out.bias", channels)).reshape(x.shape)

    def embed(self, t, labels):
        """`labels` None: unconditional, or the null label."""
        angles = t[:, None] * torch.exp(-torch.arange(self.base // 2) / (self.base // 2) * torch.tensor(10000.0).log())
        emb = self.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1), 4 * self.base)
        emb = self.linear("time_embed.2", F.silu(emb), 4 * self.base)
        self.matrix = torch.zeros(len(t), 4 * self.base, 4 * self.base)
        if self.classes is None or labels is None:
            return emb
        c = self.get("label_emb.weight", self.classes, self.base if self.class_mlp else 4 * self.base)[labels]
        if self.class_mlp:
            c = self.linear("cond_embed.2", F.silu(self.linear("cond_embed.0", c, 4 * self.base)), 4 * self.base)
        self.matrix = c[:, :, None] * c[:, None, :]
        return emb + c

    def encode(self, x, emb):
        """(output of the middle block, skips)"""
        channels = [m * self.base for m in self.mult]
        x = self.conv("input_blocks.0.0", x, channels[0])
        skips, k = [x], 1
        for level, out in enumerate(channels):
            for _ in range(self.res_blocks):
                x = self.residual(f"input_blocks.{k}.0", x, emb, out)
                if level in self.attention:
                    x = self.attend(f"input_blocks.{k}.1", x)
                skips, k = [*skips, x], k + 1
            if level < len(channels) - 1:
                if self.updown:
                    x = self.residual(f"input_blocks.{k}.0", x, emb, out, lambda x: F.avg_pool2d(x, 2))
                else:
                    x = self.conv(f"input_blocks.{k}.0.op", x, out, stride=2)
                skips, k = [*skips, x], k + 1
        x = self.residual("middle_block.0", x, emb, out)
        return self.residual("middle_block.2", self.attend("middle_block.1", x), emb, out), skips

    def __call__(self, x, t, labels=None):
        emb = self.embed(t, labels)
        x, skips = self.encode(x, emb)
        k = 0
        for level, out in reversed([(level, m * self.base) for level, m in enumerate(self.mult)]):
            for i in range(self.res_blocks + 1):
                x = self.residual(f"output_blocks.{k}.0", torch.cat([x, skips.pop()], dim=1), emb, out)
                if level in self.attention:
                    x = self.attend(f"output_blocks.{k}.1", x)
                if level and i == self.res_blocks:
                    name = f"output_blocks.{k}.{2 if level in self.attention else 1}"
                    if self.updown:
                        x = self.residual(name, x, emb, out, lambda x: F.interpolate(x, scale_factor=2))
                    else:
                        x = self.conv(f"{name}.conv", F.interpolate(x, scale_factor=2), out)
                k += 1
        return self.conv("out.2", F.silu(self.norm("out.0", x)), self.out_channels)


class OriginalClassifier(OriginalUNet):
    """The encoder with a head; `pool` "attention" or "adaptive". Held against golden g3_classifier_unit."""

    def __init__(self, tensors=None, *, pool="attention", **configuration):
        super().__init__(tensors, **configuration)
        self.pool = pool

    def __call__(self, x, t):
        x, _ = self.encode(x, self.embed(t, None))
        x = F.silu(self.norm("out.0", x))
        if self.pool == "adaptive":
            return self.conv("out.3", x.mean(dim=(2, 3), keepdim=True), self.out_channels, kernel=1).flatten(1)
        batch, channels, height, width = x.shape
        x = torch.cat([x.mean(dim=(2, 3))[..., None], x.flatten(2)], dim=2)
        x = x + self.get("out.2.positional_embedding", channels, height * width + 1)
        weight = self.get("out.2.qkv_proj.weight", 3 * channels, channels, 1)
        qkv = F.conv1d(x, weight, self.get("out.2.qkv_proj.bias", 3 * channels))
        q, k, v = qkv.reshape(batch, 3, channels // self.head_channels, self.head_channels, -1).unbind(1)
        attention = torch.einsum("bhcq,bhck->bhqk", q[..., :1], k / self.head_channels**0.5).softmax(-1)
        result = torch.einsum("bhqk,bhck->bhc", attention, v).reshape(batch, channels, 1)
        weight = self.get("out.2.c_proj.weight", self.out_channels, channels, 1)
        return F.conv1d(result, weight, self.get("out.2.c_proj.bias", self.out_channels))[..., 0]
