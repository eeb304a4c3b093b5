"""The playground in a real browser: `python -m pytest -m browser`, which needs Debian's `chromium` or its like.

python tests/test_playground_browser.py     # draws assets/playground_*.png, from out/phase1_char and out/phase2_bpe
"""

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
from conftest import ROOT

pytestmark = pytest.mark.browser

# Python runs a file of this name at its start. It notes which hosts the server looks up or connects to.
SITECUSTOMIZE = """
import sys
def note(event, args):
    host = {"socket.connect": lambda: args[1][0], "socket.getaddrinfo": lambda: args[0]}.get(event, str)()
    if host:
        with open("hosts.txt", "a") as file:
            print(host if isinstance(host, str) else host.decode(), file=file)
sys.addaudithook(note)
"""
FIRST_TOKEN = """() => {
    const text = document.querySelector("#text");
    document.addEventListener("click", () => {
        const start = performance.now();
        const observer = new MutationObserver(() => {
            const tokens = text.querySelectorAll(".token").length;
            if (tokens > 0 && tokens < 300) {  // no longer the text of before
                window.firstToken = performance.now() - start;
                observer.disconnect();
            }
        });
        observer.observe(text, {subtree: true, childList: true});
    }, {capture: true, once: true});
}"""


@contextmanager
def served(out_dirs: list[str], env: dict[str, str] | None = None):
    """The address of a playground, started as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tools.playground",
        *(f"--out_dir={d}" for d in out_dirs),
        f"--port={port}",
    ]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **(env or {})}, stdout=log, stderr=log
        )
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
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=20_000)
    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "there is no chromium on the PATH; on Debian: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"] * (os.geteuid() == 0)
        )
        yield browser
        browser.close()


@contextmanager
def watched(browser, url: str, width: int, height: int = 900, scheme: str = "light"):
    """The page in a window of that size. Afterwards: no request went to another host, and no error was logged."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    hosts, errors = [], []
    context.on("request", lambda request: hosts.append(urlsplit(request.url).hostname))
    page = context.new_page()
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    assert (
        set(hosts) - {None} == {"127.0.0.1"} and errors == []
    )  # None: what the page carries itself, data:
    context.close()


def write(page, **numbers) -> None:
    for label, value in numbers.items():
        page.get_by_label(f"number input for {label}").fill(str(value))
    page.get_by_role("button", name="Write").click()


def try_write(page, expect) -> None:
    """The page comes with a text; a token that is clicked on shows its candidates; mistakes are sentences."""
    token, candidates, said = (
        page.locator(name) for name in ("#text .token", "#candidates", "#said")
    )
    expect(token).to_have_count(300)
    expect(candidates).to_contain_text("Token 1, ")
    expect(said).to_contain_text("step 12, epoch 1.9, validation loss 2.")
    token.nth(6).click()
    expect(candidates).to_contain_text("Token 7, ")
    assert (
        candidates.locator("tbody tr").count() in (10, 11)
        and candidates.locator("tr.drawn").count() == 1
    )
    page.keyboard.press("ArrowRight")
    expect(candidates).to_contain_text("Token 8, ")
    assert token.nth(7).evaluate("token => getComputedStyle(token).outlineStyle") == "solid"
    assert (
        len(
            set(
                token.evaluate_all(
                    "all => all.map(token => getComputedStyle(token).backgroundColor)"
                )
            )
        )
        > 3
    )

    page.evaluate(FIRST_TOKEN)
    write(page)  # on a page that shows 300 tokens
    first = page.wait_for_function("window.firstToken").json_value() / 1000
    print(f"first token {first:.3f} s after the click")
    assert first < 1
    write(page, Temperature=0, Tokens=30)  # while the other text may still be written
    expect(token).to_have_count(30)
    token.nth(3).click()
    expect(candidates).to_contain_text("with temperature 0")
    expect(candidates.locator("tr.drawn")).to_contain_text("100.0%")

    prompt = page.get_by_label("Prompt", exact=True)
    for mistake, words in (
        ("", "The prompt is empty"),
        ("Zeus", "character 'Z' at position 0"),
        ("<img src=x onerror=alert(1)>", "'<img src=x onerror=alert(1)>': character '<'"),
    ):
        prompt.fill(mistake)
        write(page)
        expect(said.locator(".notice")).to_contain_text(words)
        expect(token).to_have_count(0)
    assert page.locator("#said img").count() == 0
    prompt.fill("3 times 4 is 12.\n" * 10)
    write(page, Tokens=20)
    expect(said).to_contain_text("of the prompt's 170 tokens this model sees the last 128")
    prompt.fill("3 times 4")
    write(page)
    expect(said).not_to_contain_text("prompt")
    expect(token).to_have_count(20)


def choose_head(page, head: int) -> None:
    before = page.locator("#maps svg").first.inner_html()
    page.locator("#head").get_by_label(str(head)).check()
    page.wait_for_function(
        "before => document.querySelector('#maps svg').innerHTML != before", arg=before
    )


