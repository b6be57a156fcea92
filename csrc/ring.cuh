// The weight ring: one warp of the CTA fetches weights for the sixteen others and never stops at a
// dependency, so the memory system stays busy while those wait for packets.
//
// Each computing warp has a ring of its own, filled by one lane of the fetching warp with the bulk
// copy engine. A piece is the mma A fragments of one 16-row strip for a few 16-wide chunks of k:
// 512 bytes a chunk, lane by lane 16 bytes, so a lane's load is its operand. Both sides know the
// sizes and the order of all pieces; a piece that would cross the ring's end begins at its start.
// The piece's mbarrier says that it has arrived; a count of bytes in shared memory says what has
// been consumed.
#pragma once

#include "packets.cuh"

namespace qwen_tts {

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Addresses below are 32-bit, of shared memory: half the registers of a generic pointer.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}

__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// The computing warps' own barrier: the fetching warp is not part of it.
__device__ __forceinline__ void sync_compute() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

constexpr int round_up_to_power_of_two(int n) { return n <= 1 ? 1 : 2 * round_up_to_power_of_two((n + 1) / 2); }

template <int kRingBytes_, int kMinPieceBytes>
struct RingShared {
  static constexpr int kBytes = kRingBytes_;
  // A power of two, so that a count of pieces gives the barrier and its parity.
  static constexpr int kBarriers = round_up_to_power_of_two(kRingBytes_ / kMinPieceBytes);
  alignas(128) char data[kWarps][kBytes];
  uint64_t full[kWarps][kBarriers];
  uint32_t consumed[kWarps];

  __device__ void init() {  // by all threads, before a CTA-wide barrier
    for (int i = thread_index(); i < kWarps * kBarriers; i += blockDim.x) mbarrier_init(smem_address(full[0] + i));
    if (thread_index() < kWarps) consumed[thread_index()] = 0;
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

// A computing warp's side.
template <class Shared>
struct RingReader {
  Shared& sh;
  int tail = 0;
  uint32_t total = 0, pieces = 0;  // consumed: bytes (with those passed over at the end), pieces

  // Address of this lane's first operand in the next piece; one follows every 512 bytes.
  template <int kPieceBytes>
  __device__ __forceinline__ uint32_t wait(int warp, int lane) {
    if (tail + kPieceBytes > Shared::kBytes) {
      total += Shared::kBytes - tail;
      tail = 0;
    }
    mbarrier_wait(smem_address(&sh.full[warp][pieces % Shared::kBarriers]), pieces / Shared::kBarriers & 1);
    return smem_address(&sh.data[warp][tail + 16 * lane]);
  }

  template <int kPieceBytes>
  __device__ __forceinline__ void release(int warp, int lane) {
    tail += kPieceBytes;
    total += kPieceBytes;
    ++pieces;
    __syncwarp();
    if (lane == 0)
      asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(smem_address(&sh.consumed[warp])), "r"(total)
                   : "memory");
  }
};

// The fetching warp's side: lane w fills the ring of warp w.
template <class Shared>
struct RingWriter {
  uint32_t data, full, consumed;
  int head = 0;
  uint32_t issued = 0, pieces = 0;

  __device__ RingWriter(Shared& sh, int warp)
      : data(smem_address(sh.data[warp])), full(smem_address(sh.full[warp])),
        consumed(smem_address(&sh.consumed[warp])) {}

  __device__ __forceinline__ void push(const char* from, int bytes, uint64_t policy) {
    if (head + bytes > Shared::kBytes) {
      issued += Shared::kBytes - head;
      head = 0;
    }
    issued += bytes;
    uint32_t done;
    do {
      asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(done) : "r"(consumed) : "memory");
    } while (issued - done > Shared::kBytes);
    bulk_copy(data + head, from, bytes, full + 8 * (pieces % Shared::kBarriers), policy);
    head += bytes;
    ++pieces;
  }
};

}  // namespace qwen_tts
