// The weight ring: one warp of the CTA fetches weights for the sixteen others and never stops at a
// dependency, so the memory system stays busy while those wait for packets.
//
// Each computing warp has a ring of its own, filled by one lane of the fetching warp with the bulk
// copy engine: a piece is one copy, for each costs that warp some fifty cycles, whatever its size. It is
// the mma A fragments of one 16-row strip for a few 16-wide chunks of k, 512 bytes a chunk, lane by lane
// 16 bytes, so a lane's load is its operand; or rows of keys or values (kv_tile.cuh). Both sides know the
// sizes and the order of all pieces; a piece that would cross the ring's end begins at its start.
// Of two mbarriers a piece, one says that it has arrived, the other that it has been read.
//
// The sanitizer's racecheck takes what the copy engine writes for a race, and does not see that lanes which
// meet at __syncwarp have read; for it (QWEN_TTS_RACECHECK) lanes copy, and each says itself that it has read.
#pragma once

#include "packets.cuh"

namespace qwen_tts {

// The computing warps' own barrier: the fetching warp is not part of it.
__device__ __forceinline__ void sync_compute() { sync_some<1, kThreads>(); }

#ifdef QWEN_TTS_RACECHECK
constexpr bool kRacecheck = true;
#else
constexpr bool kRacecheck = false;
#endif

constexpr int round_up_to_power_of_two(int n) { return n <= 1 ? 1 : 2 * round_up_to_power_of_two((n + 1) / 2); }

// A power of two, so that a count of pieces gives the barrier and its parity.
constexpr int ring_barriers(int ring_bytes, int min_piece_bytes) {
  return round_up_to_power_of_two(ring_bytes / min_piece_bytes);
}

template <int kRingBytes_, int kMinPieceBytes>
struct RingShared {
  static constexpr int kBytes = kRingBytes_;
  static constexpr int kBarriers = ring_barriers(kRingBytes_, kMinPieceBytes);
  static constexpr int kReaders = kRacecheck ? 32 : 1;  // threads that say a piece has been read
  alignas(256) char data[kWarps][kBytes];
  uint64_t full[kWarps][kBarriers], empty[kWarps][kBarriers];
  uint16_t taken[kWarps][kBarriers];  // bytes of the ring a piece holds; the fetching lane's own

  __device__ void init() {  // by all threads, before a CTA-wide barrier
    for (int i = thread_index(); i < kWarps * kBarriers; i += blockDim.x) {
      mbarrier_init(smem_address(full[0] + i), 1);
      mbarrier_init(smem_address(empty[0] + i), kReaders);
    }
    mbarrier_init_fence();
  }
};

// The most that fits, with what is kept of each piece, into so many bytes a warp.
constexpr int ring_bytes(int bytes_a_warp, int unit, int min_piece_bytes) {
  constexpr int kOfPiece = 2 * sizeof(uint64_t) + sizeof(uint16_t);  // full, empty, taken
  int bytes = bytes_a_warp / unit * unit;
  while (bytes + ring_barriers(bytes, min_piece_bytes) * kOfPiece > bytes_a_warp) bytes -= unit;
  return bytes;
}

// A computing warp's side.
template <class Shared>
struct RingReader {
  Shared& sh;
  int tail = 0;
  uint32_t pieces = 0;

  // Address of this lane's first operand in the next piece; one follows every 512 bytes.
  template <int kPieceBytes>
  __device__ __forceinline__ uint32_t wait(int warp, int lane) {
    if (tail + kPieceBytes > Shared::kBytes) tail = 0;
    mbarrier_wait(smem_address(&sh.full[warp][pieces % Shared::kBarriers]), pieces / Shared::kBarriers & 1);
    return smem_address(&sh.data[warp][tail + 16 * lane]);
  }

  template <int kPieceBytes>
  __device__ __forceinline__ void release(int warp, int lane) {
    __syncwarp();
    if (lane < Shared::kReaders) mbarrier_arrive(smem_address(&sh.empty[warp][pieces % Shared::kBarriers]));
    tail += kPieceBytes;
    ++pieces;
  }
};

// The fetching warp's side: lane w fills the ring of warp w.
template <class Shared>
struct RingWriter {
  Shared& sh;
  int warp;
  int head = 0, used = 0;              // bytes; used with those passed over at the ring's end
  uint32_t issued = 0, reclaimed = 0;  // pieces

  // A piece that takes `bytes` of the ring, of which the first `copied` come from memory.
  __device__ __forceinline__ void push(const char* from, int copied, int bytes, uint64_t policy) {
    const bool wraps = head + bytes > Shared::kBytes;
    const int passed_over = wraps ? Shared::kBytes - head : 0;
    reclaim(passed_over + bytes);
    if (wraps) head = 0;
    sh.taken[warp][issued % Shared::kBarriers] = uint16_t(passed_over + bytes);
    fill(sh.data[warp] + head, from, copied, &sh.full[warp][issued % Shared::kBarriers], policy);
    head += bytes;
    ++issued;
  }

 private:
  static __device__ __forceinline__ void fill(char* to, const char* from, int bytes, uint64_t* full, uint64_t policy) {
    if constexpr (!kRacecheck) {
      mbarrier_expect_tx(smem_address(full), bytes);
      if (bytes > 0) bulk_copy(smem_address(to), from, bytes, smem_address(full), policy);
    } else {
#pragma unroll 1
      for (int i = 0; i < bytes; i += 16)
        *reinterpret_cast<uint4*>(to + i) = __ldg(reinterpret_cast<const uint4*>(from + i));
      mbarrier_arrive(smem_address(full));
    }
  }
  // Wait until `bytes` more fit.
  __device__ __forceinline__ void reclaim(int bytes) {
    while (used + bytes > Shared::kBytes) {
      // Asked, not waited for: other lanes fill other rings.
      const uint32_t empty = smem_address(&sh.empty[warp][reclaimed % Shared::kBarriers]);
      if (!mbarrier_test(empty, reclaimed / Shared::kBarriers & 1)) continue;
      used -= sh.taken[warp][reclaimed % Shared::kBarriers];
      ++reclaimed;
    }
    used += bytes;
  }
};

}  // namespace qwen_tts
