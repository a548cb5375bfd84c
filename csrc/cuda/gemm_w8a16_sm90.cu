// W8A16 products by wgmma (gemm_w4_sm90.cuh): the instances for 8-bit codes, which lie in the slabs of pairs of w8a8.h.
// Their scales belong to channels, so that the sums of all of K stay with the tensor cores.
#include "run_w4_sm90.cuh"
#include "w8a16.h"

namespace qk::cuda {
namespace {

constexpr char kName[] = "gemm_w8a16_sm90";

// The instance with that tile, if there is one (w8a16_has_tile).
template <typename T, int kTokens, int kPhases = 1>
bool run_if(const GemmW8A16Args& args, const Job& job, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  static_assert(w8a16_has_tile(kTokens, kPhases), "one more");
  if (plan.tokens != kTokens || plan.phases != kPhases) return false;
  constexpr int kCluster = w4_cluster(false, kTokens, kPhases);
  run_shape<Shape<T, kTokens, W4Kind::kZeroPoint, false, kCluster, kPhases, 8>>(job, args.x, args.x_stride, plan,
                                                                                dependent, kName, stream);
  return true;
}

template <typename T>
void run_tile(const GemmW8A16Args& a, const Job& j, const W4Plan& p, bool dependent, cudaStream_t s) {
  const bool found = run_if<T, 8>(a, j, p, dependent, s) || run_if<T, 16>(a, j, p, dependent, s) ||
                     run_if<T, 32>(a, j, p, dependent, s) || run_if<T, 64>(a, j, p, dependent, s) ||
                     run_if<T, 128>(a, j, p, dependent, s) || run_if<T, 192>(a, j, p, dependent, s) ||
                     run_if<T, 256>(a, j, p, dependent, s) || run_if<T, 8, 2>(a, j, p, dependent, s) ||
                     run_if<T, 16, 2>(a, j, p, dependent, s) || run_if<T, 64, 2>(a, j, p, dependent, s) ||
                     run_if<T, 16, 4>(a, j, p, dependent, s) || run_if<T, 32, 4>(a, j, p, dependent, s) ||
                     run_if<T, 8, 8>(a, j, p, dependent, s) || run_if<T, 16, 8>(a, j, p, dependent, s);
  if (!found) throw std::logic_error("a tile of w8a16_has_tile that is not listed here");
}

}  // namespace

void gemm_w8a16_sm90(const GemmW8A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("gemm_w8a16_sm90: " + what); };
  if (!w8a16_has_tile(plan.tokens, plan.phases)) {
    refuse("no instance with " + std::to_string(plan.tokens) + " tokens and " + std::to_string(plan.phases) +
           " phases");
  }
  check_walk(kName, args.k, plan);
  if (plan.counters > 0 && plan.phases > 1) refuse("expected whole tiles, got shared ones");
  Job job = {};
  job.weight.packed = reinterpret_cast<const uint8_t*>(args.packed);
  job.weight.n = args.n, job.weight.k = args.k;
  job.slab_bytes = args.slab_rows * kSlabK;
  job.e = make_store(args.y, args.y_dtype, args.y_stride, args.m, args.n);
  job.e.weight_scale = args.weight_scale, job.e.bias = args.bias;
  job.counters = args.counters, job.partials = args.partials;
  if (args.x_dtype == DType::kBF16) return run_tile<__nv_bfloat16>(args, job, plan, dependent, stream);
  run_tile<__half>(args, job, plan, dependent, stream);
}

}  // namespace qk::cuda
