// The only place that knows OpenMP. Everything has internal linkage: this header is compiled once per ISA.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace qk {
namespace {

// Round-to-nearest-even, nothing flushed to zero, whatever the caller's thread had set: results must not depend on
// torch.set_flush_denormal.
class FpEnvironment {
 public:
#if defined(__x86_64__) || defined(_M_X64)
  FpEnvironment() : saved_(_mm_getcsr()) {
    if (saved_ != kDefault) _mm_setcsr(kDefault);
  }
  ~FpEnvironment() {
    if (saved_ != kDefault) _mm_setcsr(saved_);
  }

 private:
  static constexpr unsigned kDefault = 0x1F80;  // all exceptions masked, no FTZ, no DAZ
  unsigned saved_;
#else
  FpEnvironment() {}
  ~FpEnvironment() {}
#endif
};

// Runs body(thread, threads) on up to `threads` threads; the team may be smaller (nested regions).
template <class Body>
void parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      FpEnvironment environment;
      body(omp_get_thread_num(), omp_get_num_threads());
    }
    return;
  }
#endif
  FpEnvironment environment;
  body(0, 1);
}

// How many of `most` threads share work, if `least` of it is worth one: all of them where it is worth two, else one.
// Not a number between: libgomp ends the threads that a smaller team leaves over and begins new ones for the next
// larger one, 70 to 680 us with 16 threads where a region takes 4.
inline int team_for(int64_t work, int64_t least, int most) { return work < 2 * least ? 1 : most; }

// Waits for the whole team; call it from every thread of a parallel body or from none. With a team of one it must
// not bind to an enclosing region of somebody else, so it does nothing.
inline void barrier(int team) {
#ifdef _OPENMP
  if (team > 1) {
#pragma omp barrier
  }
#endif
  (void)team;
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The contiguous share of `count` items that belongs to one thread; shares differ by at most one item.
inline Range share(int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace
}  // namespace qk
