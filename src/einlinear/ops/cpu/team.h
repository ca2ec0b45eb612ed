// The threads of a call, and the one way to divide work among them.
//
// Every thread runs the same code. A part of it that is divided is a phase: `team.phase` gives each thread its share
// and ends with a barrier, whatever the work does and however it returns. Shares exist in phases only, so no work can
// be divided without the barrier that keeps the next phase from overwriting what another thread still reads. Two rules
// remain. A phase reads from other threads only what earlier phases wrote. Whether a phase is entered depends only on
// what is the same for all threads.
#pragma once

#include <cstdint>

#if !defined(EINLINEAR_THREADS)
// The tests bring other threads, which ThreadSanitizer understands and which check the second rule.

// The OpenMP runtime of torch, by the functions that compilers call in it; kernel_library.py finds them and sets this.
// A runtime of the kernels' own would start as many threads again, and might not be installed.
struct OpenMP {
    void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
    void (*barrier)();
    int (*thread)();
    int (*threads)();
};
extern "C" {
OpenMP einlinear_openmp;
}
#endif

namespace {

#if !defined(EINLINEAR_THREADS)
struct Threads {
    // Call `work` on each thread with its rank and their number. Fewer may run than were asked for.
    template <class Work>
    static void run(int threads, Work work) {
        const OpenMP& openmp = einlinear_openmp;
        if (threads == 1 || !openmp.parallel) return work(0, 1);
        auto run_one = [](void* data) { (*(Work*)data)(einlinear_openmp.thread(), einlinear_openmp.threads()); };
        openmp.parallel(run_one, &work, threads, 0);
    }
    static void barrier() { einlinear_openmp.barrier(); }
    // lives while a thread is in a phase
    struct InPhase {
        explicit InPhase(int) {}
    };
};
#endif

// The part of a phase's work that a thread does: of `count` pieces those from `first` to before `last`.
class Share {
    int rank_, size_;
    Share(int rank, int size) : rank_(rank), size_(size) {}
    friend class Team;

  public:
    static Share whole() { return {0, 1}; }
    int64_t first(int64_t count) const { return count * rank_ / size_; }
    int64_t last(int64_t count) const { return count * (rank_ + 1) / size_; }
};

class Team {
    int rank_, size_;
    Team(int rank, int size) : rank_(rank), size_(size) {}

  public:
    static Team alone() { return {0, 1}; }
    // of this thread, for memory of its own
    int rank() const { return rank_; }
    int size() const { return size_; }

    template <class Work>
    void phase(Work work) const {
        {
            Threads::InPhase inside(size_);
            work(Share(rank_, size_));
        }
        if (size_ > 1) Threads::barrier();
    }

    // Run the work on several threads, each of which gets the team.
    template <class Work>
    static void run(int threads, Work work) {
        Threads::run(threads, [&](int rank, int size) { work(Team(rank, size)); });
    }
};

}  // namespace
