"""The playground in a real browser: `python -m pytest -m browser`. It needs Chromium or Chrome.

This draws docs/pictures/playground_*.png from out/phase1_char and out/phase2_bpe:

    PYTHONPATH=. python tests/tools/test_playground_browser.py
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import prepare_shakespeare

ROOT = Path(prepare_shakespeare.__file__).parent
pytestmark = pytest.mark.browser

# Python runs a file of this name when it starts. It records the hosts that the server contacts.
SITECUSTOMIZE = """
import sys
def note(event, args):
    read = {"socket.connect": lambda: args[1][0], "socket.getaddrinfo": lambda: args[0],
            "socket.gethostbyaddr": lambda: args[0], "socket.bind": lambda: args[1][0]}
    host = read.get(event, str)()
    if host:
        with open("hosts.txt", "a") as file:
            print(host if isinstance(host, str) else host.decode(), file=file)
sys.addaudithook(note)
"""
FIRST_TOKEN = """() => {
    document.addEventListener("click", () => {
        const start = performance.now();
        const observer = new MutationObserver(() => {
            if (!document.querySelector("#text .token")) return;
            window.firstToken = performance.now() - start;
            observer.disconnect();
        });
        observer.observe(document.querySelector("#text"), {childList: true});
    }, {capture: true, once: true});
}"""
# Hostile text: each piece would run code, add an element or end an attribute if it became HTML.
HOSTILE = (
    '<img src=x onerror="window.hacked = 1"> </script><script>window.hacked = 2</script> '
    "'><svg onload='window.hacked = 3'> &lt;b&gt; ${window.hacked = 4} `\" onclick=\"hacked = 5"
)

FOREIGN_PAGE = """<iframe src="URL"></iframe><script>
const send = (mode, path) => fetch("URL" + path, {method: "POST", mode, body: "{}"});
const read = answers => answers.map(answer => answer.value ? answer.value.type : "refused");
Promise.allSettled([send("cors", "/runs"), fetch("URL/"), send("no-cors", "/write")])
    .then(answers => { window.answers = read(answers); });
