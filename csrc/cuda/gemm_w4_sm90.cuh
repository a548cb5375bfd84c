// Products of 4-bit weights by wgmma with the weights in registers, for 16-bit and for 8-bit activations, and of 8-bit
// weights for 16-bit ones. sm_90a.
//
// Channels are the 64-row wgmma operand, tokens the n operand. A CTA owns 128 channels x kTokens tokens, two consumer
// warpgroups of 64 channels each, and walks K in slabs of 128 (w4.h) through a ring of stages, which producers (one
// lane of a warp each) fill in turns by bulk copies: 8 KB of codes, the scales of the slab's groups, and the tokens,
// 128-byte swizzled.
//
//          kTokens                        cluster of kCluster: the CTAs take neighbouring channels and the same tokens;
//      +-------------+                    each fetches its part of the token tile and multicasts it to all, so that a
//  64  |  warps 0-3  |   x K              token crosses the L2 once for 128 * kCluster channels.
//      +-------------+
//  64  |  warps 4-7  |                    warps 8, 9: producers; where registers move (kMovesRegisters), warps 10, 11
//      +-------------+                    hand theirs over, and one says where sums have been left to others.
//
// A block of codes is in the order of wgmma's register operand, so a warp reads 16 bytes a lane, makes 64 k of them
// whole (8 or 16 registers) and multiplies them with the tokens in shared memory. Halves of a slab take turns: while
// one is multiplied, the other is read and unpacked, and while a warpgroup adds up, the other one's products run.
//
//     tensor cores    | even half   | odd half                 |                        | even half of the next ...
//     this warpgroup  | unpack odd  | unpack even of the next  | total += sums * scale  | ...
//
// Weights are never rounded: codes less their zero point are exact, and the sums of a group are multiplied by its
// scale. 8-bit activations: sums are int32 and exact, and the groups of an output are added in the order of K, each
// step rounded once. 16-bit activations: fp32 sums, promoted at the end of each group and of each slab; or, of 192
// or 256 tokens ("wide"), kept by the tensor cores for all of K in units of the scale of the group at hand, and
// multiplied by the ratio of two scales between groups: one set of registers serves twice the tokens.
//
// 8-bit weights, under 16-bit activations: rows of pairs (w8a8.h), of which "ldmatrix" gives each lane two steps of
// wgmma's register operand at a time. Their scales are of channels, so the tensor cores keep one set of sums for all of
// K, and products follow one another without a pause: behind those of two steps, the next two are unpacked. The same
// goes for 4-bit weights under 8-bit activations whose groups have multipliers in place of scales (codes_sm90.cuh).
//
// Up to 16 tokens ("few"), whose products are over before the next ones begin: the same fragments by mma.sync, in two
// chains of sums. It takes 35 cycles for a product where wgmma takes 90, and no descriptors. Floats by 4-bit codes go
// through them one slab at a time, by eight or sixteen warps that hide each other's waiting (slabs_w4_sm90.cuh).
//
// Few channels: tiles of 64 or 32 of them, since each CTA walks all of K and most of the chip would have none. Two,
// four or eight groups of their warps ("phases") take the slabs of such a tile in turns. Floats: each has sums of its
// own, and at the end they meet in shared memory, where each phase adds a part of the tokens up. Integers, whose order
// counts: the running totals lie in shared memory, and each phase adds its slab's to them when the one before it has (a
// relay, in pieces of the tile); what takes long, unpacking and products, is under way in all of them at a time. Two
// phases have all 128 channels where registers allow (w4_two_have_all): four warpgroups instead of two hide what a slab
// waits for; and of up to 16 tokens of 16 bits, channels are so many that tiles of 64 would not all run at a time.
#pragma once

#include "codes_sm90.cuh"
#include "share_w4_sm90.cuh"
#include "slabs_w4_sm90.cuh"
#include "tensor_map.h"

