"""A folder in which a tiny model of any family is trained, as a user would: a model, photos, prompts, runs."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tiny import SIZE, save_tiny, tiny_model
from tiny_rewards import TOWERS

from visiontune import assemble, models
from visiontune.config import load_run


class Workshop:
    """A folder with a tiny model of one family, three photos and some prompts."""

    captions = ("a photo of a [trigger] circle",) * 3

    def __init__(self, family: str, folder: Path, **options: str) -> None:
        self.family, self.folder, self.options = family, folder, options
        towers = family in TOWERS
        self.model = (
            TOWERS[family](folder / "model", SIZE) if towers else save_tiny(folder / "model", family, **options)
        )
        if towers:
            # No caption is another's, or there would be nothing to tell apart.
            self.captions = ("a red circle", "a blue square", "a green star")
        (folder / "prompts.txt").write_text("a red circle\na blue square\n")
        self.photos = self._photos("photos")

    def _photos(self, name: str, *under: str) -> Path:
        """Three captioned pictures, and others of the same names in the folders under it."""
        rng = np.random.default_rng(0)
        for folder in (self.folder / name, *(self.folder / name / inner for inner in under)):
            folder.mkdir()
            for i in range(3):
                pixels = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
        for i, caption in enumerate(self.captions):
            (self.folder / name / f"{i}.txt").write_text(caption)
        return self.folder / name

    @functools.cached_property
    def pairs(self) -> Path:
        """The photos, each beside one that is liked less."""
        return self._photos("pairs", "rejected")

    @functools.cached_property
    def holes(self) -> Path:
        """The photos, each beside what is white where it is to be painted."""
        return self._photos("holes", "region")

    @functools.cached_property
    def sets(self) -> Path:
        """Two sets of three photos."""
        (self.folder / "sets").mkdir()
        for name in ("one", "other"):
            self._photos(f"sets/{name}")
        return self.folder / "sets"

    @property
    def shown(self) -> tuple[list[str], str]:
        """A picture and a mask to paint into."""
        return [str(self.holes / "0.png")], str(self.holes / "region" / "0.png")

    @functools.cache  # noqa: B019
    def painting(self, **options: str) -> Workshop:
        """A workshop whose model paints."""
        (self.folder / "painting").mkdir()
        return Workshop(self.family, self.folder / "painting", **options)

    @functools.cached_property
    def grounded(self) -> Path:
        """The photos, with where the circle is."""
        folder = self._photos("grounded", "masks")
        lines = []
        for i in range(3):
            (folder / f"{i}.txt").unlink()
            words = {"file_name": f"{i}.png", "text": "a photo of a [trigger] circle"}
            lines.append(json.dumps({**words, "segments": [["circle", f"masks/{i}.png"], ["photo", None]]}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        return folder

    @functools.cached_property
    def noisy(self) -> str:
        """Dynamics that have noise to score."""
        flow = self.open().schedule.prediction == "flow"
        return "{name: flow-sde, eta: 0.7}" if flow else "{name: ddim, eta: 1.0}"

    def open(self, folder: Path | None = None):
        """A model of this family that was saved, or a copy of this one's, as it lies in its folder."""
        if self.family in TOWERS:
            return models.load(str(folder or self.model))
        return models.load(str(folder)) if folder else tiny_model(self.family, str(self.model), **self.options)

    def trainer(self, recipe: str, name: str, *more: str):
        common = ["train.trackers=[]", "train.device=cpu", "train.precision=no", "train.checkpoint_every=1"]
        shown = ["preview.prompts=['a circle']", "preview.seeds=[0]", "preview.steps=2"]
        where = [f"model={self.model}", f"out={self.folder / 'runs'}", f"name={name}"]
        return assemble.assemble(load_run(recipe, [*where, *common, *shown, "train.steps=2", *more]))

    def personalise(self, name: str, *more: str):
        data = [f"data.root={self.photos}", "data.prompt=null", "data.class_noun=circle"]
        prior = ["objective.prior_images=2", "objective.prior_steps=2"]
        parts = "train.parts=[denoiser, text_encoder]"
        return self.trainer(
            "personalise/lora", name, *data, *prior, parts, "train.batch_size=1", "train.lr=0.03", *more
        )

    @functools.cached_property
    def denoiser(self) -> Path:
        """The adapter of a personalisation of the denoiser alone."""
        return self.personalise("denoiser", "train.parts=[denoiser]").fit()

    def reward(self, recipe: str, name: str, *more: str):
        data = [f"data={self.folder / 'prompts.txt'}", "reward=redness", "objective.steps=3"]
        return self.trainer(recipe, name, *data, *more)

    def grpo(self, name: str, *more: str):
        sizes = ["train.batch_size=4", "objective.group=2", "objective.micro_batch=2", "objective.cfg_scale=2"]
        return self.reward("reward_tune/grpo", name, f"objective.dynamics={self.noisy}", *sizes, *more)
