// A decoder layer of a wide frame: the five exchanges of layer.cuh, with another owner of the residual.
//
// In a narrow frame every CTA adds the deltas of O and down to its own copy of the residual. A copy of 32 columns would
// fill the registers and the shared memory of an SM. So in a wide frame one CTA computes a whole strip of O, with all
// parts of k. It adds the result to its strip of the residual, in fp32, and publishes the sum, rounded, for the next
// product. Other CTAs own the strips of down, if the grid has enough. The two owners of a strip hand it to each other
// in packets of fp32. These arrive long before they are needed.
//
// A vector may be overwritten one layer later, tile by tile. This is safe: a CTA that writes a tile of a vector in
// layer l + 1 has waited for all strips of a later vector of layer l in that tile, and the CTAs that made those strips
// had read the old vector. Down waits for all of gate-up, which has read O's result. QKV waits for all of down, which
// has read gate-up's result. O waits for all heads, which have read QKV's result.
#pragma once

#include "predictor.cuh"
#include "wide_gemv.cuh"

namespace qwen_tts {

// The tag of the talker's last down projection. Its rows are the frame's hidden row before the final norm.
__device__ __forceinline__ uint32_t hidden_tag(const FrameParams& p) { return p.epoch + kTalkerLogits - 1; }

namespace wide_step {

// Publishes the rows of four lanes as one word. The odd row of a pair is eight lanes further, and the pair that is
// eight rows further is sixteen lanes further.
__device__ __forceinline__ void publish_rows(const WideContext& c, int vector, int strip, int tile,
                                             const WideCell& cell, float row, uint32_t tag) {
  const float2 low = make_float2(row, __shfl_down_sync(~0u, row, kTileColumns));
  const float2 high = make_float2(__shfl_down_sync(~0u, low.x, 16), __shfl_down_sync(~0u, low.y, 16));
  const int column = tile * kTileColumns + cell.column;
  if (!cell.leads || !c.uses(column)) return;
  dump_pair(c, strip * kStripRows + 2 * cell.pair, column, low.x, low.y);
  if (cell.pair >= 4) return;
  publish_word(c, dense_vector(c.p, tile, vector) + dense_at(strip, cell.column * 4 + cell.pair), low, high, tag);
}

// Where a lane's word of a strip stands in a vector.
__device__ __forceinline__ uint64_t* quad_word(const WideContext& c, int vector, int strip, int tile) {
  return dense_vector(c.p, tile, vector) + dense_at(strip, word_column() * 4 + word_pair());
}

// Dumps a lane's word for the tests. `row` is the strip's first row in the dump.
__device__ __forceinline__ void dump_quad(const WideContext& c, int row, int tile, float2 low, float2 high) {
  const int column = tile * kTileColumns + word_column();
  if (!c.uses(column)) return;
  dump_pair(c, row + 2 * word_pair(), column, low.x, low.y);
  dump_pair(c, row + 2 * word_pair() + 8, column, high.x, high.y);
}

// Publishes a lane's quad as a word, after an exchange with the lane of the neighbouring row.
__device__ __forceinline__ void publish_quad(const WideContext& c, int vector, int strip, int tile, const float4& quad,
                                             uint32_t tag) {
  const float2 low = word_rows(quad.x, quad.y), high = word_rows(quad.z, quad.w);
  dump_quad(c, strip * kStripRows, tile, low, high);
  if (c.uses(tile * kTileColumns + word_column())) publish_word(c, quad_word(c, vector, strip, tile), low, high, tag);
}

template <class D>
__device__ __forceinline__ void qkv(WideContext& c) {
  using Qkv = typename Products<D>::Qkv;
  using L = DenseLayout;
  const bool first_position = is_same<D, P> && ends_with_qkv(c.pass(), c.layer());
  const bool fed = c.layer() == 0;
  DenseOperand<Qkv> x{c, fed ? L::kFed : L::kAfterDown, fed ? fed_tag<D>(c.pass()) : dense_number(c, c.tag - 1),
                      Phase::kInput};
  wide_gemv<D, Qkv, 0>(c, x, [&](int strip, int tile, const float4& quad, float2 scale) {
    publish_quad(c, first_position ? L::kFirstPositionQkv : L::kQkv, strip, tile,
                 make_float4(quad.x * scale.x, quad.y * scale.y, quad.z * scale.x, quad.w * scale.y),
                 first_position ? kOnceTag : dense_number(c, c.tag));
  });
}

template <class D>
__device__ __forceinline__ void gate_up(WideContext& c) {
  using GateUp = typename Products<D>::GateUp;
  DenseOperand<GateUp> x{c, DenseLayout::kAfterOut, dense_number(c, c.tag - 1), Phase::kInput};
  wide_gemv<D, GateUp, 1>(c, x, [&](int strip, int tile, const float4& quad, float2 scale) {
    // Rows 0..7 of a strip are gates. Rows 8..15 are the ups of the same eight.
    const float2 inner =
        word_rows(silu(quad.x * scale.x) * (quad.z * scale.x), silu(quad.y * scale.y) * (quad.w * scale.y));
    const int column = tile * kTileColumns + word_column();
    if (!c.uses(column)) return;
    dump_pair(c, strip * (kStripRows / 2) + 2 * word_pair(), column, inner.x, inner.y);
    // Four neighbouring rows share a word (weight_packing.py). Two lanes write a half each.
    const int lane = word_column() * 4 + 2 * (strip & 1) + word_pair() / 2;
    publish_half(c, dense_vector(c.p, tile, DenseLayout::kMlpInner) + dense_at(strip / 2, lane), word_pair() & 1,
                 inner.x, inner.y, inner_tag<D>(c.pass(), c.layer()));
  });
}

// Publishes a lane's row of the residual: rounded for the next product, and in fp32 for the strip's other owner.
__device__ __forceinline__ void publish_residual(const WideContext& c, int strip, int tile, const WideCell& cell,
                                                 float x, uint32_t tag, int64_t handed, int vector, uint32_t word_tag) {
  const float2 low = make_float2(x, __shfl_down_sync(~0u, x, kTileColumns));
  const float2 high = make_float2(__shfl_down_sync(~0u, low.x, 16), __shfl_down_sync(~0u, low.y, 16));
  const int column = tile * kTileColumns + cell.column;
  if (!c.uses(column)) return;
  if (cell.leads && cell.pair < 4)
    publish_word(c, dense_vector(c.p, tile, vector) + dense_at(strip, cell.column * 4 + cell.pair), low, high,
                 word_tag);
  store_packet(c.p.packets + handed + (strip * kStripRows + cell.row()) * kMaxColumns + column, __float_as_uint(x),
               tag);
}

// Waits until the row in x, which has been loaded once from `from`, carries the tag.
__device__ __forceinline__ void wait_handed(const WideContext& c, Handed& x, const uint64_t* from, bool uses,
                                            uint32_t tag) {
  for (unsigned spin = 0; !__all_sync(~0u, !uses || high_half(x.packet) == tag); ++spin) {
    c.dog.after(spin, Phase::kInput, tag);
    x.packet = load_word(from);
  }
}

// The rows of the residual that are added to a lane's quad, in the packets by which one owner of a strip hands them to
// the other.
struct HandedQuad {
  static constexpr int kFurther = 8 * kMaxColumns;  // from a row's packets to those eight rows further
  uint64_t packets[4];

