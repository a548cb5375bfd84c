// Attention of the AMX tier: of bf16 by tiles; tiles of more terms a number take longer than vectors of fp32.
#include "attention_tiles.h"
#include "dispatch.h"
#include "verbs_attention_zmm.h"

namespace qk {
namespace {

using Products = TileProducts<ZmmAttentionVerbs>;

void attention_by_dtype(const AttentionArgs& args) {
  if (args.dtype != DType::kBF16) return attention_avx512().attention(args);
  Attention<ZmmAttentionVerbs, DType::kBF16, Products>(args).run();
}

int64_t scratch_bytes(int64_t size, int threads) {
  const int64_t own = attention_thread_bytes<Products>(size) * threads;
  const int64_t vectors = attention_avx512().scratch_bytes(size, threads);
  return own < vectors ? vectors : own;
}

}  // namespace

const AttentionTable& attention_amx() {
  static constexpr AttentionTable table = {attention_by_dtype, scratch_bytes, false};
  return table;
}

}  // namespace qk
