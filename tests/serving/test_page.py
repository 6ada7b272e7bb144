"""The page, in a real browser without a window: type, click, hear."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import gradio
import httpx
import numpy as np
import pytest
import torch
from test_speech import JSON
from TTS.tts.models.xtts import load_audio

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

# Everything that reaches the loudspeaker, as the browser mixed it.
RECORD = """() => {
  window.heard = [];
  if (window.recorder) return;
  const context = neuronXtts.player();
  const recorder = window.recorder = context.createScriptProcessor(4096, 1, 1);
  recorder.onaudioprocess = (event) => window.heard.push(...event.inputBuffer.getChannelData(0));
  neuronXtts.state.output.connect(recorder);
  recorder.connect(context.destination);
}"""


@pytest.fixture(scope="module")
def server(serve):
    with serve({"precision": "int8"}, page=True) as started:
        yield started


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A microphone that beeps, which nobody has to allow.
        microphone = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", *microphone]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, server, width=1280, height=1000, **options):
    """A page on which nothing goes wrong, and which asks nobody else for anything."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url + "/ui", timeout=60000)
    page.wait_for_selector("#speak", timeout=60000)
    page.wait_for_function("window.neuronXtts && document.getElementById('figures')")
    yield page
    assert not wrong
    assert not [url for url in asked if not url.startswith((server.url, "blob:", "data:"))]
    context.close()


def begin(page, text, seed):
    page.evaluate(RECORD)
    page.fill("#text textarea", text)
    page.fill("#seed textarea, #seed input", str(seed))
    page.click("#speak")


def heard(page):
    """What was heard, without the silence around it."""
    page.wait_for_selector("#download a", timeout=120000)
    page.wait_for_function("neuronXtts.state.sources.size === 0", timeout=60000)
    samples = np.array(page.evaluate("window.heard"), np.float32)
    loud = np.flatnonzero(samples)
    return samples[loud[0] : loud[-1] + 1]


def spoken(server, text, seed):
    body = {"model": "x", "voice": "f5", "input": text, "seed": seed, "response_format": "pcm"}
    answer = httpx.post(server.url + "/v1/audio/speech", json=body, headers=JSON, timeout=60)
    samples = np.frombuffer(answer.content, np.int16) / np.float32(32768)
    loud = np.flatnonzero(samples)
    return samples[loud[0] : loud[-1] + 1]


def share(found, expected):
    """How much of what was to be heard was heard. Where other tests take the processors, a recorder loses pieces."""
    size = 1 << (len(found) + len(expected)).bit_length()
    spectrum = np.fft.rfft(found, size)
    energy = np.concatenate([[0], np.cumsum(found.astype(float) ** 2)])
    step, right = 2400, []
    for start in range(0, len(expected) - step, step):
        piece = expected[start : start + step]
        if np.abs(piece).max() < 0.01:
            continue
        match = np.fft.irfft(spectrum * np.fft.rfft(piece, size).conj(), size)[: len(found) - step + 1]
        place = int((energy[step:] - energy[:-step] - 2 * match).argmin())
        # The vocoder of int8 rounds otherwise in other company.
        right.append(np.abs(found[place : place + step] - piece).max() < 0.005)
    return np.mean(right)


def test_hear(server, browser):
    """What reaches the loudspeaker is what the API says, without a gap; figures, and a file to keep."""
    text = "the quick brown fox jumps over the lazy dog. the band plays an old song."
    expected = spoken(server, text, 7)
    with opened(browser, server) as page:
        for _ in range(5):  # other tests take the processors, too
            begin(page, text, 7)
            part = share(heard(page), expected)
            gap = page.evaluate("neuronXtts.state.gaps")
            if gap <= 0.02 and part > 0.9:
                break
        assert part > 0.9
        assert gap <= 0.02
        assert page.inner_text("#figures").startswith("first audio after ")
        assert "RTF" in page.inner_text("#figures")
        with page.expect_download() as download:
            page.click("#download a")
        data = download.value.path().read_bytes()
        assert data[:4] == b"RIFF"
        kept = np.frombuffer(data[44:], np.int16) / np.float32(32768)
        assert len(kept) / 24000 == pytest.approx(len(expected) / 24000, abs=0.5)
        page.evaluate("neuronXtts.refresh()")
        page.wait_for_function("document.querySelectorAll('#graphs tr').length > 3")
        assert "precision int8" in page.inner_text("#speaking")
        assert "vocoder" in page.inner_text("#graphs")
        assert "nothing" in page.inner_text("#fallbacks")


def test_two_pages(server, browser):
    """At once, each hears its own."""
    texts = ["the quick brown fox jumps over the lazy dog.", "every machine never sleeps."]
    expected = [spoken(server, text, 7) for text in texts]
    with opened(browser, server) as one, opened(browser, server) as two:
        for _ in range(5):  # other tests take the processors, too
            for page, text in zip((one, two), texts, strict=True):
                begin(page, text, 7)
            parts = [share(heard(page), own) for page, own in zip((one, two), expected, strict=True)]
            if min(parts) > 0.6:
                break
        assert min(parts) > 0.6


