"""The explorer as a person uses it: JupyterLab in a headless Chromium. Limits of time only guard against hanging."""

from importlib.util import find_spec

import pytest
from lab import PICTURE, browser, changed, chromium, copy_of_the_book, run_all, server
from PIL import Image

pytestmark = [
    pytest.mark.skipif(find_spec("playwright") is None, reason="no playwright: pip install -e '.[dev]'"),
    pytest.mark.skipif(chromium() is None, reason="no Chromium on this system"),
]


def test_a_person_explores(tmp_path):
    """Run all (a run of seconds is trained), move a slider, type a sentence, upload an image, give a broken one."""
    copy_of_the_book(tmp_path, smoke=True, method="mvam")
    image = Image.new("RGB", (90, 60), "navy")
    image.paste("gold", (10, 10, 50, 50))
    image.save(tmp_path / "mine.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with server(tmp_path) as address, browser() as (page, errors):
        run_all(page, address, "notebooks/6_explore.ipynb")
        picture, overview = page.locator(PICTURE).first, page.locator(PICTURE).nth(1)
        score = page.get_by_text("this image is number").first
        slider = page.get_by_role("slider").first
        slider.focus()
        assert changed(page, picture, lambda: page.keyboard.press("ArrowRight"))
        sentence, before = page.get_by_label("sentence", exact=True), score.inner_text()

        def say(words: str) -> None:
            sentence.fill(words)
            sentence.press("Enter")

        assert changed(page, overview, lambda: say("a green star on the grass"))
        assert score.inner_text() != before

        def upload(name: str) -> None:
            with page.expect_file_chooser() as chooser:
                page.get_by_role("button", name="upload an image").click()
            chooser.value.set_files(tmp_path / name)

        assert changed(page, picture, lambda: upload("mine.png"))
        page.get_by_text("of 41 for the sentence").wait_for()
        upload("broken.png")
        page.get_by_text("broken.png: the image cannot be decoded").wait_for()
        say("a red circle")
        page.get_by_label("image of the set").fill("2")
        page.get_by_label("image of the set").press("Enter")
        page.locator(f"{PICTURE}[src]").first.wait_for()
        page.get_by_text("of 40 for the sentence").wait_for()
    assert errors == []
