// The page speaks with the server's own API: what it plays is what any other client gets.
window.neuronXtts = (() => {
  const RATE = 24000;
  const LEAD = 0.2; // seconds that are played later, so that the next piece is there in time
  const AGAIN = 0.05; // the same after a gap; what is to begin at once begins late, and the next piece would overlap it
  const root = location.pathname.replace(/\/ui\/?$/, "/");
  const state = { context: null, output: null, controller: null, sources: new Set(), gaps: 0, recording: null,
    recorder: null };

  const at = (id) => document.getElementById(id);
  const show = (id, text) => { if (at(id)) at(id).textContent = text; };
  const seconds = (value) => `${value.toFixed(2)} s`;

  function player() {
    if (!state.context) {
      state.context = new AudioContext({ sampleRate: RATE });
      state.output = state.context.createGain();
      state.output.connect(state.context.destination);
    }
    return state.context;
  }

  async function call(path, options) {
    const response = await fetch(root + path, options);
    if (response.ok) return response;
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error ? body.error.message : `The server answered ${response.status}`);
  }

  function stop() {
    if (state.controller) state.controller.abort();
    state.controller = null;
    for (const source of state.sources) source.stop();
    state.sources.clear();
  }

  // Play samples right behind those before; returns the frame at which they end. Frames are whole: between two of them
  // a browser would interpolate.
  function play(samples, end) {
    const context = state.context;
    const buffer = context.createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = context.createBufferSource();
    source.buffer = buffer;
    source.connect(state.output);
    const now = Math.ceil(context.currentTime * RATE);
    if (end === null || end < now) {
      const begin = now + (end === null ? LEAD : AGAIN) * RATE;
      if (end !== null) state.gaps += (begin - end) / RATE;
      end = begin;
    }
    source.start(end / RATE);
    state.sources.add(source);
    source.onended = () => state.sources.delete(source);
    return end + samples.length;
  }

  async function speak(text, language, voice, speed, seed) {
    stop();
    show("problem", "");
    show("figures", "");
    const number = (seed || "").trim();
    if (!voice) return show("problem", "There is no voice yet: keep one of your own, below");
    if (number && !/^\d{1,15}$/.test(number)) return show("problem", "The seed is no whole number; leave it empty for any");
    show("figures", "waiting for the first audio ...");
    at("download").innerHTML = "";
    const context = player();
    const controller = new AbortController();
    state.controller = controller;
    state.gaps = 0;
    const began = performance.now();
    try {
      await context.resume();
      const body = { model: "xtts-v2", input: text, voice, language, speed, response_format: "pcm" };
      if (number) body.seed = Number(number);
      const response = await call("v1/audio/speech", {
        method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
        signal: controller.signal,
      });
      const reader = response.body.getReader();
      const parts = [];
      let count = 0, end = null, first = null, odd = new Uint8Array(0);
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const bytes = new Uint8Array(odd.length + value.length);
        bytes.set(odd);
        bytes.set(value, odd.length);
        const whole = bytes.length - (bytes.length % 2);
        odd = bytes.slice(whole);
        if (!whole || state.controller !== controller) continue;
        if (first === null) first = (performance.now() - began) / 1000;
        const integers = new Int16Array(bytes.buffer.slice(0, whole));
        const samples = Float32Array.from(integers, (sample) => sample / 32768);
        end = play(samples, end);
        parts.push(integers);
        count += integers.length;
        report(first, count, began);
      }
      if (state.controller !== controller) return;
      report(first, count, began);
      offer(parts, count);
    } catch (error) {
      if (error.name === "AbortError") show("figures", "stopped");
      else { show("figures", ""); show("problem", error.message); }
    } finally {
      if (state.controller === controller) state.controller = null;
      refresh();
    }
  }

  function report(first, count, began) {
    const audio = count / RATE;
    const took = (performance.now() - began) / 1000;
    show("figures", `first audio after ${seconds(first)}, ${seconds(audio)} of audio in ${seconds(took)}, ` +
      `RTF ${(took / audio).toFixed(2)}, ` + (state.gaps ? `gaps of ${seconds(state.gaps)}` : "no gaps"));
  }

  function offer(parts, count) {
    const view = new DataView(new ArrayBuffer(44));
    const words = ["RIFF", "WAVE", "fmt ", "data"];
    [0, 8, 12, 36].forEach((place, i) => [...words[i]].forEach((c, j) => view.setUint8(place + j, c.charCodeAt(0))));
    view.setUint32(4, 36 + 2 * count, true);
    view.setUint32(16, 16, true);
    view.setUint16(20, 1, true);
    view.setUint16(22, 1, true);
    view.setUint32(24, RATE, true);
    view.setUint32(28, 2 * RATE, true);
    view.setUint16(32, 2, true);
    view.setUint16(34, 16, true);
    view.setUint32(40, 2 * count, true);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([view.buffer, ...parts], { type: "audio/wav" }));
    link.download = "speech.wav";
    link.textContent = "Download speech.wav";
    at("download").replaceChildren(link);
  }

  // The voice to be kept: a file, or what the microphone heard.
  function take(recording) {
    show("refused", "");
    show("kept", "");
    URL.revokeObjectURL(at("recording").src);
    state.recording = recording || null;
    at("recording").hidden = !recording;
    at("recording").src = recording ? URL.createObjectURL(recording) : "";
  }

  async function record() {
    if (state.recorder) return state.recorder.stop();
    show("refused", "");
    at("record").disabled = true; // until the microphone is allowed or refused
    let stream = null;
    try {
      if (!navigator.mediaDevices) throw new Error("Browsers record on pages of this machine, or by HTTPS, only");
      stream = await navigator.mediaDevices.getUserMedia({ audio: true });
      const recorder = new MediaRecorder(stream);
      const parts = [];
      recorder.ondataavailable = (event) => parts.push(event.data);
      recorder.onstop = () => {
        stream.getTracks().forEach((track) => track.stop());
        state.recorder = null;
        at("record").textContent = "Record";
        at("file").disabled = at("keep").disabled = false;
        at("file").value = "";
        take(new Blob(parts, { type: recorder.mimeType }));
      };
      recorder.start();
      state.recorder = recorder;
      at("record").textContent = "End the recording";
      at("file").disabled = at("keep").disabled = true; // until there is something to keep
    } catch (error) {
      if (stream) stream.getTracks().forEach((track) => track.stop());
      show("refused", error.message);
    } finally {
      at("record").disabled = false;
    }
  }

  async function keep(text) {
    const name = text.trim();
    show("refused", "");
    show("kept", "");
    at("keep").disabled = true;
    try {
      const most = Number(at("file").dataset.most);
      if (!state.recording) throw new Error("Record a voice or choose a file first");
      if (!name) throw new Error("Give the voice a name");
      if (state.recording.size > most) throw new Error(`The recording is larger than ${most} bytes`);
      const form = new FormData();
      form.append("name", name);
      form.append("audio_sample", state.recording, state.recording.name || "recording");
      show("kept", "making the voice ...");
      await call("v1/audio/voices", { method: "POST", body: form });
      const chosen = await voices(name);
      show("kept", `kept as ${name}: chosen above`);
      return chosen;
    } catch (error) {
      show("kept", "");
      show("refused", error.message);
      return { __type__: "update" };
    } finally {
      at("keep").disabled = Boolean(state.recorder);
    }
  }

  // What the list of voices becomes, in Gradio's terms.
  async function voices(chosen) {
    const found = (await (await call("v1/audio/voices?aliases=false")).json()).data.map((voice) => voice.id);
    const value = chosen || found[0] || null;
    return { __type__: "update", choices: found.map((name) => [name, name]), value };
  }

  function rows(table, headings, lines) {
    const row = (cells, kind) => {
      const line = document.createElement("tr");
      for (const cell of cells) {
        const element = document.createElement(kind);
        element.textContent = cell;
        line.append(element);
      }
      return line;
    };
    table.replaceChildren(row(headings, "th"), ...lines.map((line) => row(line, "td")));
  }

  async function refresh() {
    if (!at("graphs") || document.hidden) return;
    try {
      const found = await (await call("v1/status")).json();
      show("speaking", `${found.decoding} of ${found.slots} speak, ${found.waiting} wait. ` +
        `${found.backend}, precision ${found.precision}.`);
      rows(at("graphs"), ["graph", "runs", "ms per run", "padding"], found.graphs.map((graph) =>
        [graph.graph, graph.runs, graph.milliseconds.toFixed(1), `${Math.round(100 * graph.waste)} %`]));
      const fell = found.fallbacks.map((fallback) => [fallback.route, fallback.calls, fallback.reason]);
      rows(at("fallbacks"), ["coqui-tts served", "calls", "because"], fell.length ? fell : [["nothing", 0, ""]]);
    } catch (error) {
      show("speaking", `The server does not answer: ${error.message}`);
    }
  }

  setInterval(refresh, 1000);
  return { speak, stop, take, record, keep, voices, refresh, state, player };
})();
