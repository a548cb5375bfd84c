// Keys and values of new tokens on their way into a cache of fixed size: what takes five launches by the parts, and no
// more bytes than are copied.
#undef NDEBUG  // the assertion below is what a caller sees of tokens beyond the cache
#include <cassert>

#include "attention.h"
#include "host.h"
#include "launch.h"
#include "ptx.cuh"

namespace qk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 16;  // bytes of a thread

__device__ __forceinline__ int64_t offset_of(const HeadStrides& at, int batch, int head, int64_t token) {
  return batch * at.batch + head * at.head + token * at.token;
}

__global__ void __launch_bounds__(kThreads) append_kernel(const AppendArgs a) {
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const int64_t length = *a.length;
  assert(length >= 0 && length + a.tokens <= a.capacity && "cache: more tokens than it has room for");
  const int key_pieces = a.key_bytes / kPiece, pieces = key_pieces + a.value_bytes / kPiece;
  const int64_t total = int64_t(a.batch) * a.tokens * a.heads * pieces;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < total; at += int64_t(gridDim.x) * kThreads) {
    const int64_t row = at / pieces, token_at = row / a.heads;  // in the order in which a Linear leaves them
    const int piece = static_cast<int>(at % pieces), head = static_cast<int>(row % a.heads);
    const int token = static_cast<int>(token_at % a.tokens), batch = static_cast<int>(token_at / a.tokens);
    const bool is_key = piece < key_pieces;
    const int64_t within = int64_t(is_key ? piece : piece - key_pieces) * kPiece;
    const uint8_t* from = static_cast<const uint8_t*>(is_key ? a.key : a.value) + within +
                          offset_of(is_key ? a.key_at : a.value_at, batch, head, token);
    uint8_t* to = static_cast<uint8_t*>(is_key ? a.keys : a.values) + within +
                  offset_of(is_key ? a.keys_at : a.values_at, batch, head, length + token);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  // The last CTA to have read the length counts the tokens.
  if (gridDim.x > 1) {
    __threadfence();
    if (atomicAdd(a.counter, 1) < static_cast<int>(gridDim.x) - 1) return;
    *a.counter = 0;
  }
  *a.length = length + a.tokens;
}

}  // namespace

void append(const AppendArgs& args, cudaStream_t stream) {
  const int64_t pieces = (int64_t(args.key_bytes) + args.value_bytes) / kPiece;
  const int64_t want = (int64_t(args.batch) * args.tokens * args.heads * pieces + kThreads - 1) / kThreads;
  const int64_t most = int64_t(multiprocessors()) * 8;
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.grid = dim3(static_cast<unsigned>(want < most ? want : most));
  shape.dependent = args.dependent;
  launch(append_kernel, shape, stream, "append", args);
}

}  // namespace qk::cuda
