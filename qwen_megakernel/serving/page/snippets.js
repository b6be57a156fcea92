// Blocks to paste, with this server's address and the choices of the page.

const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const string = JSON.stringify;

const TOKEN = "QWEN_MEGAKERNEL_TOKEN";

function curl({ http, text, voice, needsToken }) {
  const body = JSON.stringify({ model: "tts-1", input: text, voice: voice ?? "alloy", response_format: "wav" });
  const header = needsToken ? `  -H "Authorization: Bearer $${TOKEN}" \\\n` : "";
  return `curl --no-buffer ${http}/v1/audio/speech \\\n${header}  -H 'Content-Type: application/json' \\\n  -d ${shell(body)} \\\n  -o hello.wav`;
}

function python({ ws, text, voice, needsToken }) {
  const header = needsToken ? `, additional_headers={"X-API-Key": os.environ["${TOKEN}"]}` : "";
  const fields = [`"context_id": "a"`, `"text": ${string(text)}`, ...(voice ? [`"voice": ${string(voice)}`] : [])];
  return `import json
${needsToken ? "import os\n" : ""}import wave

from websockets.sync.client import connect  # pip install websockets

with connect(${string(ws)}${header}) as socket, wave.open("hello.wav", "wb") as file:
    file.setparams((1, 2, 24000, 0, "NONE", ""))
    socket.send(json.dumps({"type": "hello", "protocol": 1}))
    socket.send(json.dumps({"type": "speak", ${fields.join(", ")}}))
    socket.send(json.dumps({"type": "end", "context_id": "a"}))
    for message in socket:
        if isinstance(message, bytes):  # 8 bytes of numbers, then samples
            file.writeframes(message[8:])
        elif json.loads(message)["type"] in ("done", "error"):
            print(message)
            break
`;
}

function openai({ http, text, voice, needsToken }) {
  const key = needsToken ? `os.environ["${TOKEN}"]` : `"none"`;
  return `${needsToken ? "import os\n\n" : ""}from openai import OpenAI  # pip install openai

client = OpenAI(base_url=${string(`${http}/v1`)}, api_key=${key})
speech = client.audio.speech.with_streaming_response.create(
    model="tts-1", voice=${string(voice ?? "alloy")}, input=${string(text)}, response_format="wav"
)
with speech as response:
    response.stream_to_file("hello.wav")
`;
}

function pipecat({ ws, voice, language, needsToken }) {
  const chosen = [voice && `voice=${string(voice)}`, language && language !== "auto" && `language=${string(language)}`];
  const lines = [
    `    url=${string(ws)},`,
    ...(needsToken ? [`    token=os.environ["${TOKEN}"],`] : []),
    `    settings=MegakernelTTSService.Settings(${chosen.filter(Boolean).join(", ")}),`,
  ];
  return `${needsToken ? "import os\n\n" : ""}from pipecat_client.megakernel_tts import MegakernelTTSService  # pip install '.[pipecat]'

tts = MegakernelTTSService(
${lines.join("\n")}
)
# Put tts between the language model and transport.output().
`;
}

export const SNIPPETS = { curl, Python: python, "OpenAI SDK": openai, Pipecat: pipecat };
