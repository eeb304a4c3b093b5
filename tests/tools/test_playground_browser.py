"""The playground in a real browser: `python -m pytest -m browser`. It needs Chromium or Chrome, and

    npm install --no-save --prefix . axe-core@4

This draws docs/pictures/playground_*.png from out/phase1_char:

    PYTHONPATH=. python tests/tools/test_playground_browser.py
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

import prepare_shakespeare
from tools import playground

ROOT = Path(prepare_shakespeare.__file__).parent
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"  # finds what makes a page hard to use
pytestmark = pytest.mark.browser

# Hostile text: each piece would run code, add an element or end an attribute if it became HTML.
HOSTILE = (
    '<img src=x onerror="window.hacked = 1"> </script><script>window.hacked = 2</script> '
    "'><svg onload='window.hacked = 3'> &lt;b&gt; ${window.hacked = 4} `\" onclick=\"hacked = 5"
)


@contextmanager
def served(out_dirs: list[str]):
    """Yield the address of a playground that was started as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tools.playground", f"--out_dir={','.join(out_dirs)}"]
    command, env = [*command, f"--port={port}"], {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    process = subprocess.Popen(command, env=env, **pipes)
    try:
        assert any(line.startswith("open http") for line in process.stdout)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        output = process.communicate()[0]
    assert "Traceback" not in output, output


@contextmanager
def chromium():
    expect.set_options(timeout=60_000)
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    assert path, "there is no chromium on the PATH; on Debian: apt-get install chromium"
    with sync_playwright() as playwright:
        as_root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] * as_root)
        yield browser
        browser.close()


@contextmanager
def opened(browser, url: str, width: int = 1280, height: int = 900, scheme: str = "light"):
    """Yield the page in a window of this size; afterwards check hosts, errors and hacks."""
    size, offline = {"width": width, "height": height}, url.startswith("file:")
    context = browser.new_context(viewport=size, color_scheme=scheme, offline=offline)
    hosts, errors = [], []
    context.on("request", lambda request: hosts.append(urlsplit(request.url).hostname))
    page = context.new_page()
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    assert page.evaluate("window.hacked") is None
    own = {urlsplit(url).hostname, None}  # None: data:, blob:, file:
    assert set(hosts) <= own and errors == []
    context.close()


def write_file(**options) -> str:
    """Write a run as one file, and return its address."""
    config = playground.PlaygroundConfig(device="cpu", **options)
    playground.main(config)
    return Path(config.to).resolve().as_uri()


def start_text(page, **options) -> None:
    page.locator("#sampling details").evaluate("details => { details.open = true; }")
    for name, value in options.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("#write-start").click()


def check_accessibility(page, name: str) -> None:
    """Fail if axe-core finds anything serious in the page as it is now. Print the rest."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    for problem in page.evaluate("axe.run()")["violations"]:
        targets = [" ".join(node["target"]) for node in problem["nodes"]]
        print(f"axe: {name}: {problem['impact']}: {problem['help']}: {targets}")
        assert problem["impact"] not in ("serious", "critical"), targets


def is_visible(page, selector: str) -> bool:
    """Return whether an element is inside the visible part of #text."""
    return page.locator(selector).evaluate("""element => {
        const [inner, outer] = [element, document.querySelector("#text")].map(e =>
            e.getBoundingClientRect());
        return inner.top >= outer.top - 2 && inner.bottom <= outer.bottom + 2;
    }""")


