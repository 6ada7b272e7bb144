"""What the documentation says: its site, its code, its notebook."""

import ast
import asyncio
import base64
import contextlib
import copy
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import wave
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pytest
import TTS.api
from nbclient import NotebookClient

import neuron_xtts
from neuron_xtts.coqui.models import DOWNLOADED, random_tts
from neuron_xtts.coqui.recordings import write_reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "docs/notebooks/quickstart.ipynb"
MARK = re.compile(r"<!-- not run: (?P<reason>\S[^\n]*) -->")


@dataclass
class Block:
    """A fenced block of a page, and why it is not to be run."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None


def blocks(page):
    """The fenced blocks of a page, also those inside of lists."""
    lines, found = page.read_text().splitlines(), []
    number = 0
    while number < len(lines):
        fence = re.match(r"(?P<indent> *)(?P<ticks>`{3,})(?P<language>\S*)", lines[number])
        if fence is None:
            number += 1
            continue
        end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == fence["ticks"])
        mark = MARK.fullmatch(lines[number - 1].strip())
        code = textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n"
        found.append(Block(page, number + 2, fence["language"], code, mark and mark["reason"]))
        number = end + 1
    return found


PYTHON = {page: [block for block in blocks(page) if block.language in ("python", "py")] for page in PAGES}


def mkdocs(folder, site):
    """Build a site where nothing can be fetched; returns the finished process."""
    nowhere = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site]
    environment = os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = mkdocs(ROOT, folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Symbols(HTMLParser):
    """Of the API reference: what is shown of each symbol, by its name."""

    def __init__(self, page):
        super().__init__()
        self.found, self._names, self._depth = {}, [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if re.fullmatch(r"h\d", tag) and attributes.get("id", "").startswith("neuron_xtts"):
            self._names.append(attributes["id"])
            self.found[attributes["id"]] = ""

    def handle_data(self, data):
        if self._names:
            self.found[self._names[-1]] += data


def one_line(text):
    return " ".join(text.replace("`", "").split())


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    """With the docstring that it has."""
    symbols = Symbols((site / "api.html").read_text()).found
    aio = importlib.import_module("neuron_xtts.aio")
    own = [name for name, value in vars(aio).items() if inspect.isfunction(value) and value.__module__ == aio.__name__]
    public = [(neuron_xtts, name) for name in neuron_xtts.__all__] + [(aio, n) for n in own if not n.startswith("_")]
    assert {"patch", "speak", "stream"} <= {name for _, name in public}
    for module, name in public:
        value = getattr(module, name)
        names = (f"{module.__name__}.{name}", f"{getattr(value, '__module__', None)}.{name}")
        shown = [symbols[name] for name in names if name in symbols]
        assert shown, f"{names[0]} is not in docs/api.md"
        first = "The version of this library" if name == "__version__" else inspect.getdoc(value).splitlines()[0]
        assert one_line(first) in one_line(shown[0]), name


@pytest.mark.slow
def test_pages_look_as_in_the_repository(site):
    """MkDocs's Markdown is stricter than that of code hosts: what it does not know stands there as it was typed."""
    for page in site.glob("*.html"):
        article = page.read_text().partition("<article")[2].partition("</article>")[0]
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", article, flags=re.DOTALL)
        assert not re.search(r"```|\]\(|\|---|\n[*-] |<p>[*-] |\n\| |\n\d\. ", prose), page.name
    assert '<pre class="mermaid">' in (site / "design.html").read_text()
    assert 'src="sentence.svg"' in (site / "index.html").read_text()
    assert (site / "notebooks/quickstart.ipynb").read_bytes() == NOTEBOOK.read_bytes()
    assert "fonts.googleapis" not in (site / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["[a](missing.md)", "[a](usage.md#nowhere)", "[a](../missing)"])
