"""The page at ``/ui``: type, choose a voice, hear it while it is made. Needs the extra ``webui``.

What it plays it fetches from the server's own API (``page.js``); Gradio draws the form.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from neuron_xtts.errors import ExtraMissingError
from neuron_xtts.serving.middleware import PAGE
from neuron_xtts.serving.studio import Studio

_EXAMPLE = "The quick brown fox jumps over the lazy dog. [pause:0.5] It never gets tired of it."

_CSS = """
.gradio-container {max-width: 960px !important; margin: 0 auto !important}
#problem, #refused {color: #b91c1c; font-weight: 600; min-height: 1.4em}
.dark #problem, .dark #refused {color: #fca5a5}
#file {display: block; width: 0; min-width: 100%; margin: .4em 0}
#recording {width: 100%}
#figures, #kept, #speaking, #download {min-height: 1.4em}
#status {overflow-x: auto}
#status table, #status tr {border: none !important}
#status table {border-collapse: collapse; margin: .5em 0; width: 100%}
#status th, #status td {text-align: left; padding: .2em .8em .2em 0; border: none; border-bottom: 1px solid #8884}
"""
_RESULT = '<div id="problem" role="alert"></div><div id="figures" aria-live="polite"></div><div id="download"></div>'
# A recording stays in the browser until it is kept: Gradio's own upload would store it, and answer where.
_RECORDING = (
    '<label>Recording <input id="file" type="file" accept="audio/*" data-most="{most}" '
    'onchange="neuronXtts.take(this.files[0])"></label><audio id="recording" controls hidden></audio>'
)
_STATUS = '<div id="speaking"></div><table id="graphs"></table><table id="fallbacks"></table>'


def mount(app: FastAPI, studio: Studio) -> None:
    """Put the page into an application.

    Raises:
        ExtraMissingError: Gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ExtraMissingError(
            'The page is drawn by Gradio, which is not installed: pip install "neuron-xtts[webui]"'
        ) from error

    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    gradio.mount_gradio_app(
        app, _form(studio), PAGE, theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=_CSS, head=f'<link rel="icon" href="data:,"><script>{script}</script>', footer_links=[], ssr_mode=False,
        pwa=False,
    )  # fmt: skip


def _form(studio: Studio) -> Any:
    import gradio as gr

    with gr.Blocks(title="neuron_xtts", analytics_enabled=False) as form:
        gr.Markdown("# neuron_xtts\nXTTS v2, heard while it is made.")
        text = gr.Textbox(_EXAMPLE, label="Text", lines=4, max_length=studio.settings.characters, elem_id="text")
        with gr.Row():
            language = gr.Dropdown(
                studio.languages, value=studio.reader(None).language, label="Language", elem_id="language"
            )
            names = studio.voices()
            voice = gr.Dropdown(names, value=names[0] if names else None, label="Voice", elem_id="voice")
            speed = gr.Slider(0.5, 2.0, 1.0, step=0.05, label="Speed", elem_id="speed")
            seed = gr.Textbox("", label="Seed", placeholder="any", elem_id="seed")
        with gr.Row():
            speak = gr.Button("Speak", variant="primary", elem_id="speak")
            stop = gr.Button("Stop", elem_id="stop")
        gr.HTML(_RESULT)
        if studio.settings.uploads:
            with gr.Accordion("A voice of your own", open=False, elem_id="own"):
                gr.Markdown("Ten seconds of one person speaking, without music. Ask that person first.")
                gr.HTML(_RECORDING.format(most=studio.settings.recording), padding=False)
                record = gr.Button("Record", elem_id="record")
                name = gr.Textbox(label="Name", elem_id="name")
                keep = gr.Button("Keep this voice", elem_id="keep")
                gr.HTML('<div id="refused" role="alert"></div><div id="kept" aria-live="polite"></div>')
            record.click(None, None, None, js="() => { window.neuronXtts.record() }")
            keep.click(None, name, voice, js="(name) => window.neuronXtts.keep(name)")
        gr.Markdown("### What runs")
        gr.HTML(_STATUS, elem_id="status")
        given = [text, language, voice, speed, seed]
        speak.click(None, given, None, js="(...all) => { window.neuronXtts.speak(...all) }")
        stop.click(None, None, None, js="() => { window.neuronXtts.stop() }")
        form.load(None, None, voice, js="() => window.neuronXtts.voices()")
    return form