def try_write(page) -> None:
    token, about = page.locator("#text .token"), page.locator("#about")
    chosen, candidates = page.locator("#choice"), page.locator("#candidates tr")
    narrow = page.viewport_size["width"] < 500
    assert page.locator("#seed").is_visible() != narrow  # on a phone the text comes first
    expect(token).to_have_count(300)
    expect(chosen).to_contain_text("Token 1 is ")
    size = r"parameters: 2 layers, 4 heads, 128 wide, context 128, .* step 12, validation loss 2\."
    expect(page.locator("#model-about")).to_contain_text(re.compile(size))
    token.nth(6).click()
    expect(chosen).to_contain_text("Token 7 is ")
    expect(page.locator("#row span")).to_have_count(len("3 times") + 6)
    label = chosen.locator("b").inner_text()
    expect(page.locator("#candidates .taken button")).to_have_text(label)
    expect(page.locator("#candidates button").last).to_be_in_viewport()
    assert candidates.count() in (10, 11) and page.locator("#candidates .taken").count() == 1
    shades = "all => new Set(all.map(token => getComputedStyle(token).backgroundColor)).size"
    assert token.evaluate_all(shades) > 3
    lens, best = page.locator("#lens tr"), candidates.first.locator("button").inner_text()
    assert lens.count() == 2 and lens.last.inner_text().split()[:2] == ["2", *best.split()]
    seen = page.locator("#row span")
    together = seen.evaluate_all("all => all.map(span => span.title)")
    page.locator("#row-head").select_option("layer 2, head 3")
    assert seen.evaluate_all("all => all.map(span => span.title)") != together
    assert seen.evaluate_all(shades) > 2
    try_sampling(page)
    start_text(page)  # while the page shows 300 tokens
    start_text(page, temperature=0, max_new_tokens=30)  # the other text may still be growing
    expect(token).to_have_count(30)
    token.nth(3).click()
    expect(page.locator("#candidates .taken")).to_contain_text("100.0%")
    prompt = page.locator("#prompt")
    for mistake, words in (("", "the prompt is empty"), ("Zeus", "character 'Z' at position 0")):
        prompt.fill(mistake)
        start_text(page)
        expect(about).to_contain_text(words)
        expect(about).to_have_class("message alert")
        expect(token).to_have_count(0)
        expect(page.locator("#candidates")).to_be_hidden()
    prompt.fill("3 times 4 is 12.\n" * 10)
    start_text(page, max_new_tokens=20)
    expect(about).to_have_text("The prompt has 170 tokens, and this model sees the last 128.")
    prompt.fill("3 times 4")
    start_text(page)
    expect(about).to_have_text("")
    expect(token).to_have_count(20)
    expect(page.locator("#text .prompt")).to_have_text("3 times 4")
    try_next_token(page)


def try_sampling(page) -> None:
    """The temperature moves the candidates at once; a wrong number is explained by its label."""
    says, drawn = (page.locator(f"#candidates tr > :nth-child({n})") for n in (3, 4))
    before = says.all_inner_texts()
    page.locator("#temperature").fill("1")
    assert drawn.all_inner_texts() == says.all_inner_texts() == before
    for _ in range(20):
        page.locator("#temperature").press("ArrowRight")
    expect(page.locator("#temperature-now")).to_have_text("2")
    shares = [float(column.first.inner_text().strip("%")) for column in (drawn, says)]
    assert shares[0] < shares[1] and says.all_inner_texts() == before
    top_k, about = page.locator("#top_k"), page.locator("#about")
    page.locator("#sampling details").evaluate("details => { details.open = true; }")
    top_k.fill("1")
    assert drawn.all_inner_texts()[:2] == ["100.0%", "0%"]
    top_k.fill("")
    for _ in range(2):
        expect(about).to_have_text("Top-k (0: all): write a number from 0 to 65,536.")
        page.locator("#write-start").click()
    top_k.fill("0")
    expect(about).to_have_text("")


def try_next_token(page) -> None:
    token, chosen = page.locator("#text .token"), page.locator("#choice")
    page.locator("#write-next").click()
    expect(token).to_have_count(21)
    expect(chosen).to_contain_text("Token 21 is ")
    token.nth(4).click()
    expect(page.locator("#row span")).to_have_count(len("3 times 4") + 4)
    before = page.locator("#text").inner_text()
    expect(page.locator("#write-back")).to_be_hidden()
    other = page.locator("#candidates tr:not(.taken) button").nth(1)
    label = other.inner_text()
    other.click()
    expect(token).to_have_count(21)  # as long as before
    expect(chosen).to_contain_text("Token 5 is ")
    expect(page.locator("#candidates .taken button")).to_have_text(label)
    shown = {" ": "␣", "\n": "↵", "↵\n": "↵"}
    assert shown.get(text := token.nth(4).text_content(), text) == label
    assert page.locator("#text").inner_text() != before
    expect(page.locator("#write-back")).to_be_focused()
    page.keyboard.press("Enter")
    assert page.locator("#text").inner_text() == before
    expect(chosen).to_contain_text("Token 5 is ")
    expect(page.locator("#write-back")).to_be_hidden()
    page.locator("#write-more").click()
    expect(token).to_have_count(41)
    page.locator("#prompt").fill("3 times")  # another prompt begins another text
    page.locator("#write-next").click()
    expect(token).to_have_count(1)
    page.locator("#prompt").fill("3 times 4")
    start_text(page)
    expect(token).to_have_count(20)


