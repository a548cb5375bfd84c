// AVX512-VNNI tier: vpdpbusd on 512-bit registers.
#include "activation_impl.h"
#include "dispatch.h"
#include "linear_w4a8_impl.h"
#include "linear_w8a8_impl.h"
#include "norm_impl.h"
#include "quantize_impl.h"
#include "rotary_impl.h"
#include "tile_avx512vnni.h"

namespace qk {

const KernelTable& kernels_avx512vnni() {
  static constexpr KernelTable table = {"avx512vnni",
                                        linear_w8a8<Avx512Vnni>,
                                        linear_w8a8_scratch_bytes<Avx512Vnni>,
                                        linear_w4a8<Avx512Vnni>,
                                        linear_w4a8_scratch_bytes<Avx512Vnni>,
                                        quantize<Avx512Vnni>,
                                        dequantize<Avx512Vnni>,
                                        embedding<Avx512Vnni>,
                                        activation<Avx512Vnni>,
                                        norm<Avx512Vnni>,
                                        rotary<Avx512Vnni>};
  return table;
}

}  // namespace qk