def try_attention(page, expect) -> None:
    maps, verdict = page.locator("#maps svg"), page.locator("#verdict")
    expect(maps).to_have_count(2)
    expect(verdict).to_contain_text("the first 24 of 29 tokens")
    cells = [[svg.locator(name).count() for name in (".past", ".future")] for svg in maps.all()]
    assert cells == [[24 * 25 / 2, 0], [24 * 25 / 2, 24 * 23 / 2]]
    choose_head(page, 4)
    page.locator("#over").get_by_label("prompt", exact=True).check()
    expect(verdict).to_contain_text("The text is 9 tokens")


def try_compare(page, expect) -> None:
    """Each checkpoint once, side by side where there is room."""
    page.get_by_role("button", name="Compare").click()
    cards = page.locator("#cards article")
    expect(cards).to_have_count(4)
    expect(cards.nth(2).locator(".token")).to_have_count(20)
    expect(cards.nth(1)).to_contain_text("the same weights as out/one/ckpt.pt")
    expect(cards.nth(2)).to_contain_text("step 12, epoch 0.238, validation loss 2.")
    first, second = (cards.nth(i).bounding_box() for i in (0, 1))
    assert (first["y"] == second["y"]) == (page.viewport_size["width"] == 1280)


def try_loss(page, expect) -> None:
    """The figures follow the log of a run that goes on, also while its last line is half written."""
    figures, log = page.locator("#figures"), Path("out/one/log.jsonl")
    expect(page.locator("#curve :is(canvas, svg.marks)")).to_be_visible()
    step = 1000 + log.stat().st_size
    for words, seen in (
        (f'{{"step": {step}, "epoch": 3}}\n{{"step": {step + 1}, "ep', step),
        ('och": 3}\n', step + 1),
    ):
        with open(log, "a", encoding="utf-8") as file:
            file.write(words)
        expect(figures).to_contain_text(f"step {seen:,}, epoch 3")


@pytest.fixture
def runs(tiny_run) -> list[str]:
    """A run with the model of phase 1, and a smaller one."""
    phase1 = dict(n_layer=2, n_head=4, n_embd=128, block_size=128, batch_size=4)
    return [str(tiny_run(out_dir="out/one", **phase1)), str(tiny_run(out_dir="out/two", seed=2))]


def test_every_flow_wide_and_narrow_light_and_dark(runs, tmp_path):
    from playwright.sync_api import expect

    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    with served(runs, {"PYTHONPATH": str(tmp_path)}) as url, chromium() as browser:
        for width, scheme in ((1280, "light"), (390, "dark")):
            with watched(browser, url, width, scheme=scheme) as page:
                for name, flow in (
                    ("Write", try_write),
                    ("Attention", try_attention),
                    ("Compare", try_compare),
                    ("Loss", try_loss),
                ):
                    page.get_by_role("tab", name=name).click()
                    flow(page, expect)
                    assert page.evaluate("document.documentElement.scrollWidth") <= width, (
                        f"{name} scrolls sideways"
                    )
    hosts = (tmp_path / "hosts.txt").read_text(encoding="utf-8").split()
    assert set(hosts) == {"127.0.0.1"}, (
        "the server has asked another host, or this test does not notice"
    )


def test_runs_that_come_go_and_are_overwritten_while_they_are_shown(runs):
    from playwright.sync_api import expect

    one, two = map(Path, runs)
    with served(["out/later"]) as url, chromium() as browser, watched(browser, url, 1280) as page:
        token, said = page.locator("#text .token"), page.locator("#said")
        expect(page.locator(".notice").first).to_contain_text("No checkpoint yet in out/later")
        expect(said.locator(".notice")).to_contain_text("no checkpoint yet")
        shutil.copytree(one, "out/later")
        expect(page.get_by_label("Checkpoint", exact=True)).to_have_value("out/later/ckpt.pt")
        expect(page.locator(".notice")).to_have_count(1)  # what was said of the first attempt
        page.get_by_label("Prompt", exact=True).fill("3")
        write(page, Tokens=20)
        expect(token).to_have_count(20)

        before = page.locator("#text").inner_text()
        os.replace(two / "ckpt.pt", "out/later/ckpt.pt")
        write(page)
        page.wait_for_function(
            "before => document.querySelector('#text').innerText != before", arg=before
        )
        expect(token).to_have_count(20)
        shutil.rmtree("out/later")
        write(page)
        expect(said.locator(".notice")).to_contain_text("no such checkpoint")
        shutil.copytree(one, "out/later")
        write(page)
        expect(token).to_have_count(20)


def draw() -> None:
    """The README's pictures of the page, of real runs."""
    os.chdir(ROOT)
    with (
        served(["out/phase1_char", "out/phase2_bpe"]) as url,
        chromium() as browser,
        watched(browser, url, 1280) as page,
    ):
        token = page.locator("#text .token")
        token.nth(299).wait_for()
        token.nth(12).click()
        page.get_by_text("Token 13, ").wait_for()
        page.screenshot(path="assets/playground_write.png")
        page.get_by_role("tab", name="Attention").click()
        choose_head(page, 3)  # one that looks at the token before
        page.screenshot(path="assets/playground_attention.png", full_page=True)


if __name__ == "__main__":
    draw()
