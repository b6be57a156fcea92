// What the server says of itself, and whether it asks for a token.

const POLL_MS = 4000;

const SHOWN = { model: "Model", mode: "Kind", device: "Device", dtype: "Precision", backend: "Decoder", codec: "Codec",
  active: "Speaking", waiting: "Waiting", connections: "Connections" };

export class ServerPoll {
  // `onState` takes {status, body}: HTTP's status, 0 where nobody answers, and what `/ready` says.
  constructor(onState) {
    this.onState = onState;
    this.token = "";
    document.addEventListener("visibilitychange", () => document.hidden || this.ask());
    setInterval(() => document.hidden || this.ask(), POLL_MS);
  }

  get headers() {
    return this.token ? { Authorization: `Bearer ${this.token}` } : {};
  }

  async ask() {
    let state = { status: 0, body: {} };
    try {
      const answer = await fetch("ready", { headers: this.headers, cache: "no-store" });
      state = { status: answer.status, body: await answer.json() };
    } catch { /* nobody answers, which is a state too */ }
    this.onState(state);
    return state;
  }
}

export function summary({ status, body }) {
  if (status === 0) return ["bad", "no answer"];
  if (status === 401) return ["busy", "asks for a token"];
  if (status === 200) return ["good", `ready · ${body.mode} · ${body.device}`];
  const phase = (body.phase ?? `HTTP ${status}`).replaceAll("_", " ");
  return [body.phase === "failed" ? "bad" : "busy", body.detail ? `${phase}: ${body.detail}` : phase];
}

export function fillList(list, { body }) {
  list.replaceChildren(
    ...Object.entries(SHOWN).filter(([key]) => key in body).map(([key, label]) => {
      const pair = document.createElement("div");
      for (const [tag, text] of [["dt", label], ["dd", body[key]]]) {
        pair.append(Object.assign(document.createElement(tag), { textContent: text }));
      }
      return pair;
    }),
  );
}
