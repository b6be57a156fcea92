// The weight ring. One warp of the CTA fetches weights, keys and values for the sixteen others. It never stops at a
// dependency, so the memory system stays busy while those wait for packets.
//
// The ring has kSlots slots of kSlotBytes. A piece is one copy by the bulk copy engine and takes one slot. A copy costs
// the fetching warp some fifty cycles whatever its size, so a piece serves as many warps as fill a slot, its owners.
// Before Hopper there is no such engine: the fetching warp's lanes copy a piece together, 16 bytes each at a time. A
// piece holds mma A fragments of one 16-row strip for a few 16-wide chunks of k: 512 bytes a chunk, lane by lane 16
// bytes, so a lane's load is its operand. Or it holds one warp's rows of keys or values (kv_tile.cuh). All warps know
// the order of all pieces: each reads its own and steps over those of others. Each slot has two mbarriers: one says
// that a piece has arrived, the other that its owners have read it.
//
// The sanitizer's racecheck reports false races for writes of the copy engine and for polled words. It does not see
// that __syncwarp orders the reads of lanes. In a build for racecheck (QWEN_TTS_RACECHECK), lanes copy, each lane
// arrives at the barrier after its own reads, and polled words are in device memory, which racecheck does not watch.
#pragma once

#include "packets.cuh"
#include "products.cuh"

namespace qwen_tts {

// The computing warps' own barrier: the fetching warp is not part of it.
__device__ __forceinline__ void sync_compute() { sync_some<1, kThreads>(); }

#ifdef QWEN_TTS_RACECHECK
constexpr bool kRacecheck = true;
#else
constexpr bool kRacecheck = false;
#endif

// Threads of a warp that arrive at a slot's `empty` barrier after the warp has read a piece.
constexpr int kReaders = kRacecheck ? 32 : 1;

// Whether the lanes copy a piece together. Each lane then arrives when its part has been copied.
constexpr bool kLanesCopy = !kHopper && !kRacecheck;
constexpr int kFillers = kLanesCopy ? 32 : 1;

// The round in which each slot was filled last. A warp reads only some of a slot's pieces, so it can be more than one
// piece ahead of the slot. The parity of a barrier cannot tell that.
template <int kSlots>
struct FilledRounds {
  uint32_t round[kSlots];
  __device__ __forceinline__ void set(int slot, uint32_t to) { store_shared_word(smem_address(&round[slot]), to); }
  __device__ __forceinline__ uint32_t get(int slot) const { return load_shared_word(smem_address(&round[slot])); }
};

#ifdef QWEN_TTS_RACECHECK
constexpr int kMaxWatchedCtas = 16;
__device__ volatile uint32_t watched_rounds[kMaxWatchedCtas][64];
template <int kSlots>
struct WatchedRounds {
  static_assert(kSlots <= 64, "a CTA's words");
  __device__ void set(int slot, uint32_t to) { watched_rounds[block_index()][slot] = to; }
  __device__ uint32_t get(int slot) const { return watched_rounds[block_index()][slot]; }
};
template <int kSlots>
using Rounds = WatchedRounds<kSlots>;
#else
template <int kSlots>
using Rounds = FilledRounds<kSlots>;
#endif

template <int kSlots_>
struct RingShared {
  static constexpr int kSlots = kSlots_;
  // First in shared memory: rows of tiles begin where addresses end in zeros.
  alignas(16) char data[kSlots][kSlotBytes];
  uint64_t full[kSlots], empty[kSlots];
  Rounds<kSlots> filled;

  __device__ void init() {  // by all threads, before a CTA-wide barrier
    for (int i = thread_index(); i < kSlots; i += blockDim.x) {
      mbarrier_init(smem_address(full + i), kFillers);
      mbarrier_init(smem_address(empty + i), kMaxOwners * kReaders);
      filled.set(i, ~0u);
    }
    mbarrier_init_fence();
  }
};

// How many slots fit, with their barriers.
__device__ constexpr int ring_slots(int bytes) {
  return (bytes - 16) / (kSlotBytes + int(2 * sizeof(uint64_t) + sizeof(uint32_t)));
}

// A place in the order of all pieces: a slot, and the round of the ring.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t round = 0;

  __device__ __forceinline__ void skip(int pieces) {
    slot += pieces;
#pragma unroll
    for (int i = 0; i < ceil_div(kWarps, kSlots); ++i)
      if (slot >= kSlots) {
        slot -= kSlots;
        ++round;
      }
  }
  // `pieces` further, at most kWarps.
  __device__ __forceinline__ RingPlace after(int pieces) const {
    RingPlace place = *this;
    place.skip(pieces);
    return place;
  }
};

