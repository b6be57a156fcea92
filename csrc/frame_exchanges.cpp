// The frame's schedule as text, for the host.
#include <string>

#include "dense_tags.h"
#include "frame_schedule.cuh"
#include "kernel_tts.h"

// Host sources are compiled with hidden symbols. Tests look these up by name.
#define QWEN_TTS_VISIBLE __attribute__((visibility("default")))

namespace qwen_tts {
namespace {

// Writes a line for each exchange.
struct ExchangeLister : FramePlace {
  std::string& lines;

  explicit ExchangeLister(std::string& to) : lines(to) {}
  void advance(Step step) {
    lines += at_pass == kTalkerPass ? "talker " : "predictor ";
    lines += std::to_string(at_pass) + " " + std::to_string(at_layer) + " " + kStepNames[int(step)] + "\n";
  }
};

}  // namespace
}  // namespace qwen_tts

extern "C" QWEN_TTS_VISIBLE const char* frame_exchanges(int streams) {
  thread_local std::string lines;
  lines.clear();
  qwen_tts::ExchangeLister lister(lines);
  qwen_tts::walk_frame(lister, streams, false);
  return lines.c_str();
}

extern "C" QWEN_TTS_VISIBLE const char* frame_phases() { return qwen_tts::kPhaseNames; }
