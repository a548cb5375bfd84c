// W4A8 products by wgmma (gemm_w4_sm90.cuh): the instances for 8-bit activations, equal to the definition bit for bit.
#include "gemm_w4_sm90.cuh"

namespace qk::cuda {
namespace {

constexpr int kSixteenfoldGroup = 1 << 16;  // 16 * 8 * 127 * 2^16 < 2^31

template <W4Kind kKind, int kTokens, int kPhases = 1>
void run(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  Job job = {};
  job.weight = args.weight;
  job.e = make_store(args.y, args.y_dtype, args.y_stride, args.m, args.weight.n);
  job.e.bias = args.bias, job.e.x_scale = args.x_scale;
  const auto launch_as = [&](auto zeros) {
    constexpr int kCluster = w4_cluster(true, kTokens, kPhases);
    run_shape<Shape<int8_t, kTokens, kKind, decltype(zeros)::value, kCluster, kPhases>>(
        job, args.xq, args.x_stride, plan, dependent, "gemm_w4a8_sm90", stream);
  };
  if constexpr (kKind == W4Kind::kZeroPoint) {
    const bool plain = args.weight.scale_type == ScaleType::kF16 && args.weight.group <= kSixteenfoldGroup;
    if (args.weight.zero_point || !plain) return launch_as(std::true_type());
  }
  launch_as(std::false_type());
}

template <W4Kind kKind, int kTokens>
void run_phases(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  if constexpr (kKind == W4Kind::kZeroPoint) {
    if (plan.phases == 4) return run<kKind, kTokens, 4>(args, plan, dependent, stream);
  }
  run<kKind, kTokens>(args, plan, dependent, stream);
}

template <W4Kind kKind>
void run_tokens(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  switch (plan.tokens) {
    case 8:
      return run_phases<kKind, 8>(args, plan, dependent, stream);
    case 16:
      return run_phases<kKind, 16>(args, plan, dependent, stream);
    case 32:
      return run<kKind, 32>(args, plan, dependent, stream);
    case 64:
      return run<kKind, 64>(args, plan, dependent, stream);
    case 128:
      if constexpr (kKind != W4Kind::kMinimum) return run<kKind, 128>(args, plan, dependent, stream);
      break;
    default:
      break;
  }
  throw std::invalid_argument("gemm_w4a8_sm90: no instance with " + std::to_string(plan.tokens) + " tokens");
}

}  // namespace

void gemm_w4a8_sm90(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  if (args.weight.kind == W4Kind::kMinimum) return run_tokens<W4Kind::kMinimum>(args, plan, dependent, stream);
  return run_tokens<W4Kind::kZeroPoint>(args, plan, dependent, stream);
}

}  // namespace qk::cuda
