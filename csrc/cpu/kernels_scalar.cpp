// Scalar tier: portable C++, the only one on architectures other than x86-64.
#include "activation_impl.h"
#include "dispatch.h"
#include "linear_w4a8_impl.h"
#include "linear_w8a8_impl.h"
#include "norm_impl.h"
#include "quantize_impl.h"
#include "rotary_impl.h"
#include "verbs_scalar.h"

namespace qk {
namespace {

struct Scalar : ScalarVerbs {
  static constexpr const char* kIsa = "scalar";
  static constexpr int kTileM = 4, kTileN = 64, kOffset = 0, kSliceK = 4096;
  static constexpr int kDepthAlign = 8, kMaxBlockTiles = 16, kDirectRows = 0;
  static constexpr bool kFusesGroups = false, kFinishesTiles = false, kJoinsGroups = true, kSumsAreFloats = false;
  static constexpr int64_t kOwnRows = 48;
  static constexpr int64_t kBlockBytes = 384 << 10;
  static int64_t direct_rows(int64_t /*group*/, bool /*streams*/) { return 0; }
  struct Session {
    Session() {}
  };

  // B: int8_t or uint8_t.
  template <class B>
  static void multiply(int rows, const uint8_t* a, int64_t lda, const B* b, int64_t steps, int32_t* c,
                       bool accumulate) {
    for (int r = 0; r < rows; ++r, a += lda, c += kTileN) {
      int32_t sums[kTileN];
      for (int j = 0; j < kTileN; ++j) sums[j] = accumulate ? c[j] : 0;
      for (int64_t k = 0; k < steps; ++k) {
        const B* bk = b + k * kBlockN * kPackK;
        const int8_t* ak = reinterpret_cast<const int8_t*>(a) + k * kPackK;
        const int32_t a0 = ak[0], a1 = ak[1], a2 = ak[2], a3 = ak[3];
        for (int j = 0; j < kTileN; ++j)
          sums[j] += a0 * bk[4 * j] + a1 * bk[4 * j + 1] + a2 * bk[4 * j + 2] + a3 * bk[4 * j + 3];
      }
      for (int j = 0; j < kTileN; ++j) c[j] = sums[j];
    }
  }

  static void tile(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate,
                   bool /*minus128*/, const Ahead& /*ahead*/) {
    multiply(rows, a, lda, b, steps, c, accumulate);
  }
  static void tile_one(const uint8_t* a, const int8_t* b, int64_t steps, int32_t* c, bool minus128) {
    tile(1, a, 0, b, steps, c, false, minus128, Ahead{});
  }

  static void tile4(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                    bool accumulate, const Ahead& /*ahead*/) {
    multiply(rows, a, lda, reinterpret_cast<const uint8_t*>(b), steps, c, accumulate);
  }
  static void tile4_direct(int, const uint8_t*, int64_t, const uint8_t*, int64_t, int32_t*, const Ahead&) {
  }  // kDirectRows = 0
};

}  // namespace

const KernelTable& kernels_scalar() {
  static constexpr KernelTable table = {"scalar",
                                        linear_w8a8<Scalar>,
                                        linear_w8a8_scratch_bytes<Scalar>,
                                        linear_w4a8<Scalar>,
                                        linear_w4a8_scratch_bytes<Scalar>,
                                        quantize<Scalar>,
                                        dequantize<Scalar>,
                                        embedding<Scalar>,
                                        activation<Scalar>,
                                        norm<Scalar>,
                                        rotary<Scalar>};
  return table;
}

}  // namespace qk
