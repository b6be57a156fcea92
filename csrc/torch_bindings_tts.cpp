// The kernel as a torch class. Tensors are checked once when it is made, and kept. A launch fills in what changes from
// frame to frame, and checks that. QWEN_TTS_LIBRARY is a name of its own for each build, so that kernels of several
// shapes can live in one process.
#include <cstring>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "kernel_tts.h"
#include "products.cuh"

namespace qwen_tts {
namespace {

void check(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// What a tensor must be.
struct Expected {
  at::ScalarType dtype;
  int64_t count;         // elements
  bool on_host = false;  // else on the GPU
};

void check_tensor(const std::string& name, const at::Tensor& tensor, const Expected& expected) {
  TORCH_CHECK(tensor.scalar_type() == expected.dtype, name, " is ", tensor.scalar_type(), ", expected ",
              expected.dtype);
  TORCH_CHECK(tensor.is_cuda() != expected.on_host, name, " is on ", tensor.device(), ", expected ",
              expected.on_host ? "the host" : "a CUDA device");
  TORCH_CHECK(tensor.numel() == expected.count, name, " has ", tensor.numel(), " elements, expected ", expected.count,
              "; its shape is ", tensor.sizes());
  TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
}

// Tensors by the names of FrameParams's fields.
class Tensors {
 public:
  explicit Tensors(c10::Dict<std::string, at::Tensor> tensors) : tensors_(std::move(tensors)) {
    TORCH_CHECK(tensors_.contains("k_cache"), "tensor k_cache is missing");
    device_ = tensors_.at("k_cache").device();
  }
  int64_t count(const std::string& name) const {
    TORCH_CHECK(tensors_.contains(name), "tensor ", name, " is missing");
    return tensors_.at(name).numel();
  }
  template <class X>
  X* take(const std::string& name, const Expected& expected) const {
    TORCH_CHECK(tensors_.contains(name), "tensor ", name, " is missing");
    const at::Tensor& tensor = tensors_.at(name);
    check_tensor(name, tensor, expected);
    TORCH_CHECK(expected.on_host || tensor.device() == device_, name, " is on ", tensor.device(), ", k_cache on ",
                device_);
    return static_cast<X*>(tensor.data_ptr());
  }

 private:
  c10::Dict<std::string, at::Tensor> tensors_;
  at::Device device_ = at::kCUDA;
};

class FrameKernel : public torch::CustomClassHolder {
 public:
  // tensors: one for every pointer of FrameParams that lasts, under the field's name.
  FrameKernel(c10::Dict<std::string, at::Tensor> tensors, int64_t num_slots, int64_t max_positions, int64_t grid,
              int64_t max_spins)
      : tensors_(std::move(tensors)), grid_(int(grid)) {
    int ctas = 0;
    check(frame_co_resident(&ctas), "the kernel cannot be prepared");
    TORCH_CHECK(ctas >= 1, "an SM cannot hold one CTA of the kernel");
    TORCH_CHECK(grid >= kTileColumns && grid <= frame_max_grid(), "grid is ", grid, ", allowed: ", kTileColumns, " to ",
                frame_max_grid());
    TORCH_CHECK(num_slots >= 1, "num_slots is ", num_slots, ", allowed: at least 1");
    const int most = frame_max_positions(int(grid));
    TORCH_CHECK(max_positions >= 1 && max_positions <= most, "max_positions is ", max_positions, ", allowed on ", grid,
                " CTAs: 1 to ", most);
    p_.num_slots = int(num_slots);
    p_.max_positions = int(max_positions);
    p_.max_spins = unsigned(max_spins);
    p_.withheld_cta = -1;
    take_weights();
    take_state();
  }

  // streams: uint8 on the host, Stream by Stream. The tensors are FrameParams's fields, for `n` streams; forced_codes,
  // noise and the dumps are for tests.
  void launch(const at::Tensor& streams, bool prefill, int64_t epoch, const at::Tensor& text_rows,
              const std::optional<at::Tensor>& noise, const std::optional<at::Tensor>& forced_codes,
              const std::optional<at::Tensor>& dump_logits, const std::optional<at::Tensor>& dump_exchanges,
              const std::optional<at::Tensor>& stamps, int64_t cuda_stream) {
    take_streams(streams);
    const int64_t n = p_.num_columns;
    TORCH_CHECK(!prefill || n <= kTileColumns, "a prefill has ", n, " rows, allowed: 1 to ", kTileColumns);
    p_.prefill = prefill;
    p_.epoch = uint32_t(epoch);
    check_tensor("text_rows", text_rows, {at::kFloat, n * T::kHidden});
    p_.text_rows = static_cast<const float*>(text_rows.data_ptr());
    p_.noise = optional<float>("noise", noise, {at::kFloat, n * kNumCodebooks * T::kVocab});
    p_.forced_codes = optional<int>("forced_codes", forced_codes, {at::kInt, n * kNumCodebooks});
    p_.dump_logits = optional<float>("dump_logits", dump_logits, {at::kFloat, n * kNumCodebooks * T::kVocab});
    p_.dump_exchanges = optional<float>("dump_exchanges", dump_exchanges,
                                        {at::kFloat, int64_t(frame_num_tags()) * frame_dump_rows() * kMaxColumns});
    p_.stamps = optional<uint64_t>("stamps", stamps, {at::kLong, frame_num_tags()});
    check(launch_frame(&p_, grid_, reinterpret_cast<cudaStream_t>(cuda_stream)), "the kernel cannot be launched");
  }

  void keep_in_l2(int64_t bytes_of_each_layer) { p_.predictor_kept_bytes = bytes_of_each_layer; }
  void withhold(int64_t cta) { p_.withheld_cta = int(cta); }

 private:
  void take_weights() {
    using bf16 = __nv_bfloat16;
    const auto weights = [](int64_t bytes) { return Expected{at::kBFloat16, bytes / int64_t(sizeof(bf16))}; };
    const auto values = [](int64_t count) { return Expected{at::kBFloat16, count}; };
    constexpr int64_t kFed = kNumCodebooks - 1;  // codes 0 to 14 are fed to the predictor
    constexpr int64_t kProjectionBytes = kProjects ? Projection::kBytes : 0;
    p_.talker_layers = tensors_.take<char>("talker_layers", weights(T::kLayers * TalkerProducts::kLayerBytes));
    p_.talker_head = tensors_.take<char>("talker_head", weights(TalkerProducts::Head::kBytes + kProjectionBytes));
    p_.predictor_layers = tensors_.take<char>("predictor_layers", weights(P::kLayers * PredictorProducts::kLayerBytes));
    p_.predictor_heads = tensors_.take<char>("predictor_heads", weights(kFed * PredictorProducts::Head::kBytes));
    p_.talker_norm = tensors_.take<bf16>("talker_norm", values(T::kHidden));
    p_.talker_qk_norms = tensors_.take<bf16>("talker_qk_norms", values(T::kLayers * 2 * T::kHeadDim));
    p_.predictor_qk_norms = tensors_.take<bf16>("predictor_qk_norms", values(P::kLayers * 2 * P::kHeadDim));
    p_.talker_rope = tensors_.take<float>("talker_rope", {at::kFloat, int64_t(p_.max_positions) * T::kHeadDim});
    p_.predictor_rope = tensors_.take<float>("predictor_rope", {at::kFloat, kNumCodebooks * P::kHeadDim});
    p_.codec_embedding = tensors_.take<bf16>("codec_embedding", values(int64_t(T::kVocab) * T::kHidden));
    p_.predictor_embeddings = tensors_.take<bf16>("predictor_embeddings", values(kFed * P::kVocab * T::kHidden));
    p_.predictor_first_qkv =
        tensors_.take<bf16>("predictor_first_qkv", values((kFed - 1) * P::kVocab * PredictorProducts::Qkv::kRows));
    p_.projected_embeddings =
        tensors_.take<bf16>("projected_embeddings", values(kProjects ? kFed * P::kVocab * P::kHidden : 0));
    p_.projection_bias = tensors_.take<bf16>("projection_bias", values(kProjects ? P::kHidden : 0));
  }

  void take_state() {
    using bf16 = __nv_bfloat16;
    constexpr int64_t kPage = int64_t(T::kLayers) * T::kKvHeads * kSplitPositions * T::kHeadDim;
    const int64_t pages = tensors_.count("k_cache") / kPage, cache = pages * kPage;
    TORCH_CHECK(pages >= 1 && pages * T::kKvHeads * T::kLayers < INT32_MAX, "the cache has ", pages, " pages");
    p_.num_pages = int(pages);
    p_.page_table = tensors_.take<int>("page_table",
                                       {at::kInt, int64_t(p_.num_slots) * ceil_div(p_.max_positions, kSplitPositions)});
    constexpr int64_t kPredictorKv = int64_t(P::kLayers) * kMaxColumns * P::kKvHeads * 2 * kNumCodebooks * P::kHeadDim;
    p_.k_cache = tensors_.take<bf16>("k_cache", {at::kBFloat16, cache});
    p_.v_cache = tensors_.take<bf16>("v_cache", {at::kBFloat16, cache});
    p_.predictor_kv = tensors_.take<bf16>("predictor_kv", {at::kBFloat16, kPredictorKv});
    p_.next_rows = tensors_.take<float>("next_rows", {at::kFloat, int64_t(p_.num_slots) * T::kHidden});
    p_.seen = tensors_.take<uint32_t>("seen", {at::kInt, int64_t(p_.num_slots) * (T::kVocab / 32)});
    p_.codes = tensors_.take<int>("codes", {at::kInt, kMaxColumns * kNumCodebooks});
    p_.noise_scratch = tensors_.take<float>("noise_scratch", {at::kFloat, int64_t(kMaxColumns) * frame_noise_floats()});
    p_.packets = tensors_.take<uint64_t>("packets", {at::kLong, frame_num_packets()});
    p_.watchdog = tensors_.take<int>("watchdog", {at::kInt, 4, true});
  }

  void take_streams(const at::Tensor& streams) {
    const int64_t bytes = streams.numel();
    TORCH_CHECK(bytes > 0 && bytes % sizeof(Stream) == 0 && bytes <= int64_t(sizeof(p_.streams)), "streams have ",
                bytes, " bytes, expected 1 to ", kMaxColumns, " times ", sizeof(Stream));
    check_tensor("streams", streams, {at::kByte, bytes, true});
    p_.num_columns = int(bytes / sizeof(Stream));
    std::memcpy(p_.streams, streams.data_ptr(), bytes);
    for (int column = 0; column < p_.num_columns; ++column) {
      const Stream& stream = p_.streams[column];
      TORCH_CHECK(stream.slot >= 0 && stream.slot < p_.num_slots, "column ", column, ": slot is ", stream.slot,
                  ", allowed: 0 to ", p_.num_slots - 1);
      TORCH_CHECK(stream.position >= 0 && stream.position < p_.max_positions, "column ", column, ": position is ",
                  stream.position, ", allowed: 0 to ", p_.max_positions - 1);
      TORCH_CHECK(stream.first >= 0 && stream.first <= column, "column ", column, ": first is ", stream.first,
                  ", allowed: 0 to ", column);
    }
  }

  template <class X>
  static X* optional(const char* name, const std::optional<at::Tensor>& tensor, const Expected& expected) {
    if (!tensor) return nullptr;
    check_tensor(name, *tensor, expected);
    return static_cast<X*>(tensor->data_ptr());
  }

  Tensors tensors_;
  FrameParams p_{};
  int grid_;
};

TORCH_LIBRARY(QWEN_TTS_LIBRARY, m) {
  m.class_<FrameKernel>("FrameKernel")
      .def(torch::init<c10::Dict<std::string, at::Tensor>, int64_t, int64_t, int64_t, int64_t>())
      .def("launch", &FrameKernel::launch)
      .def("keep_in_l2", &FrameKernel::keep_in_l2)
      .def("withhold", &FrameKernel::withhold);
  m.def("max_columns() -> int", [] { return int64_t(frame_max_columns()); });
  m.def("prefill_rows() -> int", [] { return int64_t(kTileColumns); });
  m.def("max_grid() -> int", [] { return int64_t(frame_max_grid()); });
  m.def("num_packets() -> int", [] { return frame_num_packets(); });
  m.def("num_tags() -> int", [] { return int64_t(frame_num_tags()); });
  m.def("noise_floats() -> int", [] { return int64_t(frame_noise_floats()); });
  m.def("dump_rows() -> int", [] { return int64_t(frame_dump_rows()); });
  m.def("stream_bytes() -> int", [] { return int64_t(sizeof(Stream)); });
  m.def("exchanges(int streams) -> str", [](int64_t streams) {
    TORCH_CHECK(streams >= 1 && streams <= kMaxColumns, "streams is ", streams, ", allowed: 1 to ", kMaxColumns);
    return std::string(frame_exchanges(int(streams)));
  });
  m.def("phases() -> str", [] { return std::string(frame_phases()); });
}

}  // namespace
}  // namespace qwen_tts
