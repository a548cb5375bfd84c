// W4A16 products by wgmma (gemm_w4_sm90.cuh): the instances for 16-bit activations.
#include "run_w4_sm90.cuh"
#include "instances_w4a16.cuh"

namespace qk::cuda {
namespace {

constexpr char kName[] = "gemm_w4a16_sm90";

template <typename T, W4Kind kKind, int kTokens, int kPhases>
void run(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  Job job = {};
  job.weight = args.weight;
  job.e = make_store(args.y, args.y_dtype, args.y_stride, args.m, args.weight.n);
  job.e.bias = args.bias;
  job.counters = args.counters, job.partials = args.partials;
  const auto launch_as = [&](auto zeros, auto one_per_sm) {
    constexpr int kCluster = w4_cluster(false, kTokens, kPhases);
    using S = Shape<T, kTokens, kKind, decltype(zeros)::value, kCluster, kPhases, 4, decltype(one_per_sm)::value>;
    run_shape<S>(job, args.x, args.x_stride, plan, dependent, kName, stream);
  };
  if constexpr (kKind == W4Kind::kZeroPoint) {
    if (args.weight.zero_point || args.weight.scale_type != ScaleType::kF16) {
      return launch_as(std::true_type(), std::false_type());
    }
  }
  if constexpr (kTokens == 8 && kPhases == 4) {  // whose producers are two or four (Shape::kFourProducers)
    const int64_t tiles =
        int64_t(blocks(args.m, kTokens)) * blocks(args.weight.n, w4_channels(false, 4, kTokens, kPhases));
    if (tiles <= multiprocessors()) return launch_as(std::false_type(), std::true_type());
  }
  launch_as(std::false_type(), std::false_type());
}

// The instance with that tile, if there is one (w4_has_tile).
template <typename T, W4Kind kKind, int kTokens, int kPhases = 1>
bool run_if(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  if constexpr (w4_has_tile(false, kKind, kTokens, kPhases)) {
    if (plan.tokens != kTokens || plan.phases != kPhases) return false;
    run<T, kKind, kTokens, kPhases>(args, plan, dependent, stream);
    return true;
  }
  return false;
}

template <typename T, W4Kind kKind>
void run_tile(const GemmW4A16Args& a, const W4Plan& p, bool dependent, cudaStream_t s) {
  const bool found = run_if<T, kKind, 8>(a, p, dependent, s) || run_if<T, kKind, 16>(a, p, dependent, s) ||
                     run_if<T, kKind, 32>(a, p, dependent, s) || run_if<T, kKind, 64>(a, p, dependent, s) ||
                     run_if<T, kKind, 96>(a, p, dependent, s) || run_if<T, kKind, 128>(a, p, dependent, s) ||
                     run_if<T, kKind, 192>(a, p, dependent, s) || run_if<T, kKind, 256>(a, p, dependent, s) ||
                     run_if<T, kKind, 8, 8>(a, p, dependent, s) || run_if<T, kKind, 16, 8>(a, p, dependent, s) ||
                     run_if<T, kKind, 8, 4>(a, p, dependent, s) || run_if<T, kKind, 8, 2>(a, p, dependent, s) ||
                     run_if<T, kKind, 16, 2>(a, p, dependent, s) || run_if<T, kKind, 16, 4>(a, p, dependent, s) ||
                     run_if<T, kKind, 32, 4>(a, p, dependent, s) || run_if<T, kKind, 32, 2>(a, p, dependent, s) ||
                     run_if<T, kKind, 64, 2>(a, p, dependent, s) || run_if<T, kKind, 128, 2>(a, p, dependent, s);
  if (!found) throw std::logic_error("a tile of w4_has_tile that is not listed here");
}

}  // namespace

void gemm_w4a16_sm90(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  check_tile(kName, false, args.weight, plan);
  for_type_and_kind(args, [&](auto type, auto kind) {
    run_tile<decltype(type), decltype(kind)::value>(args, plan, dependent, stream);
  });
}

}  // namespace qk::cuda
