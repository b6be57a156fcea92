// A decoder layer of a wide frame: the five exchanges of layer.cuh, with another owner of the residual.
//
// In a narrow frame every CTA adds the deltas of O and down to its own copy of the residual. 32 columns of it would fill the
// registers and the shared memory of an SM. So here one CTA makes all of a strip of O, with both parts of k. It adds them
// to its strip of the residual, in fp32, and publishes the sum as the next product reads it, rounded. Down's strips belong
// to other CTAs where there are enough. The two owners of a strip hand it over in packets of fp32, which are there
// long before they are needed.
#pragma once

#include "predictor.cuh"
#include "wide_gemv.cuh"

namespace qwen_tts {

// The tag of the talker's last down: its rows are the hidden row of the frame, before the final norm.
__device__ __forceinline__ uint32_t hidden_tag(const FrameParams& p) { return p.epoch + kTalkerLogits - 1; }

// The talker's hidden row as the predictor gets it: its final norm, from the sum of squares that the head has left. Whole
// warps; a lane's column is `first` + lane % 8 for the scale.
__device__ __forceinline__ float hidden_scale(const WideContext& c, int first) {
  return rms_scale<T>(squares_part(c.scratch, 1, first));
}
__device__ __forceinline__ float2 normed_pair(const FrameParams& p, uint32_t bits, float scale, int row) {
  const float2 x = unpack_bf16(bits);
  const float2 g = unpack_bf16(__ldg(reinterpret_cast<const uint32_t*>(p.talker_norm + row)));
  return make_float2(x.x * (scale * g.x), x.y * (scale * g.y));
}

// The normed hidden row as an operand.
template <class Prod>
struct HiddenOperand {
  DenseOperand<Prod> dense;

  __device__ __forceinline__ void ask(int place, int tile, int part, int first) {
    dense.ask(place, tile, part, first);
  }
  __device__ __forceinline__ void get(int place, int tile, int part, int first, uint2 (&f)[Prod::kHeld]) {
    const WideContext& c = dense.c;
    dense.get(place, tile, part, first, f);
    const float scale = __shfl_sync(~0u, hidden_scale(c, tile * kTileColumns), c.column());
    const int row = dense.chunk(part, first) * kChunk + 2 * (lane_index() & 3);
    if (!Prod::real(warp_index())) return;
#pragma unroll
    for (int j = 0; j < Prod::kHeld; ++j) {
      const float2 low = normed_pair(c.p, f[j].x, scale, row + kChunk * j);
      const float2 high = normed_pair(c.p, f[j].y, scale, row + kChunk * j + 8);
      f[j] = make_uint2(pack_bf16(low.x, low.y), pack_bf16(high.x, high.y));
    }
  }
};

// Codes that a pass after the first feeds, as each warp keeps them.
__device__ __forceinline__ const __nv_bfloat16* fed_row(const WideContext& c, int column) {
  const int codebook = c.pass() - 1, code = c.scratch.codes[warp_index()][min(column, c.p.num_columns - 1)];
  // An EOS is beyond the projected table; what follows it in the frame is not used.
  return kProjects ? c.p.projected_embeddings + (int64_t(codebook) * P::kVocab + min(code, P::kVocab - 1)) * P::kHidden
                   : embedding_row(c.p, codebook, code);
}

// The operand of QKV: the residual, or in the first layer what the model is fed.
template <class D>
struct QkvOperand {
  using Prod = typename Products<D>::Qkv;
  static constexpr bool kTalker = std::is_same_v<D, T>;
  DenseOperand<Prod> dense;

