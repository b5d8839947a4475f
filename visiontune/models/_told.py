"""Denoisers that are told a scale of guidance, and layers that let one be told that was not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from visiontune.errors import UserError
from visiontune.models.base import Model, dtype_of


class TellsGuidance(Model):
    """A model whose denoiser may be told the scale of guidance.

    Attributes:
        embedded: whether it is. blank: whether by layers that `embed_guidance` put in, which do nothing unless an
            adapter, or training, makes them.
    """

    family: ClassVar[str]
    embedded: bool = False
    blank: bool = False

    def embed_guidance(self) -> dict[str, nn.Module]:
        """Let the denoiser be told a scale of guidance, by layers that add nothing to what it computes.

        Returns:
            The layers by their names, with their component's.

        Raises:
            UserError: the denoisers of the family are told none, or this one is already.
        """
        if self.embedded:
            raise UserError(
                f"model '{self.source}' ({self.family}) is told its guidance already: take the one that it came from"
            )
        layers = self._embed_guidance()
        self.embedded = self.blank = True
        for layer in layers.values():
            layer.to(self.device, dtype_of(self.main)).requires_grad_(False).eval()
        return layers

    def drop_guidance(self) -> None:
        """Undo `embed_guidance`, when no adapter is on its layers any more."""
        if self.blank:
            self._drop_guidance()
            self.embedded = self.blank = False

    def accept(self, header: Mapping[str, Any]) -> None:
        if header["tells_guidance"] and not self.embedded:
            self.embed_guidance()

    def _embed_guidance(self) -> dict[str, nn.Module]:
        """`embed_guidance` of a denoiser that is told none."""
        raise UserError(
            f"denoisers of the family {self.family} are told no scale of guidance: distil one strength, by cfg_scale "
            "in the place of w"
        )

    def _drop_guidance(self) -> None:
        """`drop_guidance` of a denoiser that is told one."""
        raise NotImplementedError
