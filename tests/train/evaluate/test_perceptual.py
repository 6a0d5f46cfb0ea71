"""LPIPS and DISTS by their authors' packages: had only where everything lies here, and equal to the papers' formulas.

Their backbones' weights are a download, so that networks of random weights stand in for them; what the packages bring
along, the weights learned from people, is theirs.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from train.evaluate import perceptual
from train.evaluate.metrics import METRICS, measured, metric_names

PAIRS = 6  # docs/METRICS.md records 20


def images(seed: int, size: int = 64) -> torch.Tensor:
    """Smooth random pictures, uint8 [3, size, size]."""
    rng = np.random.Generator(np.random.Philox(seed))
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 9, 9)))
    fine = torch.from_numpy(rng.normal(0, 12, (1, 3, size, size)))
    return (F.interpolate(coarse, (size, size), mode="bicubic") + fine)[0].round().clamp(0, 255).to(torch.uint8)


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    """Gives torchvision's alexnet or vgg16 random convolutions in fp32, which the packages then load as if they lay in
    torch's cache."""
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)

    def build(name: str, file: str) -> torch.nn.Sequential:
        with torch.device("meta"):  # their classifiers are most of them, and of no use here
            network = getattr(models, name)()
        network.features.to_empty(device="cpu")
        random = torch.Generator().manual_seed(1)
        for weight in network.features.parameters():
            weight.data.normal_(0, (2 / max(weight[0].numel(), 9)) ** 0.5, generator=random)
        monkeypatch.setattr(models, name, lambda pretrained=True: network)
        (folder / file).touch()
        return copy.deepcopy(network.features)

    yield build
    for kept in (perceptual._lpips, perceptual._dists):
        kept.cache_clear()


def differences(name: str, other) -> float:
    pairs = [(images(n), images(n + 50 if n % 2 else n)) for n in range(PAIRS)]
    mine = measured(torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]), [name])
    found = [row[name] for row in mine]
    assert found[0] == pytest.approx(0, abs=1e-6)  # equal pictures
    assert max(found) > 1e-3
    with torch.no_grad():
        theirs = [other(*(image[None].double() / 255 for image in pair)) for pair in pairs]
    largest = float(np.abs(np.subtract(found, theirs)).max())
    print(f"{name}: {largest:.1e} over {PAIRS} pairs")
    return largest


def test_lpips_is_the_papers_formula_on_alexnet(backbone):
    package = pytest.importorskip("lpips")
    alexnet = backbone("alexnet", perceptual.ALEXNET).double()
    linear = torch.load(Path(package.__file__).parent / "weights" / "v0.1" / "alex.pth", map_location="cpu")
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def levels(image: torch.Tensor) -> list[torch.Tensor]:
        x = (2 * image - 1 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        found = []
        for layer in alexnet:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                found.append(x.clone())
        return found

    def formula(a: torch.Tensor, b: torch.Tensor) -> float:
        total = 0.0
        for level, (x, y) in enumerate(zip(levels(a), levels(b), strict=True)):
            x, y = (each / (each.norm(dim=1, keepdim=True) + 1e-10) for each in (x, y))
            weight = linear[f"lin{level}.model.1.weight"].double()
            total += float((weight * (x - y) ** 2).sum(1).mean())
        return total

    assert perceptual.lpips_here()
    assert differences("lpips", formula) < 1e-5


def test_dists_is_the_papers_formula_on_vgg16(backbone):
    package = pytest.importorskip("DISTS_pytorch")
    places = [Path(sys.prefix) / "weights.pt", Path(package.__file__).parent / "weights.pt"]
    learned = torch.load(next(place for place in places if place.is_file()), map_location="cpu")
    vgg = backbone("vgg16", perceptual.VGG16).double()
    hann = torch.from_numpy(np.hanning(5)[1:-1])
    window = hann[:, None] * hann[None] / (hann[:, None] * hann[None]).sum()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def stages(image: torch.Tensor) -> list[torch.Tensor]:
        found, x = [image], (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        for number, layer in enumerate(vgg[:30]):
            if isinstance(layer, torch.nn.MaxPool2d):
                found.append(x)
                squared = F.conv2d(
                    x.square(), window.expand(x.shape[1], 1, 3, 3), stride=2, padding=1, groups=x.shape[1]
                )
                x = (squared + 1e-12).sqrt()
            else:
                x = layer(x.clone())
            assert number < 30
        return [*found, x]

    def formula(a: torch.Tensor, b: torch.Tensor) -> float:
        alpha, beta = (learned[name].double().flatten() for name in ("alpha", "beta"))
        structure, texture = [], []
        for x, y in zip(stages(a), stages(b), strict=True):
            x, y = x[0].flatten(1), y[0].flatten(1)
            mx, my = x.mean(1), y.mean(1)
            cov = ((x - mx[:, None]) * (y - my[:, None])).mean(1)
            texture.append((2 * mx * my + 1e-6) / (mx**2 + my**2 + 1e-6))
            structure.append((2 * cov + 1e-6) / (x.var(1, unbiased=False) + y.var(1, unbiased=False) + 1e-6))
        similar = alpha @ torch.cat(texture) + beta @ torch.cat(structure)
        return float(1 - similar / (alpha.sum() + beta.sum()))

    assert perceptual.dists_here()
    assert differences("dists", formula) < 1e-5


def test_what_is_not_here_is_left_out_and_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    assert {"lpips", "dists"}.isdisjoint(metric_names("full"))
    both = images(1)[None], images(2)[None]
    for name, file in (("lpips", perceptual.ALEXNET), ("dists", perceptual.VGG16)):
        with pytest.raises(ValueError, match=f"weights are not at .*{file}: put them there"):
            METRICS[name].measure(*both)


def test_the_offline_distance_is_none_for_equal_pictures_and_grows_with_blur():
    from scipy import ndimage
    from skimage import data

    sharp = data.astronaut()[:96, 160:256]
    batch = [ndimage.gaussian_filter(sharp.astype(float), (s, s, 0)).round().astype(np.uint8) for s in (0, 0.7, 1.5, 3)]
    rows = torch.from_numpy(np.stack(batch).transpose(0, 3, 1, 2).copy())
    found = [row["features"] for row in measured(rows, rows[:1].expand(4, -1, -1, -1), ["features"])]
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found == sorted(found)
    assert found[1] > 0.01
