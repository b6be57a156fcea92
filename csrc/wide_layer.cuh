// A decoder layer of a wide frame: the five exchanges of layer.cuh, with another owner of the residual.
//
// In a narrow frame every CTA adds the deltas of O and down to its own copy of the residual. 32 columns of it would fill the
// registers and the shared memory of an SM. So here one CTA makes all of a strip of O, with both parts of k, and of the same
// strip of down. It keeps this strip of the residual, in fp32, in device memory: each row and column is one thread's own.
// It adds to it, and publishes the sum as the next product reads it, rounded.
#pragma once

#include "predictor.cuh"
#include "wide_gemv.cuh"

namespace qwen_tts {

namespace wide_step {

// Where a lane publishes words of a vector, worked out before its rows are there. A lane publishes with the three lanes that
// have the rest of a word: the odd row of its pair is eight lanes further, the pair eight rows further sixteen lanes.
struct WordPlace {
  uint64_t* to;     // of the vector's first strip
  uint2 bits;       // the tag's
  int column, row;  // row: of a strip
  bool uses, publishes;
};
__device__ __forceinline__ WordPlace word_place(const WideContext& c, int tile, const WideCell& cell, int vector,
                                                uint32_t number) {
  const int column = tile * kTileColumns + cell.column;
  const bool uses = c.uses(column);
  return {dense_vector(c.p, tile, vector) + dense_at(0, cell.column * 4 + (cell.pair & 3)), dense_tag(number),
          column, cell.row(), uses, uses && cell.leads && cell.pair < 4};
}

__device__ __forceinline__ void publish_row(const WideContext& c, const WordPlace& place, int strip, float row) {
  const float2 low = make_float2(row, __shfl_down_sync(~0u, row, kTileColumns));
  const float2 high = make_float2(__shfl_down_sync(~0u, low.x, 16), __shfl_down_sync(~0u, low.y, 16));
  if (place.publishes) publish_word(c, place.to + dense_at(strip, 0), low, high, place.bits);
}
// The same, with a dump for the test.
__device__ __forceinline__ void publish_dumped(const WideContext& c, const WordPlace& place, int strip, float row) {
  const float odd = __shfl_down_sync(~0u, row, kTileColumns);
  if (place.uses && (place.row & 1) == 0) dump_pair(c, strip * kStripRows + place.row, place.column, row, odd);
  publish_row(c, place, strip, row);
}

template <class D>
__device__ __forceinline__ void qkv(WideContext& c) {
  using Qkv = typename Products<D>::Qkv;
  using L = DenseLayout;
  typename WideRun<Qkv>::Operand x{c, c.layer() == 0 ? L::kFed : L::kAfterDown, dense_number(c, c.tag - 1),
                                   Phase::kInput};
  wide_gemv<D, Qkv, 0>(
      c, x,
      [&](int tile, const WideCell& cell) {
        const bool first_position = std::is_same_v<D, P> && ends_with_qkv(c.pass(), c.layer());
        return word_place(c, tile, cell, first_position ? L::kFirstPositionQkv : L::kQkv,
                          first_position ? kOnceTag : dense_number(c, c.tag));
      },
      [&](const WordPlace& place, int strip, float row, float scale) { publish_dumped(c, place, strip, row * scale); });
}

template <class D>
__device__ __forceinline__ void gate_up(WideContext& c) {
  using GateUp = typename Products<D>::GateUp;
  typename WideRun<GateUp>::Operand x{c, DenseLayout::kAfterOut, dense_number(c, c.tag - 1), Phase::kInput};
  wide_gemv<D, GateUp, 1>(
      c, x,
      [&](int tile, const WideCell& cell) {
        // Four neighbouring rows are a word (weight_packing.py); two warps make a half each.
        WordPlace place = word_place(c, tile, cell, DenseLayout::kMlpInner, inner_tag(dense_number(c, c.tag)));
        place.to = dense_vector(c.p, tile, DenseLayout::kMlpInner) + dense_at(0, cell.column * 4 + (cell.pair & 3) / 2);
        return place;
      },
      [&](const WordPlace& place, int strip, float row, float scale) {
        // Rows 0..7 of a strip are gates, 8..15 the ups of the same eight.
        const float up = __shfl_down_sync(~0u, row, 16);
        const float inner = silu(row * scale) * (up * scale), next = __shfl_down_sync(~0u, inner, kTileColumns);
        if (!place.publishes) return;
        dump_pair(c, strip * (kStripRows / 2) + place.row, place.column, inner, next);
        publish_half(c, place.to + dense_at(strip / 2, 2 * (strip & 1)), place.row >> 1 & 1, inner, next,
                     place.bits.x);
      });
}

// A lane's row of the residual: its own.
__device__ __forceinline__ float* residual_at(const WideContext& c, int strip, int tile, const WideCell& cell) {
  return reinterpret_cast<float*>(c.p.packets + PacketLayout::kResidual) +
         (strip * kStripRows + cell.row()) * kMaxColumns + tile * kTileColumns + cell.column;
}

// Add a product of the exchange before to the residual, and publish it to `output`.
template <class D, class Prod>
__device__ __forceinline__ void add(WideContext& c, int input, uint32_t tag, Phase phase, int output) {
  wide_add<Prod>(
      c, input, tag, phase,
      [&](int strip, int tile, const WideCell& cell) { return *residual_at(c, strip, tile, cell); },
      [&](int tile, const WideCell& cell) { return word_place(c, tile, cell, output, dense_number(c, c.tag)); },
      [&](const WordPlace& place, int strip, const WideCell& cell, const auto& parts, float residual) {
#pragma unroll
        for (int part = 0; part < Prod::kSplit; ++part) {
          const float delta = unpack_bf16(pack_bf16(parts[part], 0.f)).x;
          if (c.dumps()) {
            const float odd = __shfl_down_sync(~0u, delta, kTileColumns);
            if (place.uses && cell.leads)
              dump_pair(c, part * D::kHidden + strip * kStripRows + place.row, place.column, delta, odd);
          }
          residual += delta;
        }
        publish_row(c, place, strip, residual);
        *residual_at(c, strip, place.column / kTileColumns, cell) = residual;
      });
}

template <class D>
__device__ __forceinline__ void out(WideContext& c) {
  add<D, typename Products<D>::Out>(c, DenseLayout::kHeadsOut, dense_number(c, c.tag - 1), Phase::kOut,
                                    DenseLayout::kAfterOut);
}

template <class D>
__device__ __forceinline__ void down(WideContext& c) {
  static_assert(Products<D>::Out::kSplit == Products<D>::Down::kSplit, "O and down have the same owners");
  add<D, typename Products<D>::Down>(c, DenseLayout::kMlpInner, inner_tag(dense_number(c, c.tag - 1)), Phase::kMlp,
                                     DenseLayout::kAfterDown);
}

// Final norm and a head; logits go out under c.tag.
template <class D>
__device__ __forceinline__ void head(WideContext& c) {
  using Head = typename Products<D>::Head;
  typename WideRun<Head>::Operand x{c, DenseLayout::kAfterDown, dense_number(c, c.tag - 1), Phase::kInput};
  struct Place {
    uint64_t* to;
    uint32_t tag;
    bool uses;
  };
  wide_gemv<D, Head, 1>(
      c, x,
      [&](int tile, const WideCell& cell) {
        const int stream = tile * kTileColumns + cell.column;
        return Place{c.p.packets + PacketLayout::kLogits + stream * PacketLayout::kVocab + cell.row(), c.tag,
                     c.uses(stream)};
      },
      [&](const Place& place, int strip, float row, float scale) {
        if (place.uses) store_packet(place.to + strip * kStripRows, __float_as_uint(row * scale), place.tag);
      });
}

// The predictor's input, where its width is another, from the normed hidden row.
__device__ __forceinline__ void projection(WideContext& c) {
  typename WideRun<Projection>::Operand x{c, DenseLayout::kNormed, kOnceTag, Phase::kInput};
  wide_gemv<P, Projection, -1>(
      c, x,
      [&](int tile, const WideCell& cell) { return word_place(c, tile, cell, DenseLayout::kProjected, kOnceTag); },
      [&](const WordPlace& place, int strip, float row, float /*scale*/) {
        const float bias = __bfloat162float(c.p.projection_bias[strip * kStripRows + place.row]);
        publish_dumped(c, place, strip, row + bias);
      });
}

// Calls f(strip, tile, cell) for the rows of the residual that a lane owns.
template <class D, class F>
__device__ __forceinline__ void for_own_rows(const WideContext& c, F&& f) {
  const WideJobs<typename Products<D>::Out> jobs(c.p);
#pragma unroll 1
  for (int job = block_index(); job < jobs.count; job += gridDim.x) {
    const int from = jobs.first_tile(job), own = warp_index() >> 2;
    if (own < jobs.tiles_of(from)) f(jobs.strip(job), from + own, wide_cell(warp_index() & 3));
  }
}

// Feed a model, before its first layer, as if a layer before it had ended: x(strip, tile, cell).
template <class D, class X>
__device__ __forceinline__ void feed(WideContext& c, X&& x) {
  for_own_rows<D>(c, [&](int strip, int tile, const WideCell& cell) {
    const float row = x(strip, tile, cell);
    *residual_at(c, strip, tile, cell) = row;
    publish_row(c, word_place(c, tile, cell, DenseLayout::kFed, dense_number(c, c.tag - 1)), strip, row);
  });
}

// What the last frame left, and the text.
__device__ __forceinline__ void feed_talker(WideContext& c) {
  feed<T>(c, [&](int strip, int tile, const WideCell& cell) {
    const int row = strip * kStripRows + cell.row(), column = tile * kTileColumns + cell.column;
    if (!c.uses(column)) return 0.f;
    return __ldcg(c.p.next_rows + int64_t(c.p.streams[column].slot) * T::kHidden + row) +
           __ldcg(c.p.text_rows + int64_t(column) * T::kHidden + row);
  });
}

// The talker's hidden row, normed with the sum of squares that the head has left.
__device__ __forceinline__ float hidden_value(const WideContext& c, int strip, int tile, const WideCell& cell) {
  const int row = strip * kStripRows + cell.row();
  const float scale = rms_scale<T>(squares_part(c.scratch, 1, tile * kTileColumns));
  const float rounded = unpack_bf16(pack_bf16(*residual_at(c, strip, tile, cell), 0.f)).x;  // as the head has it
  return rounded * (scale * __bfloat162float(c.p.talker_norm[row]));
}

// The hidden row: the predictor's first input, or the projection's.
__device__ __forceinline__ void feed_hidden(WideContext& c) {
  if constexpr (!kProjects) {
    feed<P>(c, [&](int strip, int tile, const WideCell& cell) { return hidden_value(c, strip, tile, cell); });
  } else {
    for_own_rows<T>(c, [&](int strip, int tile, const WideCell& cell) {
      publish_row(c, word_place(c, tile, cell, DenseLayout::kNormed, kOnceTag), strip,
                  hidden_value(c, strip, tile, cell));
    });
  }
}

// What the projection has made of it.
__device__ __forceinline__ void feed_projected(WideContext& c) {
  feed<P>(c, [&](int strip, int tile, const WideCell& cell) {
    const uint64_t* from =
        dense_vector(c.p, tile, DenseLayout::kProjected) + dense_at(strip, cell.column * 4 + (cell.pair & 3));
    const bool uses = c.uses(tile * kTileColumns + cell.column);
    uint64_t word = load_word(from);
    for (unsigned spin = 0;
         !__all_sync(~0u, !uses || (dense_differs(word, dense_tag(kOnceTag)) & kTagMask) == 0); ++spin) {
      c.dog.after(spin, Phase::kInput, c.tag - 1);
      word = load_word(from);
    }
    const float2 pair = unpack_bf16(dense_decode(cell.pair >= 4 ? high_half(word) : uint32_t(word)));
    return cell.leads ? pair.x : pair.y;
  });
}

// The embeddings of the codes that each warp keeps.
__device__ __forceinline__ void feed_codes(WideContext& c) {
  feed<P>(c, [&](int strip, int tile, const WideCell& cell) {
    const int column = min(tile * kTileColumns + cell.column, c.p.num_columns - 1);
    const int codebook = c.pass() - 1, code = c.scratch.codes[warp_index()][column];
    // An EOS is beyond the projected table; what follows it in the frame is not used.
    const __nv_bfloat16* from =
        kProjects ? c.p.projected_embeddings + (int64_t(codebook) * P::kVocab + min(code, P::kVocab - 1)) * P::kHidden
                  : embedding_row(c.p, codebook, code);
    return __bfloat162float(from[strip * kStripRows + cell.row()]);
  });
}

}  // namespace wide_step

}  // namespace qwen_tts
