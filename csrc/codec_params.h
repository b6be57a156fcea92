// What the host fills in for the codec's launches; mirrored field by field in codec/cuda_params.py.
//
// Everything of one frame is [column][channel], channels innermost and padded with zeros to a
// multiple of 8 (one 16-byte piece). A column is one time step of one stream of the call: stream i's
// step t of a layer with `rows` steps a frame is column i * rows + t.
#pragma once

#include "geometry.h"
#include "standard.h"

namespace codec {

// A stream of this call, as `embed` leaves it for all later launches.
struct Call {
  int slot;  // which state is its own
  int age;   // frames it had decoded before
};

// Where the rows of a layer's streams lie: those of this frame only (frames = 1, by stream), or a
// ring of the last `frames` frames in the slot's state, so that history needs no copying.
struct Rows {
  void* data;
  int64_t stride;  // elements from one stream or slot to the next
  int frames;
  int rows;      // of one frame
  int channels;  // padded
  int by_slot;   // 1: indexed by slot and age
};

enum Activation : int { kNone = 0, kSnake = 1, kGelu = 2, kGlu = 3, kNormWeight = 4 };

// out = act(norm(W x) * mul + add + residual), W the weights of a convolution as a matrix.
//
// A residual unit whose channels fit one tile is a single launch, too: between its convolution and
// its product with one more tap's worth of weights stands snake(W x + middle_add).
struct Gemm {
  const void* weights;  // bf16, as codec_pack.py packs them: a stage's tile is contiguous
  const Call* calls;
  Rows source;                  // bf16
  int history, dilation, taps;  // first tap at t - history
  int m;                        // outputs: upsample * out_channels, or 2 * out_channels for kGlu
  int k_blocks;                 // of 64; weights are zero beyond taps * channels
  int columns;
  int segments;             // of k, each to one CTA of a cluster; fixed for a layer, so that bits are
  const float* mul;         // [m] or null
  const float* add;         // [m] or null
  const float* squares_in;  // [column][square_parts]: sums that an RMSNorm before W needs, or null
  int square_parts;
  float inverse_dim, eps;
  Rows residual;  // data null: none
  Rows raw;       // before the activation; data null: none
  Rows out;       // bf16, after the activation; data null: none
  int residual_fp32, raw_fp32;
  int upsample, out_channels;  // row m is step m / out_channels of `upsample`
  int activation;
  const float* act_a;       // snake: frequency; norm weight
  const float* act_b;       // snake: strength
  const float* middle_add;  // [m], residual units only
  const float* middle_a;
  const float* middle_b;
  float* squares_out;  // [column][out_channels / 8] or null: sums of squares of raw values
};

struct Embed {
  const int* input;    // [stream][17]: slot, 16 codes
  int* frame_counts;   // [slot], counted on
  Call* calls;         // out
  const float* table;  // [16 * codebook_size][channels]
  int codebook_size;
  Rows out;  // bf16
};

struct Attention {
  const Call* calls;
  const void* qkv;    // bf16 [stream][(heads + 2 * kv_heads) * head_dim]
  Rows kv;            // bf16 ring of `window` rows: keys before RoPE, then values
  const float* rope;  // [window][head_dim / 2][2]: cosine, sine by distance
  void* out;          // bf16 [stream][heads * head_dim]
  int heads, kv_heads, head_dim, window;
  float scale;
};

// Depthwise convolution and LayerNorm of a ConvNeXt block.
struct DepthwiseNorm {
  const Call* calls;
  Rows source;
  int taps;
  int real_channels;
  const float* weights;  // [taps][channels]
  const float* bias;
  const float* norm_weight;
  const float* norm_bias;
  float eps;
  void* out;  // bf16 [column][channels]
};

struct LastConv {
  const Call* calls;
  Rows source;
  const float* weights;  // [7 taps][channels]
  float bias;
  float* pcm;  // [stream][rows]
};

}  // namespace codec
