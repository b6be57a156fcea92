// The panel that adds voices: a recording or a description becomes a voice of the server.

import { MAX_S, Recorder, whyNoMicrophone } from "./recorder.js";

const VOICES = "v1/audio/voices";
const $ = (id) => document.getElementById(id);

export class ClonePanel {
  // `headers()` carry the token; `onVoices()` is called when there are other voices than before.
  constructor({ headers, onVoices, onTry }) {
    this.headers = headers;
    this.onVoices = onVoices;
    this.onTry = onTry;
    this.file = null;
    this.recorder = null;
    const why = whyNoMicrophone();
    $("microphone-why").textContent = `${why} You can choose a recorded file.`;
    $("microphone-why").hidden = !why;
    $("record").disabled = Boolean(why);
    $("record").onclick = () => (this.recorder ? this.stop() : this.record());
    $("clone-file").onchange = ({ target }) => target.files.length && this.keep(target.files[0]);
    $("clone-form").onsubmit = (event) => {
      event.preventDefault();
      this.send();
    };
  }

  // What the server lets clients add: {mode, voice_uploads} of `/ready`.
  show({ mode, voice_uploads }) {
    const why =
      mode === "custom_voice"
        ? "This checkpoint speaks with its own speakers only. A Base checkpoint clones voices, a VoiceDesign one designs them."
        : voice_uploads
          ? ""
          : "This server keeps no voices. Its operator can start it with --voices DIR.";
    $("clone-why").textContent = why;
    $("clone-why").hidden = !why;
    $("clone-form").hidden = Boolean(why);
    this.designs = mode === "voice_design";
    $("clone-recording-part").hidden = $("clone-transcript-part").hidden = this.designs;
    $("consent").required = !this.designs;
    $("clone-description-part").hidden = !this.designs;
    $("clone-description").required = this.designs;
  }

  async record() {
    const recorder = new Recorder((peak, seconds) => {
      $("level").value = peak;
      $("record-note").textContent = `${seconds.toFixed(1)} s`;
      if (seconds >= MAX_S - 0.2) this.stop();
    });
    try {
      await recorder.start();
    } catch (error) {
      $("record-note").textContent =
        error.name === "NotAllowedError" ? "The browser was told not to give the microphone." : `No microphone: ${error.message}`;
      return;
    }
    this.recorder = recorder;
    $("record").textContent = "Stop recording";
    $("record").classList.add("danger");
  }

  async stop() {
    const { recorder } = this;
    this.recorder = null;
    $("record").textContent = "Record again";
    $("record").classList.remove("danger");
    $("level").value = 0;
    if (recorder) this.keep(await recorder.stop());
  }

  keep(file) {
    this.file = file;
    URL.revokeObjectURL($("take").src);
    $("take").src = URL.createObjectURL(file);
    $("take").hidden = false;
  }

  async send() {
    if (!this.designs && !this.file) return this.note("Record something or choose a file first.");
    const form = new FormData();
    form.append("name", $("clone-name").value);
    if (this.designs) {
      form.append("description", $("clone-description").value);
    } else {
      form.append("recording", this.file, "recording.wav");
      if ($("clone-transcript").value.trim()) form.append("transcript", $("clone-transcript").value);
      if ($("consent").checked) form.append("consent", "the speaker agreed, by the page's box");
    }
    $("clone-send").disabled = true;
    this.note("One moment …");
    try {
      const answer = await fetch(VOICES, { method: "POST", body: form, headers: this.headers() });
      const body = await answer.json();
      if (!answer.ok) return this.note(body.error?.message ?? body.error ?? `HTTP ${answer.status}`);
      await this.onVoices(body.name);
      await this.list();
      this.note(`${body.name} is there.`);
    } catch (error) {
      this.note(error.message);
    } finally {
      $("clone-send").disabled = false;
    }
  }

  // Voices that clients added, each with what can be done with it.
  async list() {
    const answer = await fetch(VOICES, { headers: this.headers(), cache: "no-store" });
    const voices = answer.ok ? (await answer.json()).voices : [];
    const items = voices.filter(({ removable }) => removable).map(({ name }) => {
      const item = document.createElement("li");
      const listen = Object.assign(document.createElement("button"), { type: "button", textContent: "Listen" });
      listen.onclick = () => this.onTry(name);
      const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Delete" });
      remove.setAttribute("aria-label", `Delete ${name}`);
      remove.onclick = () => this.remove(name);
      item.append(Object.assign(document.createElement("b"), { textContent: name }), listen, remove);
      return item;
    });
    $("own-voices").replaceChildren(...items);
  }

  async remove(name) {
    if (!confirm(`Delete the voice ${name}?`)) return;
    await fetch(`${VOICES}/${encodeURIComponent(name)}`, { method: "DELETE", headers: this.headers() });
    await this.onVoices();
    await this.list();
    this.note(`${name} is gone.`);
  }

  note(text) {
    $("clone-note").textContent = text;
  }
}
