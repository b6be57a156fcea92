// The frame's schedule as tables, which the host reads out of the built kernel's file.
#pragma once

#include "facts.cuh"
#include "dense_tags.h"
#include "frame_schedule.cuh"

namespace qwen_tts {

// Every exchange of a frame, in order. `pass` is kTalkerPass for the talker.
struct ExchangeList {
  struct {
    int pass, layer, step;
  } exchanges[kMaxExchanges];
};

struct ExchangeLister : FramePlace {
  ExchangeList list{};
  int total = 0;

  __device__ constexpr void advance(Step step) {
    list.exchanges[total].pass = at_pass;
    list.exchanges[total].layer = at_layer;
    list.exchanges[total].step = int(step);
    ++total;
  }
};

__device__ constexpr ExchangeList list_exchanges(int streams) {
  ExchangeLister lister{};
  walk_frame(lister, streams, 0);
  return lister.list;
}

}  // namespace qwen_tts

// Frames of up to kPairedStreams streams have one order, and those of more have another.
extern "C" __device__ const qwen_tts::ExchangeList exchanges_of_few = qwen_tts::list_exchanges(1);
extern "C" __device__ const qwen_tts::ExchangeList exchanges_of_many = qwen_tts::list_exchanges(qwen_tts::kMaxColumns);
extern "C" __device__ const char step_names[] = QWEN_TTS_STEP_NAMES;
extern "C" __device__ const char phase_names[] = QWEN_TTS_PHASE_NAMES;
QWEN_TTS_FACT(max_columns, qwen_tts::kMaxColumns);  // streams of a frame
QWEN_TTS_FACT(paired_streams, qwen_tts::kPairedStreams);
QWEN_TTS_FACT(num_exchanges_of_few, qwen_tts::num_exchanges(1));
QWEN_TTS_FACT(num_tags, qwen_tts::kMaxExchanges);