</script>"""


@contextmanager
def served(out_dirs: list[str], env: dict[str, str] | None = None):
    """Yield the address of a playground that was started as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [*(f"--out_dir={out_dir}" for out_dir in out_dirs), f"--port={port}"]
    command = [sys.executable, "-m", "tools.playground", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                except OSError:
                    log.seek(0)
                    assert process.poll() is None and time.monotonic() < deadline, log.read()
                    time.sleep(0.1)
            yield url
            log.seek(0)
            assert "Traceback" not in log.read()
        finally:
            process.terminate()
            process.wait()


@contextmanager
def chromium():
    from playwright.sync_api import expect, sync_playwright  # so that other tests do not need it

    expect.set_options(timeout=20_000)
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
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    hosts, errors = [], []
    context.on("request", lambda request: hosts.append(urlsplit(request.url).hostname))
    page = context.new_page()
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    assert page.evaluate("window.hacked") is None
    assert set(hosts) - {None} == {"127.0.0.1"} and errors == []  # None: data: addresses
    context.close()


def start_text(page, **options) -> None:
    """Set options of the text and press Write."""
    for name, value in options.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("#write-start").click()


def is_visible(page, selector: str) -> bool:
    """Return whether an element is inside the visible part of #text."""
    return page.locator(selector).evaluate("""element => {
        const [inner, outer] = [element, document.querySelector("#text")].map(e =>
            e.getBoundingClientRect());
        return inner.top >= outer.top - 2 && inner.bottom <= outer.bottom + 2;
    }""")


def try_write(page, expect) -> None:
    token, about = page.locator("#text .token"), page.locator("#about")
    candidates = page.locator("#candidates")
    expect(token).to_have_count(300)
    expect(candidates).to_contain_text("Token 1, ")
    expect(about).to_contain_text("step 12, validation loss 2.")
    token.nth(6).click()
    expect(candidates).to_contain_text("Token 7, ")
    assert candidates.locator("tbody tr").count() in (10, 11)
    assert candidates.locator("tr.drawn").count() == 1
    shades = "all => new Set(all.map(token => getComputedStyle(token).backgroundColor)).size"
    assert token.evaluate_all(shades) > 3
    expect(about).not_to_have_class("alert")

    page.evaluate(FIRST_TOKEN)
    start_text(page)  # while the page shows 300 tokens
    first = page.wait_for_function("() => window.firstToken").json_value() / 1000
    print(f"first token {first:.3f} s after the click")
    assert first < 1
    start_text(page, temperature=0, max_new_tokens=30)  # the other text may still be growing
    expect(token).to_have_count(30)
    token.nth(3).click()
    expect(candidates).to_contain_text("with temperature 0.")
    expect(candidates.locator("tr.drawn")).to_contain_text("100.0%")

    prompt = page.locator("#prompt")
    for mistake, words in (("", "the prompt is empty"), ("Zeus", "character 'Z' at position 0")):
        prompt.fill(mistake)
        start_text(page)
        expect(about).to_contain_text(words)
        expect(about).to_have_class("message alert")
        expect(token).to_have_count(0)
    prompt.fill("3 times 4 is 12.\n" * 10)
    start_text(page, max_new_tokens=20)
    expect(about).to_contain_text("the prompt has 170 tokens and this model sees the last 128")
    prompt.fill("3 times 4")
    start_text(page)
    expect(about).not_to_contain_text("prompt")
    expect(token).to_have_count(20)
    expect(page.locator("#text .prompt")).to_have_text("3 times 4")


def try_attention(page, expect) -> None:
    maps, verdict = page.locator("#maps svg"), page.locator("#verdict")
    expect(verdict).to_contain_text("The text has 29 tokens; the maps show the first 24.")
    cells = [
        [svg.locator(f"rect.{name}").count() for name in ("past", "future")] for svg in maps.all()
    ]
    assert cells == [[24 * 25 / 2, 0], [24 * 25 / 2, 24 * 23 / 2]]
    judge = "loss => verdict({maps: [{loss: 2}, {loss}], labels: [], tokens: 2})"
    assert "was trained without the mask: it copies" in page.evaluate(judge, 0.9)
    assert "impossibly good" not in page.evaluate(judge, 1.1)
    choose_head(page, 4)
    page.locator("#over").get_by_label("prompt").check()
    expect(verdict).to_contain_text("The text has 9 tokens.")
    page.locator("#over").get_by_label("written text").check()
    expect(verdict).to_contain_text("The text has 29 tokens")
    page.locator("#prompt").fill("3 times")  # the written text continues another prompt
    page.locator("#prompt").blur()
    expect(verdict).to_contain_text("The text has 7 tokens.")
    assert page.locator("#over").get_by_label("prompt").is_checked()
    page.locator("#prompt").fill("3 times 4")


def choose_head(page, head: int) -> None:
    before = page.locator("#maps svg").first.inner_html()
    page.locator("#heads").get_by_label(str(head)).check()
    page.wait_for_function(
        "before => document.querySelector('#maps svg').innerHTML != before", arg=before
    )


def try_compare(page, expect) -> None:
    """One checkpoint per run is ticked; equal models write once; cards stand side by side."""
    boxes, cards = page.locator("#compared input"), page.locator("#cards article")
    assert [box.is_checked() for box in boxes.all()] == [True, False, True, False]
    assert page.locator("#temperature").is_visible()  # the settings that Compare uses
    page.locator("#compare-start").click()
    expect(cards).to_have_count(2)
    expect(cards.nth(1).locator(".token")).to_have_count(20)
    expect(cards.nth(1)).to_contain_text("step 12, validation loss 2.")
    first, second = (cards.nth(i).bounding_box() for i in (0, 1))
    assert (first["y"] == second["y"]) == (page.viewport_size["width"] == 1280)
    boxes.nth(1).check()
    page.locator("#compare-start").click()
    expect(cards).to_have_count(3)
    expect(cards.nth(1)).to_contain_text("the same weights as out/one/ckpt.pt")
    boxes.nth(1).uncheck()


def try_loss(page, expect) -> None:
    """The curve follows the log of a run that trains, also when its last line is half written."""
    page.locator("#run").select_option("out/one")
    figures, log = page.locator("#figures"), Path("out/one/log.jsonl")
    expect(page.locator("#curve polyline")).to_have_count(3)
    box = page.locator("#curve svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 9, box["y"] + 100)
    expect(page.locator("#reading")).to_contain_text("each batch ")
    step = 1000 + log.stat().st_size
    line = json.dumps({"step": step + 1, "epoch": 3, "loss": 1.23456})
    for words, seen in (
        (f'{{"step": {step}, "epoch": 3, "loss": 1.25}}\n{line[:9]}', step),
        (f"{line[9:]}\n", step + 1),
    ):
        with open(log, "a", encoding="utf-8") as file:
            file.write(words)
        expect(figures).to_contain_text(f"step {seen:,}, epoch 3")
    page.mouse.move(box["x"] + box["width"] - 8, box["y"] + 100)
    expect(page.locator("#reading")).to_have_text(f"step {step + 1:,}: each batch 1.235")


@pytest.fixture
def runs(tiny_run) -> list[str]:
    """Return a run with the model of phase 1, and a smaller one that was trained last."""
    phase1 = dict(n_layer=2, n_head=4, n_embd=128, block_size=128, batch_size=4)
    return [str(tiny_run(out_dir="out/one", **phase1)), str(tiny_run(out_dir="out/two", seed=2))]


def test_every_tab_works_wide_and_narrow_light_and_dark(runs, tmp_path):
    from playwright.sync_api import expect

    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    tabs = {"Write": try_write, "Attention": try_attention}
    tabs |= {"Compare": try_compare, "Loss": try_loss}
    with served(runs, {"PYTHONPATH": path}) as url, chromium() as browser:
        for width, scheme in ((1280, "light"), (390, "dark")):
            with opened(browser, url, width, scheme=scheme) as page:
                for name, try_tab in tabs.items():
                    page.get_by_role("tab", name=name).click()
                    try_tab(page, expect)
                    scrolled = page.evaluate("document.documentElement.scrollWidth")
                    assert scrolled <= width, f"{name} scrolls sideways"
    hosts = (tmp_path / "hosts.txt").read_text(encoding="utf-8").split()
    # urllib3 binds ::1 once, to find out whether this machine has IPv6.
    assert {"127.0.0.1"} <= set(hosts) <= {"127.0.0.1", "::1"}


def test_a_chosen_token_stays_visible_and_agrees_with_the_table(runs):
    from playwright.sync_api import expect

    with served(runs) as url, chromium() as browser, opened(browser, url, 390) as page:
        token = page.locator("#text .token")
        expect(token).to_have_count(300)
        assert is_visible(page, "#text .token:last-child")  # the text scrolled while it grew
        token.nth(20).click()
        for key, count in (("ArrowRight", 90), ("ArrowLeft", 60)):
            for _ in range(count):
                page.keyboard.press(key)
                chosen = int(page.locator("#text .chosen").get_attribute("data-token"))
                assert f"Token {chosen + 1}, " in page.locator("#candidates").inner_text()
                assert is_visible(page, "#text .chosen")
        assert chosen == 50
        start_text(page, max_new_tokens=500)  # a choice in a growing text is not scrolled away
        expect(token.nth(3)).to_be_attached()
        token.nth(3).dispatch_event("click")
        expect(token).to_have_count(500)
        assert is_visible(page, "#text .chosen") and page.locator("#text .chosen").count() == 1


def test_hostile_text_is_shown_as_text(tiny_run, tmp_path):
    """The data set, the prompt, the tokens, the paths and the errors hold HTML and JavaScript."""
    from playwright.sync_api import expect

    (tmp_path / "hostile.txt").write_text(f"{HOSTILE}\n" * 400, encoding="utf-8")
    config = prepare_shakespeare.PrepareConfig(input="hostile.txt", dataset="hostile")
    prepare_shakespeare.main(config)
    run = "out/<img src=x onerror=hacked=6>'&quot;"
    tiny_run(dataset="hostile", out_dir=run)
    with served([run, "out/<b>none"]) as url, chromium() as browser, opened(browser, url) as page:
        text = page.locator("#text")
        expect(page.locator("#notice")).to_contain_text("No checkpoint yet in out/<b>none")
        assert page.locator("#checkpoint").input_value() == f"{run}/ckpt.pt"
        page.locator("#prompt").fill(HOSTILE)
        start_text(page)
        expect(text.locator(".token")).to_have_count(300)
        expect(text.locator(".prompt")).to_have_text(HOSTILE)
        for i in range(40):
            text.locator(".token").nth(i).click()
        page.get_by_role("tab", name="Attention").click()
        expect(page.locator("#maps svg")).to_have_count(2)
        page.get_by_role("tab", name="Compare").click()
        page.locator("#compare-start").click()
        expect(page.locator("#cards .prompt")).to_have_text(HOSTILE)
        expect(page.locator("#cards h2")).to_have_text(f"{run}/ckpt.pt")
        page.get_by_role("tab", name="Write").click()
        page.locator("#prompt").fill(f"€{HOSTILE}")
        start_text(page)
        expect(page.locator("#about")).to_contain_text("'€<img src=x onerror=")
        shutil.rmtree(run)
        page.locator("#prompt").fill("<")
        start_text(page)
        expect(page.locator("#about")).to_contain_text(f"{run}/ckpt.pt: no such checkpoint")
        page.get_by_role("tab", name="Loss").click()
        expect(page.locator("#figures")).to_contain_text(run)
        added = (
            "img, main svg[onload], body script, b:not(p > b, figcaption > b), [onclick], [onerror]"
        )
        assert page.locator(added).count() == 0


def test_another_page_can_not_use_the_playground(runs):
    """A page of another origin in the same browser can not send requests or show the page."""
    other = Path("other")
    other.mkdir()
    with served(runs) as url:
        (other / "index.html").write_text(FOREIGN_PAGE.replace("URL", url), encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "http.server", "--bind=127.0.0.1", str(port)]
        process = subprocess.Popen(command, cwd=other, stderr=subprocess.DEVNULL)
        try:
            with chromium() as browser:
                page = browser.new_page()
                statuses = {}
                page.on("response", lambda r: statuses.update({urlsplit(r.url).path: r.status}))
                for _ in range(100):
                    try:
                        page.goto(f"http://127.0.0.1:{port}")
                        break
                    except Exception:
                        time.sleep(0.1)
                page.wait_for_function("() => window.answers")
                assert page.evaluate("window.answers") == ["refused", "refused", "opaque"]
                assert statuses["/write"] == 403
                frame = page.frames[1]
                assert frame.url.startswith("chrome-error:")
        finally:
            process.terminate()
            process.wait()


def test_runs_that_come_go_and_change_while_they_are_shown(runs):
    from playwright.sync_api import expect

    one, two = map(Path, runs)
    with served(["out/later"]) as url, chromium() as browser, opened(browser, url) as page:
        token, about = page.locator("#text .token"), page.locator("#about")
        expect(page.locator("#notice")).to_contain_text("No checkpoint yet in out/later")
        expect(about).to_contain_text("no checkpoint yet")
        shutil.copytree(one, "out/later")
        expect(page.locator("#checkpoint")).to_have_value("out/later/ckpt.pt")
        expect(page.locator("#notice")).to_be_hidden()
        expect(token).to_have_count(300)  # the first checkpoint starts the first text
        page.locator("#prompt").fill("3")
        start_text(page, max_new_tokens=20)
        expect(token).to_have_count(20)

        before = page.locator("#text").inner_text()
        os.replace(two / "ckpt.pt", "out/later/ckpt.pt")
        start_text(page)
        page.wait_for_function(
            "before => document.querySelector('#text').innerText != before", arg=before
        )
        expect(token).to_have_count(20)
        shutil.rmtree("out/later")
        start_text(page)
        expect(about).to_contain_text("no such checkpoint")
        shutil.copytree(one, "out/later")
        start_text(page)
        expect(token).to_have_count(20)


def test_loss_opens_on_the_run_that_trains(runs):
    with served(runs) as url, chromium() as browser, opened(browser, url) as page:
        page.locator("#text .token").first.wait_for()
        assert page.locator("#run").evaluate("select => select.value") == "out/two"


def draw() -> None:
    """Draw the README's pictures of the page from the run of phase 1."""
    os.chdir(ROOT)
    with served(["out/phase1_char"]) as url, chromium() as browser, opened(browser, url) as page:
        token = page.locator("#text .token")
        token.nth(299).wait_for()
        token.nth(12).click()
        page.get_by_text("Token 13, ").wait_for()
        page.screenshot(path="docs/pictures/playground_write.png")
        page.get_by_role("tab", name="Attention").click()
        page.locator("#maps svg").first.wait_for()
        choose_head(page, 3)  # this head looks at the token before
        page.screenshot(path="docs/pictures/playground_attention.png", full_page=True)


if __name__ == "__main__":
    draw()
