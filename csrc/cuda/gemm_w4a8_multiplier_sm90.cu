// W4A8 products by wgmma (gemm_w4_sm90.cuh) of weights whose groups have multipliers: equal to those of the 8-bit
// weights multiplier * (q - zero), bit for bit. Integers add up in any order. Zero points of activations cost nothing
// but a correction of the totals (share_w4_sm90.cuh).
#include "run_w4_sm90.cuh"

namespace qk::cuda {
namespace {

constexpr char kName[] = "gemm_w4a8_multiplier_sm90";

constexpr W4Kind kKind = W4Kind::kMultiplier;

// The instance with that tile, if there is one (w4_has_tile).
template <int kTokens, int kPhases = 1>
bool run_if(const GemmW4A8Args& args, const Job& job, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  static_assert(w4_has_tile(true, kKind, kTokens, kPhases), "one more");
  if (plan.tokens != kTokens || plan.phases != kPhases) return false;
  constexpr int kCluster = w4_cluster(true, kTokens, kPhases);
  run_shape<Shape<int8_t, kTokens, kKind, false, kCluster, kPhases>>(job, args.xq, args.x_stride, plan, dependent,
                                                                     kName, stream);
  return true;
}

}  // namespace

void gemm_w4a8_multiplier_sm90(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  check_tile(kName, true, args.weight, plan);
  Job job = {};
  job.weight = args.weight;
  job.e = make_store(args.y, args.y_dtype, args.y_stride, args.m, args.weight.n);
  job.e.bias = args.bias, job.e.x_scale = args.x_scale, job.e.weight_scale = args.weight.channel_scale;
  job.e.x_zero_point = args.x_zero_point, job.e.colsum = args.channel_sum;
  job.follows = args.follows;
  const auto& a = args;
  const bool found = run_if<8>(a, job, plan, dependent, stream) || run_if<16>(a, job, plan, dependent, stream) ||
                     run_if<32>(a, job, plan, dependent, stream) || run_if<64>(a, job, plan, dependent, stream) ||
                     run_if<128>(a, job, plan, dependent, stream) || run_if<192>(a, job, plan, dependent, stream) ||
                     run_if<256>(a, job, plan, dependent, stream) || run_if<8, 2>(a, job, plan, dependent, stream) ||
                     run_if<16, 2>(a, job, plan, dependent, stream) || run_if<32, 2>(a, job, plan, dependent, stream) ||
                     run_if<64, 2>(a, job, plan, dependent, stream) ||
                     run_if<128, 2>(a, job, plan, dependent, stream) || run_if<8, 4>(a, job, plan, dependent, stream) ||
                     run_if<16, 4>(a, job, plan, dependent, stream) || run_if<32, 4>(a, job, plan, dependent, stream) ||
                     run_if<64, 4>(a, job, plan, dependent, stream) || run_if<8, 8>(a, job, plan, dependent, stream) ||
                     run_if<16, 8>(a, job, plan, dependent, stream);
  if (!found) throw std::logic_error("a tile of w4_has_tile that is not listed here");
}

}  // namespace qk::cuda
