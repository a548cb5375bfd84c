// Loops that touch registers only, or memory only: what this machine can do at most with one instruction.
//
// `qkernels bench` divides every measured time by a limit made of these. One LoopTable per tier, as with the kernels,
// and the same rule: nothing in loops_<tier>.cpp may run before the caller knows that the processor has the tier.
#pragma once

#include <cstdint>

namespace qk {

struct LoopTable {
  // Runs `steps` steps of the tier's int8 multiply-accumulate instruction(s) on independent chains.
  void (*int8)(int64_t steps);
  int64_t int8_ops;  // operations (2 per multiply-accumulate) of one step
  // The same with fp32 fused multiply-adds; nullptr where the tier adds no wider one.
  void (*fp32)(int64_t steps);
  int64_t fp32_ops;
  // Sums `bytes` (a multiple of 512, 64-byte aligned) with the tier's widest loads; the sum keeps the loads alive.
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
};

// A step of a loop: an instruction on each of the independent chains c0, c1, ...
#define QK_8_CHAINS(chain)                                                                                             \
  {                                                                                                                    \
    chain(c0);                                                                                                         \
    chain(c1);                                                                                                         \
    chain(c2);                                                                                                         \
    chain(c3);                                                                                                         \
    chain(c4);                                                                                                         \
    chain(c5);                                                                                                         \
    chain(c6);                                                                                                         \
    chain(c7);                                                                                                         \
  }
#define QK_10_CHAINS(chain)                                                                                            \
  {                                                                                                                    \
    QK_8_CHAINS(chain) chain(c8);                                                                                      \
    chain(c9);                                                                                                         \
  }
#define QK_12_CHAINS(chain)                                                                                            \
  {                                                                                                                    \
    QK_10_CHAINS(chain) chain(c10);                                                                                    \
    chain(c11);                                                                                                        \
  }

const LoopTable& loops_scalar();
const LoopTable& loops_avx2();
const LoopTable& loops_avxvnni();
const LoopTable& loops_avx512vnni();
const LoopTable& loops_amx();

// The loops of a tier by name, or nullptr if this build lacks the tier.
const LoopTable* loops_of(const char* tier);

// Seconds in which `threads` threads each run `steps` steps of `loop`.
double time_loop(void (*loop)(int64_t), int64_t steps, int threads);

// Seconds in which `threads` threads together read `bytes` bytes, `passes` times over, each its own contiguous share.
double time_read(const LoopTable& loops, const uint8_t* data, int64_t bytes, int64_t passes, int threads);

}  // namespace qk
