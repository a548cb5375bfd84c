#include "pages.h"

#include "../layout.h"
#include "team.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace qk {
namespace {

// The whole huge pages among the `bytes` at `at`, as addresses.
[[maybe_unused]] Range whole_pages(const void* at, int64_t bytes) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(at));
  return {round_up(address, kHugePage), (address + bytes) / kHugePage * kHugePage};
}

#ifdef __linux__
// By its number: headers older than Linux 5.14 have no name for it, and kernels refuse what they do not know.
constexpr int kPopulateWrite = 23;

void advise(Range addresses, int advice) {
  if (addresses.size() > 0)
    madvise(reinterpret_cast<void*>(addresses.begin), static_cast<size_t>(addresses.size()), advice);
}
#endif

}  // namespace

void ask_for_huge_pages([[maybe_unused]] void* at, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  advise(whole_pages(at, bytes), MADV_HUGEPAGE);
#endif
}

void expect_output([[maybe_unused]] void* at, [[maybe_unused]] int64_t bytes, [[maybe_unused]] int threads) {
  constexpr int64_t kFresh = int64_t(32) << 20;
  if (bytes < kFresh) return;
  ask_for_huge_pages(at, bytes);
#ifdef __linux__
  const Range pages = whole_pages(at, bytes);
  parallel_pieces(threads, conversion(pages.size() / kHugePage, kHugePage), [&](Range piece) {
    advise({pages.begin + piece.begin * kHugePage, pages.begin + piece.end * kHugePage}, kPopulateWrite);
  });
#endif
}

}  // namespace qk
