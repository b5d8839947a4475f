"""What a recipe says of speed and memory, done to the model that it opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from visiontune.config import Run
from visiontune.errors import UserError

if TYPE_CHECKING:
    from visiontune.adapters.base import AdapterSet
    from visiontune.models.base import Model


def tile(model: Any) -> None:
    """Have the model's VAE work in tiles, and on one picture of a batch after the other.

    Raises:
        UserError: it has none, or one that cannot.
    """
    codec: Any = getattr(model, "vae", None)
    if not hasattr(codec, "use_tiling"):
        raise UserError(f"model.vae_tiling: '{model.source}' has no VAE that works in tiles: set it to false")
    codec.enable_tiling()
    if hasattr(codec, "use_slicing"):
        codec.enable_slicing()


def offload(run: Run, model: Model, adapters: AdapterSet | None) -> None:
    """Let the blocks of the frozen denoiser rest in the main memory, before the model moves to the device.

    Raises:
        UserError: it has no such blocks, or the adapter looks at the task.
    """
    if run.model.offload is None:
        return
    from visiontune.models._offload import Offloaded

    if adapters is not None and adapters.plans:
        raise UserError(
            f"model.offload: adapter '{adapters.method}' looks at the task before training, which needs weights on the "
            "device: take lora, or set it to null"
        )
    networks = model.of(*model.names())
    model.offloaded = {name: Offloaded(network, name, model.source) for name, network in networks.items()}


def speed_up(run: Run, model: Model) -> None:
    """Let the denoiser, with all that is attached to it, compute as the recipe says.

    Raises:
        UserError: it cannot.
    """
    networks = model.of(*model.names())
    if run.model.attention != "native":
        from visiontune.models._attention import choose

        model.attention = choose(networks, run.model.attention, model.source)
    if run.model.compile:
        from visiontune.models._compiled import compile_blocks

        _check_compiles(networks)
        compile_blocks(networks, model.source)


def _check_compiles(networks: Mapping[str, Any]) -> None:
    """Refuse adapters that find what they computed by the version of their parameters, a constant to the compiler.

    Raises:
        UserError: there is one; every step would be compiled anew.
    """
    from visiontune.adapters import attached
    from visiontune.adapters._cayley import Cache

    for found in attached(networks).values():
        if any(isinstance(value, Cache) for module in found.modules() for value in vars(module).values()):
            raise UserError(
                f"model.compile: adapter '{found.method}' keeps its rotations until its parameters change, which would "
                "be compiled anew at every step: take another adapter, such as lora, or set it to false"
            )


def released(run: Run, model: Model, rows: Any) -> list[str]:
    """The networks that leave the accelerator for the steps: those that the recipe names, or that no step needs.

    Steps need text encoders and the VAE where rows are not encoded before them: prompts and rewards, trained text, data
    without a cache, and prior pictures, which are encoded when they are first drawn.
    """
    from visiontune.data.loader import BatchSampler

    if run.train.release is not None:
        return run.train.release
    encoded = isinstance(rows, BatchSampler) and run.data.cache and not rows.rows.train_text and not rows.rows.prior
    if not encoded:
        return []
    needed = {*model.names(), *model.names(run.train.networks)}
    return [name for name in model.networks() if name not in needed]