// A computing warp's side.
template <class Shared>
struct RingReader {
  using Place = RingPlace<Shared::kSlots>;
  Shared& sh;
  Place next;  // of the pieces that all warps have yet to read or step over

  // Address of a piece that has arrived.
  __device__ __forceinline__ uint32_t wait(const Place& place) {
    while (sh.filled.get(place.slot) != place.round) {
    }
    mbarrier_wait(smem_address(&sh.full[place.slot]), place.round & 1);
    return smem_address(sh.data[place.slot]);
  }

  // Tells the ring that this warp, one of kOwners, has read a piece. `loaded` depends on all words loaded from the
  // piece. Loads may still be in flight when the next instruction runs, and the copy engine, which fills the slot
  // again, does not wait for them. So the barrier's address depends on `loaded` too. The added value is 0: no round
  // reaches 2^31.
  template <int kOwners>
  __device__ __forceinline__ void release(const Place& place, uint32_t loaded) {
    const uint32_t nothing = loaded & uint32_t(int(place.round) >> 31);
    __syncwarp();
    // Before Hopper an arrival has no count, and as many lanes arrive.
    constexpr int kCount = kMaxOwners / kOwners, kLanes = kLanesCopy ? kCount : kReaders;
    if (lane_index() < kLanes) mbarrier_arrive<kLanesCopy ? 1 : kCount>(smem_address(&sh.empty[place.slot]) + nothing);
  }
};

// The fetching warp's side: its lanes fetch pieces side by side, or together one after the other.
template <class Shared>
struct RingWriter {
  using Place = RingPlace<Shared::kSlots>;
  Shared& sh;
  Place next;

  // Fetches the next `count` pieces, at most kWarps, one for each lane. Lane i has the i-th of them: `bytes` bytes from
  // `from` on.
  __device__ __forceinline__ void push(int count, const char* from, int bytes, uint64_t policy) {
    if constexpr (kLanesCopy) return push_together(count, from, bytes, policy);
    const Place place = next.after(lane_index() & (kWarps - 1));
    const uint32_t empty = smem_address(&sh.empty[place.slot]);
#pragma unroll
    for (int first = 0; first < kWarps; first += kAtOnce) {
      bool waits = lane_index() >= first && lane_index() < min(count, first + kAtOnce);
      while (__any_sync(~0u, waits)) {
        // A slot is free once its last piece has been read.
        if (waits && mbarrier_test(empty, (place.round & 1) ^ 1)) {
          sh.filled.set(place.slot, place.round);
          fill(sh.data[place.slot], from, bytes, &sh.full[place.slot], policy);
          waits = false;
        }
      }
    }
    next.skip(count);
  }

 private:
  // Pieces that are fetched side by side. No two of them may share a slot: a barrier's parity tells only whether the
  // last piece of the slot has been read, not the piece before it.
  static constexpr int kAtOnce = Shared::kSlots >= kWarps ? kWarps : kWarps / 2;
  static_assert(Shared::kSlots >= kAtOnce, "more pieces at once than slots");

  __device__ __forceinline__ void push_together(int count, const char* from, int bytes, uint64_t policy) {
    constexpr int kRowBytes = 32 * 16;
    const int within = 16 * lane_index();
#pragma unroll 1
    for (int piece = 0; piece < count; ++piece) {
      const char* const source = lane_pointer(from, piece) + within;
      const int last = __shfl_sync(~0u, bytes, piece) - within;
      const uint32_t to = smem_address(sh.data[next.slot]) + within, full = smem_address(&sh.full[next.slot]);
      mbarrier_wait(smem_address(&sh.empty[next.slot]), (next.round & 1) ^ 1);
      if (lane_index() == 0) sh.filled.set(next.slot, next.round);
#pragma unroll
      for (int row = 0; row < kSlotBytes; row += kRowBytes)
        if (row < last) cp_async(to + row, source + row, policy);
      cp_async_arrive(full);
      next.skip(1);
    }
  }
  static __device__ __forceinline__ const char* lane_pointer(const char* p, int lane) {
    return reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(p), lane));
  }

  static __device__ __forceinline__ void fill(char* to, const char* from, int bytes, uint64_t* full, uint64_t policy) {
    if constexpr (!kRacecheck) {
      mbarrier_expect_tx(smem_address(full), bytes);
      if (bytes > 0) bulk_copy(smem_address(to), from, bytes, smem_address(full), policy);
    } else {
#pragma unroll 1
      for (int i = 0; i < bytes; i += 16)
        *reinterpret_cast<uint4*>(to + i) = __ldg(reinterpret_cast<const uint4*>(from + i));
      mbarrier_arrive<1>(smem_address(full));
    }
  }
};

}  // namespace qwen_tts
