#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qk {
namespace {

// What the processor has and the operating system saves and restores.
struct Cpu {
  bool avx2 = false, avxvnni = false, avx512vnni = false, amx = false;
  bool avx512bf16 = false;  // AVX512-BF16 and AVX512-VBMI: no tier of its own
  bool intel = false;
};

#if defined(__x86_64__)
constexpr bool bit(unsigned word, int index) { return (word >> index) & 1u; }

// Linux gives a process the 8 KiB of AMX tile state only on request (ARCH_REQ_XCOMP_PERM, feature 18).
bool request_amx_permission() {
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

Cpu detect() {
  Cpu cpu;
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return cpu;
  cpu.intel = b == signature_INTEL_ebx && c == signature_INTEL_ecx && d == signature_INTEL_edx;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  const bool osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29), fma = bit(c, 12);
  if (!osxsave || !avx || !f16c || !fma) return cpu;
  unsigned xcr_low, xcr_high;
  __asm__("xgetbv" : "=a"(xcr_low), "=d"(xcr_high) : "c"(0));
  const bool os_ymm = (xcr_low & 0x6u) == 0x6u;
  const bool os_zmm = (xcr_low & 0xE6u) == 0xE6u;
  const bool os_tiles = bit(xcr_low, 17) && bit(xcr_low, 18);
  unsigned b7, c7, d7;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return cpu;
  unsigned a71 = 0;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  cpu.avx2 = os_ymm && bit(b7, 5);
  cpu.avxvnni = cpu.avx2 && bit(a71, 4);
  const bool avx512 = bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);  // F, DQ, BW, VL
  cpu.avx512vnni = cpu.avx2 && os_zmm && avx512 && bit(c7, 11);
  cpu.avx512bf16 = cpu.avx512vnni && bit(c7, 1) && bit(a71, 5);
  const bool amx = bit(d7, 22) && bit(d7, 24) && bit(d7, 25);  // BF16, TILE, INT8
  cpu.amx = cpu.avx512vnni && os_tiles && amx && request_amx_permission();
  return cpu;
}
#else
Cpu detect() { return Cpu(); }
#endif

const Cpu& cpu() {
  static const Cpu detected = detect();
  return detected;
}

struct Tier {
  const char* name;
  const KernelTable& (*table)();  // nullptr: not compiled into this build
  const WeightOnlyTable& (*weight_only)();
  const AttentionTable& (*attention)();  // nullptr: none
  bool (*supported)(const Cpu&);
};

constexpr Tier kTiers[kMaxTiers] = {
    {"scalar", kernels_scalar, weight_only_scalar, nullptr, [](const Cpu&) { return true; }},
#ifdef QK_HAVE_AVX2
    {"avx2", kernels_avx2, weight_only_avx2, attention_avx2, [](const Cpu& c) { return c.avx2; }},
#else
    {"avx2", nullptr, nullptr, nullptr, nullptr},
#endif
#ifdef QK_HAVE_AVXVNNI
    {"avxvnni", kernels_avxvnni, weight_only_avx2, attention_avx2, [](const Cpu& c) { return c.avxvnni; }},
#else
    {"avxvnni", nullptr, nullptr, nullptr, nullptr},
#endif
#ifdef QK_HAVE_AVX512VNNI
    {"avx512vnni", kernels_avx512vnni, weight_only_avx512, attention_avx512, [](const Cpu& c) { return c.avx512vnni; }},
#else
    {"avx512vnni", nullptr, nullptr, nullptr, nullptr},
#endif
#ifdef QK_HAVE_AMX
    {"amx", kernels_amx, weight_only_avx512, attention_amx, [](const Cpu& c) { return c.amx; }},
#else
    {"amx", nullptr, nullptr, nullptr, nullptr},
#endif
};

bool usable(const Tier& tier) { return tier.table != nullptr && tier.supported(cpu()); }

const KernelTable* active_table = nullptr;
const WeightOnlyTable* active_weight_only = nullptr;
const AttentionTable* active_attention = nullptr;
char active_reason[96] = "";

void set_active(const Tier& tier, const char* reason) {
  active_table = &tier.table();
  active_weight_only = &tier.weight_only();
  active_attention = tier.attention ? &tier.attention() : nullptr;
  std::strncpy(active_reason, reason, sizeof(active_reason) - 1);
}

std::string joined(const TierList& list) {
  std::string text;
  for (int i = 0; i < list.count; ++i) text += std::string(i ? ", " : "") + list.names[i];
  return text;
}

}  // namespace

TierList compiled_tiers() {
  TierList list{};
  for (const Tier& tier : kTiers)
    if (tier.table != nullptr) list.names[list.count++] = tier.name;
  return list;
}

TierList usable_tiers() {
  TierList list{};
  for (const Tier& tier : kTiers)
    if (usable(tier)) list.names[list.count++] = tier.name;
  return list;
}

void force_isa(const char* name, const char* reason) {
  for (const Tier& tier : kTiers) {
    if (std::strcmp(tier.name, name) != 0) continue;
    if (usable(tier)) return set_active(tier, reason);
    std::ostringstream message;
    message << "ISA '" << name << "' " << (tier.table ? "is not supported by this processor" : "is not in this build")
            << "; usable here: " << joined(usable_tiers());
    throw std::invalid_argument(message.str());
  }
  std::ostringstream message;
  message << "unknown ISA '" << name
          << "'; valid names: scalar, avx2, avxvnni, avx512vnni, amx; usable here: " << joined(usable_tiers());
  throw std::invalid_argument(message.str());
}

const KernelTable& kernels() { return *active_table; }

WeightOnlyTables weight_only_tables(const LinearWxA16Args& args) {
#ifdef QK_HAVE_AVX512BF16
  const bool bf16 = args.x_dtype == DType::kBF16 && !args.inv_smooth && !args.codebook;
  if (bf16 && cpu().avx512bf16 && active_weight_only == &weight_only_avx512()) {
    // Intel's vdpbf16ps takes as long as four multiply-adds, which do twice as much.
    const WeightOnlyTable *own = &weight_only_avx512bf16(), *widened = active_weight_only;
    return cpu().intel ? WeightOnlyTables{{widened, own}, 2} : WeightOnlyTables{{own, widened}, 2};
  }
#endif
  (void)args;
  return {{active_weight_only, nullptr}, 1};
}

const WeightOnlyTable& weight_only_kernels(const LinearWxA16Args& args) { return *weight_only_tables(args).tables[0]; }

const AttentionTable* attention_kernels() { return active_attention; }

const char* isa_reason() { return active_reason; }

bool is_intel() { return cpu().intel; }

void init_dispatch() {
  if (const char* wanted = std::getenv("QKERNELS_ISA")) {
    try {
      return force_isa(wanted, "forced by QKERNELS_ISA");
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("QKERNELS_ISA: ") + error.what());
    }
  }
  for (int i = kMaxTiers - 1; i >= 0; --i)
    if (usable(kTiers[i])) return set_active(kTiers[i], "fastest tier that this build and processor share");
}

}  // namespace qk
