// One inline wrapper per PTX instruction the kernels use. Each names its section of the PTX ISA 8.x manual.
//
// Addresses of shared memory are 32-bit (`smem_u32`). Wrappers that order memory carry a "memory" clobber; pure
// register instructions do not, so the compiler may schedule them. Nothing here knows about matrices or tiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace qk::cuda::ptx {

// Generic pointer to the 32-bit shared-memory window ("Generic Addressing").
__device__ __forceinline__ uint32_t smem_u32(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// `v`, which the compiler then keeps in a register: finding an address or a lane out anew takes tens of cycles.
__device__ __forceinline__ uint32_t keep(uint32_t v) {
  uint32_t r;
  asm volatile("mov.b32 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// ---- Warp level ----------------------------------------------------------------------------------------------------

// "elect.sync": exactly one lane of a converged warp gets true.
__device__ __forceinline__ bool elect_one() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(chosen)::);
  return chosen != 0;
}

// A value that is the same in all lanes, from a shuffle: what the compiler works out of it until a loop begins anew, it
// does in uniform registers, where wgmma takes descriptors from; others it moves there one by one.
__device__ __forceinline__ uint32_t uniform(uint32_t v) { return __shfl_sync(0xffffffffu, v, 0); }

// Within 2 ulp; what is smaller than normal numbers becomes zero.
__device__ __forceinline__ float exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// "max.NaN": the larger one, NaN if either is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// "redux.sync": maximum over the warp of an unsigned value, sm_80 and up.
__device__ __forceinline__ uint32_t warp_max(uint32_t v) {
  uint32_t r;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v));
  return r;
}

// "movmatrix": transposes an 8x8 matrix of 16-bit elements spread over the warp. Lane l holds row l/4, columns
// 2(l%4) and 2(l%4)+1 before, and the same places of the transpose after.
__device__ __forceinline__ uint32_t transpose_8x8_b16(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// "ldmatrix": four 8x8 matrices of 16-bit elements (8 rows of 16 bytes each); lane l gives the address of row l%8 of
// matrix l/8 and receives bytes 4(l%4)..+3 of row l/4 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

// "stmatrix": the inverse of ldmatrix_x4, sm_90 and up.
__device__ __forceinline__ void stmatrix_x4(uint32_t row_address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row_address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// "mma" m16n8k32, s8 x s8 -> s32, sm_80 and up. With g = lane/4, t = lane%4:
//   a[0], a[1]: rows g, g+8, k = 4t..4t+3;  a[2], a[3]: the same rows, k + 16     (A is 16 x 32, row-major)
//   b[0], b[1]: column g, k = 4t..4t+3 and k + 16                                (B is 32 x 8, column-major)
//   d[0], d[1]: row g, columns 2t, 2t+1;  d[2], d[3]: row g+8
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// "mma" m16n8k16, 16-bit floats -> fp32, sm_80 and up. With g = lane/4, t = lane%4:
//   a[0], a[1]: rows g, g+8, k = 2t, 2t+1;  a[2], a[3]: the same rows, k + 8      (A is 16 x 16, row-major)
//   b[0], b[1]: column g, k = 2t, 2t+1 and k + 8                                 (B is 16 x 8, column-major)
//   d as above
__device__ __forceinline__ void mma_16(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_16(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// "lop3": (a & b) | c in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// "lop3": (a & b) ^ c in one instruction; of two constants the compiler makes two.
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// ---- cp.async (sm_80) ----------------------------------------------------------------------------------------------

// "cp.async" 16 bytes, around L1. The first `bytes` (0..16) come from global memory, the rest is written as zero.
__device__ __forceinline__ void cp_async_16(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
// 4 bytes, through L1.
__device__ __forceinline__ void cp_async_4(uint32_t dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are unfinished.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// What other multiprocessors wrote before they released this value is there when it is.
__device__ __forceinline__ int32_t load_acquire(const int32_t* at) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
// Releases, to other multiprocessors, what this thread has written and what it knows others to have.
__device__ __forceinline__ void store_release(int32_t* at, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// ---- mbarrier (sm_90) ----------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
// "fence.mbarrier_init": makes initialised barriers visible to the cluster and to the async proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// "fence.proxy.async": orders this thread's ordinary shared-memory accesses with later asynchronous ones.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same of global memory.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// One arrival at the barrier of the same offset in CTA `rank` of the cluster ("mapa", "mbarrier.arrive"). It releases
// nothing to the other CTAs: an arrival that does is a fence of the whole GPU, hundreds of cycles. Enough for "I have
// read this stage", since those reads are over when wgmma's wait returns.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar),
      "r"(rank)
      : "memory");
}
// The address in CTA `rank` of the cluster of what has `address` here ("mapa"), and the same arrival at such a one: for
// loops, where finding it out anew takes longer than the arrival.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void mbarrier_arrive_there(uint32_t there) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}
// One arrival, and the phase will also wait for `bytes` of asynchronous copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Returns once the phase of the given parity is complete. "mbarrier.try_wait" suspends, so this is no busy loop.
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nQK_WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra QK_DONE_%=;\nbra QK_WAIT_%=;\nQK_DONE_%=:\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// ---- Bulk copies (sm_90) -------------------------------------------------------------------------------------------

// L2 policies as "createpolicy" encodes them: weights are read once, activations by every CTA.
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

// "cp.async.bulk": `bytes` (a multiple of 16) contiguous bytes, global to shared, completing on `bar`.
__device__ __forceinline__ void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}
// The same bytes to the same offset of every CTA in `cta_mask`; each one's own barrier at that offset completes.
__device__ __forceinline__ void bulk_load_multicast(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar,
                                                    uint16_t cta_mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4, %5;" ::"r"(dst),
      "l"(src), "r"(bytes), "r"(bar), "h"(cta_mask), "l"(policy)
      : "memory");
}
// "cp.async.bulk.tensor" 2-D: the box at (c0, c1) of a tensor map, elements outside the tensor as zero.
__device__ __forceinline__ void tensor_load_2d(uint32_t dst, const void* map, int32_t c0, int32_t c1, uint32_t bar,
                                               uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
      "l"(map), "r"(c0), "r"(c1), "r"(bar), "l"(policy)
      : "memory");
}
// The same box to the same offset of every CTA in `cta_mask`, completing on each one's own barrier.
__device__ __forceinline__ void tensor_load_2d_multicast(uint32_t dst, const void* map, int32_t c0, int32_t c1,
                                                         uint32_t bar, uint16_t cta_mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(dst),
      "l"(map), "r"(c0), "r"(c1), "r"(bar), "h"(cta_mask), "l"(policy)
      : "memory");
}
// A box from shared memory to (c0, c1) of a tensor map, elements outside the tensor left out. Shared memory must be as
// fence_proxy_async has made it visible, and stay so until bulk_wait_read says that all stores this thread committed
// have read theirs.
__device__ __forceinline__ void tensor_store_2d(const void* map, int32_t c0, int32_t c1, uint32_t src) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(c0),
               "r"(c1), "r"(src)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// "prefetch.global.L2": asks for the line at `p`. Nothing is read, so it may come before a wait for what writes there.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ __forceinline__ void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- Warpgroup matrix multiply (sm_90a) ----------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// "Shared Memory Matrix Layout", matrix descriptor: K-major operand, 128-byte swizzle, atoms of 8 rows x 128 bytes
// stacked every 1024 bytes. `address` may point 32, 64 or 96 bytes into the atom's first row to advance along K.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kStride = uint64_t(1024 >> 4) << 32, kLeading = uint64_t(1) << 16;
  return kSwizzle128 | kStride | kLeading | ((address & 0x3FFFF) >> 4);
}

