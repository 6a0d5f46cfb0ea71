"""How near pictures are as networks see them: on the default teacher, always here; by the classes of another network,
LPIPS and DISTS where packages and weights are installed or lie in torch's cache. Nothing is ever downloaded."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from model.teacher import Teacher
from model.weights import packaged

CLASSIFIER = "efficientnet_lite2"  # of `classes`: it teaches only where a configuration names it
KEPT = 2**21  # pixels of a sharp picture whose features are kept for the next picture to be compared with it
Seen = TypeVar("Seen")
# What torchvision calls the files that the two packages' backbones are read from.
ALEXNET, VGG16 = "alexnet-owt-7be5be79.pth", "vgg16-397923af.pth"


def features(restored: Tensor, sharp: Tensor) -> Tensor:
    """Distance on EfficientNet-Lite0's features of uint8 RGB [B, 3, H, W] → float64 [B] on the CPU; 0 for equal ones.

    Zhang et al. 2018's distance without learned weights: at each of the strides 4 to 32 features are normalised to
    unit length over their channels, and the squared differences summed over channels, averaged over places, summed over
    levels. Comparable only with itself. fp32.
    """
    network = _teacher("efficientnet_lite0", sharp.device)
    total = torch.zeros(len(sharp), dtype=torch.float64)
    for first, second in zip(network(_unit(restored)), _once(network, sharp), strict=True):
        first, second = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (first, second))
        total += (first - second).square().sum(1).mean(dim=(1, 2)).double().cpu()
    return total


def classes(restored: Tensor, sharp: Tensor) -> Tensor:
    """Agreement of an independent classifier, EfficientNet-Lite2, on uint8 RGB [B, 3, H, W] → float64 [B] on the CPU:
    Σ min(p, q) of its class probabilities of the two pictures, 1 where it sees the same, 0 where nothing is shared.
    ValueError where `classes_here` is false."""
    classify = _teacher(CLASSIFIER, sharp.device).classify
    return torch.minimum(classify(_unit(restored)), _once(classify, sharp)).double().sum(1).cpu()


def lpips(restored: Tensor, sharp: Tensor) -> Tensor:
    """LPIPS (Zhang et al. 2018; AlexNet, version 0.1, inputs in [−1, 1]) of uint8 RGB [B, 3, H, W] → float64 [B] on the
    CPU, by the authors' package. ValueError where `lpips_here` is false."""
    network = _lpips(sharp.device, _cached(ALEXNET))
    return network(2 * _unit(restored) - 1, 2 * _unit(sharp) - 1).flatten().double().cpu()


def dists(restored: Tensor, sharp: Tensor) -> Tensor:
    """DISTS (Ding et al. 2020; VGG16, whole pictures) of uint8 RGB [B, 3, H, W] → float64 [B] on the CPU, by the
    authors' package. ValueError where `dists_here` is false."""
    network = _dists(sharp.device, _cached(VGG16))
    return network(_unit(restored), _unit(sharp)).reshape(-1).double().cpu()


def classes_here() -> bool:
    """Whether the classifier's weights are installed."""
    return packaged(CLASSIFIER)


def lpips_here() -> bool:
    """Whether LPIPS can be had: package and AlexNet."""
    return importlib.util.find_spec("lpips") is not None and _cached(ALEXNET).is_file()


def dists_here() -> bool:
    """Whether DISTS can be had: package and VGG16."""
    return importlib.util.find_spec("DISTS_pytorch") is not None and _cached(VGG16).is_file()


def _cached(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _unit(image: Tensor) -> Tensor:
    return image.float().div(255)


@lru_cache(maxsize=4)
def _teacher(name: str, device: torch.device) -> Teacher:
    return Teacher(name, precision="fp32").to(device)


_last: dict[Callable, tuple[Tensor, object]] = {}


def _once(network: Callable[[Tensor], Seen], sharp: Tensor) -> Seen:
    """network of the sharp picture, which several are compared with one after another: the last answer is kept."""
    if sharp.shape[0] * sharp.shape[-2] * sharp.shape[-1] > KEPT:
        return network(_unit(sharp))
    picture, seen = _last.get(network, (None, None))
    if picture is None or picture.shape != sharp.shape or not torch.equal(picture, sharp):
        seen = network(_unit(sharp))
        _last[network] = (sharp.clone(), seen)
    return seen


@lru_cache(maxsize=2)
def _lpips(device: torch.device, backbone: Path) -> nn.Module:
    package = _package("lpips", backbone)
    with _quiet():
        return package.LPIPS(net="alex", version="0.1", verbose=False).to(device).eval().requires_grad_(False)


@lru_cache(maxsize=2)
def _dists(device: torch.device, backbone: Path) -> nn.Module:
    package = _package("DISTS_pytorch", backbone)
    with _quiet():
        network = package.DISTS(load_weights=False)
    # The package looks for them below sys.prefix, where today's installers do not put them.
    places = [Path(sys.prefix) / "weights.pt", Path(package.__file__).parent / "weights.pt"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"DISTS: its weights.pt is at none of {', '.join(map(str, places))}: install the package anew")
    weights = torch.load(found, map_location="cpu", weights_only=True)
    network.alpha.data, network.beta.data = weights["alpha"], weights["beta"]
    return network.to(device).eval().requires_grad_(False)


def _package(name: str, backbone: Path):
    if not backbone.is_file():
        raise ValueError(f"{name}: its backbone's weights are not at {backbone}: put them there, or leave it out")
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name} is not installed: pip install 'sharpprior[perceptual]'") from None


@contextlib.contextmanager
def _quiet():
    """Without torchvision's warnings of an argument that both packages still use."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield
