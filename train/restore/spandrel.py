"""Our networks in spandrel's registry, so that programs that load models with spandrel load ours too.

spandrel (https://github.com/chaiNNer-org/spandrel) hands an architecture the tensors of a file and nothing else: a file
for it carries the configuration as one more tensor (`sharpprior export --format spandrel`). A program that is to read
it calls `register()` once, which takes this package: chaiNNer as it is shipped does not know us.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.deblurrer import Deblurrer
from model.pretrained import CONFIG_TENSOR, config_of_tensor
from train.checkpoint.saved import refuse_oracle
from train.config.file import build_config
from train.config.networks import build_model

ID = "sharpprior"


class _Image(nn.Module):
    """The deblurrer as spandrel calls networks: an image in, an image out. Names of tensors are the file's."""

    def __init__(self, network: Deblurrer) -> None:
        super().__init__()
        self.network = network

    def forward(self, blurry: Tensor) -> Tensor:
        return self.network(blurry).restored[-1]

    def load_state_dict(self, state: dict[str, Tensor], *arguments: Any, **keywords: Any) -> Any:
        own = {name: value for name, value in state.items() if name != CONFIG_TENSOR}
        return self.network.load_state_dict(own, *arguments, **keywords)


def register() -> None:
    """Add our architecture to spandrel's main registry (again: nothing happens). ValueError without spandrel."""
    try:
        from spandrel import MAIN_REGISTRY, Architecture, ArchSupport, ImageModelDescriptor
    except ImportError:
        raise ValueError("spandrel is not installed: pip install 'sharpprior[spandrel]'") from None

    class Sharpprior(Architecture):
        """Every network of this package; the file says which."""

        def __init__(self) -> None:
            super().__init__(id=ID, name="sharpprior", detect=lambda state: CONFIG_TENSOR in state)

        def load(self, state_dict: dict[str, Any]) -> Any:
            config = build_config(config_of_tensor(state_dict[CONFIG_TENSOR]))
            refuse_oracle(config.model.oracle, Path("the file"))
            network = _Image(build_model(config, read_weights=False))
            return ImageModelDescriptor(
                network, state_dict, architecture=self, purpose="Restoration",
                tags=[str(config.model.backbone["name"]), *(["prior"] if config.model.prior else [])],
                supports_half=False, supports_bfloat16=False, scale=1, input_channels=3, output_channels=3,
            )  # fmt: skip

    MAIN_REGISTRY.add(ArchSupport.from_architecture(Sharpprior()), ignore_duplicates=True)


def describe(file: str) -> Any:
    """spandrel's description of an exported file, on the CPU; `register` first."""
    from spandrel import ModelLoader

    register()
    return ModelLoader(device=torch.device("cpu")).load_from_file(file)
