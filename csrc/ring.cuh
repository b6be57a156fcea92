// The weight ring: one warp of the CTA fetches weights for the sixteen others and never stops at a
// dependency, so the memory system stays busy while those wait for packets.
//
// Each computing warp has a ring of its own, filled by one lane of the fetching warp with the bulk
// copy engine. A piece is the mma A fragments of one 16-row strip for a few 16-wide chunks of k:
// 512 bytes a chunk, lane by lane 16 bytes, so a lane's load is its operand. Both sides know the
// sizes and the order of all pieces; a piece that would cross the ring's end begins at its start.
// The piece's mbarrier says that it has arrived; a count of pieces in shared memory says what has
// been consumed.
#pragma once

#include "packets.cuh"

namespace qwen_tts {

// The computing warps' own barrier: the fetching warp is not part of it.
__device__ __forceinline__ void sync_compute() { sync_some<1, kThreads>(); }

constexpr int round_up_to_power_of_two(int n) { return n <= 1 ? 1 : 2 * round_up_to_power_of_two((n + 1) / 2); }

template <int kRingBytes_, int kMinPieceBytes>
struct RingShared {
  static constexpr int kBytes = kRingBytes_;
  // A power of two, so that a count of pieces gives the barrier and its parity.
  static constexpr int kBarriers = round_up_to_power_of_two(kRingBytes_ / kMinPieceBytes);
  alignas(128) char data[kWarps][kBytes];
  uint64_t full[kWarps][kBarriers];
  uint32_t consumed[kWarps];              // pieces
  uint16_t taken[kWarps][kBarriers];      // bytes of the ring a piece holds; the fetching lane's own

  __device__ void init() {  // by all threads, before a CTA-wide barrier
    for (int i = thread_index(); i < kWarps * kBarriers; i += blockDim.x) mbarrier_init(full[0] + i);
    if (thread_index() < kWarps) consumed[thread_index()] = 0;
    mbarrier_init_done();
  }
};

// A computing warp's side.
template <class Shared>
struct RingReader {
  Shared& sh;
  int tail = 0;
  uint32_t pieces = 0;

  // Whether the next piece has arrived.
  __device__ __forceinline__ bool ready(int warp) {
    return mbarrier_done(&sh.full[warp][pieces % Shared::kBarriers], pieces / Shared::kBarriers & 1);
  }

  // Address of this lane's first operand in the next piece; one follows every 512 bytes.
  template <int kPieceBytes>
  __device__ __forceinline__ uint32_t wait(int warp, int lane) {
    if (tail + kPieceBytes > Shared::kBytes) tail = 0;
    mbarrier_wait(&sh.full[warp][pieces % Shared::kBarriers], pieces / Shared::kBarriers & 1);
    return smem_address(&sh.data[warp][tail + 16 * lane]);
  }

  template <int kPieceBytes>
  __device__ __forceinline__ void release(int warp, int lane) {
    tail += kPieceBytes;
    ++pieces;
    __syncwarp();
    // Relaxed: the piece's loads are done, for their values have gone into products.
    if (lane == 0) store_shared_relaxed(&sh.consumed[warp], pieces);
  }
};

// The fetching warp's side: lane w fills the ring of warp w.
template <class Shared>
struct RingWriter {
  Shared& sh;
  int warp;
  int head = 0, used = 0;  // bytes; used with those passed over at the ring's end
  uint32_t issued = 0, reclaimed = 0;  // pieces

  __device__ __forceinline__ void push(const char* from, int bytes, uint64_t policy) {
    const bool wraps = head + bytes > Shared::kBytes;
    const int passed_over = wraps ? Shared::kBytes - head : 0;
    reclaim(passed_over + bytes);
    if (wraps) head = 0;
    sh.taken[warp][issued % Shared::kBarriers] = uint16_t(passed_over + bytes);
    bulk_copy(sh.data[warp] + head, from, bytes, &sh.full[warp][issued % Shared::kBarriers], policy);
    head += bytes;
    ++issued;
  }

  // Wait until `bytes` more fit.
  __device__ __forceinline__ void reclaim(int bytes) {
    while (used + bytes > Shared::kBytes) {
      const uint32_t consumed = load_shared_acquire(&sh.consumed[warp]);
      for (; reclaimed != consumed; ++reclaimed) used -= sh.taken[warp][reclaimed % Shared::kBarriers];
    }
    used += bytes;
  }
};

}  // namespace qwen_tts
