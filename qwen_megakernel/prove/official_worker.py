"""The process that holds the official package; it answers requests, a line of JSON each.

`prove.official` runs this file as a script, with an interpreter whose environment has `qwen_tts`. The
script imports nothing of this repository: what it computes is the official package's and
transformers' alone. A request is `{"do": NAME, ...}` on standard input and names a public method of
`Worker`; its reply is a line on standard output. Large arrays go to a `.npz` file that the request
names. Whatever the libraries print goes to standard error.

An item is a JSON object that describes one utterance: `text`, `language`, `streaming` (the text layout),
`embedding` (a speaker embedding or null), `speaker` (a preset or null), `ref_codes` and `ref_text` (of a
clone in context, or null).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch

NUM_CONTROL_CODES = 1024


def import_official() -> ModuleType:
    """The module of the official `Qwen3TTSModel`.

    The 25 Hz tokenizer imports torchaudio, which has no build beside every torch. The 12 Hz path never
    calls it, so an empty module stands in for it where it is missing.
    """
    transformers = import_module("transformers")
    for name in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoFeatureExtractor"):
        getattr(transformers, name)  # transformers looks for the real torchaudio before the stub exists
    if find_spec("torchaudio") is None:
        for name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
            sys.modules[name] = ModuleType(name)
    inference = import_module("qwen_tts.inference.qwen3_tts_model")
    import_module("qwen_tts._transformers_compat").patch_transformers_rope_registry()
    # The package's own initialiser of the default RoPE does not know the configuration of
    # transformers' Mimi, which encodes reference recordings.
    import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS["default"] = _default_rope
    return inference


def _default_rope(
    rope: Any, device: Any = None, seq_len: Any = None, layer_type: Any = None
) -> tuple[torch.Tensor, float]:
    theta = getattr(rope, "rope_theta", None) or rope.rope_parameters["rope_theta"]
    dim = getattr(rope, "head_dim", None) or rope.hidden_size // rope.num_attention_heads
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device).float() / dim), 1.0


class _Captured(Exception):
    """Raised in place of the talker's generation, once its inputs are known."""


