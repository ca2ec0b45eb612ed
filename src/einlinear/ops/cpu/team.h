// The threads of a call, and the one way to divide work among them.
//
// Every thread runs the same code. A part of it that is divided is a phase: `team.phase` gives each thread its share
// and ends with a barrier, whatever the work does and however it returns. Shares exist in phases only, so no work can
// be divided without the barrier that keeps the next phase from overwriting what another thread still reads. Two rules
// remain. A phase reads from other threads only what earlier phases wrote. Whether a phase is entered depends only on
// what is the same for all threads.
#pragma once

#include <cstdint>
// std::thread, which ThreadSanitizer understands; the second rule is then checked
#if defined(EINLINEAR_STD_THREADS)
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace {

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

#if defined(EINLINEAR_STD_THREADS)
class Barrier {
    std::mutex mutex_;
    std::condition_variable all_here_;
    int size_, waiting_ = 0, left_ = 0;
    int64_t round_ = 0;

  public:
    explicit Barrier(int size) : size_(size) {}
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        check(left_ == 0);
        if (++waiting_ == size_) {
            waiting_ = 0, round_++;
            all_here_.notify_all();
        } else
            all_here_.wait(lock, [&, round = round_] { return round_ != round; });
    }
    // A thread that ends before the others still wait for it would leave them waiting for ever.
    void leave() {
        std::unique_lock<std::mutex> lock(mutex_);
        check(waiting_ == 0);
        left_ = (left_ + 1) % size_;
    }
    static void check(bool good) {
        if (good) return;
        std::fputs("a phase was not entered by all threads, or within a phase\n", stderr);
        std::abort();
    }
};
#endif

class Team {
    int rank_, size_;
#if defined(EINLINEAR_STD_THREADS)
    Barrier* barrier_ = nullptr;
    Team(int rank, int size, Barrier* barrier) : rank_(rank), size_(size), barrier_(barrier) {}
    static bool& in_phase() {
        static thread_local bool inside = false;
        return inside;
    }
#endif
    Team(int rank, int size) : rank_(rank), size_(size) {}

    void barrier() const {
#if defined(EINLINEAR_STD_THREADS)
        barrier_->wait();
#elif defined(_OPENMP)
#pragma omp barrier
#endif
    }

  public:
    static Team alone() { return {0, 1}; }
    // of this thread, for memory of its own
    int rank() const { return rank_; }
    int size() const { return size_; }

    template <class Work>
    void phase(Work work) const {
#if defined(EINLINEAR_STD_THREADS)
        bool inside = in_phase();
        if (size_ > 1) Barrier::check(!inside), in_phase() = true;
        work(Share(rank_, size_));
        in_phase() = inside;
#else
        work(Share(rank_, size_));
#endif
        if (size_ > 1) barrier();
    }

    // Run the work on several threads, each of which gets the team. Fewer may run than were asked for.
    template <class Work>
    static void run(int threads, Work work) {
#if defined(EINLINEAR_STD_THREADS)
        Barrier barrier(threads);
        auto as = [&](int rank) {
            work(Team(rank, threads, &barrier));
            barrier.leave();
        };
        std::vector<std::thread> others;
        for (int rank = 1; rank < threads; rank++) others.emplace_back(as, rank);
        as(0);
        for (auto& thread : others) thread.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
        work(Team(omp_get_thread_num(), omp_get_num_threads()));
#else
        (void)threads, work(alone());
#endif
    }
};

}  // namespace
