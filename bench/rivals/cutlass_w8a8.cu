// W8A8 by CUTLASS 3 for `qkernels bench --device cuda --cutlass LIBRARY`: int8 activations to scaled bfloat16.
//
// A rival, built only where its headers are (`make cutlass-rival CUTLASS=DIRECTORY`), and no part of the package.
// Tiles, clusters and schedules 0 to 4 are what vLLM's scaled_mm_sm90_int8_dispatch.cuh chooses from; 5 to 7 multiply
// the transposed problem, whose few activation rows then fill narrow instructions, as SGLang does; 8 is CUTLASS's own
// cooperative tile for large products.
#include <cuda_runtime.h>

#include <cstdint>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

struct Operands {
  const int8_t *a, *b;  // (m, k) activations, (n, k) weights
  const float *a_scale, *b_scale;
  cutlass::bfloat16_t* out;
  int m, n, k;
};

template <class Tile, class Cluster, class Schedule, class EpilogueSchedule, bool kSwap>
struct Config {
  using Out = cutlass::bfloat16_t;
  using LayoutOut = conditional_t<kSwap, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  template <class Result, class Left, class Right>
  using Times = fusion::Sm90EVT<
      fusion::Sm90Compute<cutlass::multiplies, Result, float, cutlass::FloatRoundStyle::round_to_nearest>, Left, Right>;
  using OfRows = fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<_1, _0, _0>>;
  using OfColumns = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, _1, _0>>;
  using Scaled = Times<Out, OfRows, Times<float, OfColumns, fusion::Sm90AccFetch>>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, LayoutOut, 8, Out, LayoutOut, 8,
      EpilogueSchedule, Scaled>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
      cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static int run(const Operands& p, cudaStream_t stream) {
    const int rows = kSwap ? p.n : p.m, columns = kSwap ? p.m : p.n;
    const auto a_stride = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, cute::make_shape(rows, p.k, 1));
    const auto b_stride =
        cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, cute::make_shape(columns, p.k, 1));
    const auto d_stride =
        cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, cute::make_shape(rows, columns, 1));
    typename Gemm::Arguments args{cutlass::gemm::GemmUniversalMode::kGemm,
                                  {rows, columns, p.k, 1},
                                  {kSwap ? p.b : p.a, a_stride, kSwap ? p.a : p.b, b_stride},
                                  {{}, nullptr, {}, p.out, d_stride}};
    args.epilogue.thread = {{kSwap ? p.b_scale : p.a_scale}, {{kSwap ? p.a_scale : p.b_scale}, {}, {}}, {}};
    args.hw_info.device_id = 0;
    args.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(0);
    Gemm gemm;
    cutlass::Status status = Gemm::can_implement(args);
    if (status == cutlass::Status::kSuccess && Gemm::get_workspace_size(args) > 0) status = cutlass::Status::kInvalid;
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(args, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    return static_cast<int>(status);
  }
};

using Pingpong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using Specialized = cutlass::gemm::KernelTmaWarpSpecialized;
using Direct = cutlass::epilogue::TmaWarpSpecialized;
using DirectCooperative = cutlass::epilogue::TmaWarpSpecializedCooperative;

using Run = int (*)(const Operands&, cudaStream_t);
constexpr Run kConfigs[] = {
    Config<Shape<_128, _128, _128>, Shape<_2, _1, _1>, Pingpong, Direct, false>::run,
    Config<Shape<_64, _128, _128>, Shape<_2, _1, _1>, Pingpong, Direct, false>::run,
    Config<Shape<_64, _64, _256>, Shape<_1, _1, _1>, Specialized, Direct, false>::run,
    Config<Shape<_64, _128, _256>, Shape<_1, _4, _1>, Specialized, Direct, false>::run,
    Config<Shape<_64, _64, _256>, Shape<_1, _8, _1>, Specialized, Direct, false>::run,
    Config<Shape<_64, _16, _256>, Shape<_1, _1, _1>, Specialized, Direct, true>::run,
    Config<Shape<_64, _32, _256>, Shape<_1, _1, _1>, Specialized, Direct, true>::run,
    Config<Shape<_64, _64, _256>, Shape<_1, _1, _1>, Specialized, Direct, true>::run,
    Config<Shape<_128, _256, _128>, Shape<_2, _1, _1>, Cooperative, DirectCooperative, false>::run,
};
constexpr int kCount = sizeof(kConfigs) / sizeof(kConfigs[0]);

}  // namespace

extern "C" int cutlass_w8a8_configs() { return kCount; }

// The configuration that vLLM takes for m rows and n columns.
extern "C" int cutlass_w8a8_default(int m, int n) {
  if (m <= 32) return n < 8192 ? 4 : 3;
  return m <= 64 ? 2 : m <= 128 ? 1 : 0;
}

// 0, or the status of CUTLASS that says why nothing was launched.
extern "C" int cutlass_w8a8(int config, const int8_t* a, const int8_t* b, const float* a_scale, const float* b_scale,
                            void* out, int m, int n, int k, void* stream) {
  if (config < 0 || config >= kCount) return -1;
  const Operands operands{a, b, a_scale, b_scale, static_cast<cutlass::bfloat16_t*>(out), m, n, k};
  return kConfigs[config](operands, static_cast<cudaStream_t>(stream));
}
