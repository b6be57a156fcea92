// Pipecat's frames on the wire (pipecat/frames/frames.proto): protobuf, as far as a conversation needs it.

const VARINT = 0, BYTES = 2;
const AUDIO = 2, MESSAGE = 4, INTERRUPTION = 5; // fields of Frame
const utf8 = new TextEncoder();
const text = new TextDecoder();

function varint(value) {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) | 128);
  return [...bytes, value];
}

function bytesField(number, content) {
  const head = [...varint((number << 3) | BYTES), ...varint(content.length)];
  const field = new Uint8Array(head.length + content.length);
  field.set(head);
  field.set(content, head.length);
  return field;
}

function joined(...parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

// `samples` is an Int16Array, mono.
export function audioFrame(samples, rate) {
  const content = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
  const numbers = Uint8Array.from([...varint((4 << 3) | VARINT), ...varint(rate), ...varint((5 << 3) | VARINT), 1]);
  return bytesField(AUDIO, joined(bytesField(3, content), numbers));
}

// `message` is RTVI's, an object.
export function messageFrame(message) {
  return bytesField(MESSAGE, bytesField(1, utf8.encode(JSON.stringify(message))));
}

// Number -> value of each field; bytes as a view.
function fieldsOf(bytes) {
  const fields = {};
  let at = 0;
  const next = () => {
    let value = 0, scale = 1;
    for (; bytes[at] > 127; scale *= 128) value += (bytes[at++] & 127) * scale;
    return value + bytes[at++] * scale;
  };
  while (at < bytes.length) {
    const key = next();
    const number = key >> 3;
    if ((key & 7) === VARINT) {
      fields[number] = next();
    } else if ((key & 7) === BYTES) {
      const length = next();
      fields[number] = bytes.subarray(at, at + length);
      at += length;
    } else {
      throw new Error(`wire type ${key & 7} is not used here`);
    }
  }
  return fields;
}

// {audio, rate}, {message} or {interruption: true}; an empty object for what is not needed here.
export function parseFrame(buffer) {
  const frame = fieldsOf(new Uint8Array(buffer));
  if (frame[AUDIO]) {
    const { 3: content, 4: rate } = fieldsOf(frame[AUDIO]);
    return { audio: new Int16Array(content.slice().buffer), rate };
  }
  if (frame[MESSAGE]) return { message: JSON.parse(text.decode(fieldsOf(frame[MESSAGE])[1])) };
  return frame[INTERRUPTION] ? { interruption: true } : {};
}