  __device__ __forceinline__ void load(const uint64_t* from) {
    load_two_words(from, packets[0], packets[1]);
    load_two_words(from + kFurther, packets[2], packets[3]);
  }
  // Waits until the packets, which have been loaded once, carry the tag. Columns without a stream do not count.
  __device__ __forceinline__ void wait(const WideContext& c, const uint64_t* from, int column, uint32_t tag) {
    const uint32_t even = c.uses(column) ? ~0u : 0u, odd = c.uses(column + 1) ? ~0u : 0u;
    for (unsigned spin = 0;; ++spin) {
      const uint32_t lack = ((high_half(packets[0]) ^ tag) | (high_half(packets[2]) ^ tag)) & even |
                            ((high_half(packets[1]) ^ tag) | (high_half(packets[3]) ^ tag)) & odd;
      if (__all_sync(~0u, lack == 0)) return;
      c.dog.after(spin, Phase::kInput, tag);
      load(from);
    }
  }
  __device__ __forceinline__ float4 value() const {
    return make_float4(__uint_as_float(uint32_t(packets[0])), __uint_as_float(uint32_t(packets[1])),
                       __uint_as_float(uint32_t(packets[2])), __uint_as_float(uint32_t(packets[3])));
  }
  // Hands a lane's values on. Columns without a stream are written too. Nobody reads them.
  static __device__ __forceinline__ void store(uint64_t* to, const float4& quad, uint32_t tag) {
    const uint64_t tagged = uint64_t(tag) << 32;
    store_two_words(to, tagged | __float_as_uint(quad.x), tagged | __float_as_uint(quad.y));
    store_two_words(to + kFurther, tagged | __float_as_uint(quad.z), tagged | __float_as_uint(quad.w));
  }
};

// Adds a product to the residual. Reads the residual from the packets at `from`, which carry `tag`. Publishes the sum
// in the packets at `to` and in `vector`, which the next product reads.
template <class D, class Prod>
__device__ __forceinline__ void add(WideContext& c, int first_strip, int input, uint32_t input_tag, Phase phase,
                                    int64_t from, uint32_t tag, int64_t to, int vector) {
  DenseOperand<Prod> x{c, input, input_tag, phase};
  HandedQuad handed;
  float4 sum;
  auto at = [&](int strip, int tile) {
    return (strip * kStripRows + quad_row()) * kMaxColumns + tile * kTileColumns + quad_column();
  };
  wide_add<Prod>(
      c, first_strip, x, [&](int strip, int tile) { handed.load(c.p.packets + from + at(strip, tile)); },
      [&](int strip, int tile, int part, const float4& quad) {
        if (part == 0) {
          handed.wait(c, c.p.packets + from + at(strip, tile), tile * kTileColumns + quad_column(), tag);
          sum = handed.value();
        }
        const float2 low = unpack_bf16(pack_bf16(quad.x, quad.y)), high = unpack_bf16(pack_bf16(quad.z, quad.w));
        sum = make_float4(sum.x + low.x, sum.y + low.y, sum.z + high.x, sum.w + high.y);
        if (c.dumps())
          dump_quad(c, part * D::kHidden + strip * kStripRows, tile, word_rows(low.x, low.y),
                    word_rows(high.x, high.y));
      },
      [&](int strip, int tile) {
        const float2 low = word_rows(sum.x, sum.y), high = word_rows(sum.z, sum.w);
        if (c.uses(tile * kTileColumns + word_column()))
          publish_word(c, quad_word(c, vector, strip, tile), low, high, dense_number(c, c.tag));
        HandedQuad::store(c.p.packets + to + at(strip, tile), sum, c.tag);
      });
}

template <class D>
__device__ __forceinline__ void out(WideContext& c) {
  using L = PacketLayout;
  // The residual has the tag of the exchange before the layer. A layer whose QKV comes from a table has one exchange
  // less.
  const uint32_t before = c.tag - (is_same<D, P> && qkv_from_table(c.pass(), c.layer()) ? 2 : 3);
  add<D, typename Products<D>::Out>(c, out_owner_first(), DenseLayout::kHeadsOut, dense_number(c, c.tag - 1),
                                    Phase::kOut, L::kAfterDown, before, L::kAfterOut, DenseLayout::kAfterOut);
}

template <class D>
__device__ __forceinline__ void down(WideContext& c) {
  using L = PacketLayout;
  add<D, typename Products<D>::Down>(c, down_owner_first<D>(), DenseLayout::kMlpInner,
                                     inner_tag<D>(c.pass(), c.layer()), Phase::kMlp, L::kAfterOut, c.tag - 2,
                                     L::kAfterDown, DenseLayout::kAfterDown);
}

// Computes the final norm and a head, and publishes the logits under c.tag.
template <class D>
__device__ __forceinline__ void head(WideContext& c) {
  using Head = typename Products<D>::Head;
  DenseOperand<Head> x{c, DenseLayout::kAfterDown, dense_number(c, c.tag - 1), Phase::kInput};
  wide_gemv<D, Head, 1>(c, x, [&](int strip, int tile, const float4& quad, float2 scale) {
    const int stream = tile * kTileColumns + quad_column(), row = strip * kStripRows + quad_row();
    uint64_t* const to = c.p.packets + PacketLayout::kLogits + stream * PacketLayout::kVocab + row;
    auto store = [&](int column, int lower, float x) {
      store_packet(to + column * PacketLayout::kVocab + lower, __float_as_uint(x), c.tag);
    };
    if (c.uses(stream)) {
      store(0, 0, quad.x * scale.x);
      store(0, 8, quad.z * scale.x);
    }
    if (c.uses(stream + 1)) {
      store(1, 0, quad.y * scale.y);
      store(1, 8, quad.w * scale.y);
    }
  });
}

// Projects the normed hidden row to the predictor's width, if the widths differ.
__device__ __forceinline__ void projection(WideContext& c) {
  DenseOperand<Projection> x{c, DenseLayout::kNormed, kOnceTag, Phase::kInput};
  wide_gemv<P, Projection, -1>(c, x, [&](int strip, int tile, const float4& quad, float2 /*scale*/) {
    const __nv_bfloat16* const of_strip = c.p.projection_bias + strip * kStripRows + quad_row();
    const float low = __bfloat162float(of_strip[0]), high = __bfloat162float(of_strip[8]);
    publish_quad(c, DenseLayout::kProjected, strip, tile,
                 make_float4(quad.x + low, quad.y + low, quad.z + high, quad.w + high), kOnceTag);
  });
}

// Publishes a model's input in the form of a preceding layer's output. The owners of down's strips publish
// x(strip, tile, cell).
template <class D, class X>
__device__ __forceinline__ void feed(WideContext& c, X&& x) {
  if (finished_tile() >= column_tiles(c.p)) return;
#pragma unroll 1
  for (int strip = down_owner_first<D>(); strip < D::kHidden / kStripRows; strip += gridDim.x)
    publish_residual(c, strip, finished_tile(), finished_cell(), x(strip, finished_tile(), finished_cell()), c.tag - 1,
                     PacketLayout::kAfterDown, DenseLayout::kFed, fed_tag<D>(c.pass()));
}

// Feeds the talker: the stored sum of the last frame's embeddings plus the text row.
__device__ __forceinline__ void feed_talker(WideContext& c) {
  feed<T>(c, [&](int strip, int tile, const WideCell& cell) {
    const int row = strip * kStripRows + cell.row(), column = tile * kTileColumns + cell.column;
    if (!c.uses(column)) return 0.f;
    return __ldcg(c.p.next_rows + int64_t(c.p.streams[column].slot) * T::kHidden + row) +
           __ldcg(c.p.text_rows + int64_t(column) * T::kHidden + row);
  });
}

// A value of the talker's hidden row, normed. The head has stored the sum of squares.
__device__ __forceinline__ float hidden_value(const WideContext& c, int strip, int tile, const WideCell& cell) {
  const int row = strip * kStripRows + cell.row(), column = tile * kTileColumns + cell.column;
  const float scale = rms_scale<T>(squares_part(c.scratch, 1, tile * kTileColumns));
  const uint64_t* from = c.p.packets + PacketLayout::kAfterDown + row * kMaxColumns + column;
  Handed x{load_word(from)};
  wait_handed(c, x, from, c.uses(column), hidden_tag(c.p));
  const float rounded = unpack_bf16(pack_bf16(x.value(), 0.f)).x;  // as the head has it
  return rounded * (scale * __bfloat162float(c.p.talker_norm[row]));
}

// Feeds the hidden row to the predictor or, if the widths differ, to the projection.
__device__ __forceinline__ void feed_hidden(WideContext& c) {
  if constexpr (!kProjects) {
    feed<P>(c, [&](int strip, int tile, const WideCell& cell) { return hidden_value(c, strip, tile, cell); });
  } else {
    if (finished_tile() >= column_tiles(c.p)) return;
#pragma unroll 1
    for (int strip = down_owner_first<T>(); strip < T::kHidden / kStripRows; strip += gridDim.x)
      publish_rows(c, DenseLayout::kNormed, strip, finished_tile(), finished_cell(),
                   hidden_value(c, strip, finished_tile(), finished_cell()), kOnceTag);
  }
}

// Feeds the predictor the output of the projection.
__device__ __forceinline__ void feed_projected(WideContext& c) {
  feed<P>(c, [&](int strip, int tile, const WideCell& cell) {
    const uint64_t* from =
        dense_vector(c.p, tile, DenseLayout::kProjected) + dense_at(strip, cell.column * 4 + (cell.pair & 3));
    const bool uses = c.uses(tile * kTileColumns + cell.column);
    uint64_t word = load_word(from);
    for (unsigned spin = 0; !__all_sync(~0u, !uses || (dense_differs(word, dense_tag(kOnceTag)) & kTagMask) == 0);
         ++spin) {
      c.dog.after(spin, Phase::kInput, c.tag - 1);
      word = load_word(from);
    }
    const float2 pair = unpack_bf16(dense_decode(cell.pair >= 4 ? high_half(word) : uint32_t(word)));
    return cell.leads ? pair.x : pair.y;
  });
}

// Feeds the predictor the embeddings of the codes, of which each warp keeps a copy.
__device__ __forceinline__ void feed_codes(WideContext& c) {
  feed<P>(c, [&](int strip, int tile, const WideCell& cell) {
    const int column = min(tile * kTileColumns + cell.column, c.p.num_columns - 1);
    const int codebook = c.pass() - 1, code = c.scratch.codes[warp_index()][column];
    // EOS is beyond the projected table. The rest of its frame is not used.
    const __nv_bfloat16* from =
        kProjects ? c.p.projected_embeddings + (int64_t(codebook) * P::kVocab + min(code, P::kVocab - 1)) * P::kHidden
                  : embedding_row(c.p, codebook, code);
    return __bfloat162float(from[strip * kStripRows + cell.row()]);
  });
}

}  // namespace wide_step

}  // namespace qwen_tts
