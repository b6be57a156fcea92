// The weight ring: each warp streams its own tape through its own slots of shared memory and never
// stops at a dependency, so the memory system stays busy while the CTA waits for packets.
//
// A slot takes one piece: the mma A fragments of one 16-row strip for a few 16-wide chunks of k,
// 512 bytes a chunk, lane by lane 16 bytes: a lane's load is its operand. Pieces of the first
// phases of a layer have kPieceA bytes, those of the down projection kPieceB.
// Filled by the bulk copy engine, completed on the slot's mbarrier; refilled by the same warp after
// its last read (__syncwarp orders the lanes; lane 0 issues).
#pragma once

#include "params.h"

namespace qwen_tts {

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Addresses below are 32-bit, of shared memory: half the registers of a generic pointer.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier));
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}

__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
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

// How a tape is cut for one CTA: `small` pieces of kPieceA, then the rest of `pieces` of kPieceB,
// over and over, a layer each time; or all of kPieceA (heads).
struct Cut {
  int small, pieces;
};

template <int kPieceA, int kPieceB, int kSlots>
struct Ring {
  static constexpr int kSlotBytes = kPieceA > kPieceB ? kPieceA : kPieceB;

  uint32_t slots;  // address of [kSlots][kSlotBytes], this warp's
  uint32_t full;   // address of the slots' mbarriers
  int lane;
  int head = 0, tail = 0, parity = 0;

  // What is fetched next: runs of the program, each a stretch of a tape.
  const char* from = nullptr;
  int left = 0, index = 0;
  Cut cut{};
  int run = 0;

  __device__ void init() {
    if (lane < kSlots) mbarrier_init(full + 8 * lane);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // Fetch the next piece, if the program has one; `next_run(run, from, left, cut)` opens its runs.
  template <class NextRun>
  __device__ __forceinline__ void fetch(NextRun& next_run) {
    while (left == 0) {
      if (!next_run(run, from, left, cut)) return;
      ++run;
      index = 0;
    }
    const int bytes = index < cut.small ? kPieceA : kPieceB;
    if (lane == 0) bulk_copy(slots + head * kSlotBytes, from, bytes, full + 8 * head);
    from += bytes;
    --left;
    if (++index == cut.pieces) index = 0;
    if (++head == kSlots) head = 0;
  }

  // Address of this lane's first operand in the next piece; one follows every 512 bytes.
  __device__ __forceinline__ uint32_t wait() {
    mbarrier_wait(full + 8 * tail, parity);
    return slots + tail * kSlotBytes + 16 * lane;
  }

  template <class NextRun>
  __device__ __forceinline__ void release(NextRun& next_run) {
    __syncwarp();
    if (++tail == kSlots) {
      tail = 0;
      parity ^= 1;
    }
    fetch(next_run);
  }
};

}  // namespace qwen_tts
