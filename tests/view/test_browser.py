"""The page in a real browser: it draws itself, filters, sorts, moves along the steps and obeys the keys.

A script is put behind the page's own; it does what a user would and writes down what is seen.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from visiontune.view import page

HERE = Path(__file__).parent
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium on this machine")
DOT = "data:image/webp;base64,UklGRhwAAABXRUJQVlA4TBAAAAAvAAAAAAfQ//73v/+BiOh/AAA="
RUN = {
    "folder": "/runs/x",
    "recipe": "name: x",
    "card": "<b>card</b>",
    "judged": None,
    "alarms": [{"step": 20, "alarms": "reward up, diversity down"}],
    "prompts": ["a red circle"],
    "beforeAfter": DOT,
}
RUNS = [
    {
        **RUN,
        "name": name,
        "metrics": {"loss": [[10, 2.0], [20, last], [30, 0.5]], "lr": [[10, 0.1]]},
        "previews": [
            {"step": step, "pictures": [{"prompt": 0, "seed": seed, "src": DOT} for seed in (0, 1)]} for step in steps
        ],
    }
    for name, last, steps in (("one", 1.0, (0, 10, 30)), ("two", 1.5, (0, 20)))
]


def picture(i):
    return {
        "file": f"{i:05d}_seed{i % 4}.png",
        "prompt": f"{'red' if i % 2 else 'blue'} circle {i}",
        "seed": i % 4,
        "adapter": "oft" if i % 3 else "none",
        "at": {"steps": "50" if i % 5 else "25"},
        "scores": {"oracle": (i * 7919 % 5000) / 5000},
        "command": f"visiontune sample seeds=[{i}]",
        "src": DOT,
    }


def seen(tmp_path, data, script):
    """What a script finds after the page has drawn itself."""
    file = tmp_path / "page.html"
    harness, acts = ((HERE / name).read_text() for name in ("harness.js", script))
    run = f"(async () => {{ const found = {{}};\n{acts}\nanswer(found); }})().catch((e) => onerror(String(e)));"
    text = page.render("t <i>itle", data)
    file.write_text(text.replace("</body>", f"<script>{harness}{run}</script></body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,900", f"--user-data-dir={tmp_path}/p"]
    done = subprocess.run(
        [BROWSER, *words, "--virtual-time-budget=20000", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    answer = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert "error" not in answer, answer
    return answer


def test_runs_are_laid_over_each_other_and_their_previews_side_by_side(tmp_path):
    found = seen(
        tmp_path,
        {"runs": RUNS, "samples": []},
        "runs.js",
    )
    assert found["title"] == "t <i>itle" and found["measures"] == ["loss", "lr"] and found["lines"] == [3, 3]
    assert found["alarms"] == [2, ["step 20: reward up, diversity down"] * 2] and found["card"]
    assert found["last"] == ["one, step 30", "two, step 20"]
    assert found["second"] == ["one, step 10", "two, step 0"] and found["first"] == ["one, step 0", "two, step 0"]
    assert found["pictures"] == 4 and found["hidden"] == 1 and found["smoothed"] and found["zoomed"]


def test_thousands_of_pictures_are_filtered_sorted_and_enlarged_without_being_drawn_all(tmp_path):
    folder = {"name": "f", "folder": "/f", "base": ".", "missing": 2, "pictures": [picture(i) for i in range(5000)]}
    found = seen(
        tmp_path,
        {"runs": [], "samples": [folder]},
        "gallery.js",
    )
    assert found["all"] == "5000 of 5000 pictures" and found["cells"] < 200
    assert found["missing"] == ["2 pictures of the manifest are not there"]
    assert found["red"] == "2500 of 5000 pictures" and found["seed"] == "1250 of 5000 pictures"
    assert found["steps"] == f"{sum(i % 4 == 3 and i % 5 > 0 for i in range(5000))} of 5000 pictures"
    assert found["adapter"] == f"{sum(i % 4 == 3 and i % 3 == 0 for i in range(5000))} of 5000 pictures"
    ordered = sorted(range(5000), key=lambda i: -picture(i)["scores"]["oracle"])
    assert found["best"] == [picture(i)["file"] for i in ordered[:3]]
    assert found["worst"] == picture(ordered[-1])["file"] and found["least"] == "500 of 5000 pictures"
    assert 0 < found["scrolled"] < 200
    assert found["command"] == "visiontune sample seeds=[0]" and found["next"] == "red circle 1"