namespace qk::cuda {
namespace {

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kPerSm)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const Job job) {
  extern __shared__ uint8_t shared[];
  __shared__ __align__(8) uint64_t barriers[2 * kMostStages];  // of full stages, of empty ones
  __shared__ uint32_t book[S::kCodebook ? 256 : 1];
  __shared__ float4 exchange[S::kExchange];
  __shared__ Terms<S> all_terms[S::kGroups];
  __shared__ OnlyTile only;
  const uint32_t base = (ptx::smem_u32(shared) + kAlignment - 1) / kAlignment * kAlignment;
  const uint32_t full = ptx::smem_u32(barriers), empty = full + kEmptyFromFull;
  const uint32_t packed_base = base + job.stages * S::kTokenBytes;
  const int warp = threadIdx.x >> 5, group = (warp >> 2) % S::kGroups;  // of 64 channels
  const int rank = S::kCluster > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;

  if (threadIdx.x == 0) {
    int readers = S::kWarps * S::kCluster;  // all CTAs of a cluster read what any of them fetches
    if constexpr (S::kManyWarps) {
      const OnlyTile tile = OnlyTile::of<S>(job);
      readers = tile.channels.count / S::kWarpRows;
      only = tile;
    }
    for (int s = 0; s < job.stages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, readers);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (S::kCodebook) fill_book<typename S::T>(book, job.weight.codebook, S::kThreads);
  __syncthreads();
  if constexpr (S::kCluster > 1) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  }

  if (warp >= S::kConsumerWarps) {
    if constexpr (S::kMovesRegisters) ptx::registers_decrease<S::kProducerRegisters>();
    const int producer = warp - S::kConsumerWarps;
    if (producer < S::kProducers && ptx::elect_one()) {
      ptx::prefetch_tensor_map(&x_map);
      const uint64_t policy = job.tiles_m == 1 ? ptx::kEvictFirst : ptx::kEvictNormal;
      const uint32_t full_here = ptx::keep(full), empty_here = ptx::keep(empty);
      const uint32_t tokens_here = ptx::keep(base + rank * job.part * 128), packed_here = ptx::keep(packed_base);
      Walk<S> walk(job);
      Segment s;
      Ring ring;
      ring.stage = producer;
      ring.parity = 1;  // of an empty barrier nobody has used: its "previous" phase counts as complete
      [[maybe_unused]] int codes = 0;  // where a slab's go, of halves
      int skip = producer;  // slabs of the next segment until the first one of this producer
      // Copies until the next kernel may begin: about as many slabs are left then as its launch takes, or half of them;
      // none where CTAs that wait for room will hold it back long enough.
      const int before_next = S::kManyWarps ? job.slabs - kLead : walk.slabs(job) / 2;
      int until_next = job.waits ? 1 : max(1, before_next / S::kProducers);
      bool waited = false;
      while (walk.next(job, s)) {
        const int count = s.last - s.first, first = s.first + skip;
        skip = (skip + S::kProducers - count % S::kProducers) % S::kProducers;
        if (first >= s.last) continue;
        Channels channels;
        int m0;
        if constexpr (S::kManyWarps) {
          channels = only.channels, m0 = only.m0;
        } else {
          const Place place = place_of(job, s.tile);
          channels = {(place.n * S::kCluster + rank) * S::kChannels, S::kChannels};
          m0 = place.m * S::kTokens + rank * job.part;
        }
        PackedSource<S> source(job, channels, first);
        int ahead = 0;
        if (!waited) {
          // The first stages' weights, which nothing before this kernel writes, come before the activations are there.
          for (int slab = first; slab < s.last && ring.stage + ahead * S::kProducers < job.ahead;
               slab += S::kProducers) {
            const int stage = ring.stage + ahead * S::kProducers;
            source.load(job, slab, packed_here + stage / S::kStagesOfSlab * job.packed_bytes, full_here + 8 * stage,
                        policy);
            ++ahead;
            if (S::kHalves && stage + 1 < job.stages) {
              ptx::mbarrier_arrive_expect_tx(full_here + 8 * (stage + 1), source.token_bytes(job));
              ++ahead;
            }
          }
          if (!job.follows) ptx::grid_dependency_wait();
          waited = true;
        }
        if constexpr (S::kManyWarps) {
          if (source.scale_step > 0) {
            copy_slabs<S>(job, x_map, source, first, s.last, m0, ring, packed_here, tokens_here, full_here, policy,
                          ahead, until_next);
            break;  // its only tile
          }
        }
#pragma unroll 1
        for (int slab = first; slab < s.last; slab += S::kProducers) {
#pragma unroll
          for (int part = 0; part < S::kStagesOfSlab; ++part) {
            const uint32_t bar = full_here + 8 * ring.stage;
            if (ahead > 0) {
              --ahead;
              wait_for_stage_before<S>(ring, full_here);
            } else {
              ptx::mbarrier_wait(empty_here + 8 * ring.stage, ring.parity);
              if (part == 0) {
                source.load(job, slab, packed_here + (S::kHalves ? codes : ring.stage) * job.packed_bytes, bar, policy);
              } else {
                ptx::mbarrier_arrive_expect_tx(bar, source.token_bytes(job));
              }
            }
            load_tokens<S>(x_map, tokens_here + ring.stage * S::kTokenBytes,
                           slab * S::kRowBytes + part * S::kStageBoxes * 128, m0, bar);
            ring.advance(job.stages, S::kProducers);
          }
          if (S::kHalves) codes = next_codes<S>(codes);
          // It fills its stages where there is room, and memory is never idle; sooner, it would take from what this one
          // still needs.
          if (--until_next == 0) ptx::grid_launch_dependents();
        }
      }
      if constexpr (S::kShares) {  // the sums of those who share its last tile
        const int cluster = Walk<S>::cluster(job), stages = helpers_of(job, s, cluster) * Handover<S>::kStages;
        if (stages > 0 && !waited) ptx::grid_dependency_wait();  // flags of a launch before this one
        Handover<S>::fetch_all(job, cluster, rank, skip, stages, base, full_here, empty_here, ring);
      }
      if (job.follows) ptx::grid_dependency_wait();  // what waits for this kernel waits for both
      if constexpr (S::kCluster > 1) {  // stay until the last arrivals of the other CTAs are here
        for (int i = 0; i < job.stages; i += S::kProducers) {
          ptx::mbarrier_wait(empty + 8 * ring.stage, ring.parity);
          ring.advance(job.stages, S::kProducers);
        }
      }
    }
    if constexpr (S::kShares && S::kSpareWarps) {
      if (producer == S::kProducers) Handover<S>::raise_flags(job, Walk<S>::cluster(job), rank);
    }
    __syncwarp();
  } else if constexpr (S::kManyWarps) {
    work_off_slabs<S>(job, only, shared + (packed_base - ptx::smem_u32(shared)), base, full, all_terms[0]);
  } else {
    if constexpr (S::kMovesRegisters) ptx::registers_increase<S::kConsumerRegisters>();
    const Thread t(S::kWarps, S::kPhases > 1, S::kBits);
    const uint32_t packed_offset = ptx::keep(packed_base - ptx::smem_u32(shared));
    const auto packed_at = [&](int stage) { return shared + packed_offset + stage * job.packed_bytes; };
    const uint32_t full_here = ptx::keep(full);
    const uint32_t empty_there = S::kCluster > 1 ? ptx::cluster_address(empty, t.lane % S::kCluster) : ptx::keep(empty);
    Sums<S> sums;
    uint32_t even[S::kFragments], odd[S::kFragments];  // halves of a slab
    uint4 odd_codes;
    [[maybe_unused]] EarlyCodes<S> early, later;  // of the even and the odd half, where steps go one by one
    Walk<S> walk(job);
    // Of a phase: every kPhases-th slab of the only tile.
    int left = S::kPhases == 1 ? walk.slabs(job) : max(0, (job.slabs - t.phase + S::kPhases - 1) / S::kPhases);
    Ring ring;
    ring.stage = t.phase;
    [[maybe_unused]] int codes = 0;  // where a slab's are, of halves
    const Relay<S> relay(exchange);
    Segment s;
    float scale[2];  // of wide sums
    [[maybe_unused]] int group_left;  // rows until the end of the group, counted for integers alone

    const auto release = [&](int stage) {
      __syncwarp();  // everybody has read codes and scales
      if (S::kCluster > 1) {
        if (t.lane < S::kCluster) ptx::mbarrier_arrive_there(empty_there + 8 * stage);
      } else if (t.lane == 0) {
        ptx::mbarrier_arrive(empty_there + 8 * stage);
      }
    };

    // One slab whose groups have 1 << kShift rows. Its even half is unpacked, and so is the next one's when it ends.
    // What takes long, waiting for the next stage and reading from shared memory, happens behind products.
    // kEach: groups end with each row, and there are no rows of padding.
    const auto slab_of = [&](auto fixed, auto each, int slab) {
      constexpr int kShift = decltype(fixed)::value, kRows = 1 << kShift, kPerRow = S::kSteps >> kShift;
      constexpr bool kEach = decltype(each)::value;
      const uint8_t* packed = packed_at(ring.stage);
      const uint8_t* rows = packed + S::kChannels * S::kCodeBytes;
      uint32_t tokens = base + ring.stage * S::kTokenBytes;
      if (S::kFew) tokens += t.matrix;
      if (S::kUniform) tokens = ptx::uniform(tokens);
      const int own = ring.stage;
      const uint32_t own_parity = ring.parity;
      ring.advance(job.stages, S::kPhases);
      // After the last slab: this one's stage, to no purpose.
      const int next = --left > 0 ? ring.stage : own;
      const uint32_t next_parity = left > 0 ? ring.parity : own_parity;
      const uint8_t* next_packed = packed_at(next);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if constexpr (S::kTurns) ptx::named_barrier(kTurnBarrier + group, S::kConsumers);
        // Of this phase.
        [[maybe_unused]] const bool last = slab + S::kPhases >= s.last && row == kRows - 1;
        const int at = slab * kRows + row;
        bool fresh = true, ends = true;
        if constexpr (S::kRelays) {
          ends = kEach || at < job.rows;  // groups lie within a slab
        } else {
          fresh = S::kWide ? slab == s.first + t.phase && row == 0 : kEach || group_left == job.group_rows;
          // The last group may be short, and nothing comes of rows of padding.
          ends = kEach || at == job.rows - 1 || (--group_left == 0 && at < job.rows);
        }
        if constexpr (kShift == 0) {
          multiply<S, 0, S::kSteps / 2, kPerRow>(even, tokens, fresh, sums);
          if (S::kWide) odd_codes = load_codes(t, packed, 1);
          if (!S::kApart) unpack_half<S, kShift>(job, t, packed, odd_codes, book, 1, odd);
          multiply<S, S::kSteps / 2, S::kSteps / 2, kPerRow>(odd, tokens, fresh, sums);
        } else {
          multiply_row<S, kPerRow>(row, even, odd, tokens, fresh, sums);
          if (S::kWide && row == 0) odd_codes = load_codes(t, packed, 1);
          if (row == 0 && !S::kApart) unpack_half<S, kShift>(job, t, packed, odd_codes, book, 1, odd);
        }
        if constexpr (S::kTurns) ptx::named_barrier_arrive(kTurnBarrier + 1 - group, S::kConsumers);
        Factors f;
        if (!S::kWide) f = load_factors<S>(job, t, rows + row * job.groups.row_bytes);
        if (row == (S::kApart ? kRows - 1 : kRows / 2)) {
          ptx::mbarrier_wait(full_here + 8 * next, next_parity);
          const uint4 even_codes = load_codes(t, next_packed, 0);
          if (!S::kWide) odd_codes = load_codes(t, next_packed, 1);  // wide: no register to wait in
          if (S::kApart) {
            ptx::wgmma_wait<0>();
            unpack_half<S, kShift>(job, t, next_packed, odd_codes, book, 1, odd);
          } else if (kShift == 0 && !S::kFew) {
            ptx::wgmma_wait<1>();  // the even half may be overwritten
          }
          unpack_half<S, kShift>(job, t, next_packed, even_codes, book, 0, even);
        }
        if constexpr (S::kWide) {
          f = load_factors<S>(
              job, t,
              row + 1 < kRows ? rows + (row + 1) * job.groups.row_bytes : next_packed + S::kChannels * S::kCodeBytes);
        }
        if (!S::kFew) ptx::wgmma_wait<0>();
        if constexpr (S::kWide) {
          float next_scale[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) next_scale[e] = live_or(f.scale[e], last ? 1.0f : scale[e]);
          if (ends || last || S::kPhases > 1) rescale<S>(scale, next_scale, last, sums);
          scale[0] = next_scale[0], scale[1] = next_scale[1];
        } else if constexpr (S::kRelays) {
          float step[S::kValues];
          scale_parts<S>(f, !ends, sums, step);
          // Complete long since. ptxas moves nothing beyond it: the next phase shall wait for additions alone.
          if (kRows == 1) ptx::mbarrier_wait(full_here + 8 * own, own_parity);
          relay.add(t.phase, row == 0, row == kRows - 1, slab == s.last - 1, step, sums);
        } else {
          if (!S::kBytes || ends) promote<S>(f, sums);
        }
        if (!kEach && !S::kRelays && ends) group_left = job.group_rows;
      }
      release(own);
    };

    // One slab whose products add to what there is (kOneSum). A product with a register operand holds its warp up until
    // the one before it is done, so the next codes are unpacked behind a product. But of few tokens, the last products
    // are still under way when the slab ends, so that the next slab, or the end of the tile, gives its stage back.
    // kOneRow: see codes_sm90.cuh.
    const auto release_before = [&](int stage) { release(stage - S::kPhases + (stage < S::kPhases ? job.stages : 0)); };
    const auto slab_of_one_sum = [&](auto one_row, int slab) {
      [[maybe_unused]] constexpr bool kOneRow = decltype(one_row)::value;
      uint32_t tokens = base + ring.stage * S::kTokenBytes;
      if (S::kFew) tokens += t.matrix;
      if (S::kUniform) tokens = ptx::uniform(tokens);
      const int own = ring.stage;
      const uint32_t own_parity = ring.parity;
      ring.advance(job.stages, S::kPhases);
      [[maybe_unused]] const Ring second = ring;  // of halves
      if constexpr (S::kHalves) ring.advance(job.stages);
      const int next = --left > 0 ? ring.stage : own;
      const uint32_t next_parity = left > 0 ? ring.parity : own_parity;
      const bool first = slab == s.first + t.phase;
      if constexpr (S::kFew) {
        multiply<S, 0, S::kSteps / 2, S::kSteps>(even, tokens, first, sums);
        early.template unpack<kOneRow>(odd);
        multiply<S, S::kSteps / 2, S::kSteps / 2, S::kSteps>(odd, tokens, false, sums);
        ptx::mbarrier_wait(full_here + 8 * next, next_parity);
        early.template load<kOneRow>(job, t, packed_at(next), 0);
        early.template unpack<kOneRow>(even);
        early.template load<kOneRow>(job, t, packed_at(next), 1);
        release(own);
      } else if constexpr (S::kBits == 8) {
        const uint8_t* packed = packed_at(S::kHalves ? codes : own);
        if (S::kHalves && left > 0) codes = next_codes<S>(codes);
        const uint8_t* next_packed = packed_at(S::kHalves ? codes : next);
#pragma unroll
        for (int s = 0; s < S::kSteps; s += 2) {
          const bool last = s == S::kSteps - 2;
          uint32_t* next_fragments = s % 4 ? even : odd;
          if (S::kHalves && s == S::kSteps / 2) {
            ptx::mbarrier_wait(full_here + 8 * second.stage, second.parity);
            tokens = base + second.stage * S::kTokenBytes - S::kTokenBytes;
            if (S::kUniform) tokens = ptx::uniform(tokens);
          }
          multiply_two<S>(s % 4 ? odd : even, tokens, s, first, sums);
          if (last) {
            ptx::mbarrier_wait(full_here + 8 * next, next_parity);
            early.load_two(t, next_packed, 0);
            early.load_two(t, next_packed, 2);
          } else if (s + 4 < S::kSteps) {
            early.load_two(t, packed, s + 4);
          }
          ptx::wgmma_wait<1>();  // all but these
          if (s == 0 && !first) release_before(own);
          if (S::kHalves && s == S::kSteps / 2) release(own);
          early.unpack_two(last ? 0 : s + 2, next_fragments);
        }
      } else {
        multiply<S, 0, 1, S::kSteps>(even, tokens, first, sums);
        ptx::wgmma_wait<1>();  // all but these
        if (!first) release_before(own);
        early.template unpack_step<kOneRow>(1, odd);
        multiply<S, 1, 1, S::kSteps>(odd, tokens, false, sums);
        ptx::wgmma_wait<1>();
        later.template unpack_step<kOneRow>(0, even);
        multiply<S, 2, 1, S::kSteps>(even, tokens, false, sums);
        ptx::mbarrier_wait(full_here + 8 * next, next_parity);
        early.template load<kOneRow>(job, t, packed_at(next), 0);
        ptx::wgmma_wait<1>();
        later.template unpack_step<kOneRow>(1, odd);
        multiply<S, 3, 1, S::kSteps>(odd, tokens, false, sums);
        later.template load<kOneRow>(job, t, packed_at(next), 1);
        ptx::wgmma_wait<1>();
        early.template unpack_step<kOneRow>(0, even);
      }
    };

    if (!job.follows) ptx::grid_dependency_wait();
    if (left > 0) {
      ptx::mbarrier_wait(full_here + 8 * ring.stage, 0);
      const uint8_t* packed = packed_at(ring.stage);
      if constexpr (S::kOneSum) {
        early.template load<false>(job, t, packed, 0);
        if constexpr (S::kFew) {
          early.template unpack<false>(even);
          early.template load<false>(job, t, packed, 1);
        } else if constexpr (S::kBits == 8) {
          early.unpack_two(0, even);
        } else {
          early.template unpack_step<false>(0, even);
          later.template load<false>(job, t, packed, 1);
        }
      } else {
        if (!S::kWide) odd_codes = load_codes(t, packed, 1);
        for_row_shift(job.groups, [&](auto fixed) {
          constexpr int kShift = decltype(fixed)::value;
          unpack_half<S, kShift>(job, t, packed, load_codes(t, packed, 0), book, 0, even);
          if (S::kApart) unpack_half<S, kShift>(job, t, packed, odd_codes, book, 1, odd);
        });
      }
      if constexpr (S::kWide) {
        const Factors f = load_factors<S>(job, t, packed + S::kChannels * S::kCodeBytes);
#pragma unroll
        for (int e = 0; e < 2; ++e) scale[e] = live_or(f.scale[e], 1.0f);
      }
      if (S::kTurns && group == 1) ptx::named_barrier_arrive(kTurnBarrier, S::kConsumers);
    }
    Terms<S>& terms = all_terms[group];
    bool stored = false;
    while (walk.next(job, s)) {
      const Place place = place_of(job, s.tile);
      const int m0 = place.m * S::kTokens, tile_n0 = (place.n * S::kCluster + rank) * S::kChannels;
      if (stored) {  // the terms of the tile before are here, if only to be overwritten, and not needed any more
        ptx::cp_async_wait_all();
        ptx::named_barrier(1 + group, 128);
      }
      terms.start(job, m0, tile_n0 + group * Terms<S>::kWidth, Terms<S>::member(t.phase));
      if constexpr (!S::kWide && (S::kFew || !S::kOneSum)) {
#pragma unroll
        for (int i = 0; i < S::kValues; ++i) sums.total[i] = 0;
      }
      if constexpr (S::kFew && S::kOneSum) {
#pragma unroll
        for (int i = 0; i < S::kValues; ++i) sums.odd[i] = 0;
      }
      if constexpr (!S::kOneSum) group_left = job.group_rows - (s.first << job.groups.row_shift) % job.group_rows;
      if (S::kRelays && t.phase == S::kPhases - 1) relay.start();
      const auto run_slabs = [&](auto shift, auto each) {
#pragma unroll 1
        for (int slab = s.first + t.phase; slab < s.last; slab += S::kPhases) slab_of(shift, each, slab);
      };
      constexpr std::true_type kYes = {};
      constexpr std::false_type kNo = {};
      if constexpr (S::kOneSum) {
        const auto run_all = [&](auto one_row) {
          int slab = s.first + t.phase;
#pragma unroll 1
          do {
            slab_of_one_sum(one_row, slab);
          } while ((slab += S::kPhases) < s.last);
        };
        if (!S::kMultiplier || job.groups.row_shift == 0) {
          run_all(kYes);
        } else {
          run_all(kNo);
        }
        if constexpr (S::kFew) {
#pragma unroll
          for (int i = 0; i < S::kValues; ++i) sums.total[i] += sums.odd[i];
        } else {
          ptx::wgmma_wait<0>();
          release_before(ring.stage);
        }
      } else {
        for_row_shift(job.groups, [&](auto shift) {
          if constexpr (decltype(shift)::value == 0) {
            if (!S::kBytes || S::kRelays || job.group_rows == 1) return run_slabs(shift, kYes);
          }
          run_slabs(shift, kNo);
        });
      }
      const int first_row = t.warp * kW4Rows;
      if constexpr (S::kPhases > 1) {
        float4* meeting =
            S::kGathersInRing ? reinterpret_cast<float4*>(shared + (base - ptx::smem_u32(shared))) : exchange;
        typename S::Total total[1][S::kPartTokens / 2];
        if (gather<S>(meeting, S::kGathersInRing, t.phase, {sums}, total)) {
          store_tile<S, S::kPartTokens>(job, m0, tile_n0, first_row, t.phase * S::kPartTokens, terms, total[0]);
        }
      } else {
        stored = true;
        if constexpr (S::kShares) {
          const int cluster = Walk<S>::cluster(job);
          if (s.first > 0) {
            Handover<S>::leave(job, cluster, rank, sums);
            continue;
          }
          Handover<S>::add_all(helpers_of(job, s, cluster), job, shared + (base - ptx::smem_u32(shared)), full_here,
                               ring, release, sums);
        }
        ptx::cp_async_wait_all();
        ptx::named_barrier(1 + group, 128);
        store_tile<S, S::kTokens>(job, m0, tile_n0, first_row, 0, terms, sums.total);
      }
    }
  }
}

}  // namespace
}  // namespace qk::cuda
