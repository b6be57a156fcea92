"""The sampling of a client that chooses none: the project's values or the checkpoint's."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from session_stage import FakeDecoder

from qwen_megakernel import GenerationParams, SamplingParams, TTSDecoder
from qwen_megakernel.checkpoint import CheckpointError
from qwen_megakernel.config import ConfigError
from qwen_megakernel.model.generation_config import read_generation_config
from qwen_megakernel.serving.options import SpeechOptions, TurnOptions
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.tools.serve import add_arguments, resolve

ODD = {
    "do_sample": True, "temperature": 0.7, "top_k": 33, "top_p": 0.9, "repetition_penalty": 1.1,
    "subtalker_temperature": 0.6, "subtalker_top_k": 21, "subtalker_top_p": 0.8, "max_new_tokens": 7,
}  # fmt: skip
ORIGINAL = GenerationParams(SamplingParams(0.3, 15, 1.0, 1.05), SamplingParams(0.9, 50, 1.0, 1.0))


def with_config(source: Path, folder: Path, values: object) -> Path:
    """A copy of a checkpoint with another `generation_config.json`."""
    shutil.copytree(source, folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("values", [ODD, {"temperature": 0.5}, {}], ids=["odd", "one", "empty"])
def test_a_checkpoint_s_sampling_is_what_the_official_package_takes(tiny_base, tmp_path, values):
    folder = with_config(tiny_base, tmp_path / "checkpoint", values)
    theirs = official.inference.Qwen3TTSModel.from_pretrained(str(folder), dtype=torch.float32)
    expected = theirs._merge_generate_kwargs()
    found = read_generation_config(folder)
    for ours, prefix in ((found.talker, ""), (found.predictor, "subtalker_")):
        for name in ("temperature", "top_k", "top_p"):
            assert getattr(ours, name) == expected[prefix + name], prefix + name
    assert found.talker.repetition_penalty == expected["repetition_penalty"]
    assert (found.predictor.repetition_penalty, found.max_frames) == (1.0, None)


def test_a_checkpoint_without_the_file_has_the_official_defaults(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/generation_config.json").write_text("{}")
    found = read_generation_config(tmp_path)
    assert found == read_generation_config(tmp_path / "empty")
    assert (found.talker.temperature, found.talker.top_k) == (0.9, 50)


def test_a_checkpoint_that_does_not_sample_is_greedy(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "subtalker_dosample": false}')
    found = read_generation_config(tmp_path)
    assert (found.talker.temperature, found.predictor.temperature) == (0.0, 0.0)


@pytest.mark.parametrize(
    "values",
    [{"temperature": "0.9"}, {"top_k": 1.5}, {"top_p": True}, {"temperature": -1}, [1]],
    ids=str,
)
def test_a_wrong_value_is_named_with_its_file(tmp_path, values):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        read_generation_config(tmp_path)


def test_turns_that_choose_nothing_draw_with_what_was_loaded(tiny_base, tmp_path):
    folder = with_config(tiny_base, tmp_path / "checkpoint", ODD)
    with TTSDecoder.load(folder, num_slots=1) as tts:
        assert tts.default_params == ORIGINAL == GenerationParams()
    with TTSDecoder.load(folder, num_slots=1, sampling="checkpoint") as tts:
        assert tts.default_params == read_generation_config(folder)
        params = []
        prefill = tts._engine._backend.prefill
        tts._engine._backend.prefill = lambda *a: (params.append(a[2]), prefill(*a))
        tts.stream("Hi.").close()
        next(tts.stream("Hi.")).sum()
        own = GenerationParams(max_frames=2)
        assert np.abs(tts.synthesize("Hi.", params=own)).max() > 0
    assert (params[0].talker, params[0].predictor) == (
        tts.default_params.talker,
        tts.default_params.predictor,
    )
    assert params[-1] == own, "what the caller says wins"


def test_an_unknown_source_is_refused(tiny_base):
    with pytest.raises(CheckpointError, match="sampling is 'wild', allowed: original, checkpoint"):
        TTSDecoder.load(tiny_base, sampling="wild")


def test_what_a_client_names_wins_and_the_rest_is_the_server_s():
    decoder = FakeDecoder()
    state = ServerState(decoder, metrics=None)
    first = TurnOptions(params=decoder.default_params)
    chosen = state.choose(first, SpeechOptions(top_k=7)).params.talker
    assert (chosen.temperature, chosen.top_k) == (0.4, 7)
    chosen = state.choose(first, SpeechOptions(temperature=0.0)).params.talker
    assert (chosen.temperature, chosen.top_k) == (0.0, 12)


def parse_options(arguments, environ):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return resolve(parser.parse_args(arguments), environ)


def test_the_server_takes_the_option_from_command_line_and_environment(capsys):
    assert parse_options([], {}).sampling == "original"
    assert parse_options(["--sampling", "checkpoint"], {}).sampling == "checkpoint"
    assert parse_options([], {"QWEN_MEGAKERNEL_SAMPLING": "checkpoint"}).sampling == "checkpoint"
    with pytest.raises(SystemExit):
        parse_options(["--sampling", "wild"], {})
    with pytest.raises(SystemExit):
        parse_options(["--help"], {})
    shown = " ".join(capsys.readouterr().out.split())
    assert "temperature 0.3, top-k 15" in shown
