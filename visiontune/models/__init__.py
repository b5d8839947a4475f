"""Model families; `load` opens a pocket name, a folder or a Hub id.

The work is in `visiontune.models._loading`, which is imported on the first call: nothing heavy is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    fetch: bool = True,
    variant: str | None = None,
) -> Any:
    """Open a model of any family, frozen and in evaluation mode.

    Args:
        source: `pocket/<name>`, a folder in the layout of diffusers or transformers (CLIP also in open_clip's), or a
            Hugging Face Hub id.
        dtype: floating-point type of all modules; default float32.
        revision: branch, tag or commit of a Hub id.
        device: where to put it.
        fetch: whether the Hub may be asked for what is not on this machine; false where a file named the model.
        quantize: store the main networks' linear layers in 8 bits (``int8``, by torchao) or 4 (``nf4``, by
            bitsandbytes).
        variant: which files of weights are read where there are several, ``fp16`` for ``*.fp16.safetensors``; without
            it the plain ones, or the only variant that there is, which a warning names.

    Raises:
        UserError: there is no such model, it cannot be reached or read, or no family understands it.
    """
    from visiontune.models import _loading

    return _loading.load(source, dtype or _loading.DEFAULT_DTYPE, revision, device, quantize, fetch, variant)


def families() -> dict[str, type[Model]]:
    """Every family by its key: the classes that the files of this folder define."""
    from visiontune.models import _loading

    return _loading.families()
