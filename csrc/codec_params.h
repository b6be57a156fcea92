// What the host fills in for the codec's launches; mirrored field by field in codec/cuda_params.py.
//
// Activations of a frame are [column][channel]. Channels are padded with zeros to a multiple of 8, which is one 16-byte
// piece. A column is one time step of one stream of the call. In a layer with `rows` steps a frame, step t of stream i
// is column i * rows + t.
#pragma once

#include "geometry.h"
#include "standard.h"

namespace codec {

// A stream of this call. codec_embed writes it for all later launches.
struct Call {
  int slot;  // of the stream's state
  int age;   // frames that the stream has decoded before
};

// Where the rows of a layer's streams lie. Either they are those of this frame only, indexed by stream (frames = 1). Or
// they are a ring of the last `frames` frames in the slot's state, so that history is not copied.
struct Rows {
  void* data;
  int64_t stride;  // elements from one stream or slot to the next
  int frames;
  int rows;      // of one frame
  int channels;  // padded
  int by_slot;   // 1: indexed by slot and age
};

enum Activation : int { kNone = 0, kSnake = 1, kGelu = 2, kGlu = 3, kNormWeight = 4 };

// out = act(norm(W x) * mul + add + residual). W has the weights of a convolution as a matrix.
//
// A residual unit whose channels fit one tile is also a single launch. It has a convolution, then
// snake(W x + middle_add), then a product with as many weights as one more tap.
struct Gemm {
  const void* weights;  // bf16, as codec/cuda_packing.py packs them: a stage's tile is contiguous
  const Call* calls;
  Rows source;                  // bf16
  int history, dilation, taps;  // the first tap reads step t - history
  int m;                        // outputs: upsample * out_channels, or 2 * out_channels for kGlu
  int k_blocks;                 // of 64; weights are zero beyond taps * channels
  int columns;
  int segments;             // of k, one for each CTA of a cluster; fixed for a layer, so that the bits are fixed
  const float* mul;         // [m] or null
  const float* add;         // [m] or null
  const float* squares_in;  // [column][square_parts], sums of squares for an RMSNorm before W, or null
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
  float* squares_out;  // [column][out_channels / 8], sums of squares of raw values, or null
};

struct Embed {
  const int* input;    // [stream][17]: slot, 16 codes
  int* frame_counts;   // [slot], in and out: increased by one
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
