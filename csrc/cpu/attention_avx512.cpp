// Attention of the tiers with 512-bit registers.
#include "attention_vectors.h"
#include "dispatch.h"
#include "verbs_attention_zmm.h"

namespace qk {

const AttentionTable& attention_avx512() {
  static constexpr AttentionTable table = {attention<ZmmAttentionVerbs>, attention_scratch_bytes<ZmmAttentionVerbs>,
                                           false};
  return table;
}

}  // namespace qk
