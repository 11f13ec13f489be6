"""A GPU in three minutes: the share of its own matrix rate that the 256-px network reaches, training, `detect`.

    python benchmarks/gpu.py --seconds 150 --out gpu_results
    python benchmarks/gpu.py --seconds 75 --only rates forward --out gpu_results
    python benchmarks/gpu.py --device cpu --toy --out /tmp/rehearsal                (tries this program out)

What matters most is measured first. Before each measurement the time that is left is compared with what the measurement
will take, compilation included; what does not fit is named under the tables. `table.md` and `results.json` are written
after every row. Nothing but torch, diffusers and this project is imported.
"""

# ruff: noqa: E402
import time

BEGIN = time.perf_counter()  # before torch is imported: that is part of the budget

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import sys
import traceback
import types
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from diffusers.training_utils import EMAModel
from machine import describe_machine, markdown
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import cxr_diffusers
from cxr_diffusers import CFGAnomalyPipeline, default_checkpoint, denoising_loss, load_recipe
from cxr_diffusers.files import write_file

RECIPE = Path(__file__).parent.parent / "configs" / "chexpert_cfg_256.yaml"
SAMPLES = Path(cxr_diffusers.__file__).with_name("samples")
TOY = ["unet.block_out_channels=[8,8,8,8,8,8]", "unet.sample_size=64", "unet.attention_head_dim=8"]
TOY += ["unet.norm_num_groups=4", "unet.attn_norm_num_groups=4", "unet.layers_per_block=1"]
COMPILE_SECONDS = 40.0  # of a forward, until one was compiled
GOAL = 0.6  # of the matrix rate, for batched bf16 forwards
# name -> the type whose matrix rate it is held against
PRECISIONS = {"float32": "float32", "tf32": "tf32", "bf16 autocast": "bf16", "bf16 weights": "bf16"}
SECTIONS = {
    "rates": ("What the card does", ["", "rate", "unit"]),
    "forward": (
        "Forward of the network of `configs/chexpert_cfg_256.yaml`",
        ["precision", "layout", "compile", "batch", "images a second", "of the card's rate", "off by", "first call, s"],
    ),
    "kernels": ("Where the time of a forward goes", ["forward", "convolutions and products", "the longest others"]),
    "training": (
        "Training steps of the same recipe",
        ["precision", "compile", "batch", "steps a second", "images a second", "of the card's rate", "first step, s"],
    ),
    "detect": ("The shipped model's own call", ["precision", "images a call", "images a second"]),
    "agreement": (
        "Agreement with the CPU in float32",
        ["", "precision", "max. difference", "mean difference", "values"],
    ),
}


def main(arguments=None):
    options = parser().parse_args(arguments)
    torch.backends.cudnn.benchmark = True
    bench = Bench(options)
    print(bench.machine, flush=True)
    failed = bench.run()
    print("\n" + bench.report())
    return 1 if failed else 0


# what is measured


@dataclass
class Variant:
    """One way to run the network."""

    precision: str
    batch: int
    channels_last: bool = False
    compile: str = ""  # a mode of torch.compile
    channelwise: bool = False  # see `channelwise_group_norm`
    graph: bool = False  # replay as a CUDA graph
    profile: bool = False  # a row of `kernels`, too

    @property
    def layout(self):
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def how(self):
        extra = ["channelwise norm"] * self.channelwise + ["CUDA graph"] * self.graph
        return ", ".join([self.compile or "no", *extra])

    @property
    def name(self):
        return f"{self.precision}, {self.layout}, compile {self.how}, batch {self.batch}"


@dataclass
class Measurement:
    """`run()` -> pairs of a section and its row.

    `seconds` is a guess, to which the time of the last compilation is added `compiles` times.
    """

    section: str
    name: str
    seconds: float
    run: object
    compiles: float = 0.0


