"""Model families; `load` opens a pocket name, a folder or a Hub id.

The work is in `visiontune.models._loading`, which is imported on the first call: nothing heavy is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from visiontune.models._quantise import Kind
    from visiontune.models.base import Model


def load(
    source: str,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    device: str = "cpu",
    quantize: Kind | None = None,
    quantize_rank: int = 0,
    fetch: bool = True,
    variant: str | None = None,
    skips: float | None = None,
) -> Any:
    """Open a model of any family, frozen and in evaluation mode.

    Args:
        source: `pocket/<name>`, a folder in the layout of diffusers or transformers (CLIP also in open_clip's), or a
            Hugging Face Hub id.
        dtype: floating-point type of all modules; default float32.
        revision: branch, tag or commit of a Hub id.
        device: where to put it.
        fetch: whether the Hub may be asked for what is not on this machine; false where a file named the model.
        quantize: store the main networks' linear layers in 8 bits (``int8`` or ``fp8``, by torchao) or 4 (``nf4``, by
            bitsandbytes).
        quantize_rank: see ``rank`` of :func:`quantise`.
        variant: which files of weights are read where there are several, ``fp16`` for ``*.fp16.safetensors``; without
            it the plain ones, or the only variant that there is, which a warning names.
        skips: kappa of ScaleLong, by whose power a UNet's long skips are scaled (`visiontune.ops.skips`), in [0.5, 1];
            without it the checkpoint's own, which is 1 unless it was trained here with another.

    Raises:
        UserError: there is no such model, it cannot be reached or read, or no family understands it.
    """
    from visiontune.models import _loading

    quantized = None if quantize is None else (quantize, quantize_rank)
    return _loading.load(source, dtype or _loading.DEFAULT_DTYPE, revision, device, quantized, fetch, variant, skips)


def quantise(
    module: torch.nn.Module, kind: Kind, *, rank: int = 0, squares: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Store the weights of all linear layers of a module in few bits: ``int8`` and ``fp8`` by torchao, ``nf4`` by
    bitsandbytes.

    Args:
        module: changed in place; layers that are subclasses of ``nn.Linear`` stay as they are with ``nf4``.
        rank: of the part of the codes' error that is kept beside them in the dtype of the weights (LQ-LoRA,
            arXiv 2311.12023), at most the smaller side of a weight; 0 keeps none.
        squares: mean squared gradients of the weights, by the layer's name, which weigh the error that is kept small;
            in layers without an entry every number counts alike.

    Raises:
        UserError: the library is not installed, or squares of another shape than their weight.
    """
    from visiontune.models import _quantise

    _quantise.quantise(module, kind, rank, squares)


def families(naming: str | None = None) -> dict[str, type[Model]]:
    """Every family by its key: the classes that the files of this folder define.

    Args:
        naming: of the pipeline or the architecture that is looked for: files that do not name it are not imported.
    """
    from visiontune.models import _loading

    return _loading.families(naming)