def try_tokens(page) -> None:
    pieces, message = page.locator("#pieces li"), page.locator("#tokens-message")
    expect(message).to_contain_text("9 characters, 9 tokens. Loss: ")
    assert pieces.first.inner_text().split()[0] == "3" and "first" in pieces.first.inner_text()
    assert re.fullmatch(r"␣\s+id 1\s+[<\d.]+%", pieces.nth(1).inner_text())
    page.locator("#prompt").fill("3" * 200)
    expect(message).to_contain_text("200 characters, 200 tokens; these are the first 128.")
    page.locator("#prompt").fill("")
    expect(message).to_contain_text("the prompt is empty")
    expect(pieces).to_have_count(0)
    page.locator("#prompt").press_sequentially("3 times 4")
    expect(pieces).to_have_count(9)


def try_attention(page) -> None:
    maps, verdict = page.locator("#maps svg"), page.locator("#verdict")
    over = page.locator("#over")
    expect(verdict).to_contain_text("The prompt alone has 9 tokens.")  # it was edited
    over.get_by_label("prompt and text").check()
    expect(verdict).to_contain_text("with the text has 29 tokens; the maps show the first 24.")
    expect(maps.first.locator("rect")).to_have_count(24 * 25 // 2)
    assert [svg.locator("rect.future").count() for svg in maps.all()] == [0, 24 * 23 / 2]
    judge = "loss => verdict([2, loss])"
    assert "was trained without the mask. It copies" in page.evaluate(judge, 0.9)
    assert "impossibly good" not in page.evaluate(judge, 1.1)
    heads, title = page.locator("#heads button"), page.locator("#maps b").first
    assert heads.count() == 8
    pixels = "canvas => canvas.toDataURL()"
    assert len({canvas.evaluate(pixels) for canvas in heads.locator("canvas").all()}) == 8
    for layer, head in ((1, 4), (2, 3)):
        before = maps.first.inner_html()
        page.get_by_role("button", name=f"layer {layer}, head {head}").click()
        expect(title).to_have_text(f"Layer {layer}, head {head}, with the mask")
        assert maps.first.inner_html() != before
    for key in ("ArrowLeft", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    expect(title).to_have_text("Layer 1, head 2, with the mask")
    expect(page.get_by_role("button", name="layer 1, head 2")).to_be_focused()
    page.locator("#prompt").fill("3 times")  # the written text continues another prompt
    expect(verdict).to_contain_text("The prompt alone has 7 tokens.")
    assert over.get_by_label("prompt", exact=True).is_checked()
    expect(title).to_have_text("Layer 1, head 2, with the mask")
    page.locator("#prompt").fill("3 times 4")
    expect(verdict).to_contain_text("The prompt alone has 9 tokens.")
    over.get_by_label("prompt and text").check()
    page.locator("#count").fill("64")
    page.locator("#count").press("Enter")
    expect(maps.first.locator("rect")).to_have_count(29 * 30 // 2)
    for svg in maps.all():  # the whole map is in sight
        assert svg.evaluate("svg => svg.parentElement.scrollWidth <= svg.parentElement.clientWidth")
    page.locator("#count").fill("99")
    page.locator("#count").press("Enter")
    expect(verdict).to_have_text("Tokens, at most: write a number from 2 to 64.")


def try_inside(page) -> None:
    steps = page.locator("#way li")
    expect(page.locator("#inside-message")).to_contain_text("before token 1 of the text")
    expect(steps).to_have_count(8)
    expect(steps.first).to_contain_text("is token id")
    assert page.locator("#way canvas").count() == 10
    shapes = page.locator("#way canvas").evaluate_all("all => all.map(c => [c.width, c.height])")
    assert shapes == [[n, 8] for n in (128, 128, 32, 32, 32, 8, 128, 512, 128, 128)]
    page.locator("#way canvas").nth(2).click()
    cell = re.compile(r"Query, key, value, “.”, number 17 of 32: -?\d\.\d{4}")
    expect(page.locator("#cell")).to_have_text(cell)
    numbers = page.locator("#way p").all_inner_texts()
    page.locator("#way-head").select_option("layer 2, head 3")
    expect(steps.first).to_contain_text("Output of layer 1")
    assert page.locator("#way p").all_inner_texts() != numbers
    expect(steps.last).to_contain_text("%")


def try_compare(page) -> None:
    boxes, cards = page.locator("#compared input"), page.locator("#cards article")
    assert [box.is_checked() for box in boxes.all()] == [True, False, True, False]
    page.locator("#compare-start").click()
    expect(cards).to_have_count(2)
    expect(cards.first).to_contain_text("out/one/ckpt.pt, temperature 0")
    expect(cards.nth(1).locator(".token")).to_have_count(20)
    expect(cards.nth(1)).to_contain_text("step 12, validation loss 2.")
    first, second = (cards.nth(i).bounding_box() for i in (0, 1))
    assert (first["y"] == second["y"]) == (page.viewport_size["width"] == 1280)


def try_learning(page) -> None:
    """The curve and the samples follow the log of a run that trains, also a half written line."""
    if page.viewport_size["width"] == 1280:  # at first it is the run whose log changed last
        assert page.locator("#run").input_value() == "out/two"
    page.locator("#run").select_option("out/one")
    figures, log = page.locator("#figures"), Path("out/one/log.jsonl")
    slider, about = page.locator("#moment"), page.locator("#sample-about")
    expect(page.locator("#curve polyline")).to_have_count(3)
    curve = page.locator("#curve svg")  # is drawn again when the log of the run has arrived
    width = curve.evaluate("svg => svg.getBoundingClientRect().width")
    curve.hover(position={"x": width - 9, "y": 100})
    expect(page.locator("#reading")).to_contain_text("batch loss ")
    samples = sum('"sample"' in line for line in log.read_text(encoding="utf-8").splitlines())
    last = f"Sample {samples} of {samples}, at step "
    expect(about).to_contain_text(last)
    at_end = page.locator("circle.moment").get_attribute("cx")
    slider.focus()
    page.keyboard.press("Home")
    expect(about).to_contain_text(f"Sample 1 of {samples}, at step 0, epoch")
    expect(about).to_contain_text(re.compile(r"; validation loss 3\.\d{3} at step 0$"))
    expect(page.locator("#sample")).to_contain_text("3 times")
    assert page.locator("circle.moment").get_attribute("cx") != at_end
    assert slider.get_attribute("aria-valuetext") == about.text_content()
    page.keyboard.press("End")
    expect(about).to_contain_text(last)
    step = 1000 + log.stat().st_size
    at = {"step": step, "epoch": 3}
    records = [at | {"train_loss": 1.5, "val_loss": 2.0478}, at | {"sample": "4 times"}]
    records.append({"step": step + 1, "epoch": 3, "loss": 1.23456})
    *whole, line = map(json.dumps, records)
    for words, seen in (("\n".join([*whole, line[:9]]), step), (f"{line[9:]}\n", step + 1)):
        with open(log, "a", encoding="utf-8") as file:
            file.write(words)
        expect(figures).to_contain_text(f"step {seen:,}, epoch 3")
        expect(figures).to_contain_text("validation loss 2.048")
    expect(about).to_contain_text(f"Sample {samples + 1} of {samples + 1}, at step {step:,}")
    expect(page.locator("#sample")).to_have_text("4 times")
    page.locator("#curve svg").hover(position={"x": width - 8, "y": 100})
    expect(page.locator("#reading")).to_have_text(f"batch loss 1.235 at step {step + 1:,}")


@pytest.fixture
def runs(tiny_run) -> list[str]:
    """Return a run with the model of phase 1, and a smaller one that was trained last."""
    phase1 = dict(n_layer=2, n_head=4, n_embd=128, block_size=128, batch_size=4)
    samples = dict(sample_interval=6, sample_start="3 times", sample_tokens=40)
    one = tiny_run(out_dir="out/one", **phase1, **samples)
    return [str(one), str(tiny_run(out_dir="out/two", seed=2))]


def try_compare_alone(page) -> None:
    """One checkpoint is compared with itself, at three temperatures."""
    cards = page.locator("#cards article")
    expect(page.locator("#compared")).to_be_hidden()
    page.locator("#temperature").fill("0.8")
    page.locator("#compare-start").click()
    expect(cards).to_have_count(3)
    for card, temperature in zip(cards.all(), ("0.8", "0", "1.5"), strict=True):
        expect(card).to_contain_text(f"sent, temperature {temperature}")
        expect(card.locator(".token")).to_have_count(20)
    assert len({card.locator(".text").inner_text() for card in cards.all()}) == 3


def try_learning_alone(page) -> None:
    expect(page.locator("#curve polyline")).to_have_count(3)
    expect(page.locator("#figures")).to_contain_text("step 12, epoch")
    page.locator("#moment").press("Home")
    expect(page.locator("#sample")).to_contain_text("3 times")


@pytest.mark.parametrize("sent", [False, True], ids=["served", "sent"])
def test_every_tab_works_wide_and_narrow_light_and_dark(runs, sent):
    assert AXE.exists(), "axe-core is missing: npm install --no-save --prefix . axe-core@4"
    tabs = {"Write": try_write, "Tokens": try_tokens, "Attention": try_attention}
    tabs |= {"Inside": try_inside, "Compare": try_compare, "Learning": try_learning}
    if sent:
        tabs |= {"Compare": try_compare_alone, "Learning": try_learning_alone}
    source = nullcontext(write_file(out_dir=runs[0], to="sent.html")) if sent else served(runs)
    with source as url, chromium() as browser:
        for width, scheme in ((1280, "light"), (390, "dark")):
            with opened(browser, url, width, scheme=scheme) as page:
                for name, try_tab in tabs.items():
                    page.get_by_role("tab", name=name).click()
                    try_tab(page)
                    scrolled = page.evaluate("document.documentElement.scrollWidth")
                    assert scrolled <= width, f"{name} scrolls sideways"
                    for colors in ("light", "dark"):
                        page.emulate_media(color_scheme=colors)
                        check_accessibility(page, f"{name}, {width} pixels, {colors}")


def test_a_chosen_token_stays_visible_and_agrees_with_the_table(runs):
    with served(runs) as url, chromium() as browser, opened(browser, url, 390) as page:
        token = page.locator("#text .token")
        expect(token).to_have_count(300)
        assert is_visible(page, "#text .token:last-child")  # the text scrolled while it grew
        token.nth(20).click()
        for key, count in (("ArrowRight", 90), ("ArrowLeft", 60)):
            for _ in range(count):
                page.keyboard.press(key)
                chosen = int(page.locator("#text .chosen").get_attribute("data-token"))
                assert page.locator("#choice").inner_text().startswith(f"Token {chosen + 1} is ")
                assert is_visible(page, "#text .chosen")
        assert chosen == 50
        start_text(page, max_new_tokens=500)  # a choice in a growing text is not scrolled away
        expect(token.nth(3)).to_be_attached()
        token.nth(3).dispatch_event("click")
        expect(token).to_have_count(500)
        assert is_visible(page, "#text .chosen") and page.locator("#text .chosen").count() == 1


def test_hostile_text_is_shown_as_text(tiny_run, tmp_path):
    """The data set, the prompt, the tokens, the paths and the errors hold HTML and JavaScript."""
    (tmp_path / "hostile.txt").write_text(f"{HOSTILE}\n" * 400, encoding="utf-8")
    config = prepare_shakespeare.PrepareConfig(input="hostile.txt", dataset="hostile")
    prepare_shakespeare.main(config)
    run = "out/<img src=x onerror=hacked=6>'&quot;"
    tiny_run(dataset="hostile", out_dir=run, sample_interval=6, sample_start=HOSTILE)
    with served([run, "out/<b>none"]) as url, chromium() as browser, opened(browser, url) as page:
        token = page.locator("#text .token")
        expect(page.locator("#notice")).to_contain_text("No checkpoint yet in out/<b>none")
        assert page.locator("#checkpoint").input_value() == f"{run}/ckpt.pt"
        page.locator("#prompt").fill(HOSTILE)
        start_text(page)
        expect(token).to_have_count(300)
        expect(page.locator("#text .prompt")).to_have_text(HOSTILE)
        for i in range(15):
            token.nth(i).click()
        page.get_by_role("tab", name="Attention").click()
        expect(page.locator("#maps svg")).to_have_count(2)
        page.get_by_role("tab", name="Tokens").click()
        expect(page.locator("#pieces li").first).to_contain_text("<")
        page.get_by_role("tab", name="Compare").click()
        page.locator("#compare-start").click()
        expect(page.locator("#cards .prompt")).to_have_text(HOSTILE)
        page.get_by_role("tab", name="Learning").click()
        expect(page.locator("#sample")).to_contain_text(HOSTILE)
        page.get_by_role("tab", name="Write").click()
        page.locator("#prompt").fill(f"€{HOSTILE}")
        start_text(page)
        expect(page.locator("#about")).to_contain_text("'€<img src=x onerror=")
        shutil.rmtree(run)
        page.locator("#prompt").fill("<")
        start_text(page)
        expect(page.locator("#about")).to_contain_text(f"{run}/ckpt.pt: no such checkpoint")
        bold = "p > b, td > b, figcaption > b"
        added = "img, main svg[onload], body script:not([src]), [onclick], [onerror]"
        assert page.locator(f"{added}, b:not({bold})").count() == 0


def test_the_first_checkpoint_of_a_run_starts_the_first_text(runs):
    with served(["out/later"]) as url, chromium() as browser, opened(browser, url) as page:
        expect(page.locator("#notice")).to_contain_text("No checkpoint yet in out/later")
        Path(runs[0]).rename("out/later")  # all at once: the page looks for it every second
        expect(page.locator("#checkpoint")).to_have_value("out/later/ckpt.pt")
        expect(page.locator("#text .token")).to_have_count(300)


def test_the_page_while_the_model_loads_and_after_another_checkpoint_was_chosen(runs):
    with served(runs) as url, chromium() as browser, opened(browser, f"{url}/engine.js") as page:
        page.route("**/write", lambda route: (page.wait_for_timeout(700), route.continue_()))
        page.goto(url)
        expect(page.locator("#about")).to_have_text("loading the model ...")
        page.locator("#write-start").click()  # the prompt is not there yet
        page.get_by_role("tab", name="Tokens").click()
        expect(page.locator("#tokens-message")).to_have_text("loading the model ...")
        expect(page.locator("#pieces li")).to_have_count(len("3 times"))
        assert page.locator("#prompt").input_value() == "3 times"
        page.get_by_role("tab", name="Write").click()
        about = page.locator("#model-about")
        expect(about).to_contain_text("out/one/ckpt.pt: ")
        page.locator("#checkpoint").select_option("out/two/ckpt.pt")
        expect(page.locator("#text")).to_have_text("")
        expect(about).to_contain_text("out/two/ckpt.pt: ")
        expect(about).to_contain_text("16 wide")
        expect(page.locator("#text .prompt")).to_have_text(page.locator("#prompt").input_value())


def draw() -> None:
    """Draw the pictures of the page for the documents from the run of phase 1."""
    os.chdir(ROOT)
    size = dict(width=1100, height=760)
    with served(["out/phase1_char"]) as url, chromium() as b, opened(b, url, **size) as page:
        page.locator("#text .token").nth(299).wait_for()  # the prompt is the run's by now
        start_text(page, max_new_tokens=150)  # the pieces of a short text make a small file
        expect(page.locator("#text .token")).to_have_count(150)
        page.locator("#text .token").nth(12).click()
        page.screenshot(path="docs/pictures/playground_write.png", full_page=True)
        page.get_by_role("tab", name="Attention").click()
        page.get_by_role("button", name="layer 1, head 3").click()  # it looks at the token before
        page.screenshot(path="docs/pictures/playground_attention.png", full_page=True)
        page.get_by_role("tab", name="Inside").click()
        page.locator("#way canvas").last.wait_for()
        page.screenshot(path="docs/pictures/playground_inside.png", full_page=True)
        page.get_by_role("tab", name="Learning").click()
        page.locator("#moment").press("Home")
        page.screenshot(path="docs/pictures/playground_learning.png", full_page=True)


if __name__ == "__main__":
    draw()
