from __future__ import annotations

import pytest
from PIL import Image

from visiontune.data.base import Config, Sample, Source
from visiontune.data.preflight import preflight
from visiontune.data.readers import read
from visiontune.errors import UserError


def test_good_samples_pass(photo, tmp_path):
    photo("a.png", caption="a dog")
    photo("b.jpg", caption="a cat")
    preflight(
        [
            *read(Config(root=str(tmp_path))),
            Sample(id="c", sources={"image": Source(lambda: Image.new("L", (4, 4)))}, caption="x"),
        ]
    )


def test_every_fault_is_listed_in_one_line(photo, tmp_path):
    photo("good.png", caption="a dog")
    photo("blank.png", caption=" \n")
    photo("bare.png")
    cut = photo("cut.jpg", size=(64, 64), caption="a cat")
    cut.write_bytes(cut.read_bytes()[:900])
    (tmp_path / "page.png").write_text("<html>")
    (tmp_path / "page.txt").write_text("not a picture")
    (tmp_path / "alone.txt").write_text("a bird")
    with pytest.raises(UserError) as caught:
        preflight(read(Config(root=str(tmp_path))))
    message = str(caught.value)
    assert "\n" not in message
    empty, broken, missing = message.split("; ")
    assert empty.startswith("2 empty") and "bare.png, blank.png" in empty
    assert broken.startswith("2 unreadable") and "cut.jpg, page.png" in broken
    assert missing.startswith("1 caption") and "alone.txt" in missing
    assert "good.png" not in message


def test_a_row_of_metadata_without_its_image_is_refused(photo, tmp_path):
    photo("a.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "x"}\n{"file_name": "gone.png", "text": "y"}\n'
    )
    with pytest.raises(UserError, match=r"1 captions without an image .*: gone\.png$"):
        preflight(read(Config(root=str(tmp_path))))


def test_long_lists_give_ten_names_and_a_count():
    samples = [
        Sample(id=f"s{i:02d}", sources={"image": Source(lambda: Image.new("RGB", (4, 4)))}, caption="")
        for i in range(25)
    ]
    with pytest.raises(UserError, match=r"25 empty.*s09 and 15 more") as caught:
        preflight(samples)
    assert "s10" not in str(caught.value)


def test_no_samples_at_all_are_refused():
    with pytest.raises(UserError, match="no samples"):
        preflight([])


def test_a_picture_that_fails_to_load_is_unreadable():
    def fail():
        raise RuntimeError("decoder went wrong")

    with pytest.raises(UserError, match="1 unreadable"):
        preflight([Sample(id="a", sources={"image": Source(fail)}, caption="x")])
