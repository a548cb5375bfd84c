// Argument checks that say both values. They throw std::invalid_argument, which Python sees as ValueError.
//
// No streams: their locale is process-wide state, and crashes where this module has a libstdc++ of its own beside
// torch's.
#pragma once

#include <stdexcept>
#include <string>

#define QK_CHECK_OP(a, b, op)                                                                                          \
  do {                                                                                                                 \
    if (!((a)op(b))) {                                                                                                 \
      throw std::invalid_argument("expected " #a " " #op " " #b ", got " + std::to_string(a) + " and " +               \
                                  std::to_string(b));                                                                  \
    }                                                                                                                  \
  } while (0)

#define QK_CHECK_EQ(a, b) QK_CHECK_OP(a, b, ==)
#define QK_CHECK_LE(a, b) QK_CHECK_OP(a, b, <=)
#define QK_CHECK_GE(a, b) QK_CHECK_OP(a, b, >=)
