// WAV files: mono, 16 bit, with a comment in their metadata.

const ascii = (text) => Uint8Array.from(text, (char) => char.charCodeAt(0));

function chunk(name, ...parts) {
  const size = parts.reduce((sum, part) => sum + part.byteLength, 0);
  const header = new DataView(new ArrayBuffer(8));
  new Uint8Array(header.buffer).set(ascii(name));
  header.setUint32(4, size, true);
  return [header, ...parts, ...(size % 2 ? [new Uint8Array(1)] : [])];
}

const sizeOf = (parts) => parts.reduce((sum, part) => sum + part.byteLength, 0);

// `pieces` are Int16Arrays.
export function wavFile(pieces, rate, comment) {
  const format = new DataView(new ArrayBuffer(16));
  [1, 1].forEach((value, i) => format.setUint16(2 * i, value, true)); // PCM, mono
  format.setUint32(4, rate, true);
  format.setUint32(8, 2 * rate, true);
  format.setUint16(12, 2, true);
  format.setUint16(14, 16, true);
  const content = [
    ascii("WAVE"),
    ...chunk("fmt ", format),
    ...chunk("data", ...pieces),
    ...(comment ? chunk("LIST", ascii("INFO"), ...chunk("ICMT", ascii(comment + "\0"))) : []),
  ];
  const header = new DataView(new ArrayBuffer(8));
  new Uint8Array(header.buffer).set(ascii("RIFF"));
  header.setUint32(4, sizeOf(content), true);
  return new Blob([header, ...content], { type: "audio/wav" });
}

// Samples of -1 to 1, as Float32Array.
export function toInt16(samples) {
  return Int16Array.from(samples, (x) => Math.max(-32768, Math.min(32767, Math.round(32767 * x))));
}