class Worker:
    """One checkpoint in the official package, in one or two precisions."""

    def __init__(self) -> None:
        self._inference = import_official()
        self._models: dict[str, Any] = {}
        self._place = ("", "cpu")

    def load(self, model: str, device: str, dtypes: Sequence[str]) -> dict[str, Any]:
        """Load the checkpoint in each precision (`fp32`, `bf16`).

        Returns:
            `versions` of what runs it, and `sampling`, the arguments of `generate` that it chose.
        """
        torch.backends.cudnn.allow_tf32 = False
        for name in dtypes:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
            if name not in self._models:
                self._models[name] = self._inference.Qwen3TTSModel.from_pretrained(
                    model, dtype=dtype, device_map=device
                )
        names = ("qwen-tts-hf", "qwen-tts", "transformers", "torch")
        return {
            "versions": {name: version for name in names if (version := _version(name))},
            "sampling": self._models[dtypes[0]]._merge_generate_kwargs(),
        }

    # -- prompts -----------------------------------------------------------------------------

    def rows(self, items: list[dict[str, Any]], dtype: str, out: str) -> dict[str, Any]:
        """Prompt rows `rows.I` [p, hidden] and trailing text rows `trailing.I` of each item."""
        arrays = {}
        for index, item in enumerate(items):
            inputs = self._inputs(dtype, item)
            arrays[f"rows.{index}"] = _array(inputs["inputs_embeds"][0])
            arrays[f"trailing.{index}"] = _array(inputs["trailing_text_hidden"][0])
        _save(out, arrays)
        return {}

    def _arguments(self, model: Any, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Arguments of the official model's `generate`."""
        texts = [model._build_assistant_text(item["text"]) for item in items]
        found: dict[str, Any] = {
            "input_ids": model._tokenize_texts(texts),
            "languages": [item["language"] for item in items],
            "non_streaming_mode": not items[0]["streaming"],
        }
        if any(item.get("instruct") for item in items):
            found["instruct_ids"] = model._tokenize_texts(
                [model._build_instruct_text(item["instruct"]) for item in items]
            )
        if items[0]["embedding"] is not None:
            clones = [self._clone_prompt(item) for item in items]
            found["voice_clone_prompt"] = model._prompt_items_to_voice_clone_prompt(clones)
            found["ref_ids"] = [
                model._tokenize_texts([model._build_ref_text(item["ref_text"])])[0]
                if item["ref_text"]
                else None
                for item in items
            ]
        elif items[0]["speaker"] is not None:
            found["speakers"] = [item["speaker"] for item in items]
        return found

    def _clone_prompt(self, item: dict[str, Any]) -> Any:
        in_context = item["ref_codes"] is not None
        return self._inference.VoiceClonePromptItem(
            ref_code=torch.tensor(item["ref_codes"]) if in_context else None,
            ref_spk_embedding=torch.tensor(item["embedding"], dtype=torch.float32),
            x_vector_only_mode=not in_context,
            icl_mode=in_context,
            ref_text=item["ref_text"] if in_context else None,
        )

    def _inputs(self, dtype: str, item: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the official `generate` passes to its talker."""
        model, captured = self._models[dtype], {}
        talker = model.model.talker

        def capture(**arguments: Any) -> None:
            captured.update(arguments)
            raise _Captured

        original, talker.generate = talker.generate, capture
        try:
            model.model.generate(**self._arguments(model, [item]))
        except _Captured:
            return captured
        finally:
            talker.generate = original
        raise RuntimeError("the official talker was not called")

    # -- codes and logits --------------------------------------------------------------------

    def greedy(
        self, items: list[dict[str, Any]], dtype: str, frames: int, repetition_penalty: float
    ) -> dict[str, Any]:
        """Greedy codes of each item, at most `frames` frames, without the EOS frame."""
        model, found = self._models[dtype], []
        for item in items:
            codes, _ = model.model.generate(
                **self._arguments(model, [item]), do_sample=False, subtalker_dosample=False,
                repetition_penalty=repetition_penalty, max_new_tokens=frames + 1,
            )  # fmt: skip
            found.append(codes[0][:frames].tolist())
        return {"codes": found}

    def forced(
        self, items: list[dict[str, Any]], codes: list[list[list[int]]], dtype: str, out: str
    ) -> dict[str, Any]:
        """Teacher-forced: `talker.I` [frames, vocabulary], `predictor.I` [frames, 15, vocabulary]."""
        arrays = {}
        for index, (item, frames) in enumerate(zip(items, codes, strict=True)):
            talker, predictor = self._forced(dtype, item, torch.tensor(frames))
            arrays[f"talker.{index}"], arrays[f"predictor.{index}"] = _array(talker), _array(predictor)
        _save(out, arrays)
        return {}

    def _forced(
        self, dtype: str, item: dict[str, Any], codes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over the prompt and the frames `codes` [frames, 16]; logits in fp32.

        The last frame may be EOS: its code 0 is no row of the predictor's table, and its other codes say
        nothing.
        """
        inputs, talker = self._inputs(dtype, item), self._models[dtype].model.talker
        codes = codes.to(talker.device)
        trailing, pad = inputs["trailing_text_hidden"][0], inputs["tts_pad_embed"][0]
        text = torch.cat([trailing, pad.expand(max(0, len(codes) - len(trailing)), -1)])[: len(codes)]
        embeddings = [talker.get_input_embeddings(), *talker.code_predictor.get_input_embeddings()]
        summed = torch.stack([embed(codes[:, i]) for i, embed in enumerate(embeddings)], 1).sum(1)
        rows = torch.cat([inputs["inputs_embeds"][0], (summed + text)[:-1]])
        with torch.no_grad():
            hidden = talker.model(inputs_embeds=rows[None]).last_hidden_state[0, -len(codes) :]
            predictor, _ = talker.forward_sub_talker_finetune(codes, hidden)
            return talker.codec_head(hidden).float(), predictor.float()

    def judge(
        self,
        items: list[dict[str, Any]],
        codes: list[list[list[int]]],
        talker: dict[str, float],
        predictor: dict[str, float],
        min_frames: int,
        out: str,
    ) -> dict[str, Any]:
        """How the official fp32 distributions see drawn codes.

        `talker.FIGURE` has one value for each drawn code 0, `predictor.FIGURE` one for each other code
        of a frame that is not EOS; the figures are those of `_judged`.
        """
        kept: dict[str, list[np.ndarray]] = {}
        for item, frames in zip(items, codes, strict=True):
            drawn = torch.tensor(frames)
            logits, others = (part.cpu() for part in self._forced("fp32", item, drawn))
            scores, seen = self._talker_scores(logits, drawn[:, 0], talker, min_frames)
            parts = {"talker": _judged(scores, drawn[:, 0], talker, seen, self._eos)}
            speech = drawn[:, 0] != self._eos
            flat = others[speech].flatten(0, 1)
            parts["predictor"] = _judged(flat, drawn[speech, 1:].flatten(), predictor, None, None)
            for part, figures in parts.items():
                for name, values in figures.items():
                    kept.setdefault(f"{part}.{name}", []).append(values)
        _save(out, {name: np.concatenate(values) for name, values in kept.items()})
        return {}

    @property
    def _eos(self) -> int:
        return self._models["fp32"].model.config.talker_config.codec_eos_token_id

    def _talker_scores(
        self, logits: torch.Tensor, drawn: torch.Tensor, sampling: dict[str, float], min_frames: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [frames, vocabulary] after transformers' processors; which codes were drawn before."""
        processing = import_module("transformers.generation.logits_process")
        vocab, eos = logits.shape[1], self._eos
        suppressed = [code for code in range(vocab - NUM_CONTROL_CODES, vocab) if code != eos]
        suppress = processing.SuppressTokensLogitsProcessor(suppressed)
        repeat = processing.RepetitionPenaltyLogitsProcessor(float(sampling["repetition_penalty"]))
        seen = torch.zeros(logits.shape, dtype=torch.bool)
        scores = logits.clone()
        for frame in range(len(logits)):
            before = drawn[None, :frame]
            if frame:
                scores[frame] = repeat(before, scores[frame : frame + 1])[0]
                seen[frame, before[0]] = True
            if frame < min_frames:
                scores[frame, eos] = -torch.inf
            scores[frame] = suppress(before, scores[frame : frame + 1])[0]
        return scores, seen

    # -- sound -------------------------------------------------------------------------------

    def decode(self, codes: list[list[list[int]]], dtype: str, out: str) -> dict[str, Any]:
        """Decode each list of frames to samples `I`, float32 [n]."""
        tokenizer, arrays = self._models[dtype].model.speech_tokenizer, {}
        for index, frames in enumerate(codes):
            (samples,), rate = tokenizer.decode([{"audio_codes": torch.tensor(frames)}])
            arrays[str(index)] = samples
        _save(out, arrays)
        return {"rate": rate}

    def clone(self, recordings: list[str], encode: bool, out: str) -> dict[str, Any]:
        """Speaker embedding `embedding.I` and codes `codes.I` of each recording, a path.

        Args:
            recordings: WAV files.
            encode: whether to make codes; a checkpoint may lack the encoder.
            out: the file.
        """
        model, arrays = self._models["fp32"], {}
        for index, path in enumerate(recordings):
            if encode:
                (made,) = model.create_voice_clone_prompt(ref_audio=path, ref_text="Words.")
                arrays[f"codes.{index}"] = _array(made.ref_code)
                arrays[f"embedding.{index}"] = _array(made.ref_spk_embedding)
            else:
                samples, rate = model._load_audio_to_np(path)
                librosa = import_module("librosa")
                wide = librosa.resample(y=samples, orig_sr=rate, target_sr=24_000)
                arrays[f"embedding.{index}"] = _array(
                    model.model.extract_speaker_embedding(wide, 24_000)
                )
        _save(out, arrays)
        return {}

    def speak_greedily(
        self, items: list[dict[str, Any]], frames: int, repetition_penalty: float, out: str
    ) -> dict[str, Any]:
        """Samples `I` of each cloned item as `generate_voice_clone` gives them, greedy, in fp32."""
        model, arrays = self._models["fp32"], {}
        for index, item in enumerate(items):
            (samples,), _ = model.generate_voice_clone(
                text=item["text"], language=item["language"],
                voice_clone_prompt=[self._clone_prompt(item)],
                non_streaming_mode=not item["streaming"], do_sample=False, subtalker_dosample=False,
                repetition_penalty=repetition_penalty, max_new_tokens=frames + 1,
            )  # fmt: skip
            arrays[str(index)] = samples
        _save(out, arrays)
        return {}

    def sample(
        self,
        items: list[dict[str, Any]],
        dtype: str,
        seed: int,
        budgets: list[int],
        sampling: dict,
        out: str,
    ) -> dict[str, Any]:
        """Speak items side by side with the official sampling; samples `I`, float32.

        Args:
            items: of one voice kind and one layout.
            dtype: `fp32` or `bf16`.
            seed: of torch's generator.
            budgets: frames that each item may take.
            sampling: keyword arguments of the official `generate`.
            out: the file.

        Returns:
            `codes`, without EOS; `stopped`: whether EOS was drawn within the budget; `seconds`.
        """
        model = self._models[dtype]
        torch.manual_seed(seed)
        began = time.perf_counter()
        made, _ = model.model.generate(
            **self._arguments(model, items), **sampling, max_new_tokens=max(budgets) + 1
        )
        codes = [frames[:budget] for frames, budget in zip(made, budgets, strict=True)]
        stopped = [len(frames) < budget for frames, budget in zip(made, budgets, strict=True)]
        spoken = [frames for frames in codes if len(frames)]
        samples = iter(model.model.speech_tokenizer.decode([{"audio_codes": c} for c in spoken])[0])
        seconds = time.perf_counter() - began
        empty = np.zeros(0, np.float32)
        sounds = [next(samples) if len(frames) else empty for frames in codes]
        _save(out, {str(index): sound for index, sound in enumerate(sounds)})
        return {"codes": [frames.tolist() for frames in codes], "stopped": stopped, "seconds": seconds}

    def time(self, item: dict[str, Any], dtype: str, seed: int) -> dict[str, Any]:
        """Speak one item with the checkpoint's sampling: `seconds` it took and `audio_s` it gave."""
        model = self._models[dtype]
        torch.manual_seed(seed)
        began = time.perf_counter()
        (codes,), _ = model.model.generate(
            **self._arguments(model, [item]), **model._merge_generate_kwargs(max_new_tokens=400)
        )
        (samples,), rate = model.model.speech_tokenizer.decode([{"audio_codes": codes}])
        return {"seconds": time.perf_counter() - began, "audio_s": len(samples) / rate}

    def peer(
        self, model: str, device: str, item: dict[str, Any], recording: str, ref_text: str, runs: int
    ) -> dict[str, Any]:
        """faster-qwen3-tts, where it is installed, speaking a clone in context of a recording.

        Returns:
            `version`, None without it; `first_s` to the first chunk, `seconds` in all and `audio_s`, a
            value a run.
        """
        version = _version("faster-qwen3-tts")
        found: dict[str, Any] = {"version": version, "first_s": [], "seconds": [], "audio_s": []}
        if version is None:
            return found
        cls = import_module("faster_qwen3_tts").FasterQwen3TTS
        made = cls.from_pretrained(model, device=device, dtype=torch.bfloat16)
        for run in range(runs + 1):
            began, first, samples, rate = time.perf_counter(), 0.0, 0, 24_000
            for chunk, rate, _ in made.generate_voice_clone_streaming(  # noqa: B007
                text=item["text"], language=item["language"].capitalize(),
                ref_audio=recording, ref_text=ref_text, chunk_size=1,
            ):  # fmt: skip
                first = first or time.perf_counter() - began
                samples += len(chunk)
            if run:  # the first one captures graphs
                found["first_s"].append(first)
                found["seconds"].append(time.perf_counter() - began)
                found["audio_s"].append(samples / rate)
        return found


def _judged(
    logits: torch.Tensor,
    drawn: torch.Tensor,
    sampling: dict[str, float],
    seen: torch.Tensor | None,
    eos: int | None,
) -> dict[str, np.ndarray]:
    """Draws against transformers' truncated distributions.

    Args:
        logits: fp32 [n, vocabulary], after penalty and suppression.
        drawn: int64 [n].
        sampling: `temperature`, `top_k`, `top_p`.
        seen: bool [n, vocabulary], codes drawn before; None leaves those figures out.
        eos: None leaves those figures out.

    Returns:
        By figure, [n]: `allowed` (the code was not suppressed), `rank` (1 is the most likely), `margin`
        (its logit less that of the last candidate), `is_last` and `p_last` (it is the last candidate,
        and the probability of that), `log_p`, `mean_log_p` and `var_log_p` (its log-probability, and
        what a right sampler gives on average), `is_seen`, `p_seen`, `is_eos`, `p_eos`.
    """
    processing = import_module("transformers.generation.logits_process")
    scores = processing.TemperatureLogitsWarper(float(sampling["temperature"]))(None, logits)
    last = torch.full((len(scores), 1), -torch.inf)
    top_k = int(sampling["top_k"])
    kept = scores
    if top_k:
        last = torch.topk(scores, min(top_k, scores.shape[1])).values[:, -1:]
        kept = processing.TopKLogitsWarper(top_k)(None, scores)
    if sampling["top_p"] < 1:
        kept = processing.TopPLogitsWarper(float(sampling["top_p"]))(None, kept)
    log_p = kept.log_softmax(-1)
    p = log_p.exp()
    finite = torch.where(p > 0, log_p, 0.0)
    mean = (p * finite).sum(-1)
    own = scores.gather(1, drawn[:, None])
    at_last = scores == last
    found = {
        "allowed": own[:, 0].isfinite(),
        "rank": (scores > own).sum(-1) + 1,
        "margin": ((own - last)[:, 0] * float(sampling["temperature"])).nan_to_num(0.0),
        "is_last": at_last.gather(1, drawn[:, None])[:, 0],
        "p_last": (p * at_last).sum(-1),
        "log_p": finite.gather(1, drawn[:, None])[:, 0],
        "mean_log_p": mean,
        "var_log_p": (p * (finite - mean[:, None]).square()).sum(-1),
    }
    if seen is not None:
        found |= {"is_seen": seen.gather(1, drawn[:, None])[:, 0], "p_seen": (p * seen).sum(-1)}
    if eos is not None:
        found |= {"is_eos": drawn == eos, "p_eos": p[:, eos]}
    return {name: values.float().numpy() for name, values in found.items()}


def _save(path: Any, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with torch.inference_mode():
                reply = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