// "setmaxnreg": gives back or takes registers, by whole warpgroups, in steps of 8 (24..256). A kernel must be built for
// one CTA size (__launch_bounds__(threads, 1)) or ptxas ignores it.
template <int kCount>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- Barriers, clusters, dependent launches ------------------------------------------------------------------------

// "bar.sync": barrier `id` (1..15; 0 is __syncthreads) over `threads` threads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// "bar.arrive": counts as a thread of the barrier without waiting for the others.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// threadIdx.x and blockIdx.x, read anew where it is written: for code that has no register to keep them in.
__device__ __forceinline__ int thread_x() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
__device__ __forceinline__ int block_x() {
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// "barrier.cluster": the relaxed arrival only says that it got here. (The releasing one is a fence of the whole GPU:
// for what others read from this CTA's shared memory. What goes through mbarriers needs none.)
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Of the shared memory of another CTA of the cluster, at such an address as cluster_address gives
// ("ld.shared::cluster").
__device__ __forceinline__ float2 load_there_2(uint32_t there) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(there) : "memory");
  return v;
}
__device__ __forceinline__ float4 load_there_4(uint32_t there) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
}
// "st.async": 16 bytes to address `address` in CTA `rank`, completing 16 bytes of that CTA's barrier `bar`.
__device__ __forceinline__ void store_async_cluster(uint32_t address, uint32_t bar, uint32_t rank, int32_t x, int32_t y,
                                                    int32_t z, int32_t w) {
  asm volatile(
      "{\n.reg .b32 remote, signal;\nmapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 signal, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [remote], {%3,%4,%5,%6}, [signal];\n}" ::"r"(
          address),
      "r"(bar), "r"(rank), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
__device__ __forceinline__ int4 load_shared(uint32_t address) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t address, int32_t v) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
// "griddepcontrol.wait": returns once the grids this one depends on are complete and their writes visible; at once
// where the launch carries no such attribute.
__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// "griddepcontrol.launch_dependents": lets the next grid of the stream start its preamble.
__device__ __forceinline__ void grid_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace qk::cuda::ptx
