"""Claims about the page to explore a run: what is in the file, and what it does in a browser."""

import base64
import io
import json
import os
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from exercises import page
from plumbing.command import UserError
from plumbing.run_folder import load_run

SECTIONS = ("losses", "uses", "routing", "streams", "path", "attention", "claims")
HOSTILE = '</script><b>"red" & \'blue\'</b>'
CLAIM = {"name": HOSTILE, "table": "5", "measure": "PSNR", "claimed": -1, "delta": 0.2, "interval": [-2.0, -0.1],
         "verdict": "holds here", "all_rows": [-3.5, 1.25], "p_holm": 0.75, "paper": "PSNR 26 → 24",
         "seeds": [{"seed": i, "value": 29 - i, "control": 29.8} for i in range(3)]}
UNCOMPARED = CLAIM | {"name": "none better", "claimed": 1, "paper": "not compared", "no_better": "cannot be told",
                      "interval": [-0.4, 0.6], "seeds": [{"seed": 0, "value": 0.1, "control": 0.2}]}


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def pictures_of(strip: dict) -> np.ndarray:
    """`n H W 3`, levels"""
    image = Image.open(io.BytesIO(base64.b64decode(strip["src"].partition(",")[2]))).convert("RGB")
    return np.stack(np.split(np.asarray(image).astype(int), strip["n"], axis=1))


def with_data(page_file: Path, name: str, **changes) -> Path:
    """The same page with other data."""
    text, data = page_file.read_text(), data_of(page_file.read_text())
    old = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    changed = json.dumps(data | changes).replace("<", "\\u003c")
    other = page_file.parent.parent / name
    other.write_text(text.replace(old, changed))
    return other


