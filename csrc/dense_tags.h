// The tags of the words of a wide frame (dense_words.cuh), and the proof that no reader takes an old word for a new
// one: two writes of a word that follow each other never carry the same tag.
//
// Most words carry the number of their exchange in the launch, mod 16. Gate-up's words come in halves of two bits each,
// which is too little for that: they carry the number of their layer in the launch, mod 4. The fed input of a model
// carries the number of its pass.
#pragma once

#include "frame_schedule.cuh"

namespace qwen_tts {

constexpr int kDenseTags = 16;
constexpr int kClearedTag = kDenseTags - 1;  // of words whose bits are all ones (kClearedByte)
constexpr int kClearedByte = 0xff;
constexpr uint32_t kOnceTag = 5;  // of words that a launch writes once
constexpr int kFirstNumber = 1;   // of a launch's first exchange

// The tag of gate-up's result. Its two halves, of two bits each, are equal.
template <class D>
__device__ __forceinline__ constexpr uint32_t inner_tag(int pass, int layer) {
  const int number = is_same<D, T> ? layer : T::kLayers + pass * P::kLayers + layer;
  return (number & 3) * 5;
}

// The tag of what is fed to a model before its first layer.
template <class D>
__device__ __forceinline__ constexpr uint32_t fed_tag(int pass) {
  return is_same<D, T> ? 0 : (pass + 1) % kDenseTags;
}

// Walks a wide frame and compares each tag of a buffer with the one before it.
struct DenseTags : FramePlace {
  int total = 0;
  uint32_t last[5] = {kClearedTag, kClearedTag, kClearedTag, kClearedTag, kClearedTag};  // Step::kQkv to Step::kDown
  uint32_t last_fed = fed_tag<T>(kTalkerPass);
  bool distinct = last_fed != kClearedTag;

  __device__ constexpr void begin_pass(int pass) {
    FramePlace::begin_pass(pass);
    if (pass == 0) feed(0);
  }
  __device__ constexpr void feed(int) { write(last_fed, fed_tag<P>(at_pass)); }
  __device__ constexpr void advance(Step step) {
    const bool once = step == Step::kQkv && at_pass == 0 && at_layer == P::kLayers - 1;
    if (step <= Step::kDown && !once) write(last[int(step)], tag_of(step));
    ++total;
  }

 private:
  __device__ constexpr uint32_t tag_of(Step step) const {
    if (step != Step::kGateUp) return (total + kFirstNumber) % kDenseTags;
    return at_pass == kTalkerPass ? inner_tag<T>(at_pass, at_layer) : inner_tag<P>(at_pass, at_layer);
  }
  __device__ constexpr void write(uint32_t& before, uint32_t tag) {
    if (before == tag) distinct = false;
    before = tag;
  }
};
__device__ constexpr bool dense_tags_are_distinct() {
  DenseTags tags{};
  walk_frame(tags, kMaxColumns, 0);
  return tags.distinct;
}
static_assert(dense_tags_are_distinct(), "a word's tag must differ from the one that it has");

}  // namespace qwen_tts
