// Threads for team.h that ThreadSanitizer understands, and that check that every phase is entered by all threads.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#define EINLINEAR_THREADS

namespace {

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

struct Threads {
    static inline thread_local Barrier* current = nullptr;
    static inline thread_local bool in_phase = false;

    template <class Work>
    static void run(int threads, Work work) {
        Barrier shared(threads);
        auto as = [&](int rank) {
            current = &shared;
            work(rank, threads);
            shared.leave();
        };
        std::vector<std::thread> others;
        for (int rank = 1; rank < threads; rank++) others.emplace_back(as, rank);
        as(0);
        for (auto& thread : others) thread.join();
    }
    static void barrier() { current->wait(); }

    struct InPhase {
        bool before = in_phase;
        explicit InPhase(int threads) {
            if (threads > 1) Barrier::check(!before), in_phase = true;
        }
        ~InPhase() { in_phase = before; }
    };
};

}  // namespace
