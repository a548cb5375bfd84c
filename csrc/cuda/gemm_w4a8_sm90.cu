// W4A8 products by wgmma (gemm_w4_sm90.cuh): the instances for 8-bit activations, equal to the definition bit for bit.
#include "run_w4_sm90.cuh"

namespace qk::cuda {
namespace {

constexpr char kName[] = "gemm_w4a8_sm90";
constexpr int kSixteenfoldGroup = 1 << 16;  // 16 * 8 * 127 * 2^16 < 2^31

template <W4Kind kKind, int kTokens, int kPhases>
void run(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  Job job = {};
  job.weight = args.weight;
  job.e = make_store(args.y, args.y_dtype, args.y_stride, args.m, args.weight.n);
  job.e.bias = args.bias, job.e.x_scale = args.x_scale;
  const auto launch_as = [&](auto zeros) {
    constexpr int kCluster = w4_cluster(true, kTokens, kPhases);
    run_shape<Shape<int8_t, kTokens, kKind, decltype(zeros)::value, kCluster, kPhases>>(job, args.xq, args.x_stride,
                                                                                        plan, dependent, kName, stream);
  };
  if constexpr (kKind == W4Kind::kZeroPoint) {
    const bool plain = args.weight.scale_type == ScaleType::kF16 && args.weight.group <= kSixteenfoldGroup;
    if (args.weight.zero_point || !plain) return launch_as(std::true_type());
  }
  launch_as(std::false_type());
}

// The instance with that tile, if there is one (w4_has_tile).
template <W4Kind kKind, int kTokens, int kPhases = 1>
bool run_if(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  if constexpr (w4_has_tile(true, kKind, kTokens, kPhases)) {
    if (plan.tokens != kTokens || plan.phases != kPhases) return false;
    run<kKind, kTokens, kPhases>(args, plan, dependent, stream);
    return true;
  }
  return false;
}

template <W4Kind kKind>
void run_tile(const GemmW4A8Args& a, const W4Plan& p, bool dependent, cudaStream_t s) {
  const bool found = run_if<kKind, 8>(a, p, dependent, s) || run_if<kKind, 16>(a, p, dependent, s) ||
                     run_if<kKind, 32>(a, p, dependent, s) || run_if<kKind, 64>(a, p, dependent, s) ||
                     run_if<kKind, 128>(a, p, dependent, s) || run_if<kKind, 8, 2>(a, p, dependent, s) ||
                     run_if<kKind, 16, 2>(a, p, dependent, s) || run_if<kKind, 8, 4>(a, p, dependent, s) ||
                     run_if<kKind, 8, 8>(a, p, dependent, s) || run_if<kKind, 16, 8>(a, p, dependent, s) ||
                     run_if<kKind, 16, 4>(a, p, dependent, s) || run_if<kKind, 32, 4>(a, p, dependent, s);
  if (!found) throw std::logic_error("a tile of w4_has_tile that is not listed here");
}

}  // namespace

void gemm_w4a8_sm90(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  check_tile(kName, true, args.weight, plan);
  if (args.weight.kind == W4Kind::kMinimum) {
    run_tile<W4Kind::kMinimum>(args, plan, dependent, stream);
  } else {
    run_tile<W4Kind::kZeroPoint>(args, plan, dependent, stream);
  }
}

}  // namespace qk::cuda
