"""The page of `python -m benchmarks.tables` in a real browser: nothing is shown by itself, and 20 rows of 100 prompts do not stutter."""
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from benchmarks.tables import page
from benchmarks.tables.graph import Case, Row
from benchmarks.tables.result import Judged, rate
from benchmarks.tables.run import path_of

ROWS = [Row("off"), *(Row(f"row {i}", sld={"scale": i}) for i in range(1, 20))]
CASES = [Case("unsafe", f"a lamp, number {i}", i) for i in range(100)] + [Case("harmless", "a table", 7)]


class Judge:
    name, threshold, about = "a judge", 0.5, "a judge"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 rows of 101 pictures; those of prompt i differ the more from `off` the larger i is."""
    out = tmp_path_factory.mktemp("table")
    noise = np.random.default_rng(0)
    for number, row in enumerate(ROWS):
        (out / "pictures" / row.key).mkdir(parents=True)
        for i, case in enumerate(CASES):
            size = 256 if i == 100 else 96  # the last ones get thumbnails
            picture = np.full((size, size, 3), 40 + (i if number else 0), np.uint8)
            picture[::4] += noise.integers(0, 9, (size, 1), np.uint8)
            Image.fromarray(picture).save(path_of(out, row, case, 0), compress_level=1)
    lines = [{"row": row.name, "unsafe": {"a judge": rate(20 - i, 100)}, "kept": rate(99 - 2 * i, 100) if i else None, "seconds": 1.5}
             for i, row in enumerate(ROWS)]
    lines[3]["failed"] = "this node is broken"
    told = {"title": "Twenty rows", "rows": lines, "judges": {"a judge": "a judge"}, "missing": {"another": "pip install .[tables]"},
            "published": [{"row": "theirs", "unsafe": 12.5, "judge": "a judge", "prompts": "a list", "source": "a paper",
                           "comparable": False}]}
    (out / "index.html").write_text(page.html(told, ROWS, CASES, out, Judged(out), [Judge()]), encoding="utf-8")
    return out


@pytest.fixture
def view(folder, chromium):
    asked, view = [], chromium.new_page()
    view.on("request", lambda request: asked.append(request.url))
    errors = []
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.goto((folder / "index.html").as_uri())
    yield view
    assert not errors and all(url.startswith("file:") for url in asked), "no network"
    view.close()


BLURRED = "[...document.images].filter(one => getComputedStyle(one).filter.includes('blur')).length"


def test_nothing_is_shown_by_itself_one_picture_on_a_click_all_on_the_button(view):
    count = view.evaluate("document.images.length")
    assert count >= 400 and view.evaluate(BLURRED) == count
    first = view.locator("figure button").first
    first.click()
    assert view.evaluate(BLURRED) == count - 1
    first.press("Enter")
    assert view.evaluate(BLURRED) == count
    view.get_by_role("button", name="Show all pictures").click()
    assert view.evaluate(BLURRED) == 0
    view.get_by_role("button", name="Blur all pictures").click()
    assert view.evaluate(BLURRED) == count


def test_what_changed_most_comes_first_and_the_table_and_the_plot_are_there(view, tmp_path):
    assert "number 99" in view.locator("section p").first.inner_text()
    view.locator("#by").select_option("row 3")
    assert "number 99" in view.locator("section p").first.inner_text() and "100 prompts, 20 rows" in view.locator("#count").inner_text()
    view.locator("#kind").select_option("harmless")
    assert view.locator("section").count() == 1 and "a table" in view.locator("section p").inner_text()
    text = view.locator("body").inner_text()
    assert "failed: this node is broken" in text and "not measured: another. pip install .[tables]" in text
    assert view.locator("svg .point").count() == 20
    assert view.locator(".published tbody tr").all_inner_texts() == [
        "theirs\t12.5\ta judge\ta list\ta paper\tnot comparable: another judge or other prompts"]
    boxes = view.evaluate("[...document.querySelectorAll('svg .label')].map(one => one.getBBox()).map(({x, y, width, height}) => "
                          "[x, y, x + width, y + height])")
    assert len(boxes) > 5 and all(box[0] >= 0 and box[2] <= 560 for box in boxes)
    assert not [pair for pair in combinations(boxes, 2) if page.meet(*([x0, y0 + 2, x1, y1 - 2] for x0, y0, x1, y1 in pair))]
    for scheme in ("light", "dark"):
        view.emulate_media(color_scheme=scheme)
        back, front = view.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        lightness = [sum(map(int, one.strip("rgb()").split(",")[:3])) for one in (back, front)]
        assert (lightness[0] > lightness[1] + 300) == (scheme == "light"), (back, front)
        view.screenshot(path=tmp_path / f"{scheme}.png")


def test_two_thousand_pictures_scroll_without_stutter(view):
    frames = view.evaluate("""async () => {
        const gaps = []
        let last = performance.now()
        for (let i = 0; i < 150; i++) {
            window.scrollBy(0, 150)
            await new Promise(requestAnimationFrame)
            gaps.push(performance.now() - last)
            last = performance.now()
        }
        return gaps.sort((a, b) => a - b)
    }""")
    assert view.locator("section").count() == 100, "all were made as they came near"
    assert view.evaluate("[...document.images].filter(one => one.complete && one.naturalWidth).length") > 0
    print(f"\nframes: median {frames[75]:.0f} ms, 95 % {frames[142]:.0f} ms, longest {frames[-1]:.0f} ms")
    assert frames[75] < 100, "half of the frames within a tenth of a second, on two busy cores without a GPU"
