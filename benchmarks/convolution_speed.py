"""Speed of structured 1 x 1 convolutions beside torch's, and a small network trained with both.

    pip install 'einlinear[lab]'
    python benchmarks/convolution_speed.py
    python benchmarks/convolution_speed.py --train

Feature maps of 14 x 14 positions, 8 images, float32, in the memory format channels_last. Ratios of medians of calls in
turns. The network has 1 x 1 convolutions of 256 channels between depthwise ones, on Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import einlinear as el
from einlinear_lab.bench.timing import medians
from einlinear_lab.data.images.fashion_mnist import read_fashion_mnist


def speed(rounds: int) -> None:
    print("| channels | structure | MACs of dense | forward | training step |")
    print("| --- | --- | --- | --- | --- |")
    for channels in (512, 1024):
        x = torch.randn(8, channels, 14, 14).to(memory_format=torch.channels_last)
        dense = nn.Conv2d(channels, channels, 1).to(memory_format=torch.channels_last)
        for spec in ("btt(rank=2)", "monarch(blocks=16)", f"low_rank(rank={channels // 8})"):
            layer = el.Conv2d(channels, channels, 1, spec)
            share = layer.structure.macs / channels**2
            ratios = []
            for step in (forward, train_step):
                times = medians({"dense": step(dense, x), "structured": step(layer, x)}, "cpu", rounds)
                ratios.append(times["dense"] / times["structured"])
            print(
                f"| {channels} | {layer.structure.spec} | {share:.0%} | {ratios[0]:.2f} × | {ratios[1]:.2f} × |",
                flush=True,
            )


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return layer(x)

    return run


def train_step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    inputs = x.clone().requires_grad_()
    upstream = torch.randn_like(layer(x))

    def run() -> object:
        return torch.autograd.grad(layer(inputs), [inputs, *layer.parameters()], upstream)

    return run


def network(channels: int = 256) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, channels, 4, 4), nn.GELU()]
    for _ in range(2):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.BatchNorm2d(channels)]
        layers += [nn.Conv2d(channels, channels, 1), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def training(steps: int) -> None:
    images = read_fashion_mnist()
    base = network(64)
    print("| 1 × 1 convolutions | parameters | test accuracy |")
    print("| --- | --- | --- |")
    for name, spec in (("dense", None), ("BTT", "btt(rank=2)")):
        torch.manual_seed(0)
        model = copy.deepcopy(network())
        if spec:
            el.convert(model, spec, layers="*", exclude="12", convolutions=["4", "8"])
        el.init_(model, base=base)
        optimizer = torch.optim.AdamW(el.param_groups(model, 1e-2, base=base, weight_decay=0.01))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            index = torch.randint(len(images.train_x), (64,), generator=generator)
            F.cross_entropy(model(images.train_x[index]), images.train_y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        model.eval()
        with torch.no_grad():
            parts = zip(images.test_x.split(500), images.test_y.split(500), strict=True)
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
        params = sum(p.numel() for p in model.parameters())
        print(f"| {name} | {params:,} | {right / len(images.test_y):.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train the network instead")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    if arguments.train:
        training(arguments.steps)
    else:
        speed(arguments.rounds)


if __name__ == "__main__":
    main()
