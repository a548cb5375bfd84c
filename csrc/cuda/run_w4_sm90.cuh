// The host's side of gemm_w4_sm90.cuh: plans that no instance serves, sizes, and the launch.
#pragma once

#include <algorithm>
#include <cmath>

#include "gemm_w4_sm90.cuh"
#include "host.h"
#include "launch.h"

namespace qk::cuda {
namespace {

// Throws where a plan does not fit K.
inline void check_walk(const char* name, int64_t k, const W4Plan& plan) {
  const auto refuse = [&](const std::string& what) { throw std::invalid_argument(std::string(name) + ": " + what); };
  if (w4_slabs(k) < plan.phases) {
    refuse("expected K of " + std::to_string(plan.phases) + " slabs or more, got K = " + std::to_string(k));
  }
  if (plan.ctas < 1) refuse("expected at least 1 cluster, got " + std::to_string(plan.ctas));
}

// Throws where no instance has the plan's tile, or where it cannot serve the weight.
inline void check_tile(const char* name, bool bytes, const W4Weight& w, const W4Plan& plan) {
  const auto refuse = [&](const std::string& what) { throw std::invalid_argument(std::string(name) + ": " + what); };
  if (!w4_has_tile(bytes, w.kind, plan.tokens, plan.phases)) {
    refuse("no instance with " + std::to_string(plan.tokens) + " tokens and " + std::to_string(plan.phases) +
           " phases for this kind of codes");
  }
  if (bytes && w.kind != W4Kind::kMultiplier && plan.phases > 1 && !(w.group < w.k && kW4SlabK % w.group == 0)) {
    refuse("expected groups of 32, 64 or 128 for phases, got groups of " + std::to_string(w.group));
  }
  check_walk(name, w.k, plan);
  if (plan.counters > 0 && (bytes || plan.phases > 1)) refuse("expected whole tiles, got shared ones");
}

// The channels of a few tokens' tiles: all that fit into one; or of tiles of 128, where they all run at a time, as many
// as give all multiprocessors the same number.
template <typename S>
void set_channels(Job& job) {
  job.wide_tiles = job.tiles_n, job.wide_channels = job.narrow_channels = S::kChannels;
  const int sms = multiprocessors();
  if (S::kChannels < 128 || job.tiles_m > 1 || !w4_is_even(job.weight.n, sms)) return;
  // In units of a warp's.
  const int all = static_cast<int>(blocks(job.weight.n, S::kWarpRows)), each = static_cast<int>(blocks(all, sms));
  const int wide = each <= S::kWarps ? each : (each + 1) / 2, narrow = each - wide;
  job.wide_tiles = std::min(static_cast<int>(blocks(all, wide)), sms);
  job.wide_channels = wide * S::kWarpRows, job.narrow_channels = narrow * S::kWarpRows;
  const int left = all - job.wide_tiles * wide;
  job.tiles_n = job.wide_tiles + (left > 0 ? static_cast<int>(blocks(left, narrow)) : 0);
}

// Of so many tiles, how many clusters take whole, in full waves; the others' slabs are dealt out in equal runs: those
// of the last wave, which is not full, and of one before it, lest runs be short.
constexpr int64_t whole_tiles(int64_t tiles, int64_t clusters) {
  return tiles % clusters == 0 ? tiles : tiles < clusters ? 0 : (tiles / clusters - 1) * clusters;
}

// Token tiles beside each other among the clusters that run at a time: as many as make what these fetch least, tokens
// for each row of such tiles and codes for each column.
template <typename S>
int32_t tile_group(int clusters) {
  clusters = std::min(clusters, multiprocessors() * S::kPerSm / S::kCluster);
  const double tokens = S::kTokens * S::kRowBytes, codes = S::kChannels * S::kCluster * S::kCodeBytes;
  return std::max(1, static_cast<int32_t>(std::lround(std::sqrt(clusters * codes / tokens))));
}

// Launches the instance S; job: what is not worked out here. name: the same array for all instances of one kind.
template <typename S>
void run_shape(Job job, const void* x, int64_t x_stride, const W4Plan& plan, bool dependent, const char* name,
               cudaStream_t stream) {
  const W4Weight& w = job.weight;
  job.slabs = static_cast<int32_t>(w4_slabs(w.k));
  job.tiles_m = static_cast<int32_t>(blocks(job.e.m, S::kTokens));
  job.tiles_n = static_cast<int32_t>(blocks(w.n, S::kChannels * S::kCluster));
  if constexpr (S::kManyWarps) set_channels<S>(job);
  const int64_t tiles = int64_t(job.tiles_m) * job.tiles_n;
  if (tiles * job.slabs > 0x7fffffff) throw std::invalid_argument("expected less than 2^31 slabs of work");
  job.clusters = S::kPhases == 1 ? plan.ctas : static_cast<int32_t>(tiles);
  job.tile_group = tile_group<S>(job.clusters);
  job.whole = static_cast<int32_t>(plan.counters > 0 ? whole_tiles(tiles, job.clusters) : tiles);
  const int64_t units = (tiles - job.whole) * job.slabs;
  job.run = static_cast<int32_t>(units / job.clusters), job.longer = static_cast<int32_t>(units % job.clusters);
  if constexpr (S::kBits == 8) {
    job.groups.width = static_cast<int32_t>(packed_rows(w.n));
    job.packed_bytes = S::kChannels * kSlabK;
  } else {
    job.groups = make_group_rows(w, S::kChannels);
    job.slab_bytes = int64_t(w.blocks) * kW4BlockBytes;
    const int64_t groups = (int64_t(w.k) + w.group - 1) / w.group;
    if (groups * job.groups.pitch * job.groups.value_bytes > 0xffffffffll) {
      throw std::invalid_argument("expected less than 4 GiB of scales");
    }
    job.packed_bytes = S::kChannels * S::kCodeBytes + (job.groups.row_bytes << job.groups.row_shift);
    const int row_k = kW4SlabK >> job.groups.row_shift;
    job.rows = static_cast<int32_t>(blocks(w.k, row_k));
    job.group_rows = w.group >= w.k ? job.rows + 1 : w.group / row_k;
  }
  constexpr int kStaticBytes =
      (S::kExchange > 1 ? S::kExchange * 16 : 0) + static_cast<int>(sizeof(Terms<S>)) * S::kGroups;
  constexpr int kMostBytes = 225 * 1024 - kStaticBytes, kHalfBytes = 111 * 1024 - kStaticBytes;
  // Two CTAs do not go to one multiprocessor while another has none: then each gets the memory that keeps others away.
  // It keeps the next kernel's away as well, whose early copies are worth more where tokens are few and it is a product
  // like this one, which finds room on every multiprocessor. Behind anything else, room is where the product before
  // that has ended first, and CTAs that go there in twos take twice the time (Llama 8B's layers on an H200, one token
  // through eight of them: 0.82 ms, alone 0.78).
  const bool behind = S::kFew && last_launch.load(std::memory_order_relaxed) == name;
  const bool alone = S::kPerSm == 1 || (!behind && int64_t(job.clusters) * S::kCluster <= multiprocessors());
  // Each producer has stages of its own, and so has each phase: of two that took turns at one, the next but one slab's
  // could take the last one's parity for its own.
  constexpr int kMultiple = S::kPhases > S::kProducers ? S::kPhases : S::kProducers;
  const int stage_bytes = job.packed_bytes + S::kTokenBytes, room = (alone ? kMostBytes : kHalfBytes) - kAlignment;
  const auto stages_in = [&](int bytes) {
    const int stages = S::kHalves ? S::kHalfStages : std::min(bytes / stage_bytes, kMostStages);
    return stages - stages % kMultiple;
  };
  job.stages = stages_in(room);
  // Phases meet where they had their stages if those would be fewer otherwise (16 tokens by tiles of 32 channels: 8
  // instead of 16).
  if (S::kManyWarps && stages_in(room - S::kMeetingBytes) == job.stages) job.meeting = job.stages * stage_bytes;
  // A kernel over a few rows, which this one waits for, stands in line behind the weights that come early, and is done
  // before all stages are full (the same layers, one token and 8: 0.78 and 0.84 ms, with half of the stages 0.76 and
  // 0.82; 32 layers of multipliers under 8-bit activations: 2.15 and 2.35 ms, 2.05 and 2.23).
  job.ahead = S::kFew && !behind ? (job.stages + 1) / 2 : job.stages;
  job.waits = S::kManyWarps && job.clusters > S::kPerSm * multiprocessors();
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(gemm_kernel<S>), kMostBytes, allowed);
  const int64_t bytes = sizeof(typename S::T);
  // Rows that do not exist take longer to copy than others. What a stage holds in their place goes to tokens that are
  // not stored. The CTAs of a cluster share those of a single tile in whole swizzle atoms.
  job.part = S::kFew || job.tiles_m > 1 ? S::kPart : static_cast<int32_t>(blocks(job.e.m, S::kCluster * 8)) * 8;
  job.box_rows = S::kFew && job.e.m < S::kPart ? job.e.m : job.part;
  const CUtensorMap map =
      byte_matrix_map(x, job.e.m, w.k * bytes, x_stride * bytes, static_cast<uint32_t>(job.box_rows));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(job.clusters * S::kCluster));
  shape.block = dim3(S::kThreads);
  const int bytes_used = job.stages * S::kTokenBytes + (S::kHalves ? S::kCodeStages : job.stages) * job.packed_bytes +
                         (job.meeting > 0 ? S::kMeetingBytes : 0) + kAlignment;
  shape.shared_bytes = static_cast<size_t>(alone ? std::max(bytes_used, kHalfBytes + 4096) : bytes_used);
  shape.cluster_x = S::kCluster;
  shape.dependent = dependent || job.follows;
  launch(gemm_kernel<S>, shape, stream, name, map, job);
}

}  // namespace
}  // namespace qk::cuda
