// The server's native protocol (docs/PROTOCOL.md), version 1, over one WebSocket.

const WHY = { 1009: "a message is too long", 1011: "the server's engine has stopped" };

export class Connection {
  // `onMessage` takes the server's messages; audio comes as {type: "audio", stream, samples}.
  // `onLost(reason)` is called when an open connection ends by itself.
  constructor(onMessage, onLost) {
    this.onMessage = onMessage;
    this.onLost = onLost;
    this.opening = null;
    this.token = "";
  }

  // The server's `ready`. Rejects where there is no connection.
  open() {
    this.opening ??= new Promise((resolve, reject) => {
      const query = this.token ? `?token=${encodeURIComponent(this.token)}` : "";
      const socket = new WebSocket(new URL(`./${query}`, location.href.replace(/^http/, "ws")));
      socket.binaryType = "arraybuffer";
      let ready = false;
      socket.onopen = () => socket.send(JSON.stringify({ type: "hello", protocol: 1, client: "page" }));
      socket.onmessage = ({ data }) => {
        const message = typeof data === "string" ? JSON.parse(data) : audioOf(data);
        if (message.type === "ready") {
          ready = true;
          resolve(message);
        }
        this.onMessage(message);
      };
      socket.onclose = ({ code }) => {
        if (this.socket === socket) this.opening = this.socket = null;
        if (ready && !socket.left) this.onLost(WHY[code] ?? "the connection ended");
        if (!ready) reject(new Error("the server takes no connection now"));
      };
      this.socket = socket;
    });
    return this.opening;
  }

  send(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  close() {
    if (!this.socket) return;
    this.socket.left = true;
    this.socket.close();
    this.opening = this.socket = null;
  }
}

function audioOf(buffer) {
  const [stream] = new Uint32Array(buffer, 0, 2);
  return { type: "audio", stream, samples: new Int16Array(buffer, 8) };
}
