// Argument checks that say both values. They throw std::invalid_argument, which Python sees as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

#define QK_CHECK_OP(a, b, op)                                                                                          \
  do {                                                                                                                 \
    if (!((a)op(b))) {                                                                                                 \
      std::ostringstream qk_message;                                                                                   \
      qk_message << "expected " << #a << " " << #op << " " << #b << ", got " << (a) << " and " << (b);                 \
      throw std::invalid_argument(qk_message.str());                                                                   \
    }                                                                                                                  \
  } while (0)

#define QK_CHECK_EQ(a, b) QK_CHECK_OP(a, b, ==)
#define QK_CHECK_LE(a, b) QK_CHECK_OP(a, b, <=)
#define QK_CHECK_GE(a, b) QK_CHECK_OP(a, b, >=)
