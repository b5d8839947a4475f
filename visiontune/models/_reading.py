"""What models read besides words: pictures, and masks that say where they paint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What stands beside every prompt of a model.

    Attributes:
        least, most: number of pictures; `most` None is any number.
        mask: whether it paints into its picture, where a mask is white.
        channels: whether its picture stands beside the noisy latents, and not behind them as a reference.
    """

    least: int = 0
    most: int | None = 0
    mask: bool = False
    channels: bool = False

    @property
    def pictures(self) -> bool:
        """Whether it reads any."""
        return self.most != 0

    def words(self) -> str:
        """What must stand beside a prompt, in words: `a picture and a mask`."""
        return ("a picture" if self.least == 1 else f"{self.least} pictures") + (" and a mask" if self.mask else "")

    def check(self, source: str, requests: Sequence[Request]) -> None:
        """Refuse requests with more or fewer pictures than are read, and masks that are not.

        Raises:
            UserError: naming `source` and the mend.
        """
        for request in requests:
            count, masked = len(request.pictures), request.mask is not None
            if not self.pictures and (count or masked):
                raise UserError(f"model '{source}' reads no pictures: leave them out, or take one that edits")
            if count < self.least or (self.mask and not masked):
                options = "pictures= and mask=" if self.mask else "pictures="
                raise UserError(
                    f"model '{source}' reads {self.words()} beside each prompt: name their files by {options}"
                )
            if self.most is not None and count > self.most:
                some = "1 picture" if self.most == 1 else f"{self.most} pictures"
                raise UserError(f"model '{source}' reads {some} beside each prompt, not {count}: leave out the others")
            if masked and not self.mask:
                raise UserError(f"model '{source}' reads no mask: leave it out, or take one that paints into pictures")

    def check_condition(self, source: str, cond: Condition) -> None:
        """Refuse pictures in a form that the model's network does not read: ValueError naming `source`."""
        if cond.references is not None and (self.channels or not self.pictures):
            raise ValueError(f"model '{source}' reads no references")
        if "channels" in cond.extra and not self.channels:
            raise ValueError(f"model '{source}' reads no channels beside its noisy latents")


NOTHING = Reads()


def apart(predict: Callable[[Tensor, Tensor, Condition], Tensor], x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """`predict` of all rows, called once for each size and number of the pictures that they are shown.

    Networks have no mask for the tokens of pictures: rows that are shown others cannot be padded to one length.
    """
    alike: dict[tuple[torch.Size, ...], list[int]] = {}
    for row, shown in enumerate(cond.references or ()):
        alike.setdefault(tuple(one.shape for one in shown), []).append(row)
    if len(alike) < 2:
        return predict(x_t, t, cond)
    groups = [torch.tensor(rows, device=x_t.device) for rows in alike.values()]
    found = torch.cat([predict(x_t[rows], t[rows], cond[rows]) for rows in groups])
    return found[torch.cat(groups).argsort()]


def stacked(cond: Condition) -> list[Tensor]:
    """The references of rows that are shown pictures alike: of each of them the latents [b, c, h, w] of all rows."""
    return [torch.stack(column) for column in zip(*(cond.references or ()), strict=True)]
