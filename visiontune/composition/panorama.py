"""A panorama painted view by view: each view shows what is known, and a model paints what is not.

The iterative inpainting of RoomTex (Wang et al., 2024, arXiv 2406.02461) on an unwrapped panorama, without its depth
and meshes: the camera stands still and turns, so that a view is where the panorama says it is. Angles are in degrees;
longitude grows to the right and latitude upwards, and a view at (0, 0) looks at the middle of the panorama.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from visiontune.errors import UserError

# (view [n, n, 3] with holes, mask [n, n] True where to paint, prompt) -> candidates [n, n, 3].
Painter = Callable[[np.ndarray, np.ndarray, str], Sequence[np.ndarray]]
# (candidate, view, mask, prompt) -> how good it is.
Judge = Callable[[np.ndarray, np.ndarray, np.ndarray, str], float]


@dataclass(frozen=True, kw_only=True)
class View:
    """Where a camera looks, and what is there.

    Attributes:
        longitude, latitude: of its middle. field: of view, both ways.
        prompt: what is painted.
    """

    longitude: float
    latitude: float = 0.0
    field: float = 90.0
    prompt: str

    def rays(self, size: int) -> np.ndarray:
        """Unit directions [n, n, 3] through the middles of its pixels: right, up and ahead of the panorama's middle."""
        half = np.tan(np.radians(self.field) / 2)
        steps = (np.arange(size) + 0.5) / size * 2 - 1
        x, y = np.meshgrid(steps * half, -steps * half)
        rays = np.stack([x, y, np.ones_like(x)], -1)
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        return rays @ self._turn().T

    def pixels(self, directions: np.ndarray, size: int) -> np.ndarray:
        """Row and column [..., 2] at which directions [..., 3] are seen; not a number behind the camera."""
        x, y, z = np.moveaxis(directions @ self._turn(), -1, 0)
        half = np.tan(np.radians(self.field) / 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            seen = np.stack([(1 - y / z / half) / 2 * size - 0.5, (1 + x / z / half) / 2 * size - 0.5], -1)
        return np.where((z > 0)[..., None], seen, np.nan)

    def _turn(self) -> np.ndarray:
        """From the camera's axes to the panorama's."""
        a, b = np.radians(self.longitude), np.radians(self.latitude)
        up = np.array([[1, 0, 0], [0, np.cos(b), np.sin(b)], [0, -np.sin(b), np.cos(b)]])
        aside = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
        turn: np.ndarray = aside @ up
        return turn


@dataclass(kw_only=True, eq=False)
class Panorama:
    """An unwrapped panorama.

    Attributes:
        picture: [h, 2 h, 3] in [0, 1]. known: bool [h, 2 h]. done: how many views were painted.
    """

    picture: np.ndarray
    known: np.ndarray
    done: int = 0

    @staticmethod
    def empty(height: int) -> Panorama:
        """Nothing is known."""
        return Panorama(picture=np.zeros((height, 2 * height, 3)), known=np.zeros((height, 2 * height), dtype=bool))

    def show(self, view: View, size: int) -> tuple[np.ndarray, np.ndarray]:
        """A view [n, n, 3] of the panorama, bilinear, and which of its pixels are known: all four neighbours are."""
        rows, columns = self._places(view.rays(size))
        known = ndimage.map_coordinates(self.known.astype(float), (rows, columns), order=1, mode="grid-wrap") > 1 - 1e-9
        seen = [
            ndimage.map_coordinates(self.picture[..., c], (rows, columns), order=1, mode="grid-wrap") for c in range(3)
        ]
        return np.stack(seen, -1) * known[..., None], known

    def put(self, view: View, painted: np.ndarray) -> int:
        """Fill what is not known from a painted view [n, n, 3]; how many pixels that are. What is known stays."""
        height, width = self.known.shape
        latitude = (0.5 - (np.arange(height) + 0.5) / height) * np.pi
        longitude = ((np.arange(width) + 0.5) / width * 2 - 1) * np.pi
        lon, lat = np.meshgrid(longitude, latitude)
        directions = np.stack([np.cos(lat) * np.sin(lon), np.sin(lat), np.cos(lat) * np.cos(lon)], -1)
        place = view.pixels(directions, len(painted))
        seen = np.isfinite(place).all(-1) & (place >= -0.5).all(-1) & (place <= len(painted) - 0.5).all(-1)
        new = seen & ~self.known
        at = place[new].clip(0, len(painted) - 1).T
        for channel in range(3):
            self.picture[new, channel] = ndimage.map_coordinates(painted[..., channel], at, order=1)
        self.known |= new
        return int(new.sum())

    def save(self, file: Path) -> None:
        """Everything, so that `load` goes on from here."""
        partial = file.with_suffix(".partial")
        with partial.open("wb") as stream:
            np.savez_compressed(stream, picture=self.picture, known=self.known, done=self.done)
        partial.replace(file)

    @staticmethod
    def load(file: Path) -> Panorama:
        """What was saved. Raises UserError where it is no panorama."""
        try:
            with np.load(file) as values:
                return Panorama(picture=values["picture"], known=values["known"], done=int(values["done"]))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"'{file}' is no saved panorama: {error}") from error

    def _places(self, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.known.shape
        longitude = np.arctan2(rays[..., 0], rays[..., 2])
        latitude = np.arcsin(rays[..., 1].clip(-1, 1))
        rows = (0.5 - latitude / np.pi) * height - 0.5
        return rows.clip(0, height - 1), ((longitude / np.pi + 1) / 2 * width - 0.5) % width


def paint(
    panorama: Panorama,
    views: Sequence[View],
    painter: Painter,
    *,
    size: int,
    judge: Judge | None = None,
    grow: int = 0,
    file: Path | None = None,
) -> Panorama:
    """Paint views one after the other, each into what those before it have left open.

    Args:
        panorama: changed in place; its first `done` views are passed over, so that a saved one goes on.
        painter: a model; it is not called where a view has no holes.
        size: of a view in pixels.
        judge: picks the candidate, the first of equal ones; None takes the first.
        grow: pixels by which holes grow into what is known before they are painted, so that seams are drawn over. The
            panorama keeps what it knows.
        file: saved to after each view.

    Raises:
        UserError: the painter gives no candidates, or ones of another size.
    """
    for i, view in enumerate(views):
        if i < panorama.done:
            continue
        shown, known = panorama.show(view, size)
        holes = ~known
        if holes.any():
            mask = ndimage.binary_dilation(holes, iterations=grow) if grow else holes
            found = [np.asarray(one) for one in painter(shown, mask, view.prompt)]
            if not found or any(one.shape != shown.shape for one in found):
                raise UserError(f"the painter of view {i} must give pictures of {size}x{size} pixels")
            best = found[0] if judge is None else max(found, key=lambda one: judge(one, shown, mask, view.prompt))
            panorama.put(view, best)
        panorama.done = i + 1
        if file is not None:
            panorama.save(file)
    return panorama
