// The kernel as a torch class: tensors are checked once when it is made, and kept; a launch fills
// in what changes from frame to frame. QWEN_TTS_LIBRARY is a name of its own for each build, so
// that kernels of several shapes can live in one process.
#include <cstring>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "kernel_tts.h"

namespace qwen_tts {
namespace {

void check(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

class FrameKernel : public torch::CustomClassHolder {
 public:
  // tensors: one for every pointer of FrameParams that lasts, under the field's name.
  FrameKernel(c10::Dict<std::string, at::Tensor> tensors, int64_t num_slots, int64_t max_positions, int64_t grid,
              int64_t max_spins)
      : tensors_(std::move(tensors)), grid_(int(grid)) {
    int ctas = 0;
    check(frame_co_resident(&ctas), "the kernel cannot be prepared");
    TORCH_CHECK(ctas >= 1, "an SM cannot hold one CTA of the kernel");
    TORCH_CHECK(grid >= kMaxColumns && grid <= frame_max_grid(), "grid is ", grid, ", allowed: ", kMaxColumns, " to ",
                frame_max_grid());
    using bf16 = __nv_bfloat16;
    p_.talker_layers = take<char>("talker_layers");
    p_.talker_head = take<char>("talker_head");
    p_.predictor_layers = take<char>("predictor_layers");
    p_.predictor_heads = take<char>("predictor_heads");
    p_.talker_norm = take<bf16>("talker_norm");
    p_.talker_qk_norms = take<bf16>("talker_qk_norms");
      p_.predictor_qk_norms = take<bf16>("predictor_qk_norms");
    p_.talker_rope = take<float>("talker_rope");
    p_.predictor_rope = take<float>("predictor_rope");
    p_.codec_embedding = take<bf16>("codec_embedding");
    p_.predictor_embeddings = take<bf16>("predictor_embeddings");
    p_.predictor_first_qkv = take<bf16>("predictor_first_qkv");
    p_.projected_embeddings = take<bf16>("projected_embeddings");
    p_.projection_bias = take<bf16>("projection_bias");
    p_.k_cache = take<bf16>("k_cache");
    p_.v_cache = take<bf16>("v_cache");
    p_.predictor_kv = take<bf16>("predictor_kv");
    p_.next_rows = take<float>("next_rows");
    p_.seen = take<uint32_t>("seen");
    p_.codes = take<int>("codes");
    p_.noise_aside = take<float>("noise_aside");
    p_.packets = take<uint64_t>("packets");
    p_.watchdog = take<int>("watchdog");
    p_.num_slots = int(num_slots);
    p_.max_positions = int(max_positions);
    p_.max_spins = unsigned(max_spins);
    p_.withheld_cta = -1;
  }

  // columns: uint8 on the CPU, Column by Column. forced_codes, noise and the dumps are for tests.
  void launch(const at::Tensor& columns, bool prefill, int64_t epoch, const at::Tensor& text_rows,
              const std::optional<at::Tensor>& noise, const std::optional<at::Tensor>& forced_codes,
              const std::optional<at::Tensor>& dump_logits, const std::optional<at::Tensor>& dump_exchanges,
              const std::optional<at::Tensor>& stamps, int64_t stream) {
    const int64_t bytes = columns.nbytes();
    TORCH_CHECK(bytes > 0 && bytes % sizeof(Column) == 0 && bytes <= int64_t(sizeof(p_.columns)),
                "columns have ", bytes, " bytes, expected 1 to ", kMaxColumns, " times ", sizeof(Column));
    std::memcpy(p_.columns, columns.data_ptr(), bytes);
    p_.num_columns = int(bytes / sizeof(Column));
    p_.prefill = prefill;
    p_.epoch = uint32_t(epoch);
    p_.text_rows = static_cast<const float*>(text_rows.data_ptr());
    p_.noise = optional<float>(noise);
    p_.forced_codes = optional<int>(forced_codes);
    p_.dump_logits = optional<float>(dump_logits);
    p_.dump_exchanges = optional<float>(dump_exchanges);
    p_.stamps = optional<uint64_t>(stamps);
    check(launch_frame(&p_, grid_, reinterpret_cast<cudaStream_t>(stream)), "the kernel cannot be launched");
  }

  void keep_in_l2(int64_t bytes_of_each_layer) { p_.predictor_kept_bytes = bytes_of_each_layer; }
  void withhold(int64_t cta) { p_.withheld_cta = int(cta); }

 private:
  template <class X>
  X* take(const std::string& name) {
    TORCH_CHECK(tensors_.contains(name), "tensor ", name, " is missing");
    const at::Tensor& tensor = tensors_.at(name);
    TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
    return static_cast<X*>(tensor.data_ptr());
  }
  template <class X>
  static X* optional(const std::optional<at::Tensor>& tensor) {
    return tensor ? static_cast<X*>(tensor->data_ptr()) : nullptr;
  }

  c10::Dict<std::string, at::Tensor> tensors_;
  FrameParams p_{};
  int grid_;
};

TORCH_LIBRARY(QWEN_TTS_LIBRARY, m) {
  m.class_<FrameKernel>("FrameKernel")
      .def(torch::init<c10::Dict<std::string, at::Tensor>, int64_t, int64_t, int64_t, int64_t>())
      .def("launch", &FrameKernel::launch)
      .def("keep_in_l2", &FrameKernel::keep_in_l2)
      .def("withhold", &FrameKernel::withhold);
  m.def("max_grid() -> int", [] { return int64_t(frame_max_grid()); });
  m.def("num_packets() -> int", [] { return frame_num_packets(); });
  m.def("num_tags() -> int", [] { return int64_t(frame_num_tags()); });
  m.def("noise_floats() -> int", [] { return int64_t(frame_noise_floats()); });
  m.def("dump_rows() -> int", [] { return int64_t(frame_dump_rows()); });
  m.def("column_bytes() -> int", [] { return int64_t(sizeof(Column)); });
}

}  // namespace
}  // namespace qwen_tts