@pytest.fixture(scope="module")
def written(whole_run, tmp_path_factory):
    """The page of a run of all stages, whose name and whose claims hold signs of HTML."""
    folder = tmp_path_factory.mktemp("page")
    run = shutil.copytree(whole_run, folder / "a <b> & \"c\"")
    (folder / "results").mkdir()
    (folder / "results" / "claims.json").write_text(json.dumps({"rows": [CLAIM, UNCOMPARED]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "ROOT", folder)
        patch.setattr(page, "DRAWN", page.PATHS)
        page.write_page(load_run(run), run, folder / "out" / "page.html")
        page.write_page(load_run(run), run, folder / "again.html")
    return folder / "out" / "page.html"


# ---------------------------------------------------------------- the file


def test_it_is_one_file_of_less_than_5_MB_that_points_at_nothing_outside(written):
    assert list(written.parent.iterdir()) == [written] and written.stat().st_size < 5_000_000
    text = written.read_text()
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?\s*(https?:|//)|@import|<link[^>]+stylesheet|fetch\(", text)
    assert re.findall(r"https?://[^\"'\s]+", text) == ["http://www.w3.org/2000/svg"]  # a name, not an address


def test_the_same_run_gives_the_same_bytes(written):
    assert written.read_bytes() == (written.parent.parent / "again.html").read_bytes()


def test_every_section_is_there_and_its_data_parses(written):
    text = written.read_text()
    assert [name for name in SECTIONS if f'<section id="{name}"' not in text] == []
    data = data_of(text)
    assert len(data["losses"]) == 9 and data["claims"] == [CLAIM, UNCOMPARED]
    assert all(len(data[use]["cards"]) == page.COUNT for use in ("reconstruct", "ask", "draw", "edit"))
    assert len(data["streams"]["shares"]) == 11
    steps = [len(arm["sigmas"]) for arm in data["path"]["arms"]]
    assert steps == [17, 17]
    for arm in data["path"]["arms"]:
        assert len(arm["moved"]) == 15 and sum(arm["moved"]) == pytest.approx(1, abs=1e-2)
        for frames in map(pictures_of, arm["clean"]):  # what is expected before the last step is the result: x_t − σ v
            assert np.abs(frames[-1] - frames[-2]).max() <= 1 < np.abs(frames[-1] - frames[0]).max()
    for sample in data["reading"]["samples"]:
        length, layers = len(sample["kinds"]), len(sample["names"])
        assert len(sample["weights"]) == length and sample["kinds"].count("w") == len(sample["words"])
        assert len(base64.b64decode(sample["attention"])) == layers * sample["kinds"].count("q") * length


def test_signs_of_html_in_names_are_escaped(written):
    text = written.read_text()
    assert "<title>A run of SPAR: a &lt;b&gt; &amp; &quot;c&quot;</title>" in text
    script = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    assert not set("<>&") & set(script) and text.count("</script>") == 2


def test_a_run_that_stopped_early_shows_what_its_stages_allow(whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    for name in ("P3", "T1", "T2", "T3", "U1", "U2", "U3"):
        (run / f"{name}.pt").unlink()
    page.write_page(load_run(run), run, tmp_path / "page.html")
    data = data_of((tmp_path / "page.html").read_text())
    assert [use for use in ("reconstruct", "ask", "draw", "edit", "streams", "path", "reading") if data[use]] == ["ask"]


def test_before_U1_it_draws_as_P3_left_it_and_names_what_was_changed_and_left_out(whole_run, tmp_path):
    shown = []
    for gone in (("U1", "U2", "U3"), ("T1", "T2", "T3", "U1", "U2", "U3")):
        run = shutil.copytree(whole_run, tmp_path / gone[0])
        for name in gone:
            (run / f"{name}.pt").unlink()
        config = json.loads((run / "config.json").read_text()) | {"anchor": False, "skip_stage": "T1"}
        (run / "config.json").write_text(json.dumps(config))
        page.write_page(load_run(run), run, tmp_path / "page.html")
        shown.append(data_of((tmp_path / "page.html").read_text()))
    assert shown[0]["draw"] == shown[1]["draw"] and shown[0]["path"] == shown[1]["path"]
    assert shown[0]["reconstruct"] and not shown[1]["reconstruct"]
    assert shown[0]["skipped"] == "T1" and shown[0]["changed"]["anchor"] is False
    assert {stage["stage"]: stage["of"] for stage in shown[0]["losses"]} == dict.fromkeys(page.NAMES, 2)


def test_a_run_of_other_data_is_told_that_the_judge_cannot_read_it(whole_run):
    model = load_run(whole_run)
    model.config.data = "pictures"
    with pytest.raises(UserError, match="the judge cannot read"):
        page.write_page(model, whole_run, Path("never.html"))


def test_the_attention_shown_is_the_one_that_the_layers_use(whole_run):
    model = load_run(whole_run)
    picture = torch.rand(1, 3, model.config.side, model.config.side) * 2 - 1
    f_v = model.tokenizer.features(picture)
    ids, mask = model.encode_prompts(["a red circle", "make the red circle blue"], True, to_draw=True)
    for attn in (model.mllm.llm.layers[1].attn, model.mllm.connector.layers[0].attn):
        with torch.no_grad(), page.calls_of(attn) as calls:
            model.mllm.condition(ids, mask, f_v.repeat(2, 1, 1))
        for inputs, output in calls:
            shares, values = page.attention_weights(attn, inputs, output), output[1][1]
            read = shares.nan_to_num() @ values.repeat_interleave(attn.heads // attn.kv_heads, 1)
            assert torch.allclose(attn.out(read.transpose(1, 2).flatten(2)), output[0], atol=1e-5)


# ---------------------------------------------------------------- in a browser


class Browser:
    """A headless Chromium, spoken to through two pipes: JSON messages with a zero byte after each."""

    def __init__(self, program: str, folder: Path):
        reads, self.write_end = os.pipe()
        self.read_end, writes = os.pipe()
        wanted = {3: os.dup(reads), 4: os.dup(writes)}  # where Chromium looks for them
        command = (f'exec "{program}" --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run'
                   f' --remote-debugging-pipe --user-data-dir="{folder}" about:blank 3<&{wanted[3]} 4>&{wanted[4]}')
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=tuple(wanted.values()),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (reads, writes, *wanted.values()):
            os.close(end)
        self.number, self.rest, self.events, self.tab = 0, b"", [], None

    def ask(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.tab} if self.tab else {}
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        end = time.time() + 60
        while True:
            found = self.next_message(end)
            if found.get("id") == self.number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self.events.append(found)

    def next_message(self, end: float) -> dict:
        while b"\0" not in self.rest:
            assert select.select([self.read_end], [], [], max(0.0, end - time.time()))[0], "the browser is silent"
            part = os.read(self.read_end, 1 << 20)
            assert part, "the browser is gone"
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.tab, target = None, self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.tab = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=address)
        while self.js("document.readyState") != "complete":
            time.sleep(0.05)

    def js(self, expression: str):
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def key(self, name: str) -> None:
        code = {"Tab": 9, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}[name]
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def hover(self, selector: str) -> None:
        x, y = self.js(f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.scrollIntoView("
                       "{block: 'center', behavior: 'instant'}); const box = node.getBoundingClientRect();"
                       "return [box.x + box.width / 2, box.y + box.height / 2]; })()")
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, selector: str = "html") -> bytes:
        box = self.js(f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
                      "return [box.x + scrollX, box.y + scrollY, box.width, box.height]; })()")
        clip = dict(zip(("x", "y", "width", "height"), box), scale=1)
        return base64.b64decode(self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.read_end)
        os.close(self.write_end)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, written):
    browser.open(written.as_uri())
    return browser


def errors(browser: Browser) -> list:
    loud = ("error", "warning", "assert")
    return [event for event in browser.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")
            or event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in loud]


@pytest.mark.parametrize("width, dark", [(1280, False), (1280, True), (390, False), (390, True)])
def test_it_loads_without_error_fetches_nothing_and_fits_its_window(width, dark, browser, written):
    browser.open(written.as_uri(), width, 844, dark)
    shown = "[...document.querySelectorAll('section')].filter(section => !section.hidden).map(section => section.id)"
    assert browser.js(shown) == list(SECTIONS)
    browser.screenshot()  # so that every picture has been painted
    assert errors(browser) == []
    fetched = [event["params"]["request"]["url"] for event in browser.events
               if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in fetched if not url.startswith("data:")] == [written.as_uri()]
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("getComputedStyle(document.body).backgroundColor") == ("rgb(19, 21, 25)" if dark
                                                                             else "rgb(246, 246, 243)")


def test_words_of_html_are_shown_as_they_are(opened):
    assert opened.js("document.querySelector('#claims h3').textContent") == HOSTILE
    assert opened.js("document.querySelector('h1').textContent") == 'A run of SPAR: a <b> & "c"'


def shares(browser: Browser) -> str:
    return browser.js("[...document.querySelectorAll('#routing .bar b')].map(b => b.textContent).join()"
                      "+ document.querySelector('#routing .said').textContent")


def test_the_bars_are_the_mean_of_what_is_pointed_at_and_a_layer_counts_the_same_tokens(opened, written):
    sample = data_of(written.read_text())["reading"]["samples"][-1]
    assert "p" in sample["kinds"]
    opened.js("(() => { const prompt = document.querySelector('#routing select'); prompt.selectedIndex = "
              "prompt.options.length - 1; prompt.dispatchEvent(new Event('change')); })()")
    weights = [row for row, kind in zip(sample["weights"], sample["kinds"]) if kind != "p"]
    wanted = [sum(column) / len(weights) for column in zip(*weights)]
    bars = "[...document.querySelectorAll('#routing .bar b')].map(b => +b.textContent)"
    assert opened.js(bars) == pytest.approx(wanted, abs=0.0051)
    opened.hover("#routing .bar:nth-child(2)")
    assert opened.js(bars) == pytest.approx(wanted, abs=0.0051)
    shade = "[...document.querySelectorAll('#routing .patches .token')].map(t => +t.style.getPropertyValue('--share'))"
    assert set(opened.js(shade)) == {0}


def test_where_every_token_has_the_same_layers_it_says_so(browser, written):
    reading = data_of(written.read_text())["reading"]
    for sample in reading["samples"]:
        sample["weights"] = [[0.25] * 4 for _ in sample["weights"]]
    browser.open(with_data(written, "mean.html", reading=reading | {"router": "mean"}).as_uri())
    assert "listens to all layers alike" in shares(browser)
    browser.hover("#routing .bar:nth-child(2)")
    assert "is heard by all tokens alike, 0.25" in shares(browser)
    assert "every token the plain mean" in browser.js("document.querySelector('#routing .note').textContent")


def test_a_click_leaves_one_stop_of_the_tab_key(opened):
    stops = "document.querySelectorAll('#routing .words [tabindex=\"0\"]').length"
    opened.js("(() => { const words = document.querySelectorAll('#routing .words .token'); words[2].focus();"
              "words[2].click(); })()")
    opened.key("ArrowRight")
    assert opened.js(stops) == 1
    assert opened.js("document.activeElement.ariaPressed") == "true"


def test_a_claim_shows_on_which_side_it_lies_how_many_seeds_and_all_rows_at_once(opened):
    text = "[...document.querySelectorAll('.claim')].map(claim => claim.textContent)"
    first, second = opened.js(text)
    assert "3 seeds" in first and "all rows at once −3.5 to 1.25, p 0.75" in first
    assert "below the control: as the paper says" in first and "holds here" in first
    assert "above the control" in second and "as the paper says" not in second
    assert "; no better by δ: cannot be told" in second
    each = "[...document.querySelectorAll('.claim')].map(claim => "
    dots = opened.js(each + "claim.querySelector('path title').parentNode.getAttribute('transform'))")
    across = [float(re.search(r"[0-9.]+", dot)[0]) for dot in dots]
    assert across[0] > 220 > across[1]  # both are below their control
    assert opened.js(each + "claim.querySelectorAll('.head').length)") == [1, 0]


def test_stages_that_are_left_out_or_in_progress_and_changed_fields_are_named(browser, written):
    data = data_of(written.read_text())
    losses = [stage | {"of": 9} if stage["stage"] == "U2" else stage for stage in data["losses"]]
    changes = {"stages": ["P1", "P2", "P3", "T1", "T2"], "skipped": "T3", "changed": {"align": "none", "lambda_s": 0}}
    browser.open(with_data(written, "skipped.html", losses=losses, **changes).as_uri())
    chips = browser.js("[...document.querySelectorAll('#stages li')].map(li => li.textContent)")
    assert chips[4:7] == ["✓ T2 finished", "– T3 left out", "· U1 not finished"]
    assert "with align none, lambda_s 0; seed" in browser.js("document.getElementById('lead').textContent")
    titles = browser.js("[...document.querySelectorAll('#losses h3')].map(h => h.textContent)")
    assert any(title.startswith("U2: 2 of 9 steps") for title in titles)
    assert any(title.startswith("P1: 2 steps") for title in titles)


def test_what_goes_below_zero_has_a_chart_of_its_own_and_no_value_where_it_has_none(browser, written):
    terms = [{"name": "L_mse", "points": [[0, 0.5], [10, 0.25], [20, 0.125]], "held": []},
             {"name": "L_s", "points": [[10, 0.25], [20, 0.125]], "held": []},
             {"name": "L_gan", "points": [[10, 0.25], [20, -0.125]], "held": []}]
    losses = [{"stage": "T3", "steps": 21, "of": 21, "seconds": None, "terms": terms}]
    browser.open(with_data(written, "losses.html", losses=losses).as_uri())
    titles = browser.js("[...document.querySelectorAll('#losses h3')].map(h => h.textContent)")
    assert titles == ["T3: 21 steps", "T3: L_gan"]
    values = "[...document.querySelectorAll('#losses .chart:first-child .legend li')].map(li => li.textContent)"
    assert browser.js(values) == ["L_mse0.125", "L_s0.125"]
    browser.js("document.querySelector('#losses .chart svg').focus()")
    browser.key("Home")
    assert browser.js(values) == ["L_mse0.5", "L_s–"]
    assert browser.js("document.querySelector('#losses .chart svg').ariaValueText") == "step 0, L_mse 0.5, L_s –"


def test_many_patches_and_queries_fit_a_phone_and_a_patch_lies_on_its_part_of_the_picture(browser, written):
    reading = data_of(written.read_text())["reading"]
    sample = next(sample for sample in reading["samples"] if sample["picture"])
    kinds = "b" + "p" * 64 + "w" * len(sample["words"]) + "q" * 64
    sample |= {"kinds": kinds, "weights": [sample["weights"][0]] * len(kinds),
               "attention": base64.b64encode(bytes(len(sample["names"]) * 64 * len(kinds))).decode()}
    browser.open(with_data(written, "many.html", reading=reading | {"samples": [sample]}).as_uri(), 390, 844)
    assert browser.js("document.documentElement.scrollWidth") <= 390
    box = "(query => { const box = document.querySelector(query).getBoundingClientRect();" \
          "return [box.right, box.bottom]; })"
    assert browser.js(f"{box}('#routing .patches .pic')") == pytest.approx(
        browser.js(f"{box}('#routing .patches .token:last-child')"), abs=1)


def test_hovering_a_word_shows_its_layers_and_a_layer_who_listens(opened):
    seen = {shares(opened)}
    for place in (2, 4):
        opened.hover(f"#routing .words .token:nth-child({place})")
        seen.add(shares(opened))
    assert len(seen) == 3 and any("“describe” listens most to layer" in text for text in seen)
    opened.hover("#routing .bar:nth-child(2)")
    assert "is heard most by" in shares(opened)
    assert opened.js("document.querySelector('#routing .token').style.getPropertyValue('--share')") not in ("", "0")


def test_the_arrow_keys_walk_from_word_to_word_and_the_tab_key_leaves(opened):
    opened.js("document.querySelector('#routing .words .token').focus()")
    first = shares(opened)
    opened.key("ArrowRight")
    assert opened.js("document.activeElement.textContent") == "describe" and shares(opened) != first
    opened.key("Tab")
    assert opened.js("document.activeElement.closest('.words') === null")


@pytest.mark.parametrize("section", ["streams", "path"])
def test_a_slider_changes_pictures_and_words_from_the_keyboard(section, opened):
    def look() -> tuple:
        return (opened.screenshot(f"#{section} .cards"),
                opened.js(f"document.querySelector('#{section} output').textContent"))

    opened.js(f"document.querySelector('#{section} input[type=range]').focus()")
    seen = [look()]
    for key in ("ArrowLeft", "Home"):
        opened.key(key)
        seen.append(look())
    pictures, words = zip(*seen)
    assert len(set(pictures)) == 3 and len(set(words)) == 3


def test_a_query_shows_what_it_reads_in_the_layer_chosen(opened):
    read = "document.querySelector('#attention .said').textContent"
    seen = {opened.js(read)}
    opened.hover("#attention .places .token:nth-child(3)")
    seen.add(opened.js(read))
    opened.js("document.querySelector('#attention input[type=range]').focus()")
    opened.key("Home")
    seen.add(opened.js(read))
    assert len(seen) == 3 and any("query 3 attends to" in text for text in seen)


def test_the_values_of_a_curve_follow_the_arrow_keys(opened):
    opened.js("document.querySelector('#path .chart svg').focus()")
    at = "document.querySelector('#path .chart .at').textContent"
    assert opened.js(at) == "step 8"
    opened.key("ArrowLeft")
    assert opened.js(at) == "step 7"
    assert "step 7 of" in opened.js("document.querySelector('#path output').textContent")


def test_each_use_can_be_chosen_and_what_is_right_left_out(opened):
    for place, use in enumerate(("reconstruct", "ask", "draw", "edit")):
        opened.js(f"document.querySelectorAll('#uses input[type=radio]')[{place}].click()")
        assert opened.js("document.querySelectorAll('#uses .card').length") == page.COUNT
        assert opened.js("document.querySelector('#uses .card').dataset.use") == use
    opened.js("document.querySelector('#uses input[type=checkbox]').click()")
    assert opened.js("document.querySelectorAll('#uses .verdict.yes').length") == 0
