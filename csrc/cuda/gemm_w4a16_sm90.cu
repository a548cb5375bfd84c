// W4A16 products by wgmma (gemm_w4_sm90.cuh): the instances for 16-bit activations.
#include "gemm_w4_sm90.cuh"
#include "instances_w4a16.cuh"

namespace qk::cuda {
namespace {

template <typename T, W4Kind kKind, int kTokens, int kPhases = 1>
void run(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  Job job = {};
  job.weight = args.weight;
  job.e = make_store(args.y, args.y_dtype, args.y_stride, args.m, args.weight.n);
  job.e.bias = args.bias;
  job.counters = args.counters, job.partials = args.partials;
  const auto launch_as = [&](auto zeros) {
    constexpr int kCluster = w4_cluster(false, kTokens, kPhases);
    run_shape<Shape<T, kTokens, kKind, decltype(zeros)::value, kCluster, kPhases>>(job, args.x, args.x_stride, plan,
                                                                                   true, "gemm_w4a16_sm90", stream);
  };
  if constexpr (kKind == W4Kind::kZeroPoint) {
    if (args.weight.zero_point || args.weight.scale_type != ScaleType::kF16) return launch_as(std::true_type());
  }
  launch_as(std::false_type());
}

template <typename T, W4Kind kKind, int kTokens>
void run_phases(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  if constexpr (kKind == W4Kind::kZeroPoint) {
    if (plan.phases == 4) return run<T, kKind, kTokens, 4>(args, plan, dependent, stream);
  }
  run<T, kKind, kTokens>(args, plan, dependent, stream);
}

template <typename T, W4Kind kKind>
void run_tokens(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  switch (plan.tokens) {
    case 8:
      return run_phases<T, kKind, 8>(args, plan, dependent, stream);
    case 16:
      return run_phases<T, kKind, 16>(args, plan, dependent, stream);
    case 32:
      return run<T, kKind, 32>(args, plan, dependent, stream);
    case 64:
      return run<T, kKind, 64>(args, plan, dependent, stream);
    case 128:  // the sums of tokens, which minima multiply, find no room
      if constexpr (kKind != W4Kind::kMinimum) return run<T, kKind, 128>(args, plan, dependent, stream);
      break;
    case 256:
      if constexpr (kKind != W4Kind::kMinimum) return run<T, kKind, 256>(args, plan, dependent, stream);
      break;
    default:
      break;
  }
  throw std::invalid_argument("gemm_w4a16_sm90: no instance with " + std::to_string(plan.tokens) + " tokens");
}

}  // namespace

void gemm_w4a16_sm90(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  for_type_and_kind(args, [&](auto type, auto kind) {
    run_tokens<decltype(type), decltype(kind)::value>(args, plan, dependent, stream);
  });
}

}  // namespace qk::cuda