def test_links_that_lead_nowhere(wrong, tmp_path):
    """The build refuses them."""
    (tmp_path / "docs").mkdir()
    for name in ("scripts", "neuron_xtts"):
        (tmp_path / name).symlink_to(ROOT / name)
    config = (ROOT / "mkdocs.yml").read_text()
    nav = re.search(r"^nav:\n(?:  .*\n)+", config, re.MULTILINE)[0]
    (tmp_path / "mkdocs.yml").write_text(config.replace(nav, "nav: [index.md, usage.md]\n"))
    (tmp_path / "docs/usage.md").write_text("# Usage\n")
    (tmp_path / "docs/index.md").write_text("# A page\n\n[here](usage.md#usage)\n")
    assert mkdocs(tmp_path, tmp_path / "site").returncode == 0
    (tmp_path / "docs/index.md").write_text(f"# A page\n\n{wrong}\n")
    done = mkdocs(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "index.md" in done.stderr


def test_links_of_the_readme():
    """The code host's, not MkDocs's: files, and headings of them."""
    for text, path, anchor in re.findall(
        r"\[([^\]]*)\]\((?!https?:)([^)#]*)(#[^)]*)?\)", (ROOT / "README.md").read_text()
    ):
        assert (ROOT / path).exists(), text
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
            slugs = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, text


def test_the_picture():
    """It says everything by itself: no other files, no scripts, and a ground of its own under dark and light pages."""
    picture = (ROOT / "docs/sentence.svg").read_text()
    assert "<title" in picture
    assert not re.search(r"<script|<image|href|@import|url\((?!#)", picture)
    ground = re.search(r'<rect[^>]*width="(\d+)" height="(\d+)"[^>]*fill="#f7f8fa"', picture)
    width, height = re.search(r'viewBox="0 0 (\d+) (\d+)"', picture).groups()
    assert ground.groups() == (str(int(width) - 1), str(int(height) - 1))


def test_marked_blocks():
    """A mark stands right before a block of Python, and what is marked is a part of what there is, not the most."""
    marked = [block for found in PYTHON.values() for block in found if block.reason]
    every = [block for found in PYTHON.values() for block in found]
    assert sum(page.read_text().count("<!-- not run") for page in PAGES) == len(marked)
    assert len(marked) < len(every) / 4


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model whose sentences have at most 21 codes."""
    return random_tts(tmp_path_factory.mktemp("small"), small=True, gpt_max_audio_tokens=24)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "me.wav"
    write_reference(path, seconds=2)
    return path.read_bytes()


class Websocket:
    """What a page sends to."""

    async def send(self, data):
        assert data


@pytest.fixture
def place(small, recording, tmp_path, monkeypatch):
    """An empty folder with what pages take for granted; returns the names that they do, too."""
    for name in ("me.wav", "ann.wav", "recordings/ann.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(recording)
    player = tmp_path / "bin/ffplay"  # which hears to the end
    player.parent.mkdir()
    player.write_text("#!/bin/sh\nexec cat >/dev/null\n")
    player.chmod(0o755)
    monkeypatch.setenv("PATH", f"{player.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("NEURON_XTTS_CACHE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)

    def load(self, model_name):
        assert model_name == DOWNLOADED
        self.__dict__ |= copy.deepcopy(small).__dict__

    monkeypatch.setattr(TTS.api.TTS, "__init__", load)
    small.synthesizer.output_sample_rate = 24000  # as of the weights that coqui-tts downloads
    tts = copy.deepcopy(small)
    played = []
    return {
        "__name__": "__page__",
        "neuron_xtts": neuron_xtts,
        "tts": tts,
        "xtts": tts.synthesizer.tts_model,
        "texts": ["a bird sings.", "the band plays."],
        "sentences": ["a bird sings.", "the band plays."],
        "voices": ["me.wav", "ann.wav"],
        "websocket": Websocket(),
        "play": played.append,
        "played": played,
    }


def run(block, names):
    """Run a block as it stands on its page; ``await`` may stand in it."""
    filled = "\n" * (block.line - 1) + block.code  # so that a traceback has the lines of the page
    code = compile(filled, str(block.page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.iscoroutine(result):
        asyncio.run(result)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON[page]], ids=lambda page: page.name)
def test_code(page, place):
    """All code of a page that is not marked runs, from the top to the bottom."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for block in PYTHON[page]:
            if block.reason is None:
                run(block, place)
    neuron_xtts.unpatch(place["tts"])
    if page.name in CHECKS:
        CHECKS[page.name](place, out.getvalue())


def heard(path):
    with wave.open(str(path)) as file:
        assert file.getframerate() == 24000
        return np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16).astype(float)


def said_hello(names, printed):
    assert "GPT.generate" in printed
    assert np.abs(heard("hello.wav")).max() > 100


def said_at_once(names, printed):
    assert len(names["audio"]) == len(names["played"]) == 2
    assert len(names["wav"]) > 10000


def fell_back(names, printed):
    """The output that the page shows is what it prints."""
    (shown,) = [block.code for block in blocks(ROOT / "docs/reliability.md") if block.language == "text"]
    assert printed.startswith(shown)
    assert "GPT.generate does not run on graphs: argument typical_p\n" in printed
    assert "NEURON_XTTS_DISABLE" not in os.environ


def cooked(names, printed):
    assert len(names["sentences"]) == 3
    assert len(heard("story.wav")) > 3 * 10000
    assert len(names["waves"]) == 3
    assert len(names["chunks"]) == 2
    assert names["file"].name == "ann.safetensors"
    assert np.isfinite(np.asarray(names["result"]["wav"])).all()


def streamed(names, printed):
    assert len(heard("speech.wav")) > 10000
    assert names["player"].returncode == 0


def kept_a_voice(names, printed):
    assert neuron_xtts.Voice.load("me.safetensors").recordings.keys() == {"me.wav"}


CHECKS = {
    "README.md": said_hello,
    "index.md": said_hello,
    "neuron.md": said_hello,
    "concurrency.md": said_at_once,
    "reliability.md": fell_back,
    "recipes.md": cooked,
    "streaming.md": streamed,
    "voices.md": kept_a_voice,
}


@pytest.mark.slow
def test_notebook(tmp_path, monkeypatch, miniature):
    """It runs from top to bottom on the miniature, its audio is speech and its report has no fallbacks."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    options = {"timeout": 600, "startup_timeout": 300, "kernel_name": "python3"}
    NotebookClient(notebook, **options, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"].get("text/html", "") for output in outputs if "data" in output]
    sounds = [re.search(r"data:audio/wav;base64,([^\"]*)", html) for html in shown]
    sounds = [heard(io_of(sound[1], tmp_path)) for sound in sounds if sound]
    assert len(sounds) == 1 + 1 + 3 + 1
    for sound in sounds:
        assert 1 < len(sound) / 24000 < 8
        assert np.sqrt(np.mean(sound**2)) > 300
    (report,) = [html for html in shown if "neuron_xtts: backend" in html]
    for route in ("GPT.generate", "GPT.forward", "HifiDecoder.forward"):
        calls, computed, handed_over, fallbacks = re.search(
            rf"<td>{route}</td>" + r"\s*<td[^>]*>(\d+)</td>" * 4, report
        ).groups()
        assert (calls, fallbacks) == ("1", "0")
        assert int(computed) + int(handed_over) == 1
    streamed = [output["text"] for output in outputs if output.get("name") == "stdout"]
    assert "".join(streamed).count("s of audio") > 1


def io_of(data, folder):
    path = folder / f"{time.monotonic_ns()}.wav"
    path.write_bytes(base64.b64decode(data))
    return path


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    assert NOTEBOOK.stat().st_size < 20000
