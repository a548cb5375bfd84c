// One KernelTable per instruction-set tier, and the only code that chooses between them.
#pragma once

#include "../args.h"

namespace qk {

struct KernelTable {
  const char* isa;
  // Over `count` members, see args.h. Returns the tier that ran: AMX leaves few rows to VNNI.
  const char* (*linear_w8a8)(const LinearW8A8Args* members, int count);
  int64_t (*linear_w8a8_scratch_bytes)(int64_t m, int64_t k, int threads);
  const char* (*linear_w4a8)(const LinearW4A8Args&);
  int64_t (*linear_w4a8_scratch_bytes)(int64_t m, int64_t k, int64_t groups, int threads);
  void (*quantize)(const QuantizeArgs&);
  void (*dequantize)(const DequantizeArgs&);
  void (*embedding)(const EmbeddingArgs&);
  void (*activation)(const ActivationFunctionArgs&);
  void (*norm)(const NormArgs&);
  void (*rotary)(const RotaryArgs&);
};

// The weight-only kernels. They may fuse multiply-adds, so they are compiled apart from the rest, and several tiers
// share one table.
struct WeightOnlyTable {
  const char* suffix;  // "+bf16" for the bf16 dot product; appended to the tier's name
  void (*linear_w8a16)(const LinearWxA16Args&);
  void (*linear_w4a16)(const LinearWxA16Args&);
  int64_t (*scratch_bytes)(int64_t m, int64_t k, int64_t group_size, int threads);  // group_size >= 1
};

// Attention in floating point. Fused multiply-adds here as well; the scalar tier has none and leaves it to torch.
struct AttentionTable {
  void (*attention)(const AttentionArgs&);
  int64_t (*scratch_bytes)(int64_t size, int threads);
  bool few;  // whether it was measured to be worth it for few queries, whose keys it packs all the same
};

// Defined by kernels_<tier>.cpp, for the tiers this build was compiled with.
const KernelTable& kernels_scalar();
const KernelTable& kernels_avx2();
const KernelTable& kernels_avxvnni();
const KernelTable& kernels_avx512vnni();
const KernelTable& kernels_amx();

// Defined by weight_only_<features>.cpp, likewise.
const WeightOnlyTable& weight_only_scalar();
const WeightOnlyTable& weight_only_avx2();
const WeightOnlyTable& weight_only_avx512();
const WeightOnlyTable& weight_only_avx512bf16();

// Defined by attention_<features>.cpp, likewise.
const AttentionTable& attention_avx2();
const AttentionTable& attention_avx512();
const AttentionTable& attention_amx();

constexpr int kMaxTiers = 5;

struct TierList {
  const char* names[kMaxTiers];
  int count;
};

TierList compiled_tiers();  // fastest last
TierList usable_tiers();  // compiled, and the processor and operating system support them

// Forces a tier. Throws std::invalid_argument, listing the valid names, if it is unknown or not usable.
void force_isa(const char* name, const char* reason);

const KernelTable& kernels();  // the tier in use

// Those of that tier that can take the activations, the fastest one here first.
struct WeightOnlyTables {
  const WeightOnlyTable* tables[2];
  int count;
};
WeightOnlyTables weight_only_tables(const LinearWxA16Args& args);
const WeightOnlyTable& weight_only_kernels(const LinearWxA16Args& args);  // the first of these

const AttentionTable* attention_kernels();  // of the tier in use, nullptr: none

const char* isa_reason();  // why this tier

// Whether 512-bit shifts and logic take the two ports of the dot products, as on Intel's processors; AMD's have others.
bool is_intel();

// Reads QKERNELS_ISA; called once when the module loads. Throws as force_isa does.
void init_dispatch();

}  // namespace qk
