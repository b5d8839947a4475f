"""Blocks whose frozen weights rest in the main memory and are on the device for as long as they are called.

For each call a block gets copies of its weights in their place, so whatever autograd keeps of them stays what it was.
With gradient checkpointing that is nothing: the backward pass calls the block anew, which brings its weights again, and
they go as soon as the pass has left it. diffusers' group offloading moves the values of one and the same parameter
instead, also under an autograd that has kept the parameter, and is for inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.errors import UserError
from visiontune.models._blocks import named
from visiontune.ops.memory import stored


class Offloaded:
    """A network of which all but the blocks lies on a device, and which can be called as ever.

    Args:
        network: frozen, with what is attached to it; changed in place. Only what is asked of it through this object
            leaves the blocks' weights where they are.
        name: the network's. source: the model's, for errors.

    Attributes:
        blocks: the modules that are brought as one.

    Raises:
        UserError: the network has no blocks that it can recompute by themselves.
    """

    def __init__(self, network: nn.Module, name: str, source: str) -> None:
        self.network, self.blocks = network, _recomputed(network)
        if not self.blocks:
            raise UserError(
                f"model.offload: the {name} of '{source}' ({type(network).__name__}) names no blocks that gradient "
                "checkpointing recomputes one by one: set it to null"
            )
        self.device = torch.device("cpu")
        self._inside = {module for block in self.blocks for module in block.modules()}
        self._resting: dict[nn.Module, list[tuple[nn.Module, str, Tensor]]] = {}
        for block in self.blocks:
            block.register_forward_pre_hook(self._bring)
            # Recomputation ends by an exception, once it has found all that was asked for.
            block.register_forward_hook(self._take_away, always_call=True)

    def tensors(self) -> list[Tensor]:
        """The weights and buffers that rest."""
        return [tensor for module in self._inside for _, tensor in _own(module)]

    def to(self, device: torch.device | str) -> None:
        """Compute there from now on: what is outside of blocks moves, with the adapters that are attached to it."""
        self.device = torch.device(device)
        for module in self.network.modules():
            if module not in self._inside:
                module._apply(lambda tensor: tensor.to(self.device), recurse=False)
        if self.device.type == "cuda":
            for part in {part for tensor in self.tensors() for part in stored(tensor)}:
                part.data = part.data.pin_memory()  # copies of pinned memory need not be waited for

    def _bring(self, block: nn.Module, _: Any) -> None:
        resting = self._resting[block] = []
        copies: dict[Tensor, Tensor] = {}
        for module in block.modules():
            for name, tensor in [*_own(module)]:
                if tensor not in copies:
                    copies[tensor] = self._copy(tensor)
                resting.append((module, name, tensor))
                setattr(module, name, copies[tensor])

    def _take_away(self, block: nn.Module, *_: Any) -> None:
        for module, name, tensor in self._resting.pop(block):
            setattr(module, name, tensor)

    def _copy(self, tensor: Tensor) -> Tensor:
        moved = tensor.detach().to(self.device, non_blocking=True, copy=True)
        return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What belongs to a module itself, by all its names."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def _recomputed(network: nn.Module) -> list[nn.Module]:
    """The blocks in a network's lists that it names and recomputes as one, the largest that there are.

    A block that recomputes parts of itself calls these alone in the backward pass; the parts are the blocks then.
    """
    names, found, inside = named(network), list[nn.Module](), set[nn.Module]()
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    for block in (module for modules in lists for module in modules.modules()):
        whole = not any(hasattr(module, "gradient_checkpointing") for module in block.modules())
        if whole and block not in inside and type(block).__name__ in names:
            found.append(block)
            inside.update(block.modules())
    return found
