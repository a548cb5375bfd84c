// Hints to the system about memory that is about to be written. Where they are not heeded, nothing else changes.
#pragma once

#include <cstdint>

namespace qk {

constexpr int64_t kHugePage = int64_t(2) << 20;

// Asks for huge pages where they fit into the `bytes` at `at`.
void ask_for_huge_pages(void* at, int64_t bytes);

// Has the system clear new pages before a kernel writes `bytes` at `at`, huge ones where they fit, each thread others,
// if they are so many that the allocator takes them from the system anew each time (glibc: 32 MB and more). Left to the
// kernel, whose threads write the same rows at a time, all would wait for one of them to clear a page, which can take
// longer than the product.
void expect_output(void* at, int64_t bytes, int threads);

}  // namespace qk
