// The weight ring. One warp of the CTA fetches weights, keys and values for the sixteen that compute. It never stops at
// a dependency, so the memory system stays busy while those wait for packets.
//
// The ring has kSlots slots of kSlotBytes. A piece is one copy by the bulk copy engine and takes one slot. A copy costs
// the fetching warp some fifty cycles whatever its size, so a piece serves as many warps as fill a slot, its owners.
// Before Hopper there is no such engine. Four warps fetch there, and the lanes of each copy a piece together.
//
// A piece holds mma A fragments of one 16-row strip for a few 16-wide chunks of k: 512 bytes a chunk, lane by lane 16
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
// Warps that fetch. A warp takes longer to copy a piece by its lanes than memory does, so each scheduler of the SM has
// a fetching warp. A slot always has the same one, which keeps the order of its pieces.
constexpr int kFetchers = kLanesCopy ? 4 : 1;
__device__ __forceinline__ bool owns_slot(int slot) { return slot % kFetchers == warp_index() - kWarps; }

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
  __device__ __forceinline__ void step() {
    if (++slot == kSlots) {
      slot = 0;
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
    if (lane_index() < kReaders) mbarrier_arrive<kMaxOwners / kOwners>(smem_address(&sh.empty[place.slot]) + nothing);
  }
};

// How long L2 should keep the fetched bytes.
enum class Keep { kOnce, kKept, kNormal };

__device__ __forceinline__ uint64_t keep_policy(Keep keep) {
  return keep == Keep::kKept ? policy_evict_last() : keep == Keep::kOnce ? policy_evict_first() : policy_evict_normal();
}

// A fetching warp's side. Its lanes fetch pieces side by side, or copy each piece together.
template <class Shared>
struct RingWriter {
  using Place = RingPlace<Shared::kSlots>;
  Shared& sh;
  Place next;

  // Fetches the next `count` pieces, at most kWarps. Piece i is the kBytes bytes from from + i * kStride on.
  template <int kStride, int kBytes>
  __device__ __forceinline__ void push(int count, const char* from, Keep keep) {
    push_some<kStride, kBytes, true>(count, from, 0, keep);
  }
  // The same for pieces that follow each other and have `bytes` bytes together, which may be less than the pieces hold.
  template <int kStride>
  __device__ __forceinline__ void push_part(int count, const char* from, int bytes, Keep keep) {
    push_some<kStride, kStride, false>(count, from, bytes, keep);
  }

 private:
  // Pieces that are fetched side by side. No two of them may share a slot: a barrier's parity tells only whether the
  // last piece of the slot has been read, not the piece before it.
  static constexpr int kAtOnce = Shared::kSlots >= kWarps ? kWarps : kWarps / 2;
  static_assert(Shared::kSlots >= kAtOnce, "more pieces at once than slots");

  template <int kStride, int kBytes, bool kWhole>
  __device__ __forceinline__ void push_some(int count, const char* from, int total, Keep keep) {
    if constexpr (kLanesCopy) {
      // Each policy has a loop of its own, in which it is a constant.
      if (!kWhole) {
        push_together<kStride, kBytes, kWhole, Keep::kNormal>(count, from, total);
      } else if (keep == Keep::kKept) {
        push_together<kStride, kBytes, kWhole, Keep::kKept>(count, from, total);
      } else {
        push_together<kStride, kBytes, kWhole, Keep::kOnce>(count, from, total);
      }
    } else {
      const int of_lane = lane_index() * kStride;
      const int bytes = kWhole ? kBytes : max(0, min(kBytes, total - of_lane));
      push_side_by_side(count, from + of_lane, bytes, keep_policy(keep));
    }
  }

  // Lane i fetches piece i: `bytes` bytes from `from` on.
  __device__ __forceinline__ void push_side_by_side(int count, const char* from, int bytes, uint64_t policy) {
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

  // The lanes copy a piece together, in rows of 16 bytes a lane. A fetching warp steps over the slots of the others.
  template <int kStride, int kBytes, bool kWhole, Keep kKeep>
  __device__ __forceinline__ void push_together(int count, const char* from, int total) {
    const int within = 16 * lane_index();
    from += within;
    total -= within;
#pragma unroll 1
    for (; count > 0; --count) {
      if (__all_sync(~0u, owns_slot(next.slot))) {  // the vote tells the compiler that all lanes agree
        mbarrier_wait(smem_address(&sh.empty[next.slot]), (next.round & 1) ^ 1);
        if (lane_index() == 0) sh.filled.set(next.slot, next.round);
        copy_rows<kBytes, kWhole, 0>(smem_address(sh.data[next.slot]) + within, from, total, keep_policy(kKeep));
        cp_async_arrive(smem_address(&sh.full[next.slot]));
      }
      next.step();
      from += kStride;
      total -= kStride;
    }
  }
  template <int kBytes, bool kWhole, int kFrom>
  __device__ __forceinline__ void copy_rows(uint32_t to, const char* from, int total, uint64_t policy) {
    constexpr int kRowBytes = 32 * 16;
    if constexpr (kFrom < kBytes) {
      const bool partly = kBytes - kFrom < kRowBytes && 16 * lane_index() >= kBytes - kFrom;
      if ((kWhole || kFrom < total) && !partly) cp_async_at<kFrom>(to, from, policy);
      copy_rows<kBytes, kWhole, kFrom + kRowBytes>(to, from, total, policy);
    }
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