class Bench:
    """Measures in order of importance while time lasts, and keeps what it has on the disk."""

    def __init__(self, options):
        self.options, self.device, self.toy = options, torch.device(options.device), options.toy
        self.cuda = self.device.type == "cuda"
        self.machine = describe_machine(options.device)
        self.recipe = load_recipe(RECIPE, ["data.root=none", *(TOY if options.toy else [])])
        self.rows = {section: [] for section in SECTIONS}
        self.rates = {}  # type -> FLOP a second
        self.skipped, self.failed, self.kernels, self.references = [], [], {}, {}
        self.compile_seconds = COMPILE_SECONDS

    # the order

    def plan(self):
        small, middle, large = (1, 2, 3) if self.toy else (1, 8, 32)
        forward = partial(Measurement, "forward")
        best = Variant("bf16 weights", large, channels_last=True, compile="default", profile=True)

        def row(variant, seconds=4.0):
            compiles = (3.0 if "max" in variant.compile else 1.0) if variant.compile else 0.0
            return forward(variant.name, seconds, partial(self.forward, variant), compiles)

        for precision in ("bf16", "tf32", "float32"):
            yield Measurement("rates", precision, 1.0, partial(self.matrix_rate, precision))
        yield Measurement("rates", "copy", 1.0, self.copy_rate)
        yield Measurement("rates", "ceiling", 0.1, self.ceiling)
        yield row(Variant("bf16 weights", large, profile=True))
        yield row(Variant("float32", large))
        yield row(best)
        yield row(Variant("bf16 weights", large, channels_last=True, compile="default", channelwise=True, profile=True))
        yield Measurement("agreement", "the shipped network", 8.0, self.agreement)
        for count, dtype in itertools.product((2,) if self.toy else (64, 8), (torch.bfloat16, torch.float32)):
            yield Measurement("detect", f"{dtype}, {count} images", 5.0, partial(self.detect, count, dtype))
        batches = (2,) if self.toy else (16, 4)
        for batch in batches:
            yield Measurement("training", f"batch {batch}", 5.0, partial(self.training, batch, "bf16 autocast"))
        yield row(Variant("bf16 weights", large, channels_last=True))
        for precision in ("tf32", "bf16 autocast"):
            yield row(Variant(precision, large))
        yield row(Variant("bf16 weights", small, channels_last=True, graph=True))
        for batch, precision in itertools.product((small, middle), reversed(PRECISIONS)):
            yield row(Variant(precision, batch))
        for precision in ("bf16 autocast", "tf32", "float32"):
            yield row(Variant(precision, large, channels_last=True))
        yield Measurement("training", "as in float32", 6.0, partial(self.training, batches[-1], "float32"))
        for batch in batches:
            run = partial(self.training, batch, "bf16 autocast", compiled=True)
            yield Measurement("training", f"batch {batch}, compiled", 5.0, run, compiles=2.5)
        yield row(Variant("bf16 weights", middle, channels_last=True, compile="default"))
        yield row(Variant("bf16 weights", small, channels_last=True, compile="default", graph=True))
        for precision in ("bf16 autocast", "tf32", "float32"):
            yield row(Variant(precision, large, channels_last=True, compile="default"))
        yield row(Variant("bf16 weights", large, channels_last=True, compile="max-autotune-no-cudagraphs"))

    def run(self):
        """Measure what fits -> the names of what failed."""
        for item in self.plan():
            if item.section not in self.options.only:
                continue
            guess = item.seconds * (0.1 if self.toy else 1) + item.compiles * self.compile_seconds
            name = f"{item.section}: {item.name}"
            if spent() + guess > self.options.seconds:
                self.skipped.append(name)
            else:
                try:
                    for section, row in item.run():
                        self.rows[section].append(row)
                        print(f"{spent():6.1f} s  {section}: {' | '.join(row)}", flush=True)
                        self.write()
                except Exception as error:  # one row that fails, for memory say, must not cost the others
                    traceback.print_exc()
                    self.failed.append(f"{name}: {type(error).__name__}: {str(error).strip()[:200]}")
                if self.cuda:
                    torch.cuda.empty_cache()
            self.write()
        return self.failed

    # the rows

    def matrix_rate(self, precision):
        """Of one square product, on random numbers: 2 n^3 operations over the median of its times."""
        n = 256 if self.toy else 8192
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = torch.randn(2, n, n, device=self.device, dtype=dtype)
        with arithmetic(precision):
            seconds = self.seconds_of(lambda: a @ b)[1]
        self.rates[precision] = 2 * n**3 / seconds
        yield "rates", [f"{n}^3 product, {precision}", f"{self.rates[precision] / 1e12:.3g}", "TFLOP/s"]

    def copy_rate(self):
        source = torch.randn((1 << 20) if self.toy else (1 << 30), device=self.device)
        target = torch.empty_like(source)
        seconds = self.seconds_of(lambda: target.copy_(source))[1]
        self.rates["copy"] = 2 * source.nbytes / seconds
        yield "rates", ["copy, bytes read and written", f"{self.rates['copy'] / 1e9:.4g}", "GB/s"]

    def ceiling(self):
        """The share of the matrix rate that a bfloat16 forward has whose parts run at the card's own two rates."""
        if not {"bf16", "copy"} <= self.rates.keys():  # they failed
            return
        others = bytes_outside_arithmetic(self.unet, self.shape) / self.rates["copy"]
        products = self.flops / self.rates["bf16"]
        name = "ceiling: products at the bf16 rate, each norm, sum, join and enlargement one kernel at the copy rate"
        yield "rates", [name, f"{products / (products + others):.1%}", "of the card's rate"]

    @torch.no_grad()
    def forward(self, variant):
        """One row, and one of the longest kernels. "Off by" is |output - reference| / |reference| (2-norms)."""
        images, timesteps, labels, reference = self.reference(variant.batch)
        dtype = torch.bfloat16 if variant.precision == "bf16 weights" else torch.float32
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        unet = torch.nn.Module.to(copy.deepcopy(self.unet), dtype=dtype, memory_format=layout)
        images = images.to(dtype=dtype, memory_format=layout)
        if variant.channelwise:
            make_channelwise(unet)
        if variant.compile:
            self.compile(unet, variant.compile)

        def call():
            return unet(images, timesteps, class_labels=labels).sample

        with arithmetic(variant.precision), self.autocast("autocast" in variant.precision):
            if variant.graph and self.cuda:
                begin = time.perf_counter()
                call, output = capture(call)
                first = time.perf_counter() - begin
                seconds = self.seconds_of(call)[1]
            else:
                first, seconds = self.seconds_of(call)
                output = call()
            if variant.compile and "max" not in variant.compile:
                self.compile_seconds = first
            off = ((output.float() - reference).norm() / reference.norm()).item()
            rate = self.rates.get(PRECISIONS[variant.precision])
            share = f"{variant.batch * self.flops / seconds / rate:.1%}" if rate else "–"
            cells = [variant.precision, variant.layout, variant.how, str(variant.batch)]
            yield "forward", [*cells, f"{variant.batch / seconds:.4g}", share, f"{off:.1e}", f"{first:.1f}"]
            if variant.profile:
                self.kernels[variant.name] = self.profile(call)
                yield "kernels", [variant.name, *shares(self.kernels[variant.name])]

    def training(self, batch, precision, compiled=False):
        """One row: loss, backward, clipping, AdamW and the average of the weights, on a batch that stays on the card.

        In bfloat16, as in `cxr_diffusers.train`: autocast, channels_last if compiled, one kernel for all of AdamW, few
        for the average; in float32: as torch is without any of these.
        """
        low = precision == "bf16 autocast"
        config = self.recipe.train
        unet = copy.deepcopy(self.unet).train()
        if compiled:
            unet.to(memory_format=torch.channels_last)
        scheduler = DDIMScheduler(**self.recipe.scheduler)
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=low
        )
        ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=low)
        images = torch.rand(batch, *self.shape, device=self.device) * 2 - 1
        labels = torch.arange(batch, device=self.device) % 2
        if compiled:
            self.compile(unet, "default")
        losses = {"p_uncond": config.p_uncond, "vlb_weight": config.vlb_weight}

        def step():
            with self.autocast(low):
                loss = denoising_loss(unet, scheduler, images, labels, **losses)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            return loss

        with arithmetic("bf16" if low else "default"):
            first, seconds = self.seconds_of(step)
            loss = step().item()
        if not loss < float("inf"):
            raise ValueError(f"expected a finite loss after the steps, got {loss}")
        rate = self.rates.get("bf16" if low else "tf32")
        # a backward is two forwards' work
        share = f"{3 * batch * self.flops / seconds / rate:.1%}" if rate else "–"
        name = (
            f"bf16 autocast, {'channels_last, ' * compiled}fused"
            if low
            else "float32, tf32 in convolutions (torch's defaults)"
        )
        cells = [name, "default" if compiled else "no", str(batch), f"{1 / seconds:.3g}", f"{batch / seconds:.3g}"]
        yield "training", [*cells, share, f"{first:.1f}"]

    def detect(self, count, dtype):
        """One row: radiographs in memory to maps in memory, with the shipped model's own settings."""
        images = self.samples(count)
        pipeline = open_pipeline(self.device, dtype)
        with arithmetic("default"):
            seconds = self.seconds_of(lambda: pipeline(images, output_type="np", **self.settings), limit=3.0)[1]
        yield "detect", [str(dtype).removeprefix("torch."), str(count), f"{count / seconds:.4g}"]

    @torch.no_grad()
    def agreement(self):
        """The shipped network and its map of one radiograph, beside the CPU's."""
        (image,) = self.samples(1)
        generator = torch.Generator().manual_seed(0)
        reference = open_pipeline("cpu", torch.float32)
        config = reference.unet.config
        noisy = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=generator)
        settings = {"output_type": "np", **self.settings}

        def answers(pipeline):
            place = {"device": pipeline.device, "dtype": pipeline.dtype}
            labels = torch.tensor([0, 1], device=pipeline.device)
            timesteps = torch.tensor([100, 500], device=pipeline.device)
            output = pipeline.unet(noisy.to(**place), timesteps, class_labels=labels).sample.float().cpu()
            answer = pipeline(image, **settings)
            maps, scores = torch.as_tensor(answer.anomaly_map), torch.as_tensor(answer.anomaly_score)
            return {"a forward": output, "an anomaly map": maps, "an anomaly score": scores}

        expected = answers(reference)
        for name in ("float32", "tf32", "bf16 weights"):
            dtype = torch.bfloat16 if name == "bf16 weights" else torch.float32
            with arithmetic(name):
                for what, value in answers(open_pipeline(self.device, dtype)).items():
                    apart = (value.double() - expected[what].double()).abs()
                    size = f"{expected[what].min():.3g} to {expected[what].max():.3g}"
                    yield "agreement", [what, name, f"{apart.max():.1e}", f"{apart.mean():.1e}", size]

    # what they share

    @cached_property
    def unet(self):
        with self.device:
            return UNet2DModel(**self.recipe.unet).eval()

    @property
    def shape(self):
        size = self.recipe.unet["sample_size"]
        return self.recipe.unet["in_channels"], size, size

    @cached_property
    def flops(self):
        """Of one forward of one image: products and convolutions, two operations a multiply-add."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            UNet2DModel(**self.recipe.unet)(
                torch.empty(1, *self.shape), torch.zeros(1), class_labels=torch.zeros(1).int()
            )
        return counter.get_total_flops()

    def reference(self, batch):
        """(images, timesteps, labels, output in float32), the same for every variant."""
        if batch not in self.references:
            generator = torch.Generator().manual_seed(batch)
            images = torch.randn(batch, *self.shape, generator=generator).to(self.device)
            timesteps = torch.randint(1000, (batch,), generator=generator).to(self.device)
            labels = torch.arange(batch, device=self.device) % 3
            with arithmetic("float32"):
                output = self.unet(images, timesteps, class_labels=labels).sample
            self.references[batch] = images, timesteps, labels, output
        return self.references[batch]

    @property
    def settings(self):
        return {"num_inference_steps": 2} if self.toy else {}

    def samples(self, count):
        images = [Image.open(path).convert("L") for path in sorted(SAMPLES.glob("*.png"))]
        return list(itertools.islice(itertools.cycle(images), count))

    def compile(self, unet, mode):
        """In place. The toy is traced only: code for it would take longer to make than all else."""
        torch._dynamo.reset()
        unet.compile(dynamic=False, **({"backend": "eager"} if self.toy else {"mode": mode}))

    def autocast(self, enabled):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def seconds_of(self, function, limit=1.0):
        """(seconds of the first call, median seconds of at least three later ones within about `limit` seconds)."""
        times = []
        for _ in range(2):  # the first compiles and chooses algorithms
            begin = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - begin)
        repeats = 3 if self.toy else min(max(3, int(limit / times[1])), 50)
        if not self.cuda:
            return times[0], statistics.median(wall_seconds(function) for _ in range(repeats))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        self.synchronize()
        spans = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
        return times[0], statistics.median(spans)

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def profile(self, function):
        """{kernel: seconds of it in one call}, the longest first; on the CPU operators."""
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CUDA if self.cuda else kinds.CPU]) as profiler:
            function()
            self.synchronize()
        attribute = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        times = {event.key: getattr(event, attribute) / 1e6 for event in profiler.key_averages()}
        return dict(sorted(((k, v) for k, v in times.items() if v > 0), key=lambda pair: -pair[1]))

    # what is kept

    def report(self):
        """All tables as Markdown."""
        millions, gflop = self.unet.num_parameters() / 1e6, self.flops / 1e9
        size = f"{millions:.1f} M parameters, {self.shape[-1]} px, {gflop:.1f} GFLOP an image"
        time_taken = f"{spent():.0f} of {self.options.seconds:g} s"
        parts = [self.machine, f"{size}; {time_taken}; medians; cudnn.benchmark on"]
        for section, (title, header) in SECTIONS.items():
            if self.rows[section]:
                parts.append(f"**{title}**\n\n{markdown(header, self.rows[section])}")
        column = SECTIONS["forward"][1].index("of the card's rate")
        batched = [row for row in self.rows["forward"] if row[0].startswith("bf16") and int(row[3]) > 1]
        if batched and self.rates:
            best = max(batched, key=lambda row: float(row[column].rstrip("%–") or 0))
            parts.append(
                f"Best batched bf16 forward: {best[column]} of the card's rate (goal {GOAL:.0%}): {', '.join(best[:4])}"
            )
        parts += [f"No time for: {'; '.join(self.skipped)}"] * bool(self.skipped)
        parts += [f"Failed: {'; '.join(self.failed)}"] * bool(self.failed)
        return "\n\n".join(parts) + "\n"

    def write(self):
        folder = self.options.out
        tables = {
            section: [dict(zip(header, row, strict=True)) for row in self.rows[section]]
            for section, (_, header) in SECTIONS.items()
        }
        about = {"machine": self.machine, "seconds": spent(), "budget": self.options.seconds, "toy": self.toy}
        about |= {"gflop_an_image": self.flops / 1e9, "parameters": self.unet.num_parameters(), "rates": self.rates}
        results = {**about, "tables": tables, "kernels": self.kernels, "skipped": self.skipped, "failed": self.failed}
        write_file(folder / "results.json", json.dumps(results, indent=1).encode())
        write_file(folder / "table.md", self.report().encode())


def spent():
    """Seconds since this program began."""
    return time.perf_counter() - BEGIN


def wall_seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


@contextlib.contextmanager
def arithmetic(precision):
    """How float32 is multiplied within: exactly, as tf32, or ("default") as torch is when nobody says anything."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = precision == "tf32", precision in ("tf32", "default")
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def capture(function):
    """(a call that replays `function` as a CUDA graph, the tensor that every replay fills)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph.replay, output


def bytes_outside_arithmetic(unet, shape):
    """Bytes that norms, sums, joins and enlargements of a bfloat16 forward read and write for an image, a kernel each.

    A norm reads its input twice, for the moments and to apply them together with SiLU (and with the embedding of the
    timestep), and writes once; a residual sum reads both terms and writes; a join of skipped activations reads and
    writes; an enlargement reads a quarter of what it writes. Norm and sum could share a pass, which PyTorch's
    compiler does not do.
    """
    values = []
    with torch.device("meta"):
        twin = UNet2DModel.from_config(unet.config)
        for module in twin.modules():
            if isinstance(module, (torch.nn.GroupNorm, ResnetBlock2D, Attention)):
                module.register_forward_hook(lambda module, inputs, output: values.append(3 * output.numel()))
            if isinstance(module, Upsample2D):
                module.register_forward_hook(lambda module, inputs, output: values.append(output.numel() * 5 // 4))
        for resnet in (resnet for block in twin.up_blocks for resnet in block.resnets):
            resnet.register_forward_pre_hook(lambda module, inputs: values.append(2 * inputs[0].numel()))
        twin(torch.empty(1, *shape), torch.zeros(1), class_labels=torch.zeros(1).int())
    return 2 * sum(values)


def make_channelwise(unet):
    """Let every GroupNorm of a network be computed by `channelwise_group_norm`, in place."""
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = types.MethodType(channelwise_group_norm, module)


def channelwise_group_norm(norm, x):
    """(B, C, ...) -> what `norm(x)` is, its moments taken within each channel and joined to those of groups after.

    In channels_last a group's few channels lie apart by all the others; taken channel by channel, threads that are
    neighbours read bytes that are neighbours. Joined as Chan, Golub & LeVeque (1979) join variances.
    """
    variance, mean = torch.var_mean(x.float(), dim=tuple(range(2, x.ndim)), correction=0)
    variance, mean = (value.unflatten(1, (norm.num_groups, -1)) for value in (variance, mean))
    center = mean.mean(dim=-1, keepdim=True)
    spread = (variance + (mean - center).square()).mean(dim=-1, keepdim=True)
    scale = (spread + norm.eps).rsqrt() * norm.weight.float().unflatten(0, (norm.num_groups, -1))
    shift = norm.bias.float().unflatten(0, (norm.num_groups, -1)) - center * scale
    scale, shift = (value.flatten(1)[(...,) + (None,) * (x.ndim - 2)] for value in (scale, shift))
    return (x.float() * scale + shift).to(x.dtype)


def shares(kernels, count=4):
    """{kernel: seconds} -> cells: the share of convolutions and matrix products, and the longest of the others."""
    # cuDNN's own changes of layout are no arithmetic; what Inductor makes of a fused convolution's rest is none, either
    words = ("gemm", "conv", "xmma", "cutlass", "nvjet", "addmm", "bmm", "fprop")
    others = ("nchwtonhwc", "nhwctonchw", "triton_poi", "triton_red", "triton_per", "elementwise", "layout")
    total = sum(kernels.values())
    heavy = {k for k in kernels if any(w in k.lower() for w in words) and not any(w in k.lower() for w in others)}
    rest = [(name, seconds) for name, seconds in kernels.items() if name not in heavy][:count]
    listed = "; ".join(f"{name.replace('|', '/')[:48]} {seconds / total:.0%}" for name, seconds in rest)
    return [f"{sum(kernels[name] for name in heavy) / total:.0%} of {total * 1e3:.3g} ms", listed]


def open_pipeline(device, dtype):
    pipeline = CFGAnomalyPipeline.from_pretrained(default_checkpoint(), torch_dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150, help="no measurement begins that would end later")
    parser.add_argument("--out", type=Path, required=True, help="folder for table.md and results.json")
    parser.add_argument("--device", default="cuda")
    parts = [section for section in SECTIONS if section != "kernels"]  # those come with the forwards
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to measure")
    parser.add_argument("--toy", action="store_true", help="a network of toy size, to try this program out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
