"""MRC: inconsistent views lose, smaller or moved objects do not gain, and views without an object are no way out."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from visiontune.errors import UserError
from visiontune.rewards.loading import load
from visiontune.rewards.mrc import square_box

RECONSTRUCT = """
from dataclasses import dataclass
import torch

@dataclass(frozen=True, kw_only=True)
class Config:
    shift: int = 0
    paint: float = 0.0
    kind: str = ""

def build(config):
    def render(views, meta):
        if config.kind == "one":
            return views[:, :1]
        drawn = views.roll(config.shift, -1) if config.shift else views
        return torch.where(drawn < 0.95, drawn + config.paint, drawn)
    if config.kind == "distance":
        render.distance = lambda a, b: torch.full((len(a),), 0.25 * len(a))
    return render
"""


@pytest.fixture
def mrc(tmp_path: Path):
    (tmp_path / "recon.py").write_text(RECONSTRUCT)
    return lambda options=None, **own: load(
        {"name": "mrc", "reconstruct": {"name": str(tmp_path / "recon.py"), **(options or {})}, **own}
    )


def _views(side: int = 24, top: int = 20, left: int = 20) -> torch.Tensor:
    """Four views of 64 pixels in one image: a textured square on white."""
    view = torch.ones(3, 64, 64)
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    view[:, top : top + side, left : left + side] = torch.stack([x, y, x * y]) * 0.6
    row = torch.cat([view, view], 2)
    return torch.cat([row, row], 1)[None]


def test_an_exact_reconstruction_scores_zero_and_a_shifted_one_less(mrc) -> None:
    images = _views()
    scores = [mrc({"shift": shift})(images, ["a cube"]).item() for shift in (0, 1, 2, 4, 8)]
    assert scores[0] == 0
    assert all(later < earlier for earlier, later in itertools.pairwise(scores))


def test_views_are_read_row_by_row(mrc) -> None:
    images = torch.zeros(1, 3, 4, 6)
    images[0, :, :2, 3:] = 0.5
    views = mrc(columns=2)._views(images)
    assert views.shape == (1, 4, 3, 2, 3)
    assert views[0].mean((1, 2, 3)).tolist() == [0, 0.5, 0, 0]


def test_size_and_place_of_the_object_make_no_difference(mrc) -> None:
    reward = mrc({"paint": 0.2}, margin=0)
    middle = reward(_views(), [""]).item()
    assert middle == pytest.approx(-0.04, rel=0.01)
    assert reward(_views(40, 10, 12), [""]).item() == pytest.approx(middle, rel=0.01)
    assert reward(_views(12, 40, 3), [""]).item() == pytest.approx(middle, rel=0.01)


def test_one_view_without_an_object_is_the_worst(mrc) -> None:
    images = _views()
    images[..., :64, :64] = 1
    images[..., 3, 3] = 0
    assert mrc(worst=-2)(images, [""]).item() == -2
    assert mrc(least=1e-4)(images, [""]).item() == 0


def test_scores_belong_to_their_images_and_the_users_distance_counts(mrc) -> None:
    good, blank = _views(), torch.ones(1, 3, 128, 128)
    assert mrc()(torch.cat([blank, good]), ["", ""]).tolist() == [-1, 0]
    assert mrc({"kind": "distance"})(good, [""]).item() == -1


@pytest.mark.parametrize(
    ("top", "left", "height", "width", "box"),
    [
        (10, 20, 8, 4, (8, 16, 12, 12)),  # centred on the object, two pixels of margin
        (0, 28, 4, 4, (0, 26, 6, 6)),  # cut at the edges
    ],
)
def test_the_box_is_square_around_the_object(top, left, height, width, box) -> None:
    inside = torch.zeros(24, 32, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert square_box(inside, 2) == box


def test_what_cannot_work_is_refused(mrc) -> None:
    with pytest.raises(UserError, match=r"set reconstruct: FILE\.py"):
        load("mrc")
    with pytest.raises(UserError, match="do not hold 2x3 views"):
        mrc(rows=3)(_views(), [""])
    with pytest.raises(UserError, match=r"returned \[1, 1, 3, 64, 64\] for views \[1, 4"):
        mrc({"kind": "one"})(_views(), [""])
    with pytest.raises(UserError, match="columns must be a whole number from 1"):
        mrc(columns=0)
    with pytest.raises(UserError, match=r"worst must be a number from .* to 0"):
        mrc(worst=0.5)