  __device__ __forceinline__ bool direct() const { return dense.c.layer() == 0 && (kTalker || dense.c.pass() > 0); }
  __device__ __forceinline__ void ask(int place, int tile, int part, int first) {
    if (!direct()) dense.ask(place, tile, part, first);
  }
  __device__ __forceinline__ void get(int place, int tile, int part, int first, uint2 (&f)[Prod::kHeld]) {
    const WideContext& c = dense.c;
    if (!direct()) {
      if constexpr (!kTalker && !kProjects) {
        if (c.layer() == 0) {
          HiddenOperand<Prod> hidden{dense};
          hidden.get(place, tile, part, first, f);
          return;
        }
      }
      dense.get(place, tile, part, first, f);
      return;
    }
    const int column = tile * kTileColumns + c.column(), from = Residual<D>::first_k();
#pragma unroll
    for (int j = 0; j < Prod::kHeld; ++j) f[j] = make_uint2(0, 0);
    if (!c.uses(column) || !Prod::real(warp_index())) return;
    if constexpr (kTalker) {
      const float* next = c.p.next_rows + int64_t(c.p.streams[column].slot) * T::kHidden + from;
      const float* text = c.p.text_rows + int64_t(column) * T::kHidden + from;
      auto pair = [&](int at) {
        const float2 a = __ldcg(reinterpret_cast<const float2*>(next + at));
        const float2 b = __ldcg(reinterpret_cast<const float2*>(text + at));
        return pack_bf16(a.x + b.x, a.y + b.y);
      };
#pragma unroll
      for (int j = 0; j < Prod::kHeld; ++j) f[j] = make_uint2(pair(kChunk * j), pair(kChunk * j + 8));
    } else {
      const uint32_t* row = reinterpret_cast<const uint32_t*>(fed_row(c, column) + from);
#pragma unroll
      for (int j = 0; j < Prod::kHeld; ++j)
        f[j] = make_uint2(__ldg(row + kChunk / 2 * j), __ldg(row + kChunk / 2 * j + 4));
    }
  }
};

namespace wide_step {

// Publish a lane's row with those of the three lanes that make a word of it: the odd row of the pair is eight lanes further,
// the pair eight rows further sixteen lanes.
__device__ __forceinline__ void publish_rows(const WideContext& c, int vector, int strip, int tile, const WideCell& cell,
                                             float row, uint32_t tag) {
  const float2 low = make_float2(row, __shfl_down_sync(~0u, row, kTileColumns));
  const float2 high = make_float2(__shfl_down_sync(~0u, low.x, 16), __shfl_down_sync(~0u, low.y, 16));
  const int column = tile * kTileColumns + cell.column;
  if (!cell.leads || !c.uses(column)) return;
  dump_pair(c, strip * kStripRows + 2 * cell.pair, column, low.x, low.y);
  if (cell.pair >= 4) return;
  publish_word(c, dense_vector(c.p, tile, vector) + dense_at(strip, cell.column * 4 + cell.pair), low, high, tag);
}

template <class D>
__device__ __forceinline__ void qkv(WideContext& c) {
  using Qkv = typename Products<D>::Qkv;
  using L = DenseLayout;
  constexpr bool kPredictor = std::is_same_v<D, P>;
  // In the predictor's first pass the first layer reads what the talker left.
  const bool fed = kPredictor && c.layer() == 0 && c.pass() == 0;
  const int vector = fed && kProjects ? L::kProjected : L::kAfterDown;
  const uint32_t tag = !fed ? dense_number(c, c.tag - 1) : kProjects ? kOnceTag : dense_number(c, hidden_tag(c.p));
  QkvOperand<D> x{{c, vector, tag, Phase::kInput}};
  const bool first_position = kPredictor && ends_with_qkv(c.pass(), c.layer());
  wide_gemv<D, Qkv, 0>(c, x, [&](int strip, int tile, const WideCell& cell, float row, float scale) {
    publish_rows(c, first_position ? L::kFirstPositionQkv : L::kQkv, strip, tile, cell, row * scale,
                 first_position ? kOnceTag : dense_number(c, c.tag));
  });
}

template <class D>
__device__ __forceinline__ void gate_up(WideContext& c) {
  using GateUp = typename Products<D>::GateUp;
  DenseOperand<GateUp> x{c, DenseLayout::kAfterOut, dense_number(c, c.tag - 1), Phase::kInput};
  wide_gemv<D, GateUp, 1>(c, x, [&](int strip, int tile, const WideCell& cell, float row, float scale) {
    // Rows 0..7 of a strip are gates, 8..15 the ups of the same eight.
    const float up = __shfl_down_sync(~0u, row, 16);
    const float inner = silu(row * scale) * (up * scale), next = __shfl_down_sync(~0u, inner, kTileColumns);
    const int column = tile * kTileColumns + cell.column;
    if (!cell.leads || cell.pair >= 4 || !c.uses(column)) return;
    dump_pair(c, strip * (kStripRows / 2) + 2 * cell.pair, column, inner, next);
    // Four neighbouring rows are a word (weight_packing.py); two warps make a half each.
    const int lane = cell.column * 4 + 2 * (strip & 1) + cell.pair / 2;
    publish_half(c, dense_vector(c.p, tile, DenseLayout::kMlpInner) + dense_at(strip / 2, lane), cell.pair & 1, inner,
                 next, inner_tag(c.tag - c.p.epoch));
  });
}

// The residual of the layer's input, of the row and column of a lane in a finishing warp, as a packet.
template <class D>
__device__ __forceinline__ uint64_t fed_residual(const WideContext& c, int row, int column, uint32_t tag) {
  const FrameParams& p = c.p;
  float x = 0.f;
  if constexpr (std::is_same_v<D, T>) {
    if (c.uses(column))
      x = __ldcg(p.next_rows + int64_t(p.streams[column].slot) * T::kHidden + row) +
          __ldcg(p.text_rows + int64_t(column) * T::kHidden + row);
  } else if (c.pass() > 0) {
    x = __bfloat162float(fed_row(c, column)[row]);
  } else if constexpr (kProjects) {
    const uint64_t* from = dense_vector(p, column / kTileColumns, DenseLayout::kProjected) +
                           dense_at(row / kChunk, column % kTileColumns * 4 + row % 8 / 2);
    uint64_t word = load_word(from);
    for (unsigned spin = 0; c.uses(column) && dense_lacks(word, dense_tag(kOnceTag)) != 0; ++spin) {
      c.dog.after(spin, Phase::kInput, c.tag - 1);
      word = load_word(from);
    }
    const float2 pair = unpack_bf16(dense_decode(row & 8 ? high_half(word) : uint32_t(word)));
    x = row & 1 ? pair.y : pair.x;
  } else {
    const float scale = hidden_scale(c, column / kTileColumns * kTileColumns);
    const uint64_t* from = p.packets + PacketLayout::kAfterDown + row * kMaxColumns + column;
    uint64_t packet = load_word(from);
    for (unsigned spin = 0; c.uses(column) && high_half(packet) != hidden_tag(p); ++spin) {
      c.dog.after(spin, Phase::kInput, hidden_tag(p));
      packet = load_word(from);
    }
    const float rounded = unpack_bf16(pack_bf16(__uint_as_float(uint32_t(packet)), 0.f)).x;
    x = rounded * (scale * __bfloat162float(p.talker_norm[row]));
  }
  return uint64_t(tag) << 32 | __float_as_uint(x);
}

// Add a product to the residual: from the packets of `from`, which have `tag`, to those of `to`, and to the vector that the
// next product reads.
template <class D, class Prod, class Before>
__device__ __forceinline__ void add(WideContext& c, int first_strip, int input, uint32_t input_tag, Phase phase,
                                    const Before& before, int64_t from, uint32_t tag, int64_t to, int vector) {
  DenseOperand<Prod> x{c, input, input_tag, phase};
  wide_add<Prod>(c, first_strip, x, before,
                 [&](int strip, int tile, const WideCell& cell, const auto& parts, uint64_t packet) {
                   const int column = tile * kTileColumns + cell.column, row = strip * kStripRows + cell.row();
                   const int at = row * kMaxColumns + column;
                   const bool uses = c.uses(column);
                   for (unsigned spin = 0; !__all_sync(~0u, !uses || high_half(packet) == tag); ++spin) {
                     c.dog.after(spin, Phase::kInput, tag);
                     packet = load_word(c.p.packets + from + at);
                   }
                   float sum = __uint_as_float(uint32_t(packet));
#pragma unroll
                   for (int part = 0; part < Prod::kSplit; ++part) {
                     const float delta = unpack_bf16(pack_bf16(parts[part], 0.f)).x;
                     const float odd = __shfl_down_sync(~0u, delta, kTileColumns);
                     if (cell.leads && uses) dump_pair(c, part * D::kHidden + row, column, delta, odd);
                     sum += delta;
                   }
                   const float2 low = make_float2(sum, __shfl_down_sync(~0u, sum, kTileColumns));
                   const float2 high = make_float2(__shfl_down_sync(~0u, low.x, 16), __shfl_down_sync(~0u, low.y, 16));
                   if (!uses) return;
                   if (cell.leads && cell.pair < 4)
                     publish_word(c, dense_vector(c.p, tile, vector) + dense_at(strip, cell.column * 4 + cell.pair), low,
                                  high, dense_number(c, c.tag));
                   store_packet(c.p.packets + to + at, __float_as_uint(sum), c.tag);
                 });
}

template <class D>
__device__ __forceinline__ void out(WideContext& c) {
  using L = PacketLayout;
  const uint32_t tag = c.tag - 3;  // of the down before
  auto before = [&](int strip, int tile, int row, int column) {
    const int at = strip * kStripRows + row, of = tile * kTileColumns + column;
    return c.layer() == 0 ? fed_residual<D>(c, at, of, tag)
                          : load_word(c.p.packets + L::kAfterDown + at * kMaxColumns + of);
  };
  add<D, typename Products<D>::Out>(c, out_owner_first(), DenseLayout::kHeadsOut, dense_number(c, c.tag - 1), Phase::kOut,
                                    before, L::kAfterDown, tag, L::kAfterOut, DenseLayout::kAfterOut);
}

template <class D>
__device__ __forceinline__ void down(WideContext& c) {
  using L = PacketLayout;
  auto before = [&](int strip, int tile, int row, int column) {
    return load_word(c.p.packets + L::kAfterOut + (strip * kStripRows + row) * kMaxColumns + tile * kTileColumns +
                     column);
  };
  add<D, typename Products<D>::Down>(c, down_owner_first<D>(), DenseLayout::kMlpInner, inner_tag(c.tag - 1 - c.p.epoch),
                                     Phase::kMlp, before, L::kAfterOut, c.tag - 2, L::kAfterDown, DenseLayout::kAfterDown);
}

// Final norm and a head; logits go out under c.tag.
template <class D>
__device__ __forceinline__ void head(WideContext& c) {
  using Head = typename Products<D>::Head;
  DenseOperand<Head> x{c, DenseLayout::kAfterDown, dense_number(c, c.tag - 1), Phase::kInput};
  wide_gemv<D, Head, 1>(c, x, [&](int strip, int tile, const WideCell& cell, float row, float scale) {
    const int stream = tile * kTileColumns + cell.column;
    if (!c.uses(stream)) return;
    store_packet(c.p.packets + PacketLayout::kLogits + stream * PacketLayout::kVocab + strip * kStripRows + cell.row(),
                 __float_as_uint(row * scale), c.tag);
  });
}

// The predictor's input, where its width is another.
__device__ __forceinline__ void projection(WideContext& c) {
  HiddenOperand<Projection> x{{c, DenseLayout::kAfterDown, dense_number(c, hidden_tag(c.p)), Phase::kInput}};
  wide_gemv<P, Projection, -1>(c, x, [&](int strip, int tile, const WideCell& cell, float row, float /*scale*/) {
    const float bias = __bfloat162float(c.p.projection_bias[strip * kStripRows + cell.row()]);
    publish_rows(c, DenseLayout::kProjected, strip, tile, cell, row + bias, kOnceTag);
  });
}

}  // namespace wide_step

}  // namespace qwen_tts