def test_stop(server, browser):
    """It is quiet at once, and the server is free."""
    with opened(browser, server) as page:
        begin(page, "the quick brown fox jumps over the lazy dog. " * 5, 1)
        page.wait_for_function("window.heard.some((sample) => sample !== 0)")
        page.click("#stop")
        page.wait_for_function("document.getElementById('figures').textContent === 'stopped'")
        server.wait_until_idle()
        assert page.evaluate("neuronXtts.state.sources.size") == 0


def test_what_is_wrong_is_said(server, browser):
    with opened(browser, server, width=390) as page:
        begin(page, "*** [pause:1]", 1)
        page.wait_for_function("document.getElementById('problem').textContent")
        assert "There is nothing to say" in page.inner_text("#problem")
        begin(page, "a fox.", "1.5")
        page.wait_for_function("document.getElementById('problem').textContent.includes('no whole number')")
        page.evaluate("neuronXtts.speak('a fox.', 'en', null, 1, '')")
        assert "There is no voice yet" in page.inner_text("#problem")
        page.click("#own button")
        page.wait_for_selector("#record")
        # Nothing is wider than the screen.
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def keep(page, name):
    page.fill("#name textarea, #name input", name)
    page.click("#keep")
    page.wait_for_function("document.getElementById('kept').textContent.startsWith('kept as')", timeout=60000)
    page.wait_for_function(f"document.querySelector('#voice input').value === '{name.strip()}'", timeout=30000)


def test_a_voice_of_ones_own(server, browser, miniature):
    with opened(browser, server) as page:
        page.click("#own button")
        page.click("#keep")
        page.wait_for_function("document.getElementById('refused').textContent.startsWith('Record a voice')")
        page.set_input_files("#file", str(miniature / "klatt.wav"))
        page.wait_for_function("document.getElementById('recording').duration > 1")
        page.click("#keep")
        page.wait_for_function("document.getElementById('refused').textContent === 'Give the voice a name'")
        keep(page, " my own ")
        begin(page, "the band plays.", 7)
        assert np.abs(heard(page)).max() > 0.01
    kept, expected = server.folder.load("my own"), server.folder.load("klatt")
    torch.testing.assert_close(kept.latents, expected.latents)
    torch.testing.assert_close(kept.embedding, expected.embedding)


def test_a_voice_that_is_recorded(server, browser, tmp_path):
    with opened(browser, server) as page:
        page.click("#own button")
        page.click("#record")
        page.wait_for_function("document.getElementById('record').textContent === 'End the recording'")
        page.wait_for_timeout(6000)
        page.click("#record")
        page.wait_for_function("document.getElementById('record').textContent === 'Record'")
        page.wait_for_function("!document.getElementById('recording').hidden")
        keep(page, "beep")
    (recording,) = server.folder.load("beep").recordings.values()
    (recorded := tmp_path / "recording").write_bytes(recording)
    samples = load_audio(str(recorded), 22050)
    assert samples.shape[-1] / 22050 > 2
    assert samples.abs().max() > 0.05


def test_nothing_is_uploaded_elsewhere(server):
    """Gradio's upload would answer where on this machine the file is; its other calls read files, or decode them."""
    zeros = {"path": "/dev/zero", "meta": {"_type": "gradio.FileData"}}
    joined = {"fn_index": 0, "data": [zeros], "session_hash": "a"}
    for route in ("upload", "process_recording", "upload/", "queue/join", "queue/data", "call/predict", "run/predict",
                  "file=https://x.example/", "../upload"):  # fmt: skip
        for body in ({"files": {"files": ("x.wav", b"x")}}, {"json": joined}):
            answer = httpx.post(server.url + "/ui/gradio_api/" + route, **body)
            assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")
    assert httpx.get(server.url + "/ui/").headers["content-security-policy"] == "frame-ancestors 'self'"
    for path in ("/ui/", "/ui/config", "/ui/gradio_api/info", "/ui/theme.css", "/ui/gradio_api/file=/etc/passwd"):
        found = httpx.get(server.url + path)
        assert found.status_code < 500
        for place in (tempfile.gettempdir(), str(Path(gradio.__file__).parents[1]), str(Path.home())):
            assert place + "/" not in found.text


def test_a_page_behind_a_key(serve, browser):
    """Browsers ask for it; what the page calls is let in afterwards, other sites are not."""
    with serve(page=True, keys=("secret",)) as server:
        assert httpx.get(server.url + "/ui/").headers["www-authenticate"].startswith("Basic")
        with opened(browser, server, http_credentials={"username": "me", "password": "secret"}) as page:
            begin(page, "a fox.", 7)
            assert np.abs(heard(page)).max() > 0.01
        entered = httpx.get(server.url + "/ui/", auth=("me", "secret"))
        assert "SameSite=Strict" in entered.headers["set-cookie"]
        cookie = {"neuron_xtts": entered.cookies["neuron_xtts"]}
        assert httpx.get(server.url + "/v1/models", cookies=cookie).status_code == 200
        assert httpx.get(server.url + "/v1/models", cookies={"neuron_xtts": "0" * 64}).status_code == 401
        assert "set-cookie" not in httpx.get(server.url + "/ui/", auth=("me", "wrong")).headers
