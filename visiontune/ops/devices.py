"""Which devices this machine's torch can compute on."""

from __future__ import annotations

import torch

from visiontune.errors import UserError
from visiontune.outside import shown


def usable() -> list[str]:
    """Their names: ``cpu``, and the accelerator's and each of its devices' where there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    kind = accelerator.type
    return ["cpu", kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]


def check_device(name: str, option: str, also: tuple[str, ...] = ()) -> None:
    """Refuse a device that torch does not know, was built without or does not find here.

    Args:
        name: as the user gave it.
        option: what it was given by, for the message.
        also: words that the option takes besides, such as ``auto``.

    Raises:
        UserError: it names those that there are.
    """
    known = [*also, *usable()]
    if name not in known:
        raise UserError(
            f"{option} '{shown(name)}' is not on this machine or not in its torch: take one of {', '.join(known)}"
        )
