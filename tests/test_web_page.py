"""The page at `/`: what the server sends, and the page in a headless Chromium."""

import os
import re
import shutil
import subprocess
import sys
import wave

import pytest
from browser import ELSEWHERE, open_browser, take_picture, watched_page
from live_server import ROOT, LiveServer
from slow_cases import slow_after
from websockets.exceptions import InvalidStatus

from qwen_megakernel.serving.web_page import FOLDER

TOKEN = "a-secret-for-tests"
HTML = {"Accept": "text/html,*/*"}
LONG_TEXT = "One, two, three, four, five, six, seven, eight, nine, ten, and so on. " * 8


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The demonstration voice with a folder of voices that clients may add to, and with a token."""
    voices = tmp_path_factory.mktemp("voices") / "voices"
    shutil.copytree(ROOT / "demo_voice" / "voices", voices)
    options = ["--model", "demo_voice", "--voices", str(voices), "--token", TOKEN]
    server = LiveServer(*options, "--host", "0.0.0.0")  # so that it may be called by another name
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


# --- what the server sends --------------------------------------------------------------------------


def test_strangers_get_the_page_and_nothing_behind_it(server):
    status, body = server.get("/", **HTML)
    assert (status, body) == (200, (FOLDER / "index.html").read_text())
    assert server.get("/ready")[0] == 401
    with pytest.raises(InvalidStatus) as refused, server.connect("/"):
        pass
    assert refused.value.response.status_code == 401


def test_every_file_that_the_page_names_is_there(server):
    named = set()
    for path in FOLDER.iterdir():
        named |= set(re.findall(r'(?:"page/|"\./|new URL\(")([\w-]+\.\w+)"', path.read_text()))
    assert {"main.js", "page.css", "player-worklet.js"} < named
    for name in named:
        assert server.get(f"/page/{name}") == (200, (FOLDER / name).read_text())


@pytest.mark.parametrize("name", ["nothing.js", "..%2fweb_page.py", "%00", "../web_page.py", ""])
def test_no_other_file_is_served(server, name):
    assert server.get(f"/page/{name}")[0] in (401, 404)


def test_nothing_names_another_host():
    for path in FOLDER.iterdir():
        hosts = set(re.findall(r"(?:https?:)?//([\w.-]+\.\w+)", path.read_text()))
        assert hosts <= {"www.w3.org"}, path.name  # SVG's name of itself


def test_programs_are_told_that_this_is_a_websocket(server):
    status, body = server.get("/")
    assert status == 426
    assert "WebSocket" in body


# --- in a browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(recording):
    with open_browser(microphone=recording) as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    with watched_page(browser, f"http://127.0.0.1:{server.port}/") as page:
        enter(page)
        yield page


def enter(page):
    page.fill("#token", TOKEN)
    page.press("#token", "Enter")
    page.locator("#speak:enabled").wait_for()
    page.locator("#voice option").first.wait_for(state="attached")


def until_text(page, selector, pattern):
    page.locator(selector).filter(has_text=re.compile(pattern)).wait_for()


def heard(page):
    """Seconds of sound that the page has got."""
    until_text(page, "#length", r"[1-9]")
    return float(page.inner_text("#length").removesuffix(" s"))


def test_speaks_and_gives_the_file(page, tmp_path):
    page.fill("#text", "Good morning.")
    page.select_option("#voice", "slt")
    page.keyboard.press("Control+Enter")
    until_text(page, "#finish", "stop")
    until_text(page, "#ttfa", r"\d+ ms")
    with page.expect_download() as download:
        page.click("#download[href]")
    download.value.save_as(tmp_path / "speech.wav")
    with wave.open(str(tmp_path / "speech.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24_000)
        assert file.getnframes() / 24_000 == pytest.approx(heard(page), abs=0.01)
    assert b"Synthetic speech" in (tmp_path / "speech.wav").read_bytes()
    assert re.fullmatch(r"\d+", page.inner_text("#underruns"))
    assert page.is_hidden("#error")


@pytest.mark.slow
def test_a_wrong_token_is_told(browser, server):
    with watched_page(browser, f"http://127.0.0.1:{server.port}/") as page:
        page.fill("#token", "another-secret")
        page.press("#token", "Enter")
        until_text(page, "#token-note", "does not take")
        assert page.is_disabled("#speak")
        enter(page)
        assert page.is_hidden("#token-form")


@pytest.mark.slow
def test_speech_follows_the_keyboard(page):
    page.fill("#text", "")
    page.check("#live")
    page.keyboard.type("Good morning to all of you who ", delay=20)
    before = heard(page)  # although the sentence is not complete
    page.keyboard.type("are here.\n", delay=20)
    page.keyboard.type("Second.", delay=20)
    assert page.inner_text("#finish") == "–"
    page.uncheck("#live")
    until_text(page, "#finish", "stop")
    assert heard(page) > before


@pytest.mark.slow
def test_what_was_sent_live_stays(page):
    page.fill("#text", "")
    page.check("#live")
    page.keyboard.type("Good morning ", delay=20)
    heard(page)
    for _ in range(3):
        page.keyboard.press("Backspace")
    assert page.input_value("#text") == "Good morning "
    assert "taken back" in page.inner_text("#text-note")
    page.keyboard.press("Escape")


def test_stops(page, server):
    lines = len(server.err)
    page.fill("#text", LONG_TEXT)
    page.click("#speak")
    heard(page)
    page.keyboard.press("Escape")
    until_text(page, "#finish", "cancelled")
    assert server.frames_of_cancelled_turn(after=lines) < 12.5 * 30
    page.fill("#text", "Again.")
    page.click("#speak")
    until_text(page, "#finish", "stop")


@pytest.mark.slow
def test_says_why_a_text_is_not_spoken(page):
    page.fill("#text", "far too long " * 400)
    page.click("#speak")
    until_text(page, "#error", "text is longer than 4096 characters")
    assert page.is_disabled("#stop")


@pytest.mark.parametrize("tab", slow_after(1, ["curl", "Python", "OpenAI SDK", "Pipecat"]))
def test_blocks_run_as_they_are(page, tab, tmp_path):
    page.fill("#text", 'It\'s "quoted", naïve.')
    page.select_option("#voice", "rms")
    page.click(f"role=tab[name='{tab}']")
    block = page.inner_text("#snippet")
    if tab == "curl":
        command = ["bash", "-ec", block.replace("curl ", "curl --fail --silent --show-error ", 1)]
        if shutil.which("curl") is None:
            pytest.skip("no curl on this machine")
    else:
        pytest.importorskip(
            {"OpenAI SDK": "openai", "Pipecat": "pipecat.services"}.get(tab, "websockets")
        )
        command = [sys.executable, "-c", block]
    environ = {**os.environ, "QWEN_MEGAKERNEL_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), "no_proxy": "*"}
    ran = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    if tab != "Pipecat":
        assert (tmp_path / "hello.wav").stat().st_size > 24_000


@pytest.mark.parametrize("scheme", slow_after(1, ["light", "dark"]))
@pytest.mark.parametrize("width", slow_after(1, [360, 1100]))
def test_fits_the_screen(browser, server, scheme, width):
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with watched_page(browser, f"http://127.0.0.1:{server.port}/", **options) as page:
        enter(page)
        page.click("#clone summary")
        page.click("summary:has-text('Sampling')")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        take_picture(page, f"page-{scheme}-{width}")


@pytest.mark.slow
def test_everything_can_be_reached_by_keyboard(page):
    wanted = {"text", "live", "voice", "language", "speak", "copy"}
    page.focus("#live")
    reached = {"live"}
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert wanted <= reached


@pytest.mark.slow
def test_clones_from_the_microphone(page, server):
    page.click("#clone summary")
    page.fill("#clone-name", "me-myself")
    page.click("#record")
    until_text(page, "#record-note", r"^1\.[5-9]|^[2-9]\.")
    page.click("#record")
    page.locator("#take").wait_for()
    page.click("#clone-send")
    assert page.evaluate("document.querySelector('#consent:invalid') !== null")
    page.check("#consent")
    page.click("#clone-send")
    until_text(page, "#clone-note", "me-myself is there")
    assert page.input_value("#voice") == "me-myself"
    page.click("#own-voices >> text=Listen")
    until_text(page, "#finish", "stop|length|silence|repeat")
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#own-voices >> text=Delete")
    until_text(page, "#clone-note", "is gone")
    assert "me-myself" not in server.get("/ready", X_API_Key=TOKEN)[1]


@pytest.mark.slow
def test_a_bad_recording_is_told(page, tmp_path):
    page.click("#clone summary")
    page.fill("#clone-name", "nobody")
    (tmp_path / "song.mp3").write_bytes(b"ID3" + bytes(9000))
    page.set_input_files("#clone-file", tmp_path / "song.mp3")
    page.check("#consent")
    page.click("#clone-send")
    until_text(page, "#clone-note", "allowed: WAV or FLAC files")


@pytest.mark.slow
def test_without_https_it_speaks_and_says_why_there_is_no_microphone(browser, server):
    """The page under a name that is not this machine's, as from another machine."""
    with watched_page(browser, f"http://{ELSEWHERE}:{server.port}/") as page:
        enter(page)
        assert page.evaluate("isSecureContext") is False
        page.fill("#text", "Good morning.")
        page.click("#speak")
        until_text(page, "#finish", "stop")
        until_text(page, "#ttfa", r"\d+ ms")
        page.locator("#download[href]").wait_for()
        page.click("#clone summary")
        assert "only over https or from localhost" in page.inner_text("#microphone-why")
        assert page.is_disabled("#record")
        assert page.is_enabled("#clone-file")
