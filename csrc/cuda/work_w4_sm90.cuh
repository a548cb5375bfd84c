// How gemm_w4_sm90.cuh cuts a product: whole tiles of clusters, runs of slabs that they share, and what is where.
//
// Every cluster takes whole tiles (cluster, cluster + clusters, ...). What is left over, less than two tiles per
// cluster, is dealt out in equal runs of slabs ("stream-K") where K may be split. A run begins with the rest of a tile,
// whose sums are left in memory, and ends with the beginning of another, to which the sums that others have left are
// added in the order of K (share_w4_sm90.cuh). So bits do not depend on timing, and nobody waits for long.
#pragma once

#include "epilogue.cuh"
#include "groups_w4.cuh"
#include "w4.h"

namespace qk::cuda {
namespace {

struct Job {
  W4Weight weight;  // of 8-bit codes: packed, n and k alone; their scales are the epilogue's
  Epilogue e;
  GroupRows groups;
  int64_t slab_bytes;  // from one slab of codes to the next
  int32_t slabs;
  int32_t tiles_m, tiles_n, whole;  // tiles of a cluster; those done whole, the first ones
  int32_t tile_group;  // token tiles walked before the next channels
  int32_t clusters, run, longer;  // shared slabs of a cluster; the first `longer` have one more
  int32_t stages, packed_bytes;  // of a stage: codes, then rows of scales
  int32_t box_rows;  // tokens of a copy; all CTAs of a cluster make one for each slab
  int32_t part;  // tokens from the copy of one CTA to that of the next
  int32_t rows, group_rows;  // of scales, as groups_w4.cuh cuts slabs: of K, of a group
  int32_t* counters;
  float* partials;
  int32_t wide_tiles;  // kManyWarps: those of wide_channels, which come first; the others are of narrow_channels
  int32_t wide_channels, narrow_channels;
  int meeting;  // kManyWarps: bytes from the ring of stages to where phases meet; 0: in it
  int ahead;  // stages whose weights come before the activations are there
  bool waits;  // kManyWarps: not all CTAs run at a time
  bool follows;  // kMultiplier: a kernel that had waited for whatever writes the activations
};

__device__ __forceinline__ int begin_of(const Job& job, int cluster) {
  return cluster * job.run + min(cluster, job.longer);
}
// The cluster that has a shared slab.
__device__ __forceinline__ int owner_of(const Job& job, int unit) {
  const int head = job.longer * (job.run + 1);
  return unit < head ? unit / (job.run + 1) : job.longer + (unit - head) / job.run;
}

// The slabs first ... last - 1 of a tile.
struct Segment {
  int tile = 0, first = 0, last = 0;
};

// The segments of this CTA's cluster, one after the other. What is left to work out again is held by nobody.
template <typename S>
struct Walk {
  int tile, unit;
  // A cluster waits for those behind it (share_w4_sm90.cuh), which therefore have the CTAs that start first. Read anew
  // each time where there is no register to keep it in.
  static __device__ __forceinline__ int cluster(const Job& job) {
    constexpr bool kAnew = (S::kTokens == 256 && S::kOneSum) || (S::kTokens == 16 && S::kCodebook);
    const int number = (kAnew ? ptx::block_x() : static_cast<int>(blockIdx.x)) / S::kCluster;
    return S::kShares ? job.clusters - 1 - number : number;
  }
  static __device__ __forceinline__ int end(const Job& job) { return begin_of(job, cluster(job) + 1); }
  __device__ __forceinline__ explicit Walk(const Job& job) : tile(cluster(job)), unit(begin_of(job, cluster(job))) {}
  __device__ __forceinline__ int slabs(const Job& job) const {
    const int tiles = tile < job.whole ? (job.whole - tile - 1) / job.clusters + 1 : 0;
    return tiles * job.slabs + (S::kShares ? end(job) - unit : 0);
  }
  __device__ __forceinline__ bool next(const Job& job, Segment& s) {
    if (tile < job.whole) {
      s.tile = tile, s.first = 0, s.last = job.slabs;
      tile += job.clusters;
      return true;
    }
    if constexpr (!S::kShares) return false;
    const int stop = end(job);
    if (unit == stop) return false;
    const int shared = unit / job.slabs;
    s.tile = job.whole + shared, s.first = unit - shared * job.slabs;
    s.last = min(job.slabs, s.first + stop - unit);
    unit += s.last - s.first;
    return true;
  }
};

struct Place {
  int m, n;  // tile of tokens, of a cluster's channels
};

// Groups of token tiles are walked before the next channels, so that what runs at one time shares operands; the last
// group may be shorter.
__device__ __forceinline__ Place place_of(const Job& job, int tile) {
  if (job.tiles_m == 1) return Place{0, tile};  // few tokens wait for no division
  const int per_group = job.tile_group * job.tiles_n, group = tile / per_group, first = group * job.tile_group;
  const int rows = min(job.tile_group, job.tiles_m - first), inside = tile - group * per_group;
  return Place{first + inside % rows, inside / rows};
}

// A tile's channels.
struct Channels {
  int first, count;
};

// That of a CTA of kManyWarps, worked out once.
struct OnlyTile {
  int m0;  // its first token
  Channels channels;
  template <typename S>
  static __device__ __forceinline__ OnlyTile of(const Job& job) {
    const Place place = place_of(job, static_cast<int>(blockIdx.x));
    const int wide = min(place.n, job.wide_tiles);
    return {place.m * S::kTokens,
            {wide * job.wide_channels + (place.n - wide) * job.narrow_channels,
             place.n < job.wide_tiles ? job.wide_channels : job.narrow_channels}};
  }
};

}  // namespace
}  // namespace qk::cuda
